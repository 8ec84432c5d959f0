"""What training-free drafters cost, and what they are worth.

    python -m benchmarks.drafters cost
    python -m benchmarks.drafters replay question.jsonl --texts texts.json --every 2

`cost` times one call of each drafter, the context having grown by a step, beside transformers' prompt lookup.

`replay` counts tokens per target pass. Greedy verification is deterministic, so a drafter's accepted lengths follow
from the greedy text alone. The texts are decoded once (SmolLM2, fp32, one token a pass) and kept in a file; then each
drafter drafts into them through the real step, with a table of the text in the model's place. Prompts are in the
format of Spec-Bench: a JSON object a line with `question_id`, `category` and `turns`, of which the first is asked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Final, TypedDict

import torch
from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from specflow import (
    CachedPredictor,
    Dice,
    Drafter,
    Fixed,
    GreedyProcessor,
    Predictor,
    PromptLookup,
    SuffixDrafter,
    Tally,
    Tokens,
    at_most,
    autoregressive_step,
    first_of,
    longest,
    run,
    speculative_step,
    start,
    then,
)
from specflow.models import load

NEW_TOKENS: Final = 128
PROMPT_TOKENS: Final = 1024
CHAT: Final = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
"""The categories that Spec-Bench takes from MT-bench and reports as one."""

Make = Callable[[], Drafter]

DRAFTERS: Final[Mapping[str, Make]] = {
    "prompt lookup, transformers' defaults": PromptLookup,
    "prompt lookup, n ≤ 3, 10 tokens": lambda: PromptLookup(3, 10),
    "suffix": SuffixDrafter,
    "suffix, always 5": lambda: SuffixDrafter(most=5, factor=0, offset=5),
    "suffix, always 10": lambda: SuffixDrafter(most=10, factor=0, offset=10),
    "suffix, always 20": lambda: SuffixDrafter(most=20, factor=0, offset=20),
    "suffix, always 40": lambda: SuffixDrafter(most=40, factor=0, offset=40),
    "suffix, 1 per token matched": lambda: SuffixDrafter(factor=1, offset=0),
    "suffix, 2 per token matched + 2": lambda: SuffixDrafter(factor=2, offset=2),
    "suffix, 4 per token matched + 2": lambda: SuffixDrafter(factor=4, offset=2),
    "suffix, matches of 2 or more": lambda: SuffixDrafter(shortest=2),
    "first_of(suffix of 2 or more, lookup)": lambda: first_of(SuffixDrafter(shortest=2), PromptLookup(1, 4)),
    "longest(suffix, lookup)": lambda: longest(SuffixDrafter(), PromptLookup()),
    "then(suffix, suffix)": lambda: then(SuffixDrafter(), SuffixDrafter()),
    "at_most(3, suffix)": lambda: at_most(3, SuffixDrafter()),
}


class Text(TypedDict):
    """A prompt and the greedy text behind it."""

    question_id: int
    category: str
    prompt: list[int]
    output: list[int]


def read_prompts(path: Path, every: int) -> list[dict[str, object]]:
    """Every `every`th line of a file of prompts."""
    return [json.loads(line) for line in path.read_text().splitlines()][::every]


def greedy_texts(prompts: Sequence[dict[str, object]], kept: Path) -> list[Text]:
    """The greedy text of each prompt, from the file `kept` where it is there, else decoded and added to it."""
    texts: list[Text] = json.loads(kept.read_text()) if kept.exists() else []
    known = {text["question_id"]: text for text in texts}
    missing = [prompt for prompt in prompts if prompt["question_id"] not in known]
    if missing:
        loaded = load("smollm2", "float32").unwrap()
        step = autoregressive_step(CachedPredictor(loaded.model), GreedyProcessor(), Dice())
        for i, prompt in enumerate(missing, 1):
            turns = prompt["turns"]
            assert isinstance(turns, list)
            tokens = loaded.chat(turns[0])[-PROMPT_TOKENS:]
            output = run(step, start(tokens, NEW_TOKENS, loaded.stop).unwrap()).state.output
            text = Text(
                question_id=int(str(prompt["question_id"])),
                category=str(prompt["category"]),
                prompt=list(tokens),
                output=list(output),
            )
            known[text["question_id"]] = text
            kept.write_text(json.dumps(list(known.values())))
            print(f"decoded {i} of {len(missing)}", flush=True)
    return [known[int(str(prompt["question_id"]))] for prompt in prompts]


def table(text: Tokens, vocab_size: int) -> Predictor:
    """A model that knows one text by heart: its logits behind i tokens are one-hot on token i."""

    def predict(tokens: Tokens, last: int) -> Tensor:
        logits = torch.zeros(last, vocab_size)
        for row, position in enumerate(range(len(tokens) - last + 1, len(tokens) + 1)):
            if position < len(text):
                logits[row, text[position]] = 1.0
        return logits

    return predict


def replayed(drafter: Drafter, text: Text, vocab_size: int) -> Tally:
    """What happens when the drafter drafts into a text that is known. It comes out as it was, or this fails."""
    whole = (*text["prompt"], *text["output"])
    step = speculative_step(drafter, table(whole, vocab_size), GreedyProcessor(), Dice(), Fixed(1000))
    state = run(step, start(text["prompt"], len(text["output"])).unwrap()).state
    assert state.tokens == whole
    return state.tally


def replay(texts: Sequence[Text], drafters: Mapping[str, Make]) -> None:
    """Print tokens per target pass for each drafter, in all and for each category."""
    groups = {text["question_id"]: "chat" if text["category"] in CHAT else text["category"] for text in texts}
    names = ["all", *dict.fromkeys(groups.values())]
    vocab_size = 1 + max(max(text["prompt"] + text["output"]) for text in texts)
    print(f"{'tokens per target pass':40}", *(f"{name[:9]:>9}" for name in names), f"{'drafts':>9}", sep=" ")
    for label, make in drafters.items():
        drafter = make()
        tallies = {text["question_id"]: replayed(drafter, text, vocab_size) for text in texts}
        row = []
        for name in names:
            chosen = [text for text in texts if name in ("all", groups[text["question_id"]])]
            passes = sum(tallies[text["question_id"]].steps for text in chosen)
            row.append(sum(len(text["output"]) for text in chosen) / passes)
        total = sum(tallies.values(), Tally())
        print(f"{label:40}", *(f"{value:9.3f}" for value in row), f"{total.drafted / total.steps:9.1f}", flush=True)


def speech(length: int, random: Random) -> Iterator[int]:
    """Tokens by Zipf's law that now and then repeat what was said before, as texts do."""
    said: list[int] = []
    ranks = range(1, 20_000)
    weights = [1 / rank for rank in ranks]
    while len(said) < length:
        begin = random.randrange(max(1, len(said)))
        said += said[begin : begin + random.randrange(12)] if random.random() < 0.3 else random.choices(ranks, weights)
    yield from said[:length]


def microseconds(call: Callable[[], object]) -> float:
    begin = perf_counter()
    call()
    return (perf_counter() - begin) * 1e6


def cost(contexts: Sequence[int], calls: int) -> None:
    """Print the median µs of a call, the context having grown by 2 tokens since the last, all drafters taking turns."""
    titles = ("transformers", "PromptLookup", "SuffixDrafter", "suffix / transformers")
    print("µs a call ", *(f"{title:>22}" for title in titles))
    for context in contexts:
        text = tuple(speech(context + 2 * calls, Random(0)))
        theirs, lookup, suffix = PromptLookupCandidateGenerator(max_length=10**9), PromptLookup(), SuffixDrafter()
        list(suffix(text[:context]))
        times: list[tuple[float, float, float]] = []
        for end in range(context, context + 2 * calls, 2):
            ids, tokens = torch.tensor([text[:end]]), text[:end]
            times.append(
                (
                    microseconds(lambda: theirs.get_candidates(ids)),  # noqa: B023 - called here and now
                    microseconds(lambda: list(lookup(tokens))),  # noqa: B023 - called here and now
                    microseconds(lambda: list(suffix(tokens))),  # noqa: B023 - called here and now
                )
            )
        a, b, c = (median(column) for column in zip(*times, strict=True))
        print(f"{context:10}", *(f"{figure:22.2f}" for figure in (a, b, c, c / a)), flush=True)


def main() -> None:
    """Read the command line and run one of the two."""
    parser = argparse.ArgumentParser(description="What training-free drafters cost, and what they are worth.")
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("cost", help="µs a call, beside transformers' prompt lookup")
    timing.add_argument("--calls", type=int, default=300)
    timing.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    worth = commands.add_parser("replay", help="tokens per target pass, on the greedy texts of a file of prompts")
    worth.add_argument("prompts", type=Path)
    worth.add_argument("--texts", type=Path, default=Path("/tmp/specflow-greedy-texts.json"))
    worth.add_argument("--every", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.command == "cost":
        cost(arguments.contexts, arguments.calls)
    else:
        replay(greedy_texts(read_prompts(arguments.prompts, arguments.every), arguments.texts), DRAFTERS)


if __name__ == "__main__":
    main()
