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
from specflow.drafters.followers import Followers as Followers
from specflow.drafters.llm import LLMDrafter as LLMDrafter
from specflow.drafters.logits import LogitTree as LogitTree
from specflow.drafters.lookup import PromptLookup as PromptLookup
from specflow.drafters.ngrams.drafter import GuessingNGramDrafter as GuessingNGramDrafter
from specflow.drafters.ngrams.drafter import NGramDrafter as NGramDrafter
from specflow.drafters.ngrams.storage import INgramStorage as INgramStorage
from specflow.drafters.ngrams.storage import NGramStorage as NGramStorage
from specflow.drafters.ngrams.storage import OneLevelNGramStorage as OneLevelNGramStorage
from specflow.drafters.recycling import Recycled as Recycled
from specflow.drafters.recycling import RecyclingTree as RecyclingTree
from specflow.drafters.retrieval import Corpus as Corpus
from specflow.drafters.retrieval import CorpusTree as CorpusTree
from specflow.drafters.suffix import SuffixDrafter as SuffixDrafter
from specflow.drafters.tree import LookupTree as LookupTree
