"""Prompts that a model makes up, where there are no others: what it says in a user's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Final

from torch.nn import Module

from specflow.batch import generate_many
from specflow.distill.answers import SLOTS
from specflow.distill.folder import ELSEWHERE, PROMPTS, made_folder, origin_of
from specflow.errors import DecodeError, said
from specflow.files import write
from specflow.guards.checks import MOST, a, calls, shown, whole
from specflow.guards.ids import ids_of
from specflow.models import Loaded
from specflow.origin import refuse_other
from specflow.processors import MultinomialProcessor
from specflow.state import Finished, Tokens

MARK: Final = "specflow"
"""What a user says in the template that is looked at; whatever it is, it is cut out."""


def made_up(
    loaded: Loaded,
    count: int,
    seed: int = 0,
    most: int = 64,
    told: Callable[[int], object] = lambda done: None,
    reading: Module | None = None,
) -> list[Tokens]:
    """The ids of `count` prompts of up to `most` tokens, in the model's chat template, sampled by a seed.

    `told` hears how many there are. What `reading` computes stands for the model, as in `distill`.

    `DecodeError` for a model without a chat template, or whose template does not show
    where a user speaks.
    Source: Xu et al. 2406.08464 (Magpie).
    """
    a(Loaded, "give what `load` returns")("loaded", loaded)
    for name, value in (("count", count), ("most", most)):
        whole(1, "ask for one at least", MOST)(name, value)
    calls("a listener", "give a function of a number")("told", told)
    if reading is not None:
        a(Module, "give a module, such as accelerate.fast(model)")("reading", reading)
    before, after = _around(loaded)
    ends = loaded.stop | {*after[:1]}
    done: list[int] = []

    def ended(number: int, end: Finished) -> None:
        done.append(number)
        told(len(done))

    texts = generate_many(
        [before] * int(count),
        loaded.model if reading is None else reading,
        logits_processor=MultinomialProcessor(1.0),
        max_gen_len=most,
        slots=SLOTS,
        eos_tokens_id=sorted(ends),
        seed=seed,
        progress=ended,
    )
    outputs = [end.state.output for end in texts]
    return [before + (tokens[:-1] if tokens[-1:] and tokens[-1] in ends else tokens) + after for tokens in outputs]


def _around(loaded: Loaded) -> tuple[Tokens, Tokens]:
    """The ids before and after what a user says, up to the model's answer."""
    loaded.check_template()
    template: object = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], add_generation_prompt=True, tokenize=False
    )
    before, found, after = template.partition(MARK) if isinstance(template, str) else ("", "", "")
    if not found or not before:
        remedy = "give prompts"
        raise DecodeError("model", "its chat template does not show where a user speaks", MARK, remedy)
    ids = partial(loaded.tokenizer, add_special_tokens=False)
    return tuple(ids(before).input_ids), tuple(ids(after).input_ids)


def kept_prompts(
    loaded: Loaded,
    count: int,
    seed: int,
    out: str | PathLike[str],
    told: Callable[[int], object] = lambda done: None,
    reading: Module | None = None,
) -> list[Tokens]:
    """What `made_up` gives, kept in the folder `out`: from there when it is asked for again.

    `DecodeError` as `made_up`, for a folder that cannot be written, for a file there that is damaged, and for prompts
    there that another model made up.
    """
    a(Loaded, "give what `load` returns")("loaded", loaded)
    file = made_folder(out) / PROMPTS
    whole(1, "ask for one at least", MOST)("count", count)
    whole(-MOST, "give a whole number", MOST)("seed", seed)
    count, seed = int(count), int(seed)
    origin = origin_of(loaded.model, reading)
    if file.exists():
        try:
            kept = json.loads(file.read_text("utf-8"))
            asked, prompts = (kept["seed"], kept["count"]), [ids_of("prompts", ids) for ids in kept["prompts"]]
            of = dict(kept.get("origin", {}))
        except Exception as error:  # a file of any content
            remedy = "begin anew in another folder"
            raise DecodeError("out", f"the prompts cannot be read ({said(error)})", shown(str(file)), remedy) from error
        refuse_other("out", of, origin, ELSEWHERE)
        if asked == (seed, count):
            return prompts
    prompts = made_up(loaded, count, seed, told=told, reading=reading)
    write(file, json.dumps({"seed": seed, "count": count, "origin": origin, "prompts": prompts}).encode())
    return prompts
