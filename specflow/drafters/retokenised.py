"""A drafter over another vocabulary, through the text: what it drafts is cut anew into the target's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, final

from attrs import Factory, define, field, frozen

from specflow.asked import proposal_of, stream_of
from specflow.distribution import PointMass
from specflow.guards.checks import a, calls, valid
from specflow.guards.ids import Tokens, text_of
from specflow.state import TEXT, Drafter, Proposal
from specflow.trees import parent_of
from specflow.vocabulary import SharedTokens
from specflow.vocabulary.memo import Readings
from specflow.vocabulary.spelling import whole_characters

PATIENCE: Final = 16
"""How many tokens of the drafter's are waited for until they make up a token of the target's."""

LONG: Final = 256
"""How many bytes without a space are cut into tokens at once."""


@final
@frozen
class Retokenised:
    """Drafts the text that a drafter over another vocabulary goes on with, cut into the target's tokens.

    `drafter` is any drafter over the ids of `shared.drafter`: a model, a storage, a lookup. It reads the text as its
    own tokenizer cuts it; of a tree that it drafts the path of first drafts is written. The drafts are certain, however
    they were found, and so they are verified exactly: a draft stands where it is what the target says.

    What is drafted is cut where it stands, behind the last words of the text, at the byte where the text ends; a token
    is held back until more of the text has come, so that most are whole. Where no cut falls there it is cut alone.
    Where a character is not whole, or where the target writes what the drafter cannot, less is drafted. Both tokenizers
    stay as they are.

    It is a pure function of the text: what it has read of the last few texts is remembered and not read again. Threads
    may share it as far as they may share `drafter`.
    Source: Timor et al. 2502.05202, algorithm 2 (string-level exact match).

    >>> from specflow.vocabulary import Spelling
    >>> pairs = Spelling((b"a", b"b", b"ab"), lambda text: [2] * text.count("ab") + [0] * (text == "a"))
    >>> letters = Spelling((b"a", b"b"), lambda text: ["ab".index(c) for c in text])
    >>> def in_turns(tokens):
    ...     yield from [Proposal((tokens[-1] + i) % 2) for i in range(1, 6)]
    >>> [draft.token for draft in Retokenised(in_turns, SharedTokens(pairs, letters))((2, 2))]
    [2, 2]
    """

    drafter: Drafter = field(validator=valid(calls("a drafter", "give a function of the tokens so far")))
    shared: SharedTokens = field(
        validator=valid(a(SharedTokens, "give SharedTokens(Spelling.of(tokenizer), Spelling.of(other_tokenizer))"))
    )
    source: str = field(default="retokenised", validator=valid(a(str, "name the drafter")))
    _readings: Readings[_Read] = field(
        init=False,
        repr=False,
        eq=False,
        default=Factory(lambda self: Readings(lambda: _Written(self.shared)), takes_self=True),
    )

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        read = self._readings.of(text_of(tokens))
        if not read.ids:
            return
        told: Tokens = ()
        for spelled, is_over in self._spelled(read):
            known = spelled if is_over else spelled[:-1]
            if spelled[: len(told)] != told:  # what was held back was not enough
                return
            for token in known[len(told) :]:
                yield Proposal(token, PointMass(token), source=self.source)
            told = max(told, known, key=len)

    def _spelled(self, read: _Read) -> Iterator[tuple[Tokens, bool]]:
        """The draft in the target's tokens, longer and longer, and whether that is all."""
        written, end, waited, most = b"", TEXT, 0, 0
        spelled: Tokens | None = None
        stream = self.drafter(read.ids)
        for number, value in enumerate(stream_of(self.drafter, stream)):
            proposal = proposal_of(self.drafter, value, None)
            if parent_of(proposal, number) != end:
                continue
            end, waited = number, waited + 1
            text = self.shared.drafter.bytes_of((proposal.token,))
            if proposal.token in self.shared.drafter.special and not self._has(text):
                break
            written += text
            longer = self._cut(read, written)
            if longer is not None and len(longer) > 1:
                spelled = longer
                yield spelled, False
            spelled = longer or spelled
            if spelled is not None and len(spelled) > most:
                most, waited = len(spelled), 0
            if waited >= PATIENCE:
                return
        if spelled is not None:
            yield spelled, True

    def _has(self, special: bytes) -> bool:
        """Whether the target has a special token of this name, too."""
        ids = self.shared.target.after(b"", special)
        return ids is not None and len(ids) == 1 and ids[0] in self.shared.target.special

    def _cut(self, read: _Read, written: bytes) -> Tokens | None:
        """What was written behind the text, in the target's tokens; None where it does not go on with the text."""
        new = written[: whole_characters(written)]
        if not new.startswith(read.begun) or len(new) == len(read.begun):
            return None
        return self.shared.target.after(read.before + read.begun, new[len(read.begun) :])


class _Read(NamedTuple):
    """What is known of a text: the drafter's `ids` for it, its last words, and a character that it has begun."""

    ids: Tokens
    before: bytes
    begun: bytes


@final
@define(eq=False)
class _Written:
    """A reading of a text as the drafter's tokenizer cuts it, piece by piece.

    A piece ends before a space that stands behind something else, or where it is `LONG`: that depends on the bytes up
    to there alone, so pieces stay as they are when the text grows, and each is cut into tokens once.
    """

    shared: SharedTokens
    tokens: list[int] = field(factory=list)
    text: bytearray = field(factory=bytearray)
    ends: list[int] = field(factory=list)  # of the bytes of each token
    cuts: list[int] = field(factory=lambda: [0])  # where pieces begin
    ids: list[int] = field(factory=list)
    counts: list[int] = field(factory=lambda: [0])  # of ids before each cut

    def go_back(self, length: int, /) -> None:
        del self.tokens[length:], self.ends[length:]
        end = self.ends[-1] if self.ends else 0
        del self.text[end:]
        while len(self.cuts) > 1 and self.cuts[-1] >= end:
            del self.cuts[-1], self.counts[-1]
        del self.ids[self.counts[-1] :]

    def go_on(self, new: Tokens, /) -> _Read:
        first = len(self.text)
        for token in new:
            if self.tokens or token not in self.shared.target.begin[:1]:
                self.text += self.shared.target.bytes_of((token,))
            self.tokens.append(token)
            self.ends.append(len(self.text))
        for at in range(max(first, 1), len(self.text)):
            if self._is_cut(at):
                self.ids += self._cut_into_tokens(bytes(self.text[self.cuts[-1] : at]))
                self.cuts.append(at)
                self.counts.append(len(self.ids))
        last = bytes(self.text[self.cuts[-1] :])
        end = whole_characters(last)
        ids = (*self.shared.drafter.begin, *self.ids, *self._cut_into_tokens(last[:end]))
        return _Read(ids, self._before() + last[:end], last[end:])

    def _is_cut(self, at: int) -> bool:
        byte = self.text[at]
        if byte == 0x20:
            return not self.text[at - 1 : at].isspace()
        return at - self.cuts[-1] >= LONG and byte & 0xC0 != 0x80

    def _before(self) -> bytes:
        """The piece before the last."""
        return bytes(self.text[self.cuts[-2] : self.cuts[-1]]) if len(self.cuts) > 1 else b""

    def _cut_into_tokens(self, piece: bytes) -> Tokens:
        drafter = self.shared.drafter
        ids = drafter.after(before, piece) if (before := self._before()) else None
        return drafter.spell(piece.decode(errors="ignore")) if ids is None else ids
