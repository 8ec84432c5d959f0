"""The spec's `utils.logits_processor`. Nothing is defined here."""

from specflow.processors import GreedyProcessor as GreedyProcessor
from specflow.processors import LogitsProcessor as LogitsProcessor
from specflow.processors import MultinomialProcessor as MultinomialProcessor
from specflow.processors import NucleusProcessor as NucleusProcessor
from specflow.processors import TopKNucleusProcessor as TopKNucleusProcessor
from specflow.processors import TopKProcessor as TopKProcessor
