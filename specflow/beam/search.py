"""Beam search in the shape of the other decoders: Beams → Expanded → Selected → Beams | Finished."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite
from typing import Final, TypeAlias, final

import torch
import torch.nn.functional as F
from attrs import field, frozen
from returns.functions import tap
from torch import Tensor

from specflow.asked import looked_at
from specflow.errors import DecodeError
from specflow.guards.checks import a, calls, each, number, or_none, valid, whole
from specflow.state import DecodeState, Finished, Reason, Record, Request, Tally, Tokens

TOP_K: Final = 3
"""How many tokens may follow a beam unless that is asked for: all of them where there are fewer."""

BeamPredictor: TypeAlias = Callable[[tuple[Tokens, ...]], Tensor]
"""B texts of one length → logits [B, V] of what follows each. A pure function of tokens."""


@final
@frozen
class Beam:
    """What stands after the prompt, and its log-probability in nats, which is 0 or less."""

    output: Tokens = ()
    log_prob: float = 0.0


_is_beam = a(Beam, "give a Beam, such as Beam()")
_is_request = a(Request, "give the request of a state, such as start(prompt, 32).unwrap().request")
_has_length = whole(1, "give a number of new tokens")
_is_min_length = number(
    "min_length is not a finite number above -1", "use 5.0, as the GNMT paper does", lambda value: -1 < value < inf
)


@final
@frozen
class Beams(Record):
    """Between two steps: the live beams, all of one length and best first, and the best text that has ended.

    `Beams(request)` is where a search starts.
    """

    request: Request = field(validator=valid(_is_request))
    live: tuple[Beam, ...] = field(default=(Beam(),), validator=valid(each(_is_beam)))
    ended: Beam | None = field(default=None, validator=valid(or_none(_is_beam)))
    steps: int = field(default=0, validator=valid(whole(0, "give the number of steps so far")))


@final
@frozen
class Expanded(Record):
    """The branches of all live beams, each one token longer than its beam, most probable first."""

    beams: Beams
    branches: tuple[Beam, ...]


@final
@frozen
class Selected(Record):
    """A round as it will stand: the beams after it, and whether the best text that has ended is the result."""

    expanded: Expanded
    beams: Beams
    is_over: bool


BeamStep: TypeAlias = Callable[[Beams], Beams | Finished]
"""One round of beam search: it makes the live texts one token longer."""

BeamObserver: TypeAlias = Callable[[Selected], object]
"""Looks at a round of beam search that is about to stand."""


@final
@frozen
class LengthPenalty:
    """The score of a text Y: log P(Y) / ((min_length + |Y|) / (min_length + 1))^alpha, with |Y| all its new tokens.

    alpha = 0 ranks by log P(Y) alone, alpha > 0 favours longer texts, alpha < 0 shorter ones. min_length > -1 and both
    finite, else `DecodeError`. With min_length = 0 it is the `length_penalty` of transformers.
    Source: Wu et al. 1609.08144, section 7, with min_length = 5.

    >>> score = LengthPenalty(min_length=5.0, alpha=1.0).score
    >>> score(Beam((4,), -1.5)), score(Beam((4, 4, 4, 4, 4, 4, 4), -3.0))
    (-1.5, -1.5)
    """

    min_length: float = field(default=5.0, validator=valid(_is_min_length))
    alpha: float = field(
        default=1.2, validator=valid(number("alpha is not finite", "use 0.0 for no length penalty", isfinite))
    )

    def of(self, length: int) -> float:
        """The penalty of `length` ≥ 1 new tokens, 1 for one of them. `DecodeError` where no positive float holds it."""
        _has_length("length", length)
        try:
            shortest, alpha = float(self.min_length), float(self.alpha)  # numpy's overflow to ∞
            penalty: float = ((shortest + length) / (shortest + 1)) ** alpha
        except OverflowError:
            penalty = 0.0
        if penalty == 0.0:
            happened = f"the length penalty of {length} tokens is beyond floats"
            raise DecodeError("alpha", happened, self.alpha, "give an alpha nearer to 0")
        return penalty

    def score(self, beam: Beam) -> float:
        """What beam search maximises."""
        _is_beam("beam", beam)
        return beam.log_prob / self.of(len(beam.output))

    def best(self, beam: Beam, limit: int) -> float:
        """The highest score with which a live beam can still end, one token longer or at `limit` new tokens at most.

        Its log-probability can only fall, and the penalty is monotone in the length, so greatest at one of the ends.
        """
        _is_beam("beam", beam)
        return beam.log_prob / max(self.of(len(beam.output) + 1), self.of(limit))


_at_least_one = valid(whole(1, "use 1 for greedy decoding"))


@final
@frozen
class Expand:
    """Each live beam with each of its `top_k` most probable next tokens: log P(Y·x) = log P(Y) + log p(x | Y).

    Ties go to the better beam, then to the lower token id, as in greedy decoding. Impossible tokens make no branch.
    `DecodeError` where `top_k` is more than the vocabulary and more than 3.
    """

    predict: BeamPredictor = field(
        validator=valid(calls("a predictor of beams", "give a CachedBeamPredictor of the model"))
    )
    top_k: int = field(validator=_at_least_one)

    def __call__(self, beams: Beams, /) -> Expanded:
        if not beams.live:
            raise DecodeError("live", "there is no live beam", "no beams", "begin with Beams(request)")
        texts = tuple([beams.request.prompt + beam.output for beam in beams.live])
        logits = looked_at(self.predict(texts), len(texts), self.predict, len(texts[0]), "model")
        refuse_beyond(self.top_k, logits.shape[-1])
        branches = [
            Beam((*beam.output, token), beam.log_prob + log_prob)
            for beam, row in zip(beams.live, logits, strict=True)
            for token, log_prob in _most_probable(row, self.top_k)
        ]
        return Expanded(beams, tuple(sorted(branches, key=lambda branch: -branch.log_prob)))


@final
@frozen
class Select:
    """Keeps the `num_beams` most probable branches that go on, and of those that ended the one with the best score.

    A branch ends with a stop token or at the limit. It counts if it is among the `num_beams` most probable branches;
    the live ones after it move up. The search is over when no live beam is left, or when none can end with a higher
    score than the best ended text has (`LengthPenalty.best`), so that going on would not change the result.
    """

    num_beams: int = field(validator=_at_least_one)
    penalty: LengthPenalty = field(
        default=LengthPenalty(), validator=valid(a(LengthPenalty, "give LengthPenalty(), or LengthPenalty(alpha=0.0)"))
    )

    def __call__(self, expanded: Expanded, /) -> Selected:
        before, request = expanded.beams, expanded.beams.request
        ended = [] if before.ended is None else [before.ended]
        ended += [branch for branch in expanded.branches[: self.num_beams] if has_ended(branch, request)]
        best = max(ended, key=self.penalty.score, default=None)
        live = tuple([branch for branch in expanded.branches if not has_ended(branch, request)][: self.num_beams])
        beams = Beams(request, live, best, before.steps + 1)
        return Selected(expanded, beams, is_over=best is not None and not self._can_beat(best, beams))

    def _can_beat(self, best: Beam, beams: Beams) -> bool:
        limit = beams.request.limit - len(beams.request.prompt)
        return bool(beams.live) and self.penalty.best(beams.live[0], limit) > self.penalty.score(best)


def has_ended(beam: Beam, request: Request) -> bool:
    """Whether a beam ends with a stop token or at the limit."""
    _is_beam("beam", beam)
    _is_request("request", request)
    is_full = len(request.prompt) + len(beam.output) == request.limit
    return is_full or (bool(beam.output) and beam.output[-1] in request.stop)


def advance_beams(selected: Selected) -> Beams | Finished:
    """The next beams, or the best text that ended."""
    beams, request, best = selected.beams, selected.beams.request, selected.beams.ended
    if best is None or not selected.is_over:
        return beams
    state = DecodeState(request, request.prompt + best.output, tally=Tally(beams.steps))
    return Finished(state, Reason.STOP if best.output[-1] in request.stop else Reason.LIMIT)


def unobserved_beams(selected: Selected) -> None:
    """The observer that does not look."""


def beam_step(
    predict: BeamPredictor,
    num_beams: int = 4,
    top_k: int = TOP_K,
    penalty: LengthPenalty = LengthPenalty(),
    observe: BeamObserver = unobserved_beams,
) -> BeamStep:
    """Expand every live beam, keep the best branches."""
    calls("an observer", "give a function of Selected, such as ShowBeams()")("observe", observe)
    expand, select = Expand(predict, top_k), Select(num_beams, penalty)
    return lambda beams: beams.then(expand).then(select).then(tap(observe)).then(advance_beams)


def _most_probable(logits: Tensor, top_k: int) -> list[tuple[int, float]]:
    """The `top_k` likeliest tokens of `logits` [V] and their log-probabilities, lower ids before equals.

    `torch.topk` alone may take any of several equals, and a log-softmax may make equals of different logits.
    """
    candidates = (logits >= logits.topk(min(top_k, len(logits))).values[-1]).nonzero().squeeze(-1)
    tokens = candidates[logits[candidates].sort(descending=True, stable=True).indices[:top_k]]
    log_probs = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)[tokens]
    pairs = zip(tokens.tolist(), log_probs.tolist(), strict=True)
    return [(token, log_prob) for token, log_prob in pairs if log_prob > -inf]


def refuse_beyond(top_k: int, vocab_size: int) -> None:
    """Refuses more branches of a beam than there are tokens, but for `TOP_K`, which nobody need have asked for."""
    if top_k > max(TOP_K, vocab_size):
        happened = f"top_k is larger than the vocabulary of {vocab_size}"
        raise DecodeError("top_k", happened, top_k, "give a smaller number")
