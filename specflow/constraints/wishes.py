"""Plain wishes about a text, each a processor around another: biases, words, lengths, and penalties for repeating.

Each changes the logits, in fp32 at least, and hands them on: law = processor(changed logits). All rows are made at
once, nothing is remembered, and each has a law after any text that leaves one, so they are exact under drafts. The
outermost comes first: `LogitBias(RepetitionPenalty(greedy, 1.2), …)` adds its bias before repeats are punished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf, log
from types import MappingProxyType
from typing import Final, final

import torch
from attrs import field, frozen
from torch import Tensor
from typing_extensions import override

from specflow.asked import laws_of
from specflow.constraints.constraint import ends_of
from specflow.errors import DecodeError
from specflow.guards.checks import MOST, does, is_floats, is_id, number, shown, valid, whole
from specflow.guards.ids import ids_of, text_of
from specflow.laws import Laws
from specflow.processors import MultinomialProcessor, Processor
from specflow.state import Tokens

_is_processor = valid(does("a processor", "give one, such as GreedyProcessor()", "laws"))
_is_begin = valid(whole(0, "give the length of the prompt, or 0 to count it too", MOST))
LARGEST: Final = 1e30
"""What is added to logits is no larger: in fp32 there is nothing beyond 3.4e38, and the model would be blamed."""

_is_penalty = valid(
    number(
        "a penalty is not a number between -1e30 and 1e30",
        "give a number such as 0.5; 0 changes nothing",
        lambda penalty: abs(penalty) <= LARGEST,
    )
)


def _biases(given: object) -> Mapping[int, float]:
    remedy = "give a mapping of ids to numbers, such as {5: -1.0}"
    if not isinstance(given, Mapping):
        raise DecodeError("bias", "a bias is not a mapping", shown(given), remedy)
    for token, bias in given.items():
        if not is_id(token):
            raise DecodeError("bias", "a bias is of what is no token id", shown(token), remedy)
        number("a bias is not a number up to 1e30", remedy, lambda value: value <= LARGEST)("bias", bias)
    return MappingProxyType({int(token): float(bias) for token, bias in given.items()})


def _words(given: object) -> tuple[Tokens, ...]:
    remedy = "give the ids of each, such as [(5, 6), (7,)]"
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise DecodeError("words", "words are not several rows of ids", shown(given), remedy)
    words = tuple([ids_of("words", word) for word in given])
    if not all(words) or any(token < 0 for word in words for token in word):
        raise DecodeError("words", "a word is empty, or no ids", shown(given), remedy)
    return words


@final
@frozen(eq=False)
class LogitBias:
    """Adds a number to the logits of some tokens: -∞ forbids one, and more than 1e30 is refused.

    >>> from specflow import GreedyProcessor
    >>> LogitBias(GreedyProcessor(), {1: -2.0}).laws((0,), torch.tensor([[0.0, 1.0]]))
    (PointMass(token=0),)
    """

    processor: Processor = field(validator=_is_processor)
    bias: Mapping[int, float] = field(converter=_biases)

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Laws:
        """The law after each row of `logits` [k, V]; row k - 1 follows all of `tokens`."""
        text, scores = _asked(tokens, logits)
        ids = [token for token in self.bias if token < scores.shape[1]]
        scores[:, ids] += torch.tensor([self.bias[token] for token in ids], dtype=scores.dtype, device=scores.device)
        return laws_of(self.processor, text, scores)


@final
@frozen(eq=False)
class BannedWords:
    """Forbids words, each the ids of a text: the last token of one may not come where the others stand before it.

    As transformers' `NoBadWordsLogitsProcessor` has it. A word that begins a line and one in a sentence are other ids.

    >>> from specflow import GreedyProcessor
    >>> BannedWords(GreedyProcessor(), [(0, 1)]).laws((2, 0), torch.tensor([[0.0, 3.0, 0.0], [0.0, 3.0, 2.0]]))
    (PointMass(token=1), PointMass(token=2))
    """

    processor: Processor = field(validator=_is_processor)
    words: tuple[Tokens, ...] = field(converter=_words)

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Laws:
        """The law after each row of `logits` [k, V]; row k - 1 follows all of `tokens`."""
        text, scores = _asked(tokens, logits)
        for row, end in _ends(text, scores):
            banned = [
                word[-1]
                for word in self.words
                if len(word) <= end + 1 and text[end + 1 - len(word) : end] == word[:-1] and word[-1] < scores.shape[1]
            ]
            scores[row, banned] = -inf
        return laws_of(self.processor, text, scores)


@final
@frozen(eq=False)
class RequiredWords:
    """Forbids the end of the text until all words have come after position `begins`, such as the prompt's end.

    It makes a text wait for them, and does not make the model say them.

    >>> from specflow import GreedyProcessor
    >>> required = RequiredWords(GreedyProcessor(), [(0, 1)], stop=(2,), begins=1)
    >>> required.laws((2, 0, 1), torch.tensor([[0.0, 1.0, 2.0]] * 3))
    (PointMass(token=1), PointMass(token=1), PointMass(token=2))
    """

    processor: Processor = field(validator=_is_processor)
    words: tuple[Tokens, ...] = field(converter=_words)
    stop: frozenset[int] = field(converter=ends_of)
    begins: int = field(default=0, validator=_is_begin)

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Laws:
        """The law after each row of `logits` [k, V]; row k - 1 follows all of `tokens`."""
        text, scores = _asked(tokens, logits)
        ready = max((_end_of(word, text, self.begins) for word in self.words), default=0)
        return laws_of(self.processor, text, _without_end(text, scores, self.stop, ready))


@final
@frozen(eq=False)
class MinLength:
    """Forbids the end of the text before `least` tokens after position `begins`, such as the prompt's end.

    >>> from specflow import GreedyProcessor
    >>> long = MinLength(GreedyProcessor(), 1, stop=(1,), begins=1)
    >>> long.laws((0, 0), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    (PointMass(token=0), PointMass(token=1))
    """

    processor: Processor = field(validator=_is_processor)
    least: int = field(validator=valid(whole(0, "give a number of tokens", MOST)))
    stop: frozenset[int] = field(converter=ends_of)
    begins: int = field(default=0, validator=_is_begin)

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Laws:
        """The law after each row of `logits` [k, V]; row k - 1 follows all of `tokens`."""
        text, scores = _asked(tokens, logits)
        return laws_of(self.processor, text, _without_end(text, scores, self.stop, self.begins + self.least))


@final
class MinPProcessor(MultinomialProcessor):
    """Sampling from the tokens that are at least min_p times as likely as the likeliest, at this temperature.

    0 ≤ min_p ≤ 1, else `DecodeError`. Source: Nguyen et al. 2407.01082.

    >>> MinPProcessor(1.0, min_p=0.5)(torch.tensor([0.5, 0.3, 0.2]).log())
    tensor([0.6250, 0.3750, 0.0000])
    """

    def __init__(self, temperature: float, min_p: float) -> None:
        super().__init__(temperature)
        _MIN_P("min_p", min_p)
        self.min_p = float(min_p)

    @override
    def _process(self, logits: Tensor) -> Tensor:
        if self.min_p == 0.0:
            return logits
        least = logits.amax(dim=-1, keepdim=True) + log(self.min_p) * self.temperature
        return logits.masked_fill(logits < least, -inf)


_MIN_P: Final = number("min_p is outside [0, 1]", "use 0.0 to keep every token", lambda min_p: 0 <= min_p <= 1)


@final
@frozen(eq=False)
class RepetitionPenalty:
    """Makes what stands after position `begins` less likely: its logits are divided by `penalty`, multiplied if < 0.

    1e-30 ≤ penalty ≤ 1e30; above 1 it punishes. As transformers' `RepetitionPenaltyLogitsProcessor` has it, which
    begins at 0. Source: Keskar et al. 1909.05858.

    >>> from specflow import GreedyProcessor
    >>> RepetitionPenalty(GreedyProcessor(), 2.0).laws((1,), torch.tensor([[2.0, 3.0]]))
    (PointMass(token=0),)
    """

    processor: Processor = field(validator=_is_processor)
    penalty: float = field(
        validator=valid(
            number(
                "penalty is not a number between 1e-30 and 1e30",
                "use 1.0 for none",
                lambda penalty: 1e-30 <= penalty <= LARGEST,
            )
        )
    )
    begins: int = field(default=0, validator=_is_begin)

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Laws:
        """The law after each row of `logits` [k, V]; row k - 1 follows all of `tokens`."""
        text, scores = _asked(tokens, logits)
        punished = torch.where(scores < 0, scores * float(self.penalty), scores / float(self.penalty))
        return laws_of(self.processor, text, torch.where(_counts(text, scores, self.begins) > 0, punished, scores))


@final
@frozen(eq=False)
class FrequencyPenalty:
    """Takes `penalty` from a token's logit for each time that it stands after position `begins`.

    >>> from specflow import GreedyProcessor
    >>> FrequencyPenalty(GreedyProcessor(), 1.0).laws((1, 1), torch.tensor([[0.0, 1.5], [0.0, 1.5]]))
    (PointMass(token=1), PointMass(token=0))
    """

    processor: Processor = field(validator=_is_processor)
    penalty: float = field(validator=_is_penalty)
    begins: int = field(default=0, validator=_is_begin)

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Laws:
        """The law after each row of `logits` [k, V]; row k - 1 follows all of `tokens`."""
        text, scores = _asked(tokens, logits)
        said = _counts(text, scores, self.begins).to(scores.dtype)
        return laws_of(self.processor, text, scores - float(self.penalty) * said)


@final
@frozen(eq=False)
class PresencePenalty:
    """Takes `penalty` from a token's logit where it stands after position `begins`, however often.

    >>> from specflow import GreedyProcessor
    >>> PresencePenalty(GreedyProcessor(), 1.0).laws((1, 1), torch.tensor([[0.0, 1.5], [0.0, 1.5]]))
    (PointMass(token=1), PointMass(token=1))
    """

    processor: Processor = field(validator=_is_processor)
    penalty: float = field(validator=_is_penalty)
    begins: int = field(default=0, validator=_is_begin)

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Laws:
        """The law after each row of `logits` [k, V]; row k - 1 follows all of `tokens`."""
        text, scores = _asked(tokens, logits)
        said = (_counts(text, scores, self.begins) > 0).to(scores.dtype)
        return laws_of(self.processor, text, scores - float(self.penalty) * said)


@final
@frozen(eq=False)
class NoRepeatNGram:
    """No n tokens in a row come twice. As transformers' `NoRepeatNGramLogitsProcessor` has it. n ≥ 1.

    >>> from specflow import GreedyProcessor
    >>> NoRepeatNGram(GreedyProcessor(), 2).laws((0, 1, 0), torch.tensor([[0.0, 1.0]]))
    (PointMass(token=0),)
    """

    processor: Processor = field(validator=_is_processor)
    n: int = field(validator=valid(whole(1, "give the length of what may not repeat", MOST)))

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Laws:
        """The law after each row of `logits` [k, V]; row k - 1 follows all of `tokens`."""
        text, scores = _asked(tokens, logits)
        followed: dict[Tokens, list[int]] = {}
        known = self.n - 1
        for row, end in _ends(text, scores):
            for at in range(known if row == 0 else end - 1, end):
                if at >= known and text[at] < scores.shape[1]:
                    followed.setdefault(text[at - known : at], []).append(text[at])
            if end >= known:
                scores[row, followed.get(text[end - known : end], [])] = -inf
        return laws_of(self.processor, text, scores)


def _asked(tokens: object, logits: object) -> tuple[Tokens, Tensor]:
    """The text, and a copy of the rows of logits that can be changed.

    In fp32 at least, as transformers has it: 16 bits would round what is added to them, or it would be beyond them.
    """
    text = ids_of("tokens", text_of(tokens))
    if not is_floats(logits) or logits.ndim != 2 or not 0 < len(logits) <= len(text) or logits.shape[1] == 0:
        received = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else shown(logits)
        happened = f"logits are not rows after the prefixes of a text of {len(text)} tokens"
        raise DecodeError("logits", happened, received, "give logits [k, V], a row for each of the last k prefixes")
    return text, logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)


def _ends(text: Tokens, scores: Tensor) -> Iterable[tuple[int, int]]:
    """(row, length of the prefix that it follows) of each row, in order."""
    return enumerate(range(len(text) - len(scores) + 1, len(text) + 1))


def _counts(text: Tokens, scores: Tensor, begins: int) -> Tensor:
    """How often each token stands after position `begins` of the prefix of each row, [k, V]."""
    rows, vocab_size = scores.shape
    first = len(text) - rows + 1
    # Whole numbers: in 16 bits counting one by one stops at 256, and the law would depend on where counting began.
    counts = torch.zeros(rows, vocab_size, dtype=torch.long, device="cpu")
    before = [token for token in text[begins:first] if 0 <= token < vocab_size]
    counts[0] = torch.bincount(torch.tensor(before, dtype=torch.long, device="cpu"), minlength=vocab_size)
    for row in range(1, rows):
        counts[row] = counts[row - 1]
        at = first + row - 1
        if at >= begins and 0 <= text[at] < vocab_size:
            counts[row, text[at]] += 1
    return counts.to(scores.device)


def _without_end(text: Tokens, scores: Tensor, stop: frozenset[int], ready: float) -> Tensor:
    """Without the tokens of `stop` in the rows whose prefixes are shorter than `ready`."""
    ends = [token for token in stop if token < scores.shape[1]]
    early = [row for row, end in _ends(text, scores) if end < ready]
    rows, columns = (torch.tensor(each, dtype=torch.long, device="cpu") for each in (early, ends))
    scores[rows[:, None], columns[None, :]] = -inf
    return scores


def _end_of(word: Tokens, text: Tokens, begins: int) -> float:
    """How much of the text it takes to hold a word after position `begins`; ∞ where it does not."""
    starts = range(begins, len(text) - len(word) + 1)
    return next((start + len(word) for start in starts if text[start : start + len(word)] == word), inf)
