"""The stages a step is composed of. Each is a callable from one record to the next; mypy refuses a wrong order."""

from specflow.stages.adjust import Adjust as Adjust
from specflow.stages.adjust import LossySkipAdjustment as LossySkipAdjustment
from specflow.stages.block import VerifyBlock as VerifyBlock
from specflow.stages.commit import advance as advance
from specflow.stages.commit import commit as commit
from specflow.stages.draft import Draft as Draft
from specflow.stages.draft import draft_nothing as draft_nothing
from specflow.stages.ngram import UpdateNgram as UpdateNgram
from specflow.stages.observe import Observer as Observer
from specflow.stages.observe import Show as Show
from specflow.stages.observe import unobserved as unobserved
from specflow.stages.prune import PruneCache as PruneCache
from specflow.stages.stop import Condition as Condition
from specflow.stages.stop import StopWhen as StopWhen
from specflow.stages.stop import never as never
from specflow.stages.stop import stop_string as stop_string
from specflow.stages.tree import DraftTree as DraftTree
from specflow.stages.tree import VerifyTree as VerifyTree
from specflow.stages.typical import LossyTypicalAcceptance as LossyTypicalAcceptance
from specflow.stages.verify import MatchSamples as MatchSamples
from specflow.stages.verify import RejectTokens as RejectTokens
