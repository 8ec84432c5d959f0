"""What a model answers to prompts, kept line by line as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from torch.nn import Module

from specflow.batch import generate_many
from specflow.distill.folder import ANSWERS, ELSEWHERE, damaged
from specflow.distill.lesson import Text
from specflow.errors import DecodeError
from specflow.files import write
from specflow.guards.checks import shown
from specflow.guards.ids import ids_of
from specflow.origin import refuse_other
from specflow.state import Finished, Tokens

SLOTS: Final = 16
"""How many texts are decoded at a time."""


def answers_of(
    model: Module,
    folder: Path,
    prompts: Sequence[Tokens],
    stops: Tokens,
    new_tokens: int,
    answered: Callable[[int], object],
    origin: Mapping[str, str],
) -> list[Text]:
    """A model's greedy answers of up to `new_tokens` each, from the folder where they are there.

    `DecodeError` where those there are to other prompts, of another length, or come of another `origin`.
    """
    file = folder / ANSWERS
    asked = {"prompts": [list(prompt) for prompt in prompts], "stop": list(stops), "new_tokens": new_tokens}
    answers: dict[int, Tokens] = {}
    if file.exists():
        try:
            first, *lines = file.read_text("utf-8").splitlines(keepends=True)
            there = json.loads(first)
            of = dict(there.pop("origin", {}))
            same = there == asked
            is_cut = bool(lines) and not lines[-1].endswith("\n")  # it was being written
            whole = lines[:-1] if is_cut else lines
            answers = {int(row["prompt"]): ids_of("answer", row["answer"]) for row in map(json.loads, whole)}
        except Exception as error:  # a file of any content
            raise damaged(folder, error) from error
        if not same:
            happened, remedy = "the answers there are to other prompts, or of another length", "name another folder"
            raise DecodeError("out", happened, shown(str(folder)), remedy)
        refuse_other("out", of, origin, ELSEWHERE)
        if is_cut:
            write(file, "".join((first, *whole)).encode())
    else:
        write(file, f"{json.dumps({**asked, 'origin': dict(origin)})}\n".encode())
    left = [i for i in range(len(prompts)) if i not in answers]

    def progress(number: int, finished: Finished) -> None:
        answers[left[number]] = finished.state.output
        with file.open("a", encoding="utf-8") as kept:
            kept.write(f"{json.dumps({'prompt': left[number], 'answer': finished.state.output})}\n")
        answered(len(answers))

    if left:
        texts = [prompts[i] for i in left]
        generate_many(texts, model, max_gen_len=new_tokens, eos_tokens_id=list(stops), slots=SLOTS, progress=progress)
    return [Text(prompt + answers[i], len(prompt)) for i, prompt in enumerate(prompts)]
