"""Replay: texts are recorded once, and any drafter, policy and rule is tried on them without the target."""

from specflow.replay.command import add_commands as add_commands
from specflow.replay.hindsight import Hindsight as Hindsight
from specflow.replay.played import Decoder as Decoder
from specflow.replay.played import Played as Played
from specflow.replay.played import Replay as Replay
from specflow.replay.played import replay as replay
from specflow.replay.record import record as record
from specflow.replay.recording import Costs as Costs
from specflow.replay.recording import RecordedText as RecordedText
from specflow.replay.recording import Recording as Recording
