"""The stages of a step: each a callable from one record to the next, so that type checkers refuse a wrong order."""

from specflow.stages.adjust import Adjust as Adjust
from specflow.stages.adjust import LossySkipAdjustment as LossySkipAdjustment
from specflow.stages.commit import advance as advance
from specflow.stages.commit import commit as commit
from specflow.stages.draft import Draft as Draft
from specflow.stages.draft import draft_nothing as draft_nothing
from specflow.stages.ending import PruneCache as PruneCache
from specflow.stages.ending import ending as ending
from specflow.stages.judge import Judge as Judge
from specflow.stages.judge import LossyJudge as LossyJudge
from specflow.stages.judge import LossyRule as LossyRule
from specflow.stages.judge import Verify as Verify
from specflow.stages.ngram import UpdateNgram as UpdateNgram
from specflow.stages.observe import Observer as Observer
from specflow.stages.observe import Show as Show
from specflow.stages.observe import unobserved as unobserved
from specflow.stages.rules import Block as Block
from specflow.stages.rules import LossyTypical as LossyTypical
from specflow.stages.rules import Match as Match
from specflow.stages.rules import Reject as Reject
from specflow.stages.rules import Traverse as Traverse
from specflow.stages.score import Score as Score
from specflow.stages.stop import Condition as Condition
from specflow.stages.stop import StopWhen as StopWhen
from specflow.stages.stop import never as never
from specflow.stages.stop import stop_string as stop_string
