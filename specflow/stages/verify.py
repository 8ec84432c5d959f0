"""Verify: one target pass over all drafts, and a rule that tells how many of them stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TypeAlias, final

from attrs import field, frozen

from specflow.asked import accepts, fits, laws_of, rows_of
from specflow.checks import a, calls, does, is_id, or_none, shown, valid
from specflow.distribution import BlackBox, Categorical, Distribution, PointMass
from specflow.errors import DecodeError
from specflow.processors import Laws, Lazily, Processor
from specflow.random import Randomness, Sampling, draws
from specflow.stages.probabilities import odds_of
from specflow.state import Drafted, Predictor, Proposal, Verified

Judgement: TypeAlias = tuple[int, Distribution | None]
"""How many drafts stand, and the law of the token behind them; None where it is p itself, as behind all of them."""

Rule: TypeAlias = Callable[[Sequence[Proposal], Laws, int], Judgement]
"""(proposals, the laws behind each prefix of them, position of the first) → the judgement. There is one law more.

A rule asks for the law behind a draft only once that draft can stand: laws may be made as they are asked for."""

is_target = valid(or_none(calls("a predictor", "give a function of (tokens, last), such as a CachedPredictor")))
"""None serves where the rule alone is asked, on laws that are already there."""

a_processor = does("a processor", "give a Processor; interop.ProcessorList makes one of transformers' list", "laws")
is_processor = valid(or_none(a_processor))
is_randomness = valid(does("randomness that takes decisions", "give Dice(), or sample-and-match", "draw", "accept"))
is_sampling = valid(does("a source of draws", "give Dice() or SharedNoise(seed)", "draw"))


def judged(drafted: Drafted, target: Predictor, processor: Processor, rule: Rule) -> Verified:
    """One target pass over all drafts, judged by a rule: what every verification stage does.

    `DecodeError` for a draft outside the vocabulary, for logits that are no rows [γ + 1, V], and for a law that is
    none, where the rule asks for it.
    """
    a_draft("drafted", drafted)
    _both(target, processor)
    state, proposals = drafted.state, drafted.proposals
    if not all(map(_is_draft, proposals)):
        raise DecodeError("drafted", "a draft is no proposal of a token id", shown(proposals), "propose plain ints")
    tokens, start = state.tokens + drafted.tokens, len(state.tokens)
    logits = rows_of(target, tokens, len(proposals) + 1)
    vocab_size = logits.shape[1]
    for proposal in proposals:
        if proposal.token >= vocab_size:
            fits(proposal.token, proposal.source, vocab_size)
    given, laws = laws_of(processor, tokens, logits)
    accepted, correction = rule(proposals, laws, start)
    if not is_id(accepted) or accepted > len(proposals):
        happened = f"a rule accepts a number of drafts that is not between 0 and {len(proposals)}"
        raise DecodeError("rule", happened, shown(accepted), "return how many stand, and the law behind them")
    if accepted and accepted == len(proposals) and tokens[-1] in state.request.stop:
        correction = None
    elif correction is None:
        correction = laws[accepted]
    return Verified(drafted, accepted, correction, _made(given, laws), logits)


a_draft = a(Drafted, "put the stages in order: Draft, a verification stage, Adjust, commit, advance")


def _is_draft(value: object) -> bool:
    return isinstance(value, Proposal) and is_id(value.token)


def _both(target: object, processor: object) -> None:
    if target is None or processor is None:
        raise DecodeError("target", "a verification stage has no target or no processor", None, "give both")


def _made(given: Laws, laws: Laws) -> tuple[Distribution, ...]:
    """The laws that there are by now."""
    if isinstance(given, tuple):
        return given
    return tuple(laws.made) if isinstance(laws, Lazily) else ()


@final
@frozen
class RejectTokens:
    """Token rejection: a drawn draft x_i stands iff u_i < p(x_i) / q(x_i) and all before it stand.

    At the first refusal the correction is drawn from norm(max(0, p - q)), behind γ accepted drafts from p. The text
    then has exactly the target's law, and P(accept) = 1 - TV(p, q).

    A certain draft, one whose q is a point mass, is judged by sample-and-match: s ~ p, and it stands iff it is s, else
    s is emitted. That has the same law and the same P(accept) = p(x), and takes one draw for each token that is
    committed and none for any other. So with certain drafters a seed gives one text, that of autoregressive decoding,
    whatever they draft and however far. Where the law of p or q is not known (a user's sampler) the position is judged
    like this too.
    Source: Leviathan et al. 2211.17192, algorithm 1; Chen et al. 2302.01318, algorithm 2. Beyond them: p(x) = 0 is
    always refused, and a residual without mass (p = q) is replaced by p.
    """

    target: Predictor = field(validator=is_target)
    processor: Processor = field(validator=is_processor)
    rng: Randomness = field(validator=is_randomness)

    def __call__(self, drafted: Drafted, /) -> Verified:
        return judged(drafted, self.target, self.processor, self.judge)

    def judge(self, proposals: Sequence[Proposal], laws: Laws, start: int, /) -> Judgement:
        """The rule alone, on laws that are already there."""
        return self.judge_from(0, proposals, laws, start)

    def judge_from(self, first: int, proposals: Sequence[Proposal], laws: Laws, start: int, /) -> Judgement:
        """The rule for the drafts from number `first` on, where all before it stand."""
        while first < len(proposals):
            drawn = isinstance(proposals[first].q, Categorical)
            span = range(first, _end(proposals, first))
            refusal = (self._by_ratio if drawn else self._by_samples)(proposals, laws, start, span)
            if refusal is not None:
                return refusal
            first = span.stop
        return len(proposals), None

    def _by_samples(self, proposals: Sequence[Proposal], laws: Laws, start: int, span: range) -> Judgement | None:
        return by_samples(self.rng, proposals, laws, start, span)

    def _by_ratio(self, proposals: Sequence[Proposal], laws: Laws, start: int, span: range) -> Judgement | None:
        odds = odds_of(proposals, laws, start, span)
        for i in span:
            p, q = laws[i], proposals[i].q
            if isinstance(p, BlackBox) or isinstance(q, BlackBox):
                refusal = by_samples(self.rng, proposals, laws, start, range(i, i + 1))
                if refusal is not None:
                    return refusal
                continue
            likely, drafted = odds(i, p, q)
            if not (likely > 0 and (likely >= drafted or accepts(self.rng, likely / drafted))):
                return i, p.residual(q)
        return None


@final
@frozen
class MatchSamples:
    """Sample-and-match: draw s ~ p at each position and emit it; the draft stands iff it is s.

    Exact whatever the drafts are and however s is drawn, since every emitted token is the target's own sample. For
    point masses it is token rejection; for spread drafts it accepts less often, unless drafter and target share
    their noise: with `SharedNoise` on both sides this is seed-coupled verification, and the text depends on the seed
    alone, not on the drafter. Source: Daliri et al. 2408.07978, section 3.
    """

    target: Predictor = field(validator=is_target)
    processor: Processor = field(validator=is_processor)
    rng: Sampling = field(validator=is_sampling)

    def __call__(self, drafted: Drafted, /) -> Verified:
        return judged(drafted, self.target, self.processor, self.judge)

    def judge(self, proposals: Sequence[Proposal], laws: Laws, start: int, /) -> Judgement:
        """The rule alone, on laws that are already there."""
        refusal = by_samples(self.rng, proposals, laws, start, range(len(proposals)))
        return (len(proposals), None) if refusal is None else refusal


def by_samples(rng: Sampling, proposals: Sequence[Proposal], laws: Laws, start: int, span: range) -> Judgement | None:
    """Sample-and-match for the drafts in `span`, where all before them stand; None if they stand too."""
    with closing(draws(rng, laws, start, span)) as samples:
        for i, sample in zip(span, samples, strict=True):
            if sample != proposals[i].token:
                return i, PointMass(sample)
    return None


def _end(proposals: Sequence[Proposal], first: int) -> int:
    """Where the drafts end that are drawn as the first one is, or are certain as it is."""
    drawn = isinstance(proposals[first].q, Categorical)
    changes = (i for i in range(first, len(proposals)) if isinstance(proposals[i].q, Categorical) is not drawn)
    return next(changes, len(proposals))
