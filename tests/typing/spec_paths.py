"""The spec's own import paths, as mypy sees them through typings/. It is only type-checked."""

from __future__ import annotations

from typing import assert_type

import torch
import utils.logits_processor
from ngram_assisted import NGramStorage, OneLevelNGramStorage, ngram_assisted_speculative_generate
from sampling import autoregressive_generate, beam_search_generate, speculative_generate
from sampling.speculative_decoding import max_fn
from transformers import DynamicCache
from utils.caching import prune_cache
from utils.logits_processor import (
    GreedyProcessor,
    LogitsProcessor,
    MultinomialProcessor,
    NucleusProcessor,
    TopKNucleusProcessor,
    TopKProcessor,
)

import specflow
from tests.toys import tiny_llama

model = tiny_llama()
processors: list[LogitsProcessor] = [
    GreedyProcessor(),
    MultinomialProcessor(0.8),
    TopKProcessor(0.8, 5),
    NucleusProcessor(0.8, 0.9),
    TopKNucleusProcessor(0.8, 5, 0.9),
]
theirs: type[utils.logits_processor.GreedyProcessor] = specflow.GreedyProcessor
assert_type(autoregressive_generate([1], model), list[int])
assert_type(beam_search_generate([1], model, num_beams=5), list[int])
assert_type(speculative_generate([1], model, model), tuple[list[int], float])
storage = NGramStorage(n=3, vocab_size=64)
assert_type(ngram_assisted_speculative_generate([1], storage, model), tuple[list[int], float])
ngram_assisted_speculative_generate([1], OneLevelNGramStorage(3, 64), model, filler_top_k=1)
assert_type(max_fn(torch.zeros(3)), torch.Tensor)
assert_type(prune_cache(DynamicCache(), num_tokens_to_discard=3), DynamicCache)
autoregressive_generate("text", model)  # type: ignore[arg-type]
NucleusProcessor(top_p="0.9", temperature=1.0)  # type: ignore[arg-type]
