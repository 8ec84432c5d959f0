"""The files of a checkpoint: what its config says, and the tensors that somebody asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Final, cast, final

import torch
from attrs import field, frozen
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from specflow.errors import DecodeError, said
from specflow.guards.checks import MOST, shown, whole

CONFIG: Final = "config.json"

WEIGHTS: Final = ("model*.safetensors", "pytorch_model*.bin", "medusa_lm_head.safetensors", "medusa_lm_head.pt")
"""Where the weights of heads are, the first kind that is there."""

REMEDY: Final = "give a folder, or a name on the Hugging Face hub"


@final
@frozen(eq=False)
class Config:
    """A config.json, of which values are asked for by name. `DecodeError`, naming it, for one that cannot be."""

    said: Mapping[str, object]

    def size(self, name: str, otherwise: int | None = None) -> int:
        """A whole number of 1 or more."""
        value = self.said.get(name)
        if value is None and otherwise is not None:
            return otherwise
        whole(1, "see config.json", MOST)(name, value)
        return cast(int, value)

    def number(self, name: str, otherwise: float) -> float:
        """A number."""
        value = self.said.get(name, otherwise)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DecodeError(name, f"{name} of config.json is not a number", shown(value), "see config.json")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or False; False where nothing is said."""
        value = self.said.get(name) or False
        if not isinstance(value, bool):
            raise DecodeError(name, f"{name} of config.json is not true or false", shown(value), "see config.json")
        return value

    def part(self, name: str) -> Config | None:
        """A config within this one; None where there is none."""
        value = self.said.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise DecodeError(name, f"{name} of config.json is no config", shown(value), "see config.json")
        return Config(value)

    def ids(self, name: str) -> tuple[int, ...] | None:
        """Whole numbers of 0 or more; None where nothing is said, or none are named."""
        value = self.said.get(name)
        if value is None or value == []:
            return None
        if not isinstance(value, list):
            raise DecodeError(name, f"{name} of config.json is no list", shown(value), "see config.json")
        for each in value:
            whole(0, "see config.json", MOST)(name, each)
        return tuple(value)


@final
@frozen(eq=False)
class Checkpoint:
    """A folder with a config and weights, whose tensors are read when they are asked for.

    `DecodeError` for a folder that has none, and for files that are truncated, corrupted or of another kind. Pickles
    are read as tensors alone: no code of a checkpoint's is run.
    """

    name: str
    config: Config
    _places: Mapping[str, Path] = field(repr=False)

    @classmethod
    def at(cls, name: str | PathLike[str]) -> Checkpoint:
        """The checkpoint in a folder, or on the hub."""
        given: object = name
        if not isinstance(given, str | PathLike) or not isinstance(fspath(given), str) or not fspath(given):
            raise DecodeError("head", "the head has no name", shown(given), REMEDY)
        label = str(fspath(given))
        folder = _folder(label)
        files = next((found for pattern in WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
        if not files:
            raise DecodeError("head", "the folder has no weights of a head", shown(label), f"give {WEIGHTS[0]}")
        try:
            said_there: object = json.loads((folder / CONFIG).read_text("utf-8"))
            places = {tensor: file for file in files for tensor in _names(file)}
        except Exception as error:  # files of any content
            raise _unreadable(label, error) from error
        if not isinstance(said_there, dict):
            raise DecodeError("head", f"{CONFIG} is no config", shown(said_there), REMEDY)
        return cls(label, Config(said_there), places)

    @property
    def names(self) -> tuple[str, ...]:
        """What its tensors are called."""
        return tuple(self._places)

    def tensors(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """The tensors whose names are wanted."""
        found: dict[str, Tensor] = {}
        try:
            for file in dict.fromkeys(self._places.values()):
                names = [name for name, place in self._places.items() if place == file and wanted(name)]
                if names:
                    found |= _read(file, names)
        except Exception as error:  # files of any content
            raise _unreadable(self.name, error) from error
        return found


def _folder(name: str) -> Path:
    try:
        if Path(name).is_dir():
            return Path(name)
        return Path(snapshot_download(name, allow_patterns=[CONFIG, *WEIGHTS]))
    except Exception as error:  # the hub's, the network's, the disk's
        raise DecodeError("head", f"the head cannot be found ({said(error)})", shown(name), REMEDY) from error


def _unreadable(name: str, error: Exception) -> DecodeError:
    return DecodeError("head", f"the head cannot be read ({said(error)})", shown(name), "give a whole checkpoint")


def _names(file: Path) -> Sequence[str]:
    if file.suffix == ".safetensors":
        with safe_open(str(file), framework="pt") as opened:
            return [*opened.keys()]
    return [*_pickled(file)]


def _read(file: Path, names: Sequence[str]) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        with safe_open(str(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    held = _pickled(file)
    return {name: held[name] for name in names}


def _pickled(file: Path) -> dict[str, Tensor]:
    held: object = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(held, dict) or not all(isinstance(each, Tensor) for each in held.values()):
        raise ValueError(f"{file.name} holds no tensors by name")
    return {str(name): tensor for name, tensor in held.items()}
