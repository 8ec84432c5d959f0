"""Drafters: interchangeable providers of proposals."""

from specflow.drafters.bigrams import Bigrams as Bigrams
from specflow.drafters.block import GreedyBlockDrafter as GreedyBlockDrafter
from specflow.drafters.block import SampledBlockDrafter as SampledBlockDrafter
from specflow.drafters.combine import as_chain as as_chain
from specflow.drafters.combine import at_most as at_most
from specflow.drafters.combine import first_of as first_of
from specflow.drafters.combine import longest as longest
from specflow.drafters.combine import propose_nothing as propose_nothing
from specflow.drafters.combine import then as then
from specflow.drafters.intersection import IntersectionDrafter as IntersectionDrafter
from specflow.drafters.intersection import translated as translated
from specflow.drafters.llm import LLMDrafter as LLMDrafter
from specflow.drafters.lookup import PromptLookup as PromptLookup
from specflow.drafters.ngrams.drafter import GuessingNGramDrafter as GuessingNGramDrafter
from specflow.drafters.ngrams.drafter import NGramDrafter as NGramDrafter
from specflow.drafters.ngrams.storage import INgramStorage as INgramStorage
from specflow.drafters.ngrams.storage import NGramStorage as NGramStorage
from specflow.drafters.ngrams.storage import OneLevelNGramStorage as OneLevelNGramStorage
from specflow.drafters.retokenised import Retokenised as Retokenised
from specflow.drafters.suffix import SuffixDrafter as SuffixDrafter
from specflow.drafters.tree import LookupTree as LookupTree
