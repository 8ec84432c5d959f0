"""What a drafter believes of its own drafts."""

from __future__ import annotations

from math import isnan

import torch
import torch.nn.functional as F
from torch import Tensor

from specflow.distribution import BlackBox, Categorical, Known, PointMass
from specflow.errors import DecodeError
from specflow.guards import checks
from specflow.guards.checks import a, shown
from specflow.state import Proposal


def drafter_law(proposal: Proposal, temperature: float = 1.0) -> Known:
    """What the drafter believed: softmax(logits / T), before top-k, top-p or argmax; q itself where it has no logits.

    `DecodeError` where the logits are not a row [V] of numbers, q is not a law, or T is not a temperature.

    >>> drafter_law(Proposal(7)), drafter_law(Proposal(1, logits=torch.zeros(4)))
    (PointMass(token=7), Categorical(probs=tensor([0.2500, 0.2500, 0.2500, 0.2500])))
    """
    a(Proposal, "have the drafter yield proposals")("proposal", proposal)
    checks.temperature("temperature", temperature)
    match proposal.logits, proposal.q:
        case Tensor() as logits, _ if logits.ndim == 1 and len(logits) and not (logits.is_complex() or logits.is_meta):
            scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
            # Less the largest of them: divided by a small T they would be beyond floats.
            return Categorical(F.softmax((scores - scores.amax()) / float(temperature), dim=-1))
        case None, BlackBox(probs):
            return Categorical(probs)
        case None, PointMass() | Categorical():
            return proposal.q
        case None, _:
            happened, remedy = "a proposal's q is not a law", "give a PointMass or Categorical"
            raise DecodeError("drafter", happened, shown(proposal.q), remedy)
    happened, remedy = "the logits of a proposal are not a row of numbers", "give a tensor [V], or leave them out"
    raise DecodeError("drafter", happened, shown(proposal.logits), remedy)


def entropy_of(proposal: Proposal, temperature: float) -> float:
    """H of the drafter's law, in nats."""
    return told(drafter_law(proposal, temperature).entropy())


def told(number: float) -> float:
    """A number that was made of a drafter's law; NaN was made of none."""
    if isnan(number):
        happened, remedy = "the drafter's logits are not finite", "check its weights and dtype"
        raise DecodeError("drafter", happened, "NaN or infinity", remedy)
    return number
