"""A recorded text in the target's place: its laws are the text itself, its rows those that were kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import Final, final

import torch
from attrs import define, field, frozen
from torch import Tensor

from specflow.asked import rows_of
from specflow.distribution import PointMass
from specflow.errors import DecodeError
from specflow.guards.checks import a, named
from specflow.laws import Lazily
from specflow.prefix import common_prefix
from specflow.replay.rows import Row, names_of, rows_kept, whole
from specflow.stages import ReadsRows, Rows
from specflow.state import Committed, Predictor, Proposal, Tokens, chain

AFTER: Final = 0
"""What is drawn after the end of a text, where nobody looks."""


@final
@frozen
class Known:
    """The processor of a text that is known: after each beginning of it the next token is certain.

    It is asked about drafts only once they stand; `DecodeError` for a rule that asks about another text.
    """

    text: Tokens

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Lazily:
        """The law after each row of `logits` [k, V]; row k - 1 follows all of `tokens`."""
        first, agreed = len(tokens) - len(logits) + 1, common_prefix(tokens, self.text)

        def law(row: int) -> PointMass:
            length = first + row
            if min(length, len(self.text)) > agreed:
                happened = "the rule asks for a law that was not recorded"
                received = f"another text from position {agreed} on"
                raise DecodeError("rule", happened, received, "replay with a rule that asks about drafts that stand")
            return PointMass(self.text[length] if length < len(self.text) else AFTER)

        return Lazily(len(logits), law)


@final
@define(eq=False)
class Memory:
    """The rows that were kept, and those that a live target was asked for meanwhile, which are `new`."""

    known: Mapping[bytes, Row]
    vocab_size: int
    kept: int
    live: Predictor | None
    new: dict[bytes, Row] = field(init=False, factory=dict)

    def blank(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Rows that nobody reads."""
        return torch.full((1, 1), nan, dtype=torch.float32, device="cpu").expand(len(drafts) + 1, self.vocab_size)

    def along(self, text: Tokens) -> Predictor:
        """The rows along a text; others, after drafts that are rejected, are NaN."""
        names = set(names_of(text[:1], chain(text[1:])))

        def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
            return self._rows(tokens, drafts, lambda name: name in names)

        return predict

    def all(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """The rows after the text and after each draft."""
        return self._rows(tokens, drafts, lambda name: True)

    def _rows(self, tokens: Tokens, drafts: Sequence[Proposal], wanted: Callable[[bytes], bool]) -> Tensor:
        names = names_of(tokens, drafts)
        if not all(self._has(name) for name in names if wanted(name)):
            if self.live is None:
                happened = "a stage learns from rows of the target, and one that it reads was not recorded"
                received = f"a draft of {len(drafts)} tokens at position {len(tokens)}"
                remedy = "give the live target, which is asked for it once, or replay without that stage"
                raise DecodeError("live", happened, received, remedy)
            self.new.update(zip(names, rows_kept(rows_of(self.live, tokens, drafts, "live"), self.kept), strict=True))
        nothing = torch.full((self.vocab_size,), nan, dtype=torch.float32, device="cpu")
        return torch.stack([whole(self._row(name), self.vocab_size) if wanted(name) else nothing for name in names])

    def _has(self, name: bytes) -> bool:
        return name in self.known or name in self.new

    def _row(self, name: bytes) -> Row:
        row = self.known.get(name)
        return self.new[name] if row is None else row

    def for_stages(self, stages: Sequence[Callable[[Committed], Committed]], text: Tokens) -> Predictor:
        """The target of a decoder that teaches with these stages: with as many rows as they read.

        `DecodeError` for a stage that looks at more tokens of a row than were kept, or does not say at how many.
        """
        read = [self._read_by(stage) for stage in stages]
        most = max([rows.most for rows in read], default=0)
        if min(most, self.vocab_size) > self.kept:
            happened = f"a stage looks at {most} tokens of a row"
            raise DecodeError("recording", happened, f"{self.kept} that were kept", "record with more")
        if any(rows.most and not rows.along for rows in read):
            return self.all
        return self.along(text) if most else self.blank

    def _read_by(self, stage: Callable[[Committed], Committed]) -> Rows:
        """What a stage says that it reads; of whole rows it may read what it likes."""
        given: object = stage
        if isinstance(given, ReadsRows):
            a(Rows, "return Rows(k)")("rows", given.rows)
            return given.rows
        if self.kept == self.vocab_size:
            return Rows(self.vocab_size)
        happened = f"the stage {named(stage)} does not say how many tokens of a row it looks at"
        received = f"{self.kept} that were kept of {self.vocab_size}"
        raise DecodeError("make", happened, received, "wrap it in Looks(stage, Rows(k)), or record with all kept")
