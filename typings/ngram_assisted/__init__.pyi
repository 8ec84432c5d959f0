# For code that calls specflow.install_spec_paths().
from specflow.drafters import INgramStorage as INgramStorage
from specflow.drafters import NGramStorage as NGramStorage
from specflow.drafters import OneLevelNGramStorage as OneLevelNGramStorage
from specflow.generate import ngram_assisted_speculative_generate as ngram_assisted_speculative_generate
