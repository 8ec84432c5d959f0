"""What training-free drafters cost, and what they are worth.

    python -m benchmarks.drafters cost
    python -m benchmarks.drafters replay question.jsonl --texts texts.json
    python -m benchmarks.drafters remember others.jsonl memory.safetensors --texts others.json
    python -m benchmarks.drafters replay question.jsonl --texts texts.json --memory memory.safetensors
    python -m benchmarks.drafters replay question.jsonl --texts texts.json --bigrams bigrams.safetensors
    python -m benchmarks.drafters recycle question.jsonl --texts texts.json --bigrams bigrams.safetensors --rows rows
    python -m benchmarks.drafters edits question.jsonl

`cost` times one call of each drafter, the context having grown by a step, beside transformers' prompt lookup.

`replay` counts tokens a pass. Greedy verification is deterministic, so a drafter's accepted lengths follow
from the greedy text alone. The texts are decoded once (SmolLM2, fp32, one token a pass) and kept in a file; then each
drafter drafts into them (`specflow.replay`). Prompts are in the format of Spec-Bench: a JSON object a line with
`category` and `turns`, of which the first is asked. Of a prompt of more than 1024 tokens the last 1024 are read.

`remember` saves an n-gram storage of the model's texts, and with `--memory` the drafters know them. With `--bigrams`
trees know the model's bigrams; the model is asked for them where the file is not there.

`recycle` does it for drafters that learn from the target's rows of logits, rejected drafts' among them, of which the
text alone says nothing. So the target reads each draft, once: the likeliest tokens of each row are kept in the file
`--rows`, and a drafter whose drafts were all read before is counted without the model. Each table begins anew with
each text, or is one for all texts, which are then decoded in the order of the file.

`edits` does the same as `replay` for a model that edits its prompt without a fault. Every text is an edited question of
at least 100 words and at most 1024 tokens: one of its words in 20 is another one, or its three most frequent words are
renamed throughout, or one word in 50 is replaced, one inserted and one left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from statistics import median
from tempfile import gettempdir
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
    GammaPolicy,
    GreedyProcessor,
    LookupTree,
    NGramDrafter,
    NGramStorage,
    PointMass,
    Predictor,
    PromptLookup,
    Proposal,
    SuffixDrafter,
    Tokens,
    accelerate,
    at_most,
    autoregressive_step,
    first_of,
    longest,
    run,
    start,
    then,
)
from specflow.catalogue import Drafting, Setting
from specflow.drafters import Bigrams, LogitTree, Recycled, RecyclingTree, as_chain
from specflow.models import bigrams_of, load
from specflow.replay import Decoder, RecordedText, Recording, replay
from specflow.stages import Recycle, UpdateNgram

KEPT: Final = 24
"""How many logits of a row are kept."""

NEW_TOKENS: Final = 128
PROMPT_TOKENS: Final = 1024
VOCABULARY: Final = 49152
CHAT: Final = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
"""The categories that Spec-Bench takes from MT-bench and reports as one."""


class Question(TypedDict):
    """A line of a file of prompts."""

    category: str
    turns: list[str]


class Text(TypedDict):
    """A question's first turn, its prompt, and the greedy text behind it."""

    category: str
    asked: str
    prompt: list[int]
    output: list[int]


def read_questions(path: Path, every: int) -> list[Question]:
    """Every `every`th line of a file of prompts."""
    return [json.loads(line) for line in path.read_text().splitlines()][::every]


def greedy_texts(questions: Sequence[Question], kept: Path) -> list[Text]:
    """The greedy text of each question, from the file `kept` where it is there, else decoded and added to it."""
    texts: list[Text] = json.loads(kept.read_text()) if kept.exists() else []
    known = {text["asked"]: text for text in texts}
    missing = [question for question in questions if question["turns"][0] not in known]
    if missing:
        loaded = load("smollm2", "float32").unwrap()
        step = autoregressive_step(CachedPredictor(loaded.model), GreedyProcessor(), Dice())
        for i, question in enumerate(missing, 1):
            asked = question["turns"][0]
            prompt = loaded.chat(asked)[-PROMPT_TOKENS:]
            output = run(step, start(prompt, NEW_TOKENS, loaded.stop).unwrap()).state.output
            known[asked] = Text(category=question["category"], asked=asked, prompt=list(prompt), output=list(output))
            kept.write_text(json.dumps(list(known.values())))
            print(f"decoded {i} of {len(missing)}", flush=True)
    return [known[question["turns"][0]] for question in questions]


EVERYTHING: Final = Fixed(1000)
"""The drafters decide themselves how much they draft."""


def drafting(drafter: Drafter, gamma: GammaPolicy = EVERYTHING) -> Decoder:
    """Speculative decoding with one drafter for all texts, which are decoded in turn."""
    return Decoder.of(drafter, gamma)


def teaching(make: Callable[[Setting], Drafting], gamma: GammaPolicy = EVERYTHING) -> Decoder:
    """The same with a drafter for each text, and stages that teach it."""
    return Decoder(make, lambda meter: gamma)


def bigrams_in(path: Path) -> Bigrams:
    """The table in a file, which is made where it is not there."""
    if not path.exists():
        loaded = load("smollm2", "float32").unwrap()
        began = perf_counter()
        bigrams_of(accelerate.fast(loaded.model), loaded.tokenizer).save(path)
        print(f"the target was asked for its bigrams in {perf_counter() - began:.0f} s", flush=True)
    return Bigrams.load(path)


def without_rejected_copies() -> Drafter:
    """`SuffixDrafter`, if each rejected copy were lost: what followed the longest match, and nothing where none is."""
    suffix = SuffixDrafter()

    def draft(tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        length, end = suffix.read(tokens).match
        for i in range(min(20, 2 * length + 3) if length else 0):
            token = tokens[end + i % (len(tokens) - end)]
            yield Proposal(token, source="suffix")

    return draft


def nasd(n: int, gamma: int) -> Decoder:
    """NASD that starts anew with each text. Of a known text only what is emitted can be learned: no filler."""

    def make(setting: Setting) -> Drafting:
        storage = NGramStorage(n, VOCABULARY)
        storage.initialize(setting.text)
        return Drafting(NGramDrafter(storage), (UpdateNgram(storage, filler_top_k=1),))

    return teaching(make, Fixed(gamma))


def with_memory(storage: NGramStorage) -> Drafter:
    """The text's own repetitions first, and where there are none, what the storage remembers."""
    return first_of(SuffixDrafter(), at_most(5, NGramDrafter(storage, source="memory")))


def with_long_memory(storage: NGramStorage) -> Drafter:
    """The same, as long as drafts are worth anything at all: most tokens a pass, but many drafts."""
    return first_of(SuffixDrafter(factor=0, offset=20), at_most(10, NGramDrafter(storage, source="memory")))


def with_memory_and_rejected_copies(storage: NGramStorage) -> Drafter:
    """The same, and where the storage remembers nothing either, copies that are worth nothing."""
    return first_of(with_memory(storage), SuffixDrafter(shortest=0))


def learning(remembering: Callable[[NGramStorage], Drafter]) -> Decoder:
    """A memory that begins empty and learns each text while it is decoded, for those that come later."""
    storage = NGramStorage(4, VOCABULARY)
    known = Drafting(remembering(storage), (UpdateNgram(storage, filler_top_k=1),))
    return teaching(lambda setting: known)


def knowing_the_others(texts: Sequence[Text]) -> Decoder:
    """A memory of what the model wrote for all other prompts: of a server that has seen such requests before."""

    def make(setting: Setting) -> Drafting:
        storage = NGramStorage(4, VOCABULARY)
        for other in texts:
            if tuple(other["prompt"]) != setting.text:
                storage.initialize(other["output"])
        return Drafting(with_memory(storage))

    return teaching(make)


def editors() -> dict[str, Decoder]:
    """The rows of the table that `edits` prints, which are among those of `replay`."""
    return {
        "lookup, n ≤ 3, 10 tokens": drafting(PromptLookup(3, 10)),
        "NASD, n = 4, gamma 10": nasd(4, 10),
        "suffix": drafting(SuffixDrafter()),
        "suffix, shortest = 0": drafting(SuffixDrafter(shortest=0)),
        "suffix, rejected copies lost": drafting(without_rejected_copies()),
        "suffix, always 10": drafting(SuffixDrafter(factor=0, offset=10)),
        "suffix, always 20": drafting(SuffixDrafter(factor=0, offset=20)),
        "suffix, shortest = 0, always 20": drafting(SuffixDrafter(factor=0, offset=20, shortest=0)),
        "tree, 4 drafts": drafting(LookupTree(), Fixed(4)),
        "tree, 10 drafts": drafting(LookupTree(), Fixed(10)),
        "tree, 20 drafts": drafting(LookupTree(), Fixed(20)),
    }


def decoders(texts: Sequence[Text], memory: Path | None, bigrams: Path | None) -> dict[str, Decoder]:
    """The rows of the table that `replay` prints."""
    rows = {
        "lookup, transformers' defaults": drafting(PromptLookup()),
        "NASD, n = 3, gamma 5": nasd(3, 5),
        **editors(),
        "suffix, always 5": drafting(SuffixDrafter(factor=0, offset=5)),
        "suffix, always 40": drafting(SuffixDrafter(most=40, factor=0, offset=40)),
        "suffix, m + 4": drafting(SuffixDrafter(factor=1, offset=4)),
        "suffix, 4m + 2": drafting(SuffixDrafter(factor=4, offset=2)),
        "suffix of 2 or more": drafting(SuffixDrafter(shortest=2)),
        "longest(suffix, lookup)": drafting(longest(SuffixDrafter(), PromptLookup())),
        "first_of(suffix of 2, lookup)": drafting(first_of(SuffixDrafter(shortest=2), PromptLookup())),
        "then(suffix, suffix)": drafting(then(SuffixDrafter(), SuffixDrafter())),
        "suffix, memory that learns": learning(with_memory),
        "the same, else rejected copies": learning(with_memory_and_rejected_copies),
        "suffix, memory of the others": knowing_the_others(texts),
    }
    if memory is not None:
        storage = NGramStorage(4, VOCABULARY)
        storage.load(memory)
        rows["memory alone"] = drafting(at_most(5, NGramDrafter(storage)))
        rows["suffix, memory"] = drafting(with_memory(storage))
        rows["suffix, memory, long drafts"] = drafting(with_long_memory(storage))
    if bigrams is not None:
        known = bigrams_in(bigrams)
        rows["likeliest path, bigrams"] = drafting(as_chain(LookupTree(known)))
        rows |= {
            f"tree and bigrams, {n} drafts": drafting(LookupTree(known), Fixed(n)) for n in (3, 4, 6, 8, 10, 16, 32)
        }
    return rows


def recorded(texts: Sequence[Text], kept: Path | None = None) -> Recording:
    """The texts as a recording, each pass of which takes as long as any other, with the rows in the file `kept`."""
    known = [(tuple(text["prompt"]), tuple(text["output"])) for text in texts]
    rows = Recording.load(kept).rows if kept is not None and kept.exists() else {}
    whole = [RecordedText(prompt, output, len(prompt) + len(output)) for prompt, output in known]
    return Recording(tuple(whole), VOCABULARY, kept=KEPT, rows=rows)


def show(
    texts: Sequence[Text], recording: Recording, rows: dict[str, Decoder], live: Predictor | None = None
) -> Recording:
    """Print tokens a pass of each decoder, in all and for each category, and drafts per pass.

    `live` is asked for rows that are missing; what is returned holds them.
    """
    groups = ["chat" if text["category"] in CHAT else text["category"] for text in texts]
    names = ["all", *dict.fromkeys(groups)]
    print(f"{'tokens a pass':30}", *(f"{name[:9]:>9}" for name in names), f"{'drafts':>9}")
    for label, decoder in rows.items():
        played = replay(recording, decoder, live, most=None)
        recording = played.recording
        row = []
        for name in names:
            chosen = [each for each, group in zip(played.texts, groups, strict=True) if name in ("all", group)]
            row.append(sum(len(each.text.output) for each in chosen) / sum(len(each.rounds) for each in chosen))
        drafts = played.tally.drafted / played.passes
        print(f"{label:30}", *(f"{value:9.3f}" for value in row), f"{drafts:9.1f}", flush=True)
    return recording


def recycling(
    drafter: Callable[[Recycled], Drafter], gamma: int, before: Bigrams, *, kept: bool, n: int = 2
) -> Decoder:
    """A drafter over a table that learns: one for all texts where it is `kept`, else one for each."""
    shared = Recycled(VOCABULARY, n=n, before=before)

    def make(setting: Setting) -> Drafting:
        table = shared if kept else Recycled(VOCABULARY, n=n, before=before)
        return Drafting(drafter(table), (Recycle(table),))

    return teaching(make, Fixed(gamma))


def recyclers(bigrams: Path) -> dict[str, Decoder]:
    """The rows of the table that `recycle` prints."""
    known = bigrams_in(bigrams)
    rows: dict[str, Decoder] = {}
    for kept, where in ((False, "of the text"), (True, "of all texts")):
        rows |= {
            f"static tree, {where}": recycling(RecyclingTree, 16, known, kept=kept),
            f"guesses and lookup, {where}": recycling(LogitTree, 16, known, kept=kept),
            f"tree and table, {where}": recycling(LookupTree, 16, known, kept=kept),
        }
    return {"tree and bigrams, 16 drafts": drafting(LookupTree(known), Fixed(16))} | rows


def renamed(words: list[str], names: Sequence[str], random: Random) -> list[str]:
    """The three most frequent words of four letters or more have other names."""
    frequent = Counter(word for word in words if len(word) > 3 and word.isalpha()).most_common(3)
    new = dict(zip((word for word, _ in frequent), random.sample(names, 3), strict=False))
    return [new.get(word, word) for word in words]


def changed(words: list[str], names: Sequence[str], random: Random, *, replaced: float, moved: float) -> list[str]:
    """A share `replaced` of the words is replaced; a share `moved` is inserted, and another one left out."""
    text: list[str] = []
    for word in words:
        chance = random.random() if word.isalpha() else 1.0
        if chance < moved:
            text += [random.choice(names), " ", word]
        elif chance >= 2 * moved:
            text.append(random.choice(names) if chance < 2 * moved + replaced else word)
    return text


def edited(questions: Sequence[Question]) -> list[Text]:
    """Each question of 100 words or more that a prompt holds whole, edited in three ways, each a text behind it."""
    loaded, random = load("smollm2").unwrap(), Random(0)
    long = [question["turns"][0] for question in questions if len(question["turns"][0].split()) >= 100]
    asked = [question for question in long if len(loaded.chat(question)) <= PROMPT_TOKENS]
    names = sorted({word for question in asked for word in question.split() if len(word) > 3 and word.isalpha()})
    texts: list[Text] = []
    for question in asked:
        words = re.split(r"(\W+)", question)
        versions = {
            "replaced": changed(words, names, random, replaced=0.05, moved=0.0),
            "renamed": renamed(words, names, random),
            "edited": changed(words, names, random, replaced=0.02, moved=0.02),
        }
        for category, version in versions.items():
            output = loaded.tokenizer("".join(version)).input_ids[: 2 * NEW_TOKENS]
            prompt = list(loaded.chat(question))
            texts.append(Text(category=category, asked=question, prompt=prompt, output=output))
    return texts


def remember(texts: Sequence[Text], path: Path) -> None:
    """Save what the model wrote, to be drafted from later."""
    storage = NGramStorage(4, VOCABULARY)
    for text in texts:
        storage.initialize(text["output"])
    storage.save(path)


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
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description="What training-free drafters cost, and what they are worth.")
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("cost", help="µs a call, beside transformers' prompt lookup")
    timing.add_argument("--calls", type=int, default=300)
    timing.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    worth = commands.add_parser("replay", help="tokens a pass, on the greedy texts of a file of prompts")
    worth.add_argument("prompts", type=Path)
    worth.add_argument("--texts", type=Path, default=Path(gettempdir()) / "specflow-greedy-texts.json")
    worth.add_argument("--every", type=int, default=1, help="take every n-th prompt")
    worth.add_argument("--memory", type=Path, help="a saved NGramStorage with n = 4 to draft from as well")
    worth.add_argument("--bigrams", type=Path, help="a saved Bigrams for trees, made where it is not there")
    memory = commands.add_parser("remember", help="save a storage of the greedy texts of a file of prompts")
    memory.add_argument("prompts", type=Path)
    memory.add_argument("storage", type=Path)
    memory.add_argument("--texts", type=Path, default=Path(gettempdir()) / "specflow-greedy-texts.json")
    learning_ones = commands.add_parser("recycle", help="tokens a pass, of drafters that learn from its rows")
    learning_ones.add_argument("prompts", type=Path)
    learning_ones.add_argument("--texts", type=Path, default=Path(gettempdir()) / "specflow-greedy-texts.json")
    learning_ones.add_argument("--every", type=int, default=1, help="take every n-th prompt")
    learning_ones.add_argument(
        "--bigrams", type=Path, required=True, help="a saved Bigrams, made where it is not there"
    )
    learning_ones.add_argument("--rows", type=Path, required=True, help="the rows that were read, kept in this file")
    learning_ones.add_argument("--only", default="", help="the rows of the table whose names hold this")
    editing = commands.add_parser("edits", help="tokens a pass, of a model that edits its prompt")
    editing.add_argument("prompts", type=Path)
    arguments = parser.parse_args()
    match arguments.command:
        case "cost":
            cost(arguments.contexts, arguments.calls)
        case "edits":
            texts = edited(read_questions(arguments.prompts, 1))
            show(texts, recorded(texts), editors())
        case "recycle":
            texts = greedy_texts(read_questions(arguments.prompts, arguments.every), arguments.texts)
            target = CachedPredictor(accelerate.fast(load("smollm2", "float32").unwrap().model))
            recording, passes = recorded(texts, arguments.rows), list[int]()

            def live(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
                passes.append(len(drafts))
                return target(tokens, drafts)

            for name, decoder in recyclers(arguments.bigrams).items():
                if arguments.only in name:
                    recording = show(texts, recording, {name: decoder}, live)
                    recording.save(arguments.rows)
            print(f"{len(passes)} passes of the model")
        case "remember":
            remember(greedy_texts(read_questions(arguments.prompts, 1), arguments.texts), arguments.storage)
        case _:
            texts = greedy_texts(read_questions(arguments.prompts, arguments.every), arguments.texts)
            show(texts, recorded(texts), decoders(texts, arguments.memory, arguments.bigrams))


if __name__ == "__main__":
    main()
