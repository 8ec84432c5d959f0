# For code that calls specflow.install_spec_paths().
from sampling import speculative_decoding as speculative_decoding
from specflow.beam import beam_search_generate as beam_search_generate
from specflow.generate import autoregressive_generate as autoregressive_generate
from specflow.generate import speculative_generate as speculative_generate
