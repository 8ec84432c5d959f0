"""The probabilities that a drawn draft is judged by: read one by one on the host, copied all at once from a device."""

from __future__ import annotations

from math import isnan
from typing import TypeAlias, final

import torch
from attrs import define, field

from specflow.distribution import Categorical, Known, flaw_of_sums, no_law
from specflow.errors import DecodeError
from specflow.guards.finite import is_near
from specflow.state import Scored, Stretch
from specflow.trees import no_draft

Reading: TypeAlias = tuple[float, float, float]
"""The probability of a token, the sum of all probabilities, and the least of them."""


@final
@define(eq=False)
class Odds:
    """p(x) and q(x) of drafts x. Where laws are on a device, those along a stretch are copied at the first."""

    scored: Scored
    _sent: dict[tuple[int, bool], Reading] = field(init=False, factory=dict)
    _seen: set[int] = field(init=False, factory=set)

    def of(self, i: int, p: Known) -> tuple[float, float]:
        """p(x) and q(x) of draft i: p is the target's law, or what siblings left of it.

        `DecodeError` where p is not a law, and where x was not drawn from q: q(x) = 0, no law, another vocabulary.
        """
        draft = self.scored.drafted.proposals[i]
        q = draft.q
        assert isinstance(q, Categorical)
        if isinstance(p, Categorical) and len(p.probs) != len(q.probs):
            happened = f"the source {draft.source!r} drafts from another vocabulary than the target's"
            remedy = "wrap its model: fitted(predictor, vocab_size)"
            raise DecodeError("drafter", happened, f"{len(q.probs)} and {len(p.probs)} probabilities", remedy)
        stretch, at = self.scored.stretch(self.scored.drafted.parents[i])
        if stretch.way[0] not in self._seen:
            self._seen.add(stretch.way[0])
            self._sent |= _sent(self.scored, stretch)
        whole = p is stretch.laws[at]
        likely, total, least = (self._sent.get((i, False)) if whole else None) or _read(p, draft.token)
        if (isinstance(p, Categorical) and flaw_of_sums(total, least, p.probs.dtype)) or isnan(likely):
            raise no_law(p, stretch.start + at)
        drafted, total, least = self._sent.get((i, True)) or _read(q, draft.token)
        what = flaw_of_sums(total, least, q.probs.dtype)
        if what is None and not drafted > 0:
            what = f"q({draft.token}) = {drafted:.3g}"
        if what is not None:
            raise no_draft(draft, f"{what} at position {stretch.start + at}")
        return likely, drafted


def _read(law: Known, token: int) -> Reading:
    if isinstance(law, Categorical) and (law.by is None or not is_near(law.probs)):  # nobody has looked at it
        likely = law.probs[token] if token < len(law.probs) else law.probs.new_zeros(())
        read: list[float] = torch.stack([likely, law.probs.sum(), law.probs.amin()]).tolist()
        return read[0], read[1], read[2]
    return law.of(token), 1.0, 0.0


def _sent(scored: Scored, stretch: Stretch) -> dict[tuple[int, bool], Reading]:
    """What is read of laws on a device along a stretch, by the draft's number and whether the law is its q."""
    laws, proposals = stretch.laws, scored.drafted.proposals
    if not isinstance(laws, tuple):
        return {}
    far = [
        ((i, is_q), law.probs)
        for p, i in zip(laws, stretch.way[1:], strict=False)
        for is_q, law in ((False, p), (True, proposals[i].q))
        if isinstance(law, Categorical) and not is_near(law.probs) and proposals[i].token < len(law.probs)
    ]
    sizes = {len(probs) for _, probs in far}
    if len(sizes) != 1:
        return {}  # there are none, or the first that does not fit is rejected
    place = far[0][1].device
    rows = torch.stack([probs.to(place) for _, probs in far])
    likely = torch.stack([row[proposals[i].token] for row, ((i, _), _) in zip(rows, far, strict=True)])
    read = torch.stack([likely, rows.sum(-1), rows.amin(-1)], dim=-1).tolist()
    return {key: (one[0], one[1], one[2]) for (key, _), one in zip(far, read, strict=True)}
