"""The folder that a head is kept in."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Final

from torch.nn import Module

from specflow.errors import DecodeError, said
from specflow.guards.checks import shown
from specflow.origin import weights_of

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"
PROMPTS: Final = "prompts.json"
ANSWERS: Final = "answers.jsonl"
STATE: Final = "training.pt"

ELSEWHERE: Final = (
    "name another folder, or go on as it was begun (--model, --dtype, --accelerate); "
    "one of an older specflow cannot be gone on with"
)
"""What to do where the folder holds what another model said, or does not say which."""


def made_folder(out: object) -> Path:
    """The folder `out`, made where it is not there. `DecodeError` for what is no folder's name."""
    remedy = "name a folder that can be written"
    if not isinstance(out, str | PathLike) or not isinstance(fspath(out), str) or not fspath(out):
        raise DecodeError("out", "out is not the name of a folder", shown(out), remedy)
    folder = Path(fspath(out))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise DecodeError("out", f"the folder cannot be made ({said(error)})", shown(out), remedy) from error
    return folder


def origin_of(model: Module, reading: Module | None) -> dict[str, str]:
    """What the texts in the folder come of."""
    return {"model": weights_of(model), "reading": weights_of(model if reading is None else reading)}


def refuse_filled(folder: Path) -> None:
    """`DecodeError` for a folder with a head in it, or with a training."""
    there = [name for name in (CONFIG, WEIGHTS, STATE, ANSWERS) if (folder / name).exists()]
    if there:
        remedy = "name another folder, or go on with resume"
        raise DecodeError("out", "the folder holds a training, or a head", f"{folder}: {there[0]}", remedy)


def damaged(folder: Path, error: Exception) -> DecodeError:
    """What is said of a training whose files cannot be read."""
    happened, remedy = f"the training cannot be resumed ({said(error)})", "begin it anew in another folder"
    return DecodeError("out", happened, shown(str(folder / STATE)), remedy)
