"""Prompts in Spec-Bench's JSONL format, and the few dozen of our own that come with specflow."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import Final, final

from attrs import frozen
from returns.result import safe

from specflow.errors import DecodeError
from specflow.guards.checks import a

OWN_PROMPTS: Final = Path(__file__).with_name("prompts.jsonl")
"""Chat, translation, summarising, code edits, extraction and arithmetic; written for specflow."""


@final
@frozen
class Prompt:
    """One question. Of several turns the benchmark asks the first: the others need answers, which may differ."""

    question_id: int
    category: str
    turns: tuple[str, ...]

    @property
    def text(self) -> str:
        """What is asked."""
        return self.turns[0]


@safe(exceptions=(DecodeError,))
def read_prompts(path: Path = OWN_PROMPTS) -> tuple[Prompt, ...]:
    """The prompts of a JSONL file whose lines have `question_id`, `category` and `turns`; other fields are ignored.

    The format is that of Spec-Bench (`data/spec_bench/question.jsonl`) and of MT-bench. Refused: a file that cannot be
    read, and the first line that is not such an object. `path` is a `Path`.

    >>> len(read_prompts().unwrap())
    36
    """
    a(Path, "give a Path")("path", path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a JSON string may hold what else ends a line of text
    except (OSError, UnicodeDecodeError) as error:
        remedy = "give a JSONL file in Spec-Bench's format"
        raise DecodeError("prompts", f"the prompts cannot be read ({error})", str(path), remedy) from error
    prompts = tuple([_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()])
    twice = [number for number, count in Counter(prompt.question_id for prompt in prompts).items() if count > 1]
    if twice:
        raise DecodeError("prompts", "a question_id occurs twice", twice[0], "number the prompts apart")
    if not prompts:
        raise DecodeError("prompts", "the file holds no prompts", str(path), "give at least one line")
    return prompts


def spread(prompts: Sequence[Prompt], limit: int | None) -> tuple[Prompt, ...]:
    """`limit` ≥ 1 prompts, one of each category in turn, so that a short run still sees all of them.

    >>> asked = [Prompt(i, category, ("?",)) for i, category in enumerate("aaab")]
    >>> [prompt.question_id for prompt in spread(asked, 3)]
    [0, 3, 1]
    """
    if limit is None or limit >= len(prompts):
        return tuple(prompts)
    categories = defaultdict(list)
    for prompt in prompts:
        categories[prompt.category].append(prompt)
    turns = chain.from_iterable(zip_longest(*categories.values()))
    return tuple([prompt for prompt in turns if prompt is not None][:limit])


def _prompt(path: Path, number: int, line: str) -> Prompt:
    with suppress(ValueError, RecursionError):
        match json.loads(line):
            case {"question_id": int(question_id), "category": str(category), "turns": [str(first), *more]}:
                return Prompt(question_id, category, (first, *map(str, more)))
    remedy = 'write {"question_id": 1, "category": "chat", "turns": ["…"]} on each line'
    raise DecodeError("prompts", f"line {number} of {path} is not a prompt", line[:60], remedy)
