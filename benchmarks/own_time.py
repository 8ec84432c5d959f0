"""What specflow itself takes for a step, over a model that answers at once: no other work is in the figures.

    python -m benchmarks.own_time

The model looks its logits up in a table; the time in there is left out. All else is counted: drafting, the memo, the
laws, the rule, the commit. Medians of many steps, in microseconds, as a machine that others use wavers. `--calls` lists
where the time goes, call by call, as cProfile has it, which makes small functions look dearer than they are.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Final, final

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from specflow import (
    CachedPredictor,
    CostAware,
    DecodeState,
    Dice,
    Drafter,
    Finished,
    Fixed,
    GammaPolicy,
    GreedyProcessor,
    LookupTree,
    Reject,
    SuffixDrafter,
    start,
)
from specflow.caches import KVCache
from specflow.drafters import propose_nothing
from specflow.stages import Adjust, Draft, Judge, PruneCache, Score, ending, unobserved
from specflow.stages.stop import never

VOCABULARY, ROWS = 49152, 256
PARTS: Final = ("draft", "score", "judge", "adjust", "end")
STEPS: Final = 400
FURTHER: Final = 1700
"""How many tokens a text grows before it is begun again."""


@final
class Instant(Module):
    """A model whose logits are the row of the last token in a table, and which tells how long it took."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=1 << 20)
        self.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        random = torch.Generator().manual_seed(0)
        self.table = torch.rand(ROWS, VOCABULARY, generator=random)
        # Half of the tokens have one follower each, in short rounds; the others wander.
        self.table[torch.arange(ROWS), (torch.arange(ROWS) * 5 + 1) % ROWS] += 2.0
        self.passes: list[float] = []
        """What each took, in seconds."""
        self.eval()

    @override
    def forward(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        parents: Sequence[int] | None = None,
    ) -> object:
        """Logits [1, n, V]."""
        began = perf_counter()
        kept = KVCache(torch.zeros(1, 2, 1, 0, 1)) if cache is None else cache
        kept.reserve(kept.length + input_ids.shape[-1])
        kept.length += input_ids.shape[-1]
        logits = self.table[input_ids[:, -logits_to_keep:] % ROWS]
        self.passes.append(perf_counter() - began)
        return SimpleNamespace(logits=logits, cache=kept if use_cache else None)


Timed = dict[str, list[float]]


def measured(drafter: Drafter, make: Callable[[CachedPredictor], GammaPolicy], steps: int, length: int = 300) -> Timed:
    """What each part of each step took behind a text of `length` tokens, without the model, once all have met it."""
    model = Instant()
    target = CachedPredictor(model)
    draft, score = Draft(drafter, make(target)), Score(target, GreedyProcessor())
    judge, adjust = Judge(Reject(Dice())), Adjust(Dice())
    end = ending(never, unobserved, PruneCache((target,)))
    prompt = [(7 * i * i + 3) % 199 for i in range(length)]
    state: DecodeState | Finished = start(prompt, 1 << 16).unwrap()
    took: Timed = {part: [] for part in (*PARTS, "in all")}
    for number in range(steps + 20):
        assert isinstance(state, DecodeState)
        if len(state.tokens) > length + FURTHER:
            state = start(prompt, 1 << 16).unwrap()
        model.passes.clear()
        moments = [perf_counter()]
        drafted = draft(state)
        moments.append(perf_counter())
        scored = score(drafted)
        moments.append(perf_counter())
        verified = judge(scored)
        moments.append(perf_counter())
        adjusted = adjust(verified)
        moments.append(perf_counter())
        state = end(adjusted)
        moments.append(perf_counter())
        if number < 20:
            continue
        parts = [later - earlier for earlier, later in pairwise(moments)]
        parts[1] -= sum(model.passes)
        for part, seconds in zip((*PARTS, "in all"), (*parts, sum(parts)), strict=True):
            took[part].append(1e6 * seconds)
    return took


CASES: Final[dict[str, tuple[Callable[[], Drafter], Callable[[CachedPredictor], GammaPolicy]]]] = {
    "plain": (lambda: propose_nothing, lambda target: Fixed(1)),
    "suffix, 10": (SuffixDrafter, lambda target: Fixed(10)),
    "suffix, CostAware": (SuffixDrafter, lambda target: CostAware(target.meter)),
    "tree of 8": (LookupTree, lambda target: Fixed(8)),
    "tree, CostAware": (LookupTree, lambda target: CostAware(target.meter)),
}
"""What is measured: what drafts, and how far."""


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--length", type=int, default=300, help="tokens of the text before")
    parser.add_argument("--calls", choices=CASES, help="list the dearest calls of one of them instead")
    options = parser.parse_args()
    if options.calls is not None:
        make, policy = CASES[options.calls]
        with cProfile.Profile() as profile:
            measured(make(), policy, options.steps, options.length)
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
        return
    print("| µs a step (median) | " + " | ".join((*PARTS, "in all", "least")) + " |")
    print("|---" * (len(PARTS) + 3) + "|")
    for name, (make, policy) in CASES.items():
        took = measured(make(), policy, options.steps, options.length)
        figures = [*[median(took[part]) for part in (*PARTS, "in all")], min(took["in all"])]
        print(f"| {name} | " + " | ".join(f"{figure:.0f}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
