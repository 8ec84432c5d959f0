"""Gamma policies: how many drafts to take from a drafter's lazy stream, of a chain or of a tree."""

from specflow.policies.belief import drafter_law as drafter_law
from specflow.policies.choice import Choice as Choice
from specflow.policies.cost import CostAware as CostAware
from specflow.policies.egag import EGAG as EGAG
from specflow.policies.fixed import Fixed as Fixed
from specflow.policies.fixed import Heuristic as Heuristic
from specflow.policies.meter import CostMeter as CostMeter
from specflow.policies.meter import Costs as Costs
from specflow.policies.meter import meter_of as meter_of
from specflow.policies.stops import SVIP as SVIP
from specflow.policies.stops import AdaEDL as AdaEDL
from specflow.policies.stops import Stop as Stop
from specflow.policies.stops import StopAfter as StopAfter
from specflow.policies.stops import Unsure as Unsure
