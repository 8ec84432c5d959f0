"""The spec's `sampling.speculative_decoding`. Nothing is defined here."""

from specflow.distribution import max_fn as max_fn
from specflow.generate import speculative_generate as speculative_generate
