"""A drafter that is itself speculative: a tiny model drafts for a small one, and that one drafts for a big one.

The small model drafts as `LLMDrafter` has it, token by token, each from its own law. But where it is asked what comes
after a text it reads what the tiny model expects along with it, in the same pass: when its own token is the expected
one, the next law is there already. What it answers is a function of the text, so its drafts carry their true law, and
the big model's text is exact; the certificate checks it on every branch of small worlds.

python examples/speculative_drafter.py
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import final

import torch
from attrs import define, field
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specflow import (
    CachedPredictor,
    Dice,
    Drafter,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Predictor,
    Proposal,
    Step,
    Tokens,
    run,
    speculative_step,
    start,
)
from specflow.testing import CASES, TableModel, World, certify


@final
@define(eq=False)
class LooksAhead:
    """A predictor that reads a drafter's chain along with the text, and remembers the rows behind it.

    The same function as `predictor`, in fewer passes where the drafter is right. `passes` counts them.
    """

    predictor: Predictor
    drafter: Drafter
    ahead: int = 4
    passes: int = 0
    _rows: dict[Tokens, Tensor] = field(init=False, factory=dict)

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        if drafts:
            self.passes += 1
            return self.predictor(tokens, drafts)
        if tokens not in self._rows:
            expected = tuple(islice(self.drafter(tokens), self.ahead))
            self.passes += 1
            rows = self.predictor(tokens, expected)
            drafted = tuple([draft.token for draft in expected])
            self._rows = {(*tokens, *drafted[:i]): rows[i : i + 1] for i in range(len(expected) + 1)}
        return self._rows[tokens]


def llama(noise: float) -> LlamaForCausalLM:
    """A random llama with noise on its weights; in real life, three models of one family."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    return model


def main() -> None:
    """Certifies the composition, and counts the small model's passes with and without the tiny one."""
    greedy, dice = GreedyProcessor(), Dice()

    def compose(world: World) -> Step:
        small = LooksAhead(world.drafter, LLMDrafter(TableModel(4, 99), greedy, dice), ahead=2)
        drafter = LLMDrafter(small, world.processor, world.rng)
        return speculative_step(drafter, world.target, world.processor, world.rng, Fixed(2))

    print(certify(compose, cases=[case for case in CASES if case.vocab_size == 4]))
    big, own, tiny = (CachedPredictor(llama(noise)) for noise in (0.0, 0.05, 0.1))
    texts = set()
    for ahead in (0, 4):
        small = LooksAhead(own, LLMDrafter(tiny, greedy, dice), ahead)
        step = speculative_step(LLMDrafter(small, greedy, dice), big, greedy, dice, Fixed(4))
        state = run(step, start([5, 9, 7], 60).unwrap()).state
        texts.add(state.output)
        print(f"{state.tally.drafted} drafts in {small.passes} passes of the small model, {ahead} tokens ahead")
    print("the same text" if len(texts) == 1 else "two texts")


if __name__ == "__main__":
    main()
