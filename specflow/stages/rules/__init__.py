"""The rules that judge drafts, each a value without target and processor."""

from specflow.stages.rules.block import Block as Block
from specflow.stages.rules.match import Match as Match
from specflow.stages.rules.reject import Reject as Reject
from specflow.stages.rules.traverse import Traverse as Traverse
from specflow.stages.rules.typical import LossyTypical as LossyTypical
