"""A target behind torch.compile, with a static cache that it need not be compiled again for.

python examples/compiled.py
"""

from __future__ import annotations

import torch
from torch.nn import Module
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from specflow import CachedPredictor, Dice, GreedyProcessor, run, speculative_step, start
from specflow.drafters import SuffixDrafter


def main() -> None:
    """Prints a text of the compiled model, and whether it is the eager model's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    model.eval()
    # The default backend compiles for half a minute; "eager" shows the same without it.
    compiled = torch.compile(model, backend="eager", dynamic=True)
    assert isinstance(compiled, Module)
    texts = []
    for target in (
        CachedPredictor(compiled, lambda: StaticCache(config, max_cache_len=64)),
        CachedPredictor(model),
    ):
        step = speculative_step(SuffixDrafter(), target, GreedyProcessor(), Dice())
        texts.append(run(step, start([5, 9, 7], 24, limits=target.limits).unwrap()).state.output)
    print(texts[0])
    print("the same text" if texts[0] == texts[1] else "another text")


if __name__ == "__main__":
    main()
