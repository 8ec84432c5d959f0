"""The spec's `sampling`: the generate functions, under the spec's names. Nothing is defined here."""

from specflow.beam import beam_search_generate as beam_search_generate
from specflow.generate import autoregressive_generate as autoregressive_generate
from specflow.generate import speculative_generate as speculative_generate
from specflow.sampling import speculative_decoding as speculative_decoding
