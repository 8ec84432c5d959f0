"""Text that obeys a grammar, and plain wishes about what a text holds: processors, a drafter, and a stage."""

from specflow.constraints.constrained import Constrained as Constrained
from specflow.constraints.constraint import Constraint as Constraint
from specflow.constraints.forced import CutForbidden as CutForbidden
from specflow.constraints.forced import Forced as Forced
from specflow.constraints.grammar import Grammar as Grammar
from specflow.constraints.matcher import Engine as Engine
from specflow.constraints.matcher import Matcher as Matcher
from specflow.constraints.matcher import following as following
from specflow.constraints.wishes import BannedWords as BannedWords
from specflow.constraints.wishes import FrequencyPenalty as FrequencyPenalty
from specflow.constraints.wishes import LogitBias as LogitBias
from specflow.constraints.wishes import MinLength as MinLength
from specflow.constraints.wishes import MinPProcessor as MinPProcessor
from specflow.constraints.wishes import NoRepeatNGram as NoRepeatNGram
from specflow.constraints.wishes import PresencePenalty as PresencePenalty
from specflow.constraints.wishes import RepetitionPenalty as RepetitionPenalty
from specflow.constraints.wishes import RequiredWords as RequiredWords
