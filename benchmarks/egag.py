"""What the gamma policies see on a real model: the γ of EGAG and the verdicts of the stops, on SmolLM2's own text.

    python -m benchmarks.egag

SmolLM2-135M-Instruct answers a few prompts greedily. The drafter is the same model, as it is and with noise on its
weights, standing in for a smaller one. It reads each answer in one pass, so every position is once the first of a
draft. A draft there would be accepted if it is the answer's next token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import repeat
from typing import Final

import torch
from torch.nn import Module

from specflow import DecodeState, Proposal, autoregressive_generate
from specflow.models import load
from specflow.policies import EGAG, SVIP, AdaEDL, Stop, Unsure, drafter_law
from specflow.predictors import UncachedPredictor, last_rows
from specflow.state import Request

PROMPTS: Final = (
    "Write a short poem about the sea.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain how a bicycle stays upright.",
    "List five cities in Europe and one thing to see in each.",
)
NEW_TOKENS: Final = 64
STOPS: Final[Mapping[str, Stop]] = {"confidence 0.4": Unsure(), "SVIP 0.3": SVIP(), "AdaEDL 0.4": AdaEDL()}
QUANTILES: Final = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
STATE: Final = DecodeState(Request((0,), 1000), (0,))

Draft = tuple[Proposal, bool]
"""A first draft, and whether it would be accepted."""


def with_noise(model: Module, amount: float) -> Module:
    """A copy of the model with noise on its weight matrices, in standard deviations of each."""
    copy, generator = deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.dim() == 2:
                parameter.add_(amount * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return copy


def first_drafts(drafter: Module, prompt: list[int], answer: list[int]) -> Iterator[Draft]:
    """The drafter's proposal at each position of the answer."""
    rows = last_rows(UncachedPredictor(drafter), (*prompt, *answer[:-1]), len(answer))
    for logits, token in zip(rows, answer, strict=True):
        draft = int(logits.argmax())
        yield Proposal(draft, source="llm", logits=logits), draft == token


def share(drafts: list[Draft]) -> str:
    """How many of the drafts would be accepted."""
    return f"{sum(good for _, good in drafts) / len(drafts):.0%}" if drafts else "-"


def report(drafts: list[Draft]) -> None:
    """Print what the policies make of these drafts."""
    entropies = torch.tensor([drafter_law(proposal).entropy() for proposal, _ in drafts])
    quantiles = entropies.quantile(torch.tensor(QUANTILES)).tolist()
    print(f"{len(drafts)} drafts, {share(drafts)} accepted; entropy in nats at the quantiles")
    print("  " + "  ".join(f"{q:.0%}: {nats:.2g}" for q, nats in zip(QUANTILES, quantiles, strict=True)))
    for most in (5, 10, 20):
        policy = EGAG(gamma_max=most)
        gammas = Counter(len(policy(repeat(proposal), STATE)[0]) for proposal, _ in drafts)
        shares = ", ".join(f"{gamma}: {gammas[gamma] / len(drafts):.0%}" for gamma in sorted(gammas))
        print(f"  EGAG, gamma_max {most:2}: gamma is  {shares}")
    for name, stop in STOPS.items():
        stopped = [draft for draft in drafts if stop(draft[0])]
        going = [draft for draft in drafts if not stop(draft[0])]
        print(
            f"  {name:<14} goes on after {len(going) / len(drafts):4.0%} of the drafts ({share(going)} accepted), "
            f"stops after {len(stopped) / len(drafts):4.0%} ({share(stopped)} accepted)"
        )
    print()


def main() -> None:
    """Print the numbers of benchmarks/journal.md."""
    loaded = load().unwrap()
    prompts = [list(loaded.chat(message)) for message in PROMPTS]
    stop = list(loaded.stop)
    answers = [
        autoregressive_generate(prompt, loaded.model, NEW_TOKENS, eos_tokens_id=stop, use_cache=True)
        for prompt in prompts
    ]
    for amount in (0.0, 0.05, 0.1):
        drafter = with_noise(loaded.model, amount)
        print(f"noise {amount}: ", end="")
        pairs = zip(prompts, answers, strict=True)
        report([draft for prompt, answer in pairs for draft in first_drafts(drafter, prompt, answer)])


if __name__ == "__main__":
    main()
