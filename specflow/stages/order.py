"""What a stage is given: the record that the stage before it makes."""

from __future__ import annotations

from typing import Final

from specflow.guards.checks import a
from specflow.state import Adjusted, Committed, Drafted, Scored, Verified

_ORDER: Final = "put the stages in order: Draft, Score, Judge, Adjust, commit, advance"

a_draft = a(Drafted, _ORDER)
a_score = a(Scored, _ORDER)
a_verdict = a(Verified, _ORDER)
an_adjustment = a(Adjusted, _ORDER)
a_commitment = a(Committed, _ORDER)
