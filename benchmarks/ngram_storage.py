"""What an n-gram storage costs: a call at growing sizes, a decoding step beside a 20 ms target pass, bytes a context.

    python benchmarks/ngram_storage.py

Read the ratios. Processor time, one thread, one process; each figure is the median of interleaved rounds.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import islice
from math import exp, log
from random import Random
from statistics import median
from time import thread_time

import torch

from specflow import Dice, GreedyProcessor, NGramDrafter, NGramStorage
from specflow.drafters import GuessingNGramDrafter
from specflow.stages import Adjust, Reject, UpdateNgram, Verify, commit
from specflow.stages.ngram import top_tokens
from specflow.state import DecodeState, Drafted, Request, chain

VOCABULARY = 49152
N = 4
SIZES = (1_000, 100_000, 1_000_000)
CALLS = 500
ROUNDS = 15
STEP = 20e-3
"""The target pass that a step is held against, in seconds."""


def zipf_text(random: Random, length: int) -> list[int]:
    """Tokens of which the i-th most frequent has a frequency of about 1 / i, as in natural text."""
    return [int(exp(random.random() * log(VOCABULARY))) - 1 for _ in range(length)]


def filled(size: int) -> tuple[NGramStorage, list[int]]:
    """A storage that keeps at least `size` contexts, and the text that it was taught."""
    random, storage, text = Random(0), NGramStorage(N, VOCABULARY), list[int]()
    while len(storage) < size:
        more = zipf_text(random, max(1, (size - len(storage)) // 2))
        storage.initialize(text[-N:] + more)
        text += more
    return storage, text


def interleaved(tasks: dict[str, Callable[[], object]], calls: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds for one of the `calls` that a task makes, the median of rounds in which each task has its turn."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = thread_time()
            task()
            times[name].append((thread_time() - start) / calls)
    return {name: median(values) for name, values in times.items()}


def calls_by_size() -> None:
    """`next_token` and `update` with lists of ints, half of them at places that the storage knows."""
    tasks: dict[str, Callable[[], object]] = {}
    for size in SIZES:
        storage, text = filled(size)
        random = Random(1)
        places = [random.randrange(N, len(text)) for _ in range(CALLS // 2)]
        fresh = zipf_text(random, CALLS // 2 + N)
        questions = [text[place - N : place] for place in places] + [fresh[i : i + N] for i in range(CALLS // 2)]
        random.shuffle(questions)

        def ask(storage: NGramStorage = storage, questions: list[list[int]] = questions) -> None:
            for question in questions:
                storage.next_token(question)

        def teach(storage: NGramStorage = storage, questions: list[list[int]] = questions) -> None:
            for question in questions:
                storage.update(question, question[0])

        tasks |= {f"next_token {size:>9,}": ask, f"update     {size:>9,}": teach}
    found = interleaved(tasks, CALLS)
    print(f"{'call, contexts':<22} {'µs':>6} {'against 1,000':>14}")
    for name, seconds in found.items():
        smallest = next(value for key, value in found.items() if key.startswith(name.split()[0]))
        print(f"{name:<22} {seconds * 1e6:6.2f} {seconds / smallest:13.2f}x")


def one_step() -> None:
    """Drafting γ = 5 from 100,000 contexts and a 2048 token text, then learning all six positions, top-3 filler too."""
    storage, text = filled(100_000)
    tokens = tuple(text[:2048])
    state = DecodeState(Request(tokens, len(tokens) + 100), tokens)
    logits = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0))
    best = tuple(logits.argmax(dim=-1).tolist())
    verify = Verify(lambda tokens, drafts: logits, GreedyProcessor(), Reject(Dice()))
    committed = Drafted(state, chain(best[:5])).then(verify).then(Adjust(Dice())).then(commit)
    assert committed.tokens == best
    draft, known = GuessingNGramDrafter(storage), NGramDrafter(storage)
    with_filler, without = UpdateNgram(storage, 3), UpdateNgram(storage, 1)
    found = interleaved(
        {
            "draft 5": lambda: tuple(islice(draft(tokens), 5)),
            "draft up to 5, known only": lambda: tuple(islice(known(tokens), 5)),
            "update, filler_top_k=1": lambda: without(committed),
            "update, filler_top_k=3": lambda: with_filler(committed),
            "  of it: top_tokens": lambda: top_tokens(logits, 3),
            "  torch.topk in its place": lambda: logits.topk(3),
        },
        calls=1,
        rounds=200,
    )
    found["draft 5 + update, filler"] = found["draft 5"] + found["update, filler_top_k=3"]
    print(f"\n{'a step, gamma 5':<28} {'µs':>7} {'of 20 ms':>9}")
    for name, seconds in found.items():
        print(f"{name:<28} {seconds * 1e6:7.1f} {seconds / STEP:8.2%}")


def bytes_a_context() -> None:
    """What Python allocates for the contexts of a prompt, and for contexts that were learned with filler."""
    text, others = zipf_text(Random(2), 60_000), zipf_text(Random(3), 120_000)
    plain = [[token] for token in text]
    filler = [[others[2 * i], others[2 * i + 1], token, token] for i, token in enumerate(text)]
    print(f"\n{'memory':<28} {'contexts':>9} {'bytes each':>11}")
    for name, followers in (("the prompt, filler_top_k=1", plain), ("filler_top_k=3", filler)):
        tracemalloc.start()
        storage = NGramStorage(N, VOCABULARY)
        storage.learn(tuple(text), 1, followers[1:])
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        print(f"{name:<28} {len(storage):>9,} {used / len(storage):11.0f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    calls_by_size()
    one_step()
    bytes_a_context()
