"""A language model on a device as drafter: it drafts a block of tokens there, and their ids are copied once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

from attrs import field, frozen
from torch import Tensor

from specflow.distribution import BlackBox, Categorical, PointMass
from specflow.errors import DecodeError
from specflow.guards.checks import MOST, a, does, or_none, shown, valid, whole
from specflow.guards.ids import ids_of, text_of
from specflow.processors import LogitsProcessor
from specflow.protocols import Choose, Limits, ReadsAhead
from specflow.randomness import Sampling, q_of
from specflow.state import Proposal, Tokens
from specflow.vocabulary import fit

_reads_ahead = valid(does("a predictor that reads ahead", "give a CachedPredictor", "read_ahead"))
_at_least_one = valid(whole(1, "draft at least one token"))
_size = valid(or_none(whole(1, "give the target's vocabulary, or None", MOST)))
_name = valid(a(str, "give a name"))
_has_a_law = valid(a(LogitsProcessor, "give one whose law is its probabilities, such as MultinomialProcessor(1.0)"))
_draws_there = valid(does("a source of draws", "give Dice() or SharedNoise(seed)", "draw", "draw_there"))


@final
@frozen
class GreedyBlockDrafter:
    """Drafts a model's most probable tokens, `ahead` of them at once, with one copy from the device for all.

    `LLMDrafter` with a `GreedyProcessor` proposes the same and copies each token, so that the device waits for the host
    in between. Here all are drafted before the first is proposed: those that the gamma policy leaves are wasted.
    Sampled decoding is exact with them too, but accepts more of `SampledBlockDrafter`.

    `vocab_size` is the target's vocabulary, None where the drafter has the same. The draft ends where the drafter's
    own limits end, and after one token for a model that is not fed one at a time over its cache. ahead ≥ 1, else
    `DecodeError`.

    >>> import torch
    >>> from specflow.protocols import Limits
    >>> class Counting:  # in real life a CachedPredictor
    ...     limits = Limits(vocab_size=16, context=9)
    ...     def read_ahead(self, tokens, most, choose, /):
    ...         return tuple([int(choose(torch.eye(16)[len(tokens) + i], len(tokens) + i)) for i in range(most)])
    >>> [[draft.token for draft in GreedyBlockDrafter(Counting(), ahead=3)(range(k))] for k in (5, 8)]
    [[5, 6, 7], [8, 9]]
    """

    predictor: ReadsAhead = field(validator=_reads_ahead)
    ahead: int = field(default=5, validator=_at_least_one)
    vocab_size: int | None = field(default=None, validator=_size)
    source: str = field(default="llm", validator=_name)

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        for token, row in _drafted(self, tokens, lambda logits, position: logits.argmax()):
            yield Proposal(token, PointMass(token), source=self.source, logits=row)


@final
@frozen
class SampledBlockDrafter:
    """Drafts samples of a model, `ahead` of them at once, with one copy from the device for all ids.

    The rest is as in `GreedyBlockDrafter`. The laws q that the drafts are drawn from, the processor's probabilities,
    stay on the device; as in `LLMDrafter`, those of `SharedNoise` are for `Match`. A processor's own `sample` is not
    used.

    >>> import torch
    >>> from specflow import Dice, MultinomialProcessor
    >>> class Counting:  # in real life a CachedPredictor
    ...     limits = Limits(vocab_size=16, context=9)
    ...     def read_ahead(self, tokens, most, choose, /):
    ...         return tuple([int(choose(torch.eye(16)[len(tokens) + i], len(tokens) + i)) for i in range(most)])
    >>> drafter = SampledBlockDrafter(Counting(), MultinomialProcessor(0.01), Dice(), ahead=3)
    >>> [(draft.token, draft.q.of(draft.token)) for draft in drafter(range(5))]
    [(5, 1.0), (6, 1.0), (7, 1.0)]
    """

    predictor: ReadsAhead = field(validator=_reads_ahead)
    processor: LogitsProcessor = field(validator=_has_a_law)
    rng: Sampling = field(validator=_draws_there)
    ahead: int = field(default=5, validator=_at_least_one)
    vocab_size: int | None = field(default=None, validator=_size)
    source: str = field(default="llm", validator=_name)

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[Categorical | BlackBox]]:
        laws: list[Categorical | BlackBox] = []

        def choose(logits: Tensor, position: int) -> Tensor:
            law = Categorical(self.processor(logits))
            laws.append(q_of(self.rng, law, position))
            token: object = self.rng.draw_there(law.probs, position)
            if not isinstance(token, Tensor) or token.numel() != 1:
                happened, remedy = "the source of draws gives no token", "return an id [], a tensor"
                raise DecodeError("rng", happened, shown(token), remedy)
            return token

        for (token, row), q in zip(_drafted(self, tokens, choose), laws, strict=True):
            yield Proposal(token, q, source=self.source, logits=row)


def _drafted(
    drafter: GreedyBlockDrafter | SampledBlockDrafter, tokens: Tokens, choose: Choose
) -> Sequence[tuple[int, Tensor]]:
    """Each token of a block, with the logits over the target's vocabulary that it was chosen from."""
    predictor, vocab_size, tokens = drafter.predictor, drafter.vocab_size, text_of(tokens)
    limits = predictor.limits
    a(Limits, "give it limits, as a CachedPredictor has")("predictor", limits)
    if vocab_size is not None and limits.vocab_size is not None and max(ids_of("tokens", tokens)) >= limits.vocab_size:
        return ()
    most = drafter.ahead if limits.context is None else min(drafter.ahead, limits.context - len(tokens) + 1)
    rows: list[Tensor] = []

    def choose_fitted(logits: Tensor, position: int) -> Tensor:
        rows.append(logits if vocab_size is None else fit(logits, vocab_size))
        return choose(rows[-1], position)

    return list(zip(predictor.read_ahead(tokens, most, choose_fitted), rows, strict=True)) if most > 0 else ()
