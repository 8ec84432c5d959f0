"""A benchmark of decoders: prompts × decoders, interleaved, with intervals, identity, and where the time goes."""

from specflow.bench.command import add_arguments as add_arguments
from specflow.bench.command import main as main
from specflow.bench.context import Context as Context
from specflow.bench.prompts import Prompt as Prompt
from specflow.bench.prompts import read_prompts as read_prompts
