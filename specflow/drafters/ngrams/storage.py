"""The spec's n-gram storages: what followed the last tokens before, most often, will follow them again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from numbers import Integral
from operator import itemgetter
from os import PathLike
from threading import Lock
from typing import ClassVar, Final, final, overload

import torch
from torch import Tensor
from typing_extensions import override

from specflow.drafters.ngrams.counts import Counts
from specflow.drafters.ngrams.file import Header, contradiction, packed, read
from specflow.errors import DecodeError
from specflow.files import write
from specflow.guards.checks import a, named, or_none, shown, whole
from specflow.guards.ids import id_rows, ids_of, plain
from specflow.state import Tokens

_is_list: Final = a(Sequence, "give a list of lists of ids")


class INgramStorage(ABC):
    """The spec's interface. Subclass it, implement the five abstract methods, and your storage drafts as ours do.

    Tensors are batch first: `input_ids` [B, L], `next_tokens` [B, 1 or more]. The drafters and the update stage call
    `continuation` and `learn`, which are written in terms of the other methods; override them to be faster.
    """

    n: int
    vocab_size: int

    def __init__(self, n: int, vocab_size: int) -> None:
        """`n` ≥ 2 is the highest order, `vocab_size`, 1 to 2⁶², the number of tokens there are; else `DecodeError`."""
        whole(2, "use 2 for bigrams, a token after a context of one", most=2**31 - 1)("n", n)
        whole(1, "give the target's vocab_size", most=2**62)("vocab_size", vocab_size)
        self.n = int(n)
        self.vocab_size = int(vocab_size)

    @abstractmethod
    def next_token(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(token, known) for each row; a random token and False where the context is unknown."""

    @abstractmethod
    def has_gram(self, ngram: Tensor) -> bool:
        """Whether this n-gram, a context and the token after it, was seen."""

    @abstractmethod
    def update(self, input_ids: Tensor, next_tokens: Tensor) -> None:
        """Counts each of the row's `next_tokens` once more as what follows that row of `input_ids`."""

    @abstractmethod
    def initialize(self, input_ids: Tensor) -> None:
        """Counts every n-gram of each row."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets everything."""

    def continuation(self, tokens: Tokens) -> Iterator[tuple[int, bool]]:
        """The text that the storage expects after `tokens`, token by token, each with whether it was known.

        `DecodeError` for what holds no ids.
        """
        return self._continued([*ids_of("tokens", tokens)])

    def _continued(self, text: list[int]) -> Iterator[tuple[int, bool]]:
        while True:
            token, known = self._next(text)
            yield token, known
            text.append(token)

    def _next(self, text: list[int]) -> tuple[int, bool]:
        answer: object = self.next_token(torch.tensor([text], dtype=torch.long, device="cpu"))
        match answer:
            case (token, known):
                ids = ids_of("next_token", token if isinstance(token, Tensor) else [token])
                if len(ids) == 1:
                    return ids[0], bool(known)
        happened = "a storage's answer is not a token and a flag"
        raise DecodeError("next_token", happened, shown(answer), "return (token, known)")

    def known(self, tokens: Tokens) -> Iterator[int]:
        """The same text as far as it is known. Override it where a guess that is dropped should not be drawn.

        `DecodeError` for what holds no ids.
        """
        return (token for token, _ in takewhile(itemgetter(1), pairs_of(self, self.continuation(tokens))))

    def learn(self, tokens: Tokens, start: int, followers: Sequence[Sequence[int]]) -> None:
        """Counts each of `followers[i]` once more as what follows the first `start + i` of `tokens`.

        `DecodeError`, with nothing learned, for what holds no ids, and where the text is not as long as that.
        """
        text = ids_of("tokens", tokens)
        _is_list("followers", followers)
        lessons = [ids_of("followers", following) for following in followers]
        _check_reach(len(text), start, len(lessons))
        for end, following in enumerate(lessons, start):
            context = torch.tensor([text[:end]], dtype=torch.long, device="cpu")
            for token in following:
                self.update(context, torch.tensor([[token]], device="cpu"))


def pairs_of(storage: INgramStorage, said: object) -> Iterator[tuple[int, bool]]:
    """What a storage's `continuation` said; `DecodeError` for what is not (token, known)."""
    for pair in said if isinstance(said, Iterable) else [said]:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise no_answer(storage, pair, "yield (token, whether it is known)")
        yield pair


def no_answer(storage: INgramStorage, said: object, remedy: str) -> DecodeError:
    """The error that names a storage that does not say what follows."""
    return DecodeError("storage", f"the storage {named(storage)} says nothing of what follows", shown(said), remedy)


class _CountingStorage(INgramStorage):
    """What the two storages share: all but whether they keep the contexts of n - 1 tokens alone."""

    _alone: ClassVar[bool]

    def __init__(self, n: int, vocab_size: int, *, max_contexts: int | None = None) -> None:
        super().__init__(n, vocab_size)
        or_none(whole(1, "use None for no bound"))("max_contexts", max_contexts)
        self.max_contexts: Final = None if max_contexts is None else int(max_contexts)
        self._counts = Counts(self.max_contexts)
        self._writing: Final = Lock()
        self._shortest: Final = self.n - 1 if self._alone else 1
        self._header: Final = Header(type(self).__name__, self.n, self.vocab_size, self._shortest)
        self._bits: Final = self.vocab_size.bit_length()

    def __len__(self) -> int:
        """How many contexts are kept."""
        return len(self._counts)

    @overload
    def next_token(self, input_ids: Tensor) -> tuple[Tensor, Tensor]: ...
    @overload
    def next_token(self, input_ids: Sequence[int]) -> tuple[int, bool]: ...
    @override
    def next_token(self, input_ids: Tensor | Sequence[int]) -> tuple[Tensor, Tensor] | tuple[int, bool]:
        """(token, known): the most frequent continuation of the longest context that is known.

        Where none is known, a random token, of torch's default generator, and False. Tensors [B, L] give [B, 1] and
        [B, 1], [L] gives [1] and [1], a sequence of ints gives int and bool. O(n), however long the text and however
        large the storage. `DecodeError` for ids outside the vocabulary among the last n - 1; others are not looked at.
        """
        answers = [self._next([*self._checked("input_ids", row)]) for row in _rows("input_ids", input_ids, self.n - 1)]
        if not isinstance(input_ids, Tensor):
            return answers[0]
        shape, device = (*input_ids.shape[:-1], 1), input_ids.device
        tokens = torch.tensor([token for token, _ in answers], dtype=torch.long, device=device)
        known = torch.tensor([known for _, known in answers], dtype=torch.bool, device=device)
        return tokens.reshape(shape), known.reshape(shape)

    @override
    def has_gram(self, ngram: Tensor | Sequence[int]) -> bool:
        """Whether this n-gram, [L], [1, L] or a sequence of ints, was seen: its last token after those before it.

        Of more than n tokens the last n are looked at. False for an order that the storage does not keep, and for what
        it has forgotten. `DecodeError` for ids outside the vocabulary.
        """
        rows = _rows("ngram", ngram, self.n)
        if len(rows) != 1:
            raise DecodeError("ngram", "there is not just one n-gram", f"{len(rows)} rows", "ask for one at a time")
        gram = self._checked("ngram", rows[0])
        contexts = self._contexts(gram, len(gram) - 1)
        return bool(contexts) and self._counts.has(contexts[-1], gram[-1])

    @override
    def update(self, input_ids: Tensor | Sequence[int], next_tokens: Tensor | Sequence[int] | int) -> None:
        """Counts each of `next_tokens` once more as what follows `input_ids`, in every length of context.

        `input_ids` is [B, L] with `next_tokens` [B, 1 or more] or [B], or [L] or a sequence of ints with any number of
        tokens, or one. What `next_token` returned fits. `DecodeError`, with nothing learned, for rows that do not match
        and for ids outside the vocabulary.
        """
        contexts, followers = _rows("input_ids", input_ids, self.n - 1), _rows("next_tokens", next_tokens)
        if len(followers) == 1 and len(followers[0]) == len(contexts):
            followers = [(token,) for token in followers[0]]
        if len(followers) != len(contexts):
            received = f"{len(contexts)} and {len(followers)}"
            raise DecodeError("next_tokens", "contexts and next tokens differ in rows", received, "give a row for each")
        lessons = [
            (self._checked("input_ids", context), self._checked("next_tokens", following))
            for context, following in zip(contexts, followers, strict=True)
        ]
        with self._writing:
            for context, following in lessons:
                self._learn(context, len(context), following)

    @override
    def initialize(self, input_ids: Tensor | Sequence[int]) -> None:
        """Counts every n-gram of each row of [B, L], of [L], or of a sequence of ints.

        It adds to what is known: a text that is given twice counts twice; `reset` first to begin anew. `DecodeError`,
        with nothing learned, for ids outside the vocabulary.
        """
        rows = [self._checked("input_ids", row) for row in _rows("input_ids", input_ids)]
        with self._writing:
            for row in rows:
                for end in range(1, len(row)):
                    self._learn(row, end, row[end : end + 1])

    @override
    def reset(self) -> None:
        with self._writing:
            self._counts = Counts(self.max_contexts)

    @override
    def continuation(self, tokens: Tokens) -> Iterator[tuple[int, bool]]:
        """The text expected after `tokens`, token by token; what holds ids outside the vocabulary is unknown.

        `DecodeError` for what holds no ids.
        """
        return self._continued(self._ending(tokens))

    @override
    def known(self, tokens: Tokens) -> Iterator[int]:
        """The text expected after `tokens`, as far as it is known. Nothing is drawn."""
        return self._remembered(self._ending(tokens))

    def _remembered(self, text: list[int]) -> Iterator[int]:
        while (token := self._best(text)) is not None:
            yield token
            text.append(token)

    @override
    def learn(self, tokens: Tokens, start: int, followers: Sequence[Sequence[int]]) -> None:
        """Counts `followers[i]` after the first `start + i` of `tokens`; leaves out ids outside the vocabulary.

        `DecodeError`, with nothing learned, for what holds no ids, and where the text is not as long as that.
        """
        _is_list("followers", followers)
        lessons = [
            [token for token in plain("followers", _text("followers", following)) if 0 <= token < self.vocab_size]
            for following in followers
        ]
        whole_text = _text("tokens", tokens)
        _check_reach(len(whole_text), start, len(lessons))
        start = int(start)
        skipped = max(0, start - self.n + 1)  # the last n - 1 tokens before each follower are all that is looked at
        text = plain("tokens", whole_text[skipped : start + len(lessons)])
        with self._writing:
            for end, following in enumerate(lessons, start - skipped):
                self._learn(text, end, following)

    def counts(self) -> dict[Tokens, dict[int, int]]:
        """All that is known, for looking at: how often each token was counted after each context."""
        with self._writing:
            return {self._unpacked(key): counted for key, _, counted in self._counts.rows()}

    def save(self, path: str | PathLike[str]) -> None:
        """Writes all that is known to `path`, atomically: a crash leaves the file that was there before.

        The format is in docs/ngram.md. Other threads' updates wait while the content is put together, not while it is
        written.
        """
        with self._writing:
            rows = ((self._unpacked(key), rank, counted) for key, rank, counted in self._counts.rows())
            content = packed(self._header, rows)
        write(path, content)

    def load(self, path: str | PathLike[str]) -> None:
        """Replaces all that is known by what `save` wrote; a storage with a smaller bound keeps the most useful part.

        `DecodeError`, with the storage in hand as it was, for a file that is truncated, corrupted, no storage at all,
        of a newer format, or of a storage with another kind, n or vocabulary.
        """
        counts = Counts(self.max_contexts)
        for context, rank, counted in read(path, self._header):
            key = self._contexts(context, len(context))[-1]
            if counts.best(key) is not None:
                raise contradiction(path)
            counts.put(key, rank, counted)
        with self._writing:
            self._counts = counts

    def _ending(self, tokens: Tokens) -> list[int]:
        """The last n - 1 tokens."""
        return [*plain("tokens", _text("tokens", tokens)[1 - self.n :])]

    @override
    def _next(self, text: list[int]) -> tuple[int, bool]:
        token = self._best(text)
        return (int(torch.randint(self.vocab_size, (), device="cpu")), False) if token is None else (token, True)

    def _best(self, text: Sequence[int]) -> int | None:
        """What followed the longest known context; None where none is known."""
        counts = self._counts
        found = (counts.best(context) for context in reversed(self._contexts(text, len(text))))
        return next((token for token in found if token is not None), None)

    def _learn(self, text: Sequence[int], end: int, following: Sequence[int]) -> None:
        if following:
            for context in self._contexts(text, end):
                self._counts.learn(context, following)

    def _contexts(self, text: Sequence[int], end: int) -> list[int]:
        """The contexts that end before position `end`, the shortest first, each packed into an int.

        The last token takes the lowest `_bits` bits, as token + 1: no context of one length looks like one of another.
        An id outside the vocabulary ends them.
        """
        contexts, key, shift = [], 0, 0
        for position in range(end - 1, max(end - self.n, -1), -1):
            token = text[position]
            if not 0 <= token < self.vocab_size:
                break
            key |= (token + 1) << shift
            shift += self._bits
            contexts.append(key)
        return contexts[self._shortest - 1 :]

    def _unpacked(self, key: int) -> Tokens:
        tokens = []
        while key:
            tokens.append((key & ((1 << self._bits) - 1)) - 1)
            key >>= self._bits
        return tuple(reversed(tokens))

    def _checked(self, name: str, ids: Tokens) -> Tokens:
        for token in ids:
            if not 0 <= token < self.vocab_size:
                happened = f"a token id is outside the vocabulary of {self.vocab_size}"
                raise DecodeError(name, happened, token, "use a storage with the target's vocab_size")
        return ids


@final
class NGramStorage(_CountingStorage):
    """Orders 2 to n: every context of 1 to n - 1 tokens, with back-off from the longest one that is known.

    `n` ≥ 2, `vocab_size` ≥ 1 and `max_contexts` ≥ 1 (None: no bound), else `DecodeError`. Of equally frequent
    continuations the one that reached the count last is drafted.

    >>> storage = NGramStorage(n=3, vocab_size=10)
    >>> storage.initialize([1, 2, 3, 1, 2, 4, 1, 2, 4])
    >>> storage.next_token([1, 2]), storage.next_token([9, 2]), storage.has_gram([1, 2, 3])
    ((4, True), (4, True), True)
    >>> storage.next_token(torch.tensor([[5, 1], [3, 1]]))[0].tolist()
    [[2], [2]]
    """

    _alone = False


@final
class OneLevelNGramStorage(_CountingStorage):
    """Order n alone: contexts of n - 1 tokens, no back-off. Less memory, and unknown sooner.

    >>> storage = OneLevelNGramStorage(n=3, vocab_size=10)
    >>> storage.initialize([1, 2, 3])
    >>> storage.next_token([1, 2]), storage.has_gram([2, 3])
    ((3, True), False)
    """

    _alone = True


def _check_reach(length: int, start: int, lessons: int) -> None:
    """`DecodeError` where lessons from `start` on reach beyond the end of a text of `length` tokens."""
    whole(0, "count from the beginning of the text")("start", start)
    if lessons and start + lessons - 1 > length:
        received = f"{lessons} followers from {start} on in a text of {length}"
        raise DecodeError("start", "there are followers beyond the end of the text", received, "give the whole text")


def _rows(name: str, ids: Tensor | Sequence[int] | int, last: int | None = None) -> list[Tokens]:
    """The rows of [B, L], or the one row of anything smaller; of each row just the last tokens, `last` of them."""
    if isinstance(ids, Tensor) and ids.dim() > 0:
        return [plain(name, row) for row in id_rows(name, ids, last)]
    if isinstance(ids, Integral):
        return [plain(name, [ids])]
    text = _text(name, ids)
    return [plain(name, text if last is None else text[-last:])]


def _text(name: str, ids: object) -> Sequence[int]:
    """What holds the ids of one text; those of a sequence have not been looked at."""
    return ids if isinstance(ids, Sequence) and not isinstance(ids, str | bytes | bytearray) else ids_of(name, ids)
