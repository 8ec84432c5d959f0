"""What the gamma policies see on a real model: the γ of EGAG and the verdicts of the stops, on SmolLM2's own text.

    python -m benchmarks.egag

SmolLM2-135M-Instruct answers a few prompts greedily. The drafter is the same model with noise on its weights, standing
in for a smaller one; it reads each answer in one pass, so every position of the text is a first draft position. A draft
there is accepted iff the drafter's argmax is the text's next token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import repeat
from typing import Final

import torch
from torch.nn import Module

from specflow import (
    EGAG,
    SVIP,
    AdaEDL,
    DecodeState,
    PointMass,
    Proposal,
    Request,
    Stop,
    UncachedPredictor,
    Unsure,
    autoregressive_generate,
    drafter_law,
)
from specflow.models import Loaded, load

PROMPTS: Final = (
    "Write a short poem about the sea.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain how a bicycle stays upright.",
    "List five cities in Europe and one thing to see in each.",
)
NEW_TOKENS: Final = 64
NOISE: Final = 0.1
"""In standard deviations of each weight matrix."""

STOPS: Final[Mapping[str, Stop]] = {"confidence 0.4": Unsure(), "SVIP 0.3": SVIP(), "AdaEDL 0.4": AdaEDL()}


def disturbed(model: Module) -> Module:
    """A copy of the model with noise on its weight matrices."""
    copy, generator = deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.dim() == 2:
                parameter.add_(NOISE * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return copy


def first_drafts(loaded: Loaded, drafter: Module) -> Iterator[tuple[Proposal, bool]]:
    """The drafter's proposal at each position of the model's answers, and whether it would be accepted."""
    read = UncachedPredictor(drafter)
    for message in PROMPTS:
        prompt = list(loaded.chat(message))
        answer = autoregressive_generate(
            prompt, loaded.model, NEW_TOKENS, eos_tokens_id=list(loaded.stop), use_cache=True
        )
        for logits, token in zip(read((*prompt, *answer[:-1]), len(answer)), answer, strict=True):
            draft = int(logits.argmax())
            yield Proposal(draft, PointMass(draft), "noisy", logits), draft == token


def main() -> None:
    """Print the three tables of docs/gamma.md."""
    loaded = load().unwrap()
    drafts = list(first_drafts(loaded, disturbed(loaded.model)))
    accepted = sum(good for _, good in drafts)
    print(f"{len(drafts)} positions, {accepted / len(drafts):.0%} of the drafts would be accepted\n")

    entropies = torch.tensor([drafter_law(proposal).entropy() for proposal, _ in drafts])
    quantiles = entropies.quantile(torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])).tolist()
    print("entropy in nats, at the 0, 10, 25, 50, 75, 90 and 100 % quantile")
    print("  ".join(f"{quantile:.2g}" for quantile in quantiles), end="\n\n")

    state = DecodeState(Request((0,), 1000), (0,))
    for most in (5, 10, 20):
        policy = EGAG(gamma_max=most)
        gammas = Counter(len(policy(repeat(proposal), state)[0]) for proposal, _ in drafts)
        shares = ", ".join(f"{gamma}: {gammas[gamma] / len(drafts):.0%}" for gamma in sorted(gammas))
        print(f"EGAG with gamma_max {most} drafts  {shares}")

    print("\nstop            goes on   accepted there   stops   accepted there")
    for name, stop in STOPS.items():
        goes_on = [good for proposal, good in drafts if not stop(proposal)]
        stops = [good for proposal, good in drafts if stop(proposal)]
        print(
            f"{name:<16}{len(goes_on) / len(drafts):7.0%}   {share(goes_on):14.0%}   "
            f"{len(stops) / len(drafts):5.0%}   {share(stops):14.0%}"
        )


def share(verdicts: list[bool]) -> float:
    """The share of true ones; 0 of none."""
    return sum(verdicts) / len(verdicts) if verdicts else 0.0


if __name__ == "__main__":
    main()
