"""specflow: compose LLM decoders from immutable stages, and trust what comes out.

Here stand the names that a person composes with. All else is one import deeper: `specflow.stages`, `drafters`,
`policies`, `predictors`, `processors`, `state`, `testing`, `interop`, `accelerate`, `bench`.
"""

from typing import TYPE_CHECKING

# The text and the loop.
from specflow.errors import DecodeError as DecodeError
from specflow.loop import run as run
from specflow.loop import start as start
from specflow.loop import unfold as unfold
from specflow.state import DecodeState as DecodeState
from specflow.state import Finished as Finished
from specflow.state import Step as Step
from specflow.state import Tokens as Tokens

# Steps, and the rules that judge drafts.
from specflow.steps import autoregressive_step as autoregressive_step
from specflow.steps import ngram_step as ngram_step
from specflow.steps import seed_coupled_step as seed_coupled_step
from specflow.steps import speculative_step as speculative_step
from specflow.steps import verified_step as verified_step
from specflow.stages import Block as Block
from specflow.stages import Match as Match
from specflow.stages import Reject as Reject
from specflow.stages import Traverse as Traverse
from specflow.state import Rule as Rule
from specflow.state import Verdict as Verdict

# What goes from stage to stage.
from specflow.state import Adjusted as Adjusted
from specflow.state import Drafted as Drafted
from specflow.state import Scored as Scored
from specflow.state import Verified as Verified

# Drafts and drafters.
from specflow.state import TEXT as TEXT
from specflow.state import Drafter as Drafter
from specflow.state import Proposal as Proposal
from specflow.state import chain as chain
from specflow.drafters import LLMDrafter as LLMDrafter
from specflow.drafters import LookupTree as LookupTree
from specflow.drafters import NGramDrafter as NGramDrafter
from specflow.drafters import NGramStorage as NGramStorage
from specflow.drafters import PromptLookup as PromptLookup
from specflow.drafters import SuffixDrafter as SuffixDrafter
from specflow.drafters import at_most as at_most
from specflow.drafters import first_of as first_of
from specflow.drafters import longest as longest
from specflow.drafters import then as then

# How many drafts.
from specflow.policies import CostAware as CostAware
from specflow.policies import CostMeter as CostMeter
from specflow.policies import Fixed as Fixed
from specflow.state import GammaPolicy as GammaPolicy

# Laws, and randomness.
from specflow.distribution import Categorical as Categorical
from specflow.distribution import PointMass as PointMass
from specflow.processors import EachPrefix as EachPrefix
from specflow.processors import GreedyProcessor as GreedyProcessor
from specflow.processors import MultinomialProcessor as MultinomialProcessor
from specflow.processors import NucleusProcessor as NucleusProcessor
from specflow.processors import Processor as Processor
from specflow.processors import TopKNucleusProcessor as TopKNucleusProcessor
from specflow.processors import TopKProcessor as TopKProcessor
from specflow.randomness import Dice as Dice
from specflow.randomness import SharedNoise as SharedNoise

# Models as functions of tokens, and the spec's functions; these load transformers once they are asked for.
from specflow.paths import along_paths as along_paths
from specflow.state import Predictor as Predictor

if TYPE_CHECKING:
    from specflow.beam import beam_search_generate as beam_search_generate
    from specflow.generate import autoregressive_generate as autoregressive_generate
    from specflow.generate import ngram_assisted_speculative_generate as ngram_assisted_speculative_generate
    from specflow.generate import speculative_generate as speculative_generate
    from specflow.predictors import CachedPredictor as CachedPredictor
    from specflow.predictors import limits_of as limits_of
else:
    import importlib
    import inspect

    _LATER = {
        "beam_search_generate": "specflow.beam",
        "autoregressive_generate": "specflow.generate",
        "ngram_assisted_speculative_generate": "specflow.generate",
        "speculative_generate": "specflow.generate",
        "CachedPredictor": "specflow.predictors",
        "limits_of": "specflow.predictors",
    }

    # What `from specflow import *` brings: all that stands here.
    _here = {name for name, what in globals().items() if not name.startswith("_") and not inspect.ismodule(what)}
    __all__ = [*sorted(_here - {"TYPE_CHECKING"}), *_LATER]  # noqa: PLE0604 - they are strings

    def __getattr__(name: str) -> object:
        if name not in _LATER:
            raise AttributeError(f"module 'specflow' has no attribute {name!r}")
        return globals().setdefault(name, getattr(importlib.import_module(_LATER[name]), name))
