"""What it costs to try a model, once, and to look at it in each pass.

python -m benchmarks.trial [--model NAME]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import copy
from statistics import median
from time import perf_counter

from returns.result import Success

from specflow import TEXT, CachedPredictor, Proposal
from specflow.models import SMOLLM2, load
from specflow.predictors.watch import Watch

TIMES = 5


def milliseconds(work: Callable[[], object], times: int = TIMES) -> float:
    """The median time of some runs."""
    taken = []
    for _ in range(times):
        began = perf_counter()
        work()
        taken.append(1e3 * (perf_counter() - began))
    return median(taken)


def main() -> None:
    """Prints one line for each price."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default=SMOLLM2, help="a name that specflow.models.load takes")
    loaded = load(parser.parse_args().model)
    assert isinstance(loaded, Success), loaded.failure()
    model, prompt = loaded.unwrap().model, loaded.unwrap().chat("Hello")

    def tried() -> None:
        CachedPredictor(copy(model))(prompt, ())  # another object over the same weights

    def tried_with_trees() -> None:
        CachedPredictor(copy(model))(prompt, (Proposal(5), Proposal(6, parent=TEXT)))

    known = CachedPredictor(model)
    known(prompt, ())
    once = milliseconds(lambda: CachedPredictor(model)(prompt, ()))
    print(f"the first reading of a prompt of {len(prompt)} tokens: {once:.0f} ms where the model is known")
    print(f"the trial, once for a model object: {milliseconds(tried) - once:.0f} ms")
    print(f"with trees of drafts: {milliseconds(tried_with_trees) - once:.0f} ms")
    print(f"a pass over one token: {milliseconds(lambda: known((*prompt, 7), ()), 20):.1f} ms")
    print(f"a look at the model before it: {1e3 * milliseconds(Watch(model).look, 50):.0f} µs")


if __name__ == "__main__":
    main()
