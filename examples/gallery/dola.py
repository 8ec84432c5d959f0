"""DoLa: the last layer against an early one of the same model (Chuang et al. 2309.03883), under drafts.

`early_exit` is the model's first layers and its head: a predictor, so it contrasts, and it drafts as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specflow import (
    CachedPredictor,
    Dice,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Predictor,
    Proposal,
    Tokens,
    autoregressive_step,
    run,
    speculative_step,
    start,
)
from specflow.predictors import early_exit


def dola(mature: Predictor, early: Predictor, plausible: float = 0.1) -> Predictor:
    """log p_last - log p_early, among tokens that the last layer finds plausible."""

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        last, first = mature(tokens, drafts).log_softmax(-1), early(tokens, drafts).log_softmax(-1)
        least = last.max(-1, keepdim=True).values + torch.log(torch.tensor(plausible))
        return (last - first).masked_fill(last < least, -torch.inf)

    return predict


def check() -> None:
    """Greedy text with drafts is the text without them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval().double()
    target = dola(CachedPredictor(model), early_exit(model, 2))
    small = early_exit(model, 3)
    greedy, state = GreedyProcessor(), start((5, 6, 7), 24).unwrap()
    step = speculative_step(LLMDrafter(small, greedy, Dice()), target, greedy, Dice(), Fixed(3), prune=(small,))
    plain = autoregressive_step(target, greedy, Dice())
    assert run(step, state).state.output == run(plain, state).state.output
