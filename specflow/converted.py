"""GGUF files as transformers reads models: converted once, and kept in the user's cache directory by their content."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import file_digest
from pathlib import Path
from shutil import rmtree
from typing import Final, cast
from zlib import crc32

import torch
import transformers
from filelock import FileLock
from gguf import GGUFReader
from platformdirs import user_cache_path
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from specflow.errors import DecodeError, said
from specflow.gguf_keys import differing, missing
from specflow.guards.checks import a, flag, shown

MAGIC: Final = b"GGUF"
"""What a GGUF file begins with."""

SEAL: Final = "specflow.json"
"""The file in a copy that says what the others hold."""

WAY: Final = 2
"""The way in which copies are made. Another number makes all of them anew: where those of before were other models."""

PIECE: Final = 1 << 24
"""How many bytes of a copy are looked at in one go."""


def is_gguf(path: Path) -> bool:
    """Whether a path means a GGUF file, there or not: by its name, or by what a file begins with.

    >>> is_gguf(Path("model.gguf")), is_gguf(Path("model"))
    (True, False)
    """
    _is_path("path", path)
    if path.suffix.lower() == ".gguf":
        return not os.path.isdir(path)  # a Path's own is_dir raises for a name that is too long
    try:
        return path.is_file() and _begins(path) == MAGIC
    except OSError:
        return False


def copy_of(path: Path, *, weights: bool = True) -> Path:
    """The folder with the model and the tokenizer of a GGUF file in fp32, which any dtype can be made of.

    Without its `weights` it has the config and the tokenizer alone, for who lets another program run the file.

    It is made by transformers, with progress bars, once for a file's content, by one process at a time: the others
    wait for it. It is there whole or not at all. What is not as it was made, or was made in another way or by
    another version of transformers, is made anew.

    `DecodeError` for what is no GGUF file, is truncated or changes meanwhile; for an architecture that transformers
    cannot read, or of which it would leave something out; and where the copy cannot be kept.
    """
    _is_path("path", path)
    flag("weights", weights)
    digest = _digest(path)
    home = user_cache_path("specflow") / "gguf" / (digest if weights else f"{digest}-words")
    if _is_whole(home):
        return home
    with _kept(home):
        home.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(home.with_name(f"{home.name}.lock"))
        lock.acquire()
    try:
        if not _is_whole(home):  # else another process was faster
            _make(path, digest, home, _convert if weights else _read_words)
    finally:
        lock.release()
    return home


_is_path: Final = a(Path, 'give a path, such as Path("model.gguf")')


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(MAGIC))


def _digest(path: Path) -> str:
    """The SHA-256 of a GGUF file."""
    try:
        if _begins(path) != MAGIC:
            raise DecodeError("model", "this is no GGUF file", shown(str(path)), "give a file in that format")
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(
            "model", f"the file cannot be read ({said(error)})", shown(str(path)), "give another"
        ) from error


@contextmanager
def _kept(home: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk with an error of its own
        happened, remedy = (
            f"the converted copy cannot be kept ({said(error)})",
            "make room for it, in a folder of yours",
        )
        raise DecodeError("model", happened, shown(str(home.parent)), remedy) from error


def _make(path: Path, digest: str, home: Path, convert: Callable[[Path, Path], None]) -> None:
    building = home.with_name(f"{home.name}.new")
    rmtree(building, ignore_errors=True)  # of a process that was killed
    try:
        with _kept(home):
            (building / "alone").mkdir(parents=True)
            # Beside a file in its own folder transformers would read whatever configs and adapters lie there.
            (building / "alone" / "model.gguf").symlink_to(path.resolve())
        try:
            convert(building / "alone" / "model.gguf", building / "copy")
        except DecodeError:
            raise
        except Exception as error:  # files of any content and any architecture: nobody lists what they may raise
            raise _unread(path, error) from error
        if _digest(path) != digest:
            raise DecodeError("model", "the file changes while it is read", shown(str(path)), "wait until it is whole")
        with _kept(home):
            _seal(building / "copy")
            rmtree(home, ignore_errors=True)
            (building / "copy").rename(home)
    finally:
        rmtree(building, ignore_errors=True)


def _read_words(file: Path, folder: Path) -> None:
    """What a file says of its model, and its tokenizer. Nothing is refused for weights that nobody reads."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with _kept(folder.parent):
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _convert(file: Path, folder: Path) -> None:
    shows_progress = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        answer: object = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
    finally:
        if not shows_progress:
            logging.disable_progress_bar()
    converted, info = cast(tuple[PreTrainedModel, dict[str, object]], answer)
    reader = GGUFReader(file)
    fields = _hyperparameters(reader)
    for name, value in missing(converted.config.to_dict(), fields).items():
        setattr(converted.config, name, value)
    _refuse_left_out(file, reader, fields, converted, sorted(map(str, cast(set[object], info["missing_keys"]))))
    # transformers refuses to save what was quantized, so the copy is an ordinary model with the same weights.
    vars(converted.config).pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(converted.config)
    model.load_state_dict(converted.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = converted.generation_config
    with _kept(folder.parent):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _hyperparameters(reader: GGUFReader) -> dict[str, object]:
    """What the file says of its architecture, by the keys behind its name."""
    prefix = f"{reader.fields['general.architecture'].contents()}."
    return {
        name.removeprefix(prefix): field.contents() for name, field in reader.fields.items() if name.startswith(prefix)
    }


def _refuse_left_out(
    file: Path, reader: GGUFReader, fields: Mapping[str, object], model: PreTrainedModel, made_up: list[str]
) -> None:
    """`DecodeError` where transformers has made up weights, or has left out what the file holds."""
    left_out, is_stretched = "", _is_stretched(model)
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    stretched = [
        tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_") and (tensor.data != 1).any()
    ]
    stretched += ["rope.scaling.type"] * (fields.get("rope.scaling.type", "none") != "none")
    # Further heads draft, each a whole block; they are no part of the model. A head that is tied is there twice.
    drafting = tuple({f"{name.partition('.nextn.')[0]}." for name in sizes if ".nextn." in name})
    beside = (*drafting, "rope_", *(["output.weight"] if model.config.tie_word_embeddings else []))
    held = sum(size for name, size in sizes.items() if not name.startswith(beside))
    known = sum({id(weight): weight.numel() for weight in model.state_dict(keep_vars=True).values()}.values())
    if made_up:
        left_out = f"{len(made_up)} of its weights are missing, such as {made_up[0]}"
    elif stretched and not is_stretched:
        left_out = f"transformers does not read its rotary frequencies, {stretched[0]}"
    elif held > known:
        left_out = f"transformers leaves out {held - known} of its {held} numbers"
    elif other := differing(model, model.config.to_dict(), fields, is_stretched=is_stretched):
        left_out = f"transformers does not read its {other}, {shown(fields.get(other, 'which is the usual one'))}"
    if left_out:
        happened = f"the file cannot be converted ({left_out})"
        remedy = "use generate --engine llama.cpp, or its original model"
        raise DecodeError("model", happened, shown(file.resolve().name), remedy)


def _is_stretched(model: PreTrainedModel) -> bool:
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = [part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)]
    return any(kind != "default" for kind in kinds)


def _unread(path: Path, error: Exception) -> DecodeError:
    """Why transformers has failed at a file."""
    try:
        GGUFReader(path)
    except Exception as broken:  # it looks at no length before it reads
        happened, remedy = f"the GGUF file is truncated or damaged ({said(broken)})", "fetch it again"
    else:
        happened, remedy = f"transformers cannot read the GGUF file ({said(error)})", "use its original model"
    return DecodeError("model", happened, shown(str(path)), remedy)


def _sums(folder: Path) -> dict[str, int]:
    """A checksum of each file but the seal."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name != SEAL:
            with path.open("rb") as file:
                sums[path.name] = 0
                for piece in iter(partial(file.read, PIECE), b""):
                    sums[path.name] = crc32(piece, sums[path.name])
    return sums


def _seal(folder: Path) -> None:
    (folder / SEAL).write_text(json.dumps(_made(folder)))


def _made(folder: Path) -> dict[str, object]:
    return {"way": WAY, "transformers": transformers.__version__, "crc32": _sums(folder)}


def _is_whole(home: Path) -> bool:
    try:
        seal: object = json.loads((home / SEAL).read_text())
        return seal == _made(home)
    except (OSError, ValueError):
        return False
