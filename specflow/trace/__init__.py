"""A trace: what a decode did, step by step, as a value that draws itself on a page, a terminal and in a notebook."""

from specflow.stages.fates import Fate as Fate
from specflow.trace.parts import DraftTrace as DraftTrace
from specflow.trace.parts import StepTrace as StepTrace
from specflow.trace.record import Recorder as Recorder
from specflow.trace.trace import Trace as Trace
