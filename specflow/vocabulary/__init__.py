"""The vocabularies of drafter and target: one of two sizes, or two that share some tokens."""

from specflow.vocabulary.padding import fit as fit
from specflow.vocabulary.padding import fitted as fitted
from specflow.vocabulary.padding import shared_vocabulary as shared_vocabulary
from specflow.vocabulary.shared import SharedTokens as SharedTokens
from specflow.vocabulary.spelling import Spelling as Spelling
from specflow.vocabulary.spelling import Tokenizer as Tokenizer
from specflow.vocabulary.spelling import alike as alike
