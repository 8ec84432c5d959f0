"""The probabilities that a draft is judged by: read one by one on the host, copied all at once from a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from typing import TypeAlias

import torch

from specflow.asked import no_draft
from specflow.distribution import Categorical, Known, flaw_of_sums, no_law
from specflow.errors import DecodeError
from specflow.finite import is_near
from specflow.processors import Laws
from specflow.state import Proposal

Odds: TypeAlias = Callable[[int, Known, Known], tuple[float, float]]
"""(i, p, q), the law behind i drafts and that of the draft x behind them → p(x), q(x)."""

Reading: TypeAlias = tuple[float, float, float]
"""The probability of a token, the sum of all probabilities, and the least of them."""


def odds_of(proposals: Sequence[Proposal], laws: Laws, start: int, span: range) -> Odds:
    """p(x) and q(x) of the drafts in `span`. Where `laws` are a tuple, what is on a device is copied now, in one copy.

    `DecodeError` where p is no law, and where x was not drawn from q: q(x) = 0, no law, another vocabulary than p's.
    """
    sent = _sent(proposals, laws, span) if isinstance(laws, tuple) else {}

    def odds(i: int, p: Known, q: Known) -> tuple[float, float]:
        draft = proposals[i]
        if isinstance(p, Categorical) and isinstance(q, Categorical) and len(p.probs) != len(q.probs):
            happened = f"the source {draft.source!r} drafts from another vocabulary than the target's"
            remedy = "wrap its model: fitted(predictor, vocab_size)"
            raise DecodeError("drafter", happened, f"{len(q.probs)} and {len(p.probs)} probabilities", remedy)
        likely, *sums = sent.get((i, False)) or _read(p, draft.token)
        if flaw_of_sums(*sums) or isnan(likely):
            raise no_law(p, start + i)
        drafted, *sums = sent.get((i, True)) or _read(q, draft.token)
        what = flaw_of_sums(*sums)
        if what is None and not drafted > 0:
            what = f"q({draft.token}) = {drafted:.3g}"
        if what is not None:
            raise no_draft(draft, f"{what} at position {start + i}")
        return likely, drafted

    return odds


def _read(law: Known, token: int) -> Reading:
    if isinstance(law, Categorical) and (law.by is None or not is_near(law.probs)):  # nobody has looked at it
        likely = law.probs[token] if token < len(law.probs) else law.probs.new_zeros(())
        read: list[float] = torch.stack([likely, law.probs.sum(), law.probs.amin()]).tolist()
        return read[0], read[1], read[2]
    return law.of(token), 1.0, 0.0


def _sent(proposals: Sequence[Proposal], laws: tuple[object, ...], span: range) -> dict[tuple[int, bool], Reading]:
    """What is read of laws on a device, by the draft's number and whether the law is its q."""
    far = [
        ((i, is_q), law.probs)
        for i in span
        for is_q, law in enumerate((laws[i], proposals[i].q))
        if isinstance(law, Categorical) and not is_near(law.probs) and proposals[i].token < len(law.probs)
    ]
    sizes = {len(probs) for _, probs in far}
    if len(sizes) != 1:
        return {}  # there are none, or the first that does not fit is refused
    place = far[0][1].device
    rows = torch.stack([probs.to(place) for _, probs in far])
    likely = torch.stack([row[proposals[i].token] for row, ((i, _), _) in zip(rows, far, strict=True)])
    read = torch.stack([likely, rows.sum(-1), rows.amin(-1)], dim=-1).tolist()
    return {(i, bool(is_q)): (one[0], one[1], one[2]) for ((i, is_q), _), one in zip(far, read, strict=True)}
