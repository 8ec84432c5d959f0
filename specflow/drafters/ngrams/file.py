"""The file of an n-gram storage: safetensors, that is a JSON header and plain arrays, with a checksum.

`__metadata__` holds `format`, `version`, `kind`, `n`, `vocab_size` and `sha256`, all strings. Six arrays, one dimension
each: `lengths`, `widths` [contexts] int32 (tokens in a context, different continuations of it); `ranks` [contexts]
int64 (how long it is kept, ascending); `contexts` int32 (all contexts, one after the other); `tokens` int32 and
`counts` int64 (all continuations, those of one context together and the one that is drafted first). In a vocabulary of
more than 2³¹ tokens `contexts` and `tokens` are int64. `sha256` is taken of the lines `name value` of the other
metadata and then, for each array, of `name length` and its little-endian bytes, both in the order of the names.
"""

from __future__ import annotations

import json
import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path
from secrets import token_hex
from typing import Final, TypeAlias, final

import torch
from attrs import frozen
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from specflow.errors import DecodeError
from specflow.guards.checks import shown
from specflow.state import Tokens

FORMAT: Final = "specflow n-gram storage"
VERSION: Final = 1

ARRAYS: Final = {"lengths": torch.int32, "widths": torch.int32, "ranks": torch.int64, "counts": torch.int64}
"""The arrays whose numbers take as many bytes in every vocabulary."""

MOST: Final = 2**62  # more than any count or rank

Row: TypeAlias = tuple[Tokens, int, Mapping[int, int]]
"""A context, its rank, and how often each token followed it, the token that is drafted first."""


@final
@frozen
class Header:
    """Which storage a file belongs to. Its contexts have `shortest` to n - 1 tokens."""

    kind: str
    n: int
    vocab_size: int
    shortest: int

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself, but for the checksum."""
        numbers = {"version": VERSION, "n": self.n, "vocab_size": self.vocab_size}
        return {"format": FORMAT, "kind": self.kind} | {name: str(number) for name, number in numbers.items()}

    @property
    def arrays(self) -> dict[str, torch.dtype]:
        """The arrays of the file. A token takes no more bytes than the vocabulary needs."""
        token = torch.int32 if self.vocab_size <= 2**31 else torch.int64
        return {"contexts": token, "tokens": token} | ARRAYS


def packed(header: Header, rows: Iterable[Row]) -> bytes:
    """The content of the file that holds `rows`."""
    columns = {name: array("i" if dtype is torch.int32 else "q") for name, dtype in header.arrays.items()}
    for context, rank, counted in rows:
        columns["lengths"].append(len(context))
        columns["contexts"].extend(context)
        columns["ranks"].append(rank)
        columns["widths"].append(len(counted))
        columns["tokens"].extend(counted)
        columns["counts"].extend(counted.values())
    tensors = {name: torch.tensor(columns[name], dtype=dtype, device="cpu") for name, dtype in header.arrays.items()}
    return save(tensors, header.metadata | {"sha256": checksum(header.metadata, tensors)})


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Puts `content` at `path` whole or not at all: a reader finds the old file or the new one.

    The file keeps the permissions of the one that was there; a link stays, and what it points to is replaced.
    `DecodeError` for a folder, a device, or whatever else is no file, and where nothing can be written.
    """
    target = checked_path(path)
    try:
        _write(target, content)
    except OSError as error:
        happened = f"cannot be written ({error.strerror or error})"
        raise no_file(path, happened, "name a file in a folder that can be written") from error


def _write(target: Path, content: bytes) -> None:
    target = target.resolve()
    before = os.stat(target) if target.exists() else None
    mode = 0o666 if before is None else stat.S_IMODE(before.st_mode)
    building = target.with_name(f".specflow-{token_hex(8)}")
    try:
        with open(building, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            if before is not None:
                now = os.stat(building)
                if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
                    with suppress(PermissionError):  # not whoever writes may give a file away
                        os.chown(building, before.st_uid, before.st_gid)
                building.chmod(mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        building.replace(target)
    except BaseException:
        building.unlink(missing_ok=True)
        raise


def content_of(path: str | os.PathLike[str], remedy: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the arrays of a safetensors file, which is read once: it may change meanwhile.

    `DecodeError` for a file that cannot be read, or that is no such file; the remedy is for the latter.
    """
    file = checked_path(path)
    try:
        content = file.read_bytes()
        arrays = load(content)
    except FileNotFoundError as error:
        raise no_file(path, "does not exist", "name one that `save` wrote") from error
    except (OSError, MemoryError) as error:
        happened = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise no_file(path, happened, "name a file that can be read") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise no_file(path, f"is truncated, corrupted or not of this kind ({error})", remedy) from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return dict(header.get("__metadata__") or {}), arrays


def checked_path(path: object) -> Path:
    """`path`, where there is a file or could be one: no folder, no device, no pipe. `DecodeError` for any other."""
    remedy = "name a file, as a str or a Path"
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise DecodeError("path", "the path is not the name of a file", shown(path), remedy)
    named = Path(path)
    try:
        mode = os.stat(named).st_mode
    except FileNotFoundError:
        return named
    except (OSError, ValueError) as error:
        raise DecodeError("path", f"the path leads nowhere ({error})", shown(str(path)), remedy) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise DecodeError("path", f"the path is that of {kind}, not of a file", shown(str(path)), remedy)
    return named


def read(path: str | os.PathLike[str], header: Header) -> Iterator[Row]:
    """The rows of a file that belongs to `header`; `DecodeError` for any other. The whole file is checked first."""
    remedy = "restore it from a copy"
    metadata, tensors = content_of(path, remedy)
    sha = metadata.pop("sha256", None)
    if metadata.get("format") != FORMAT:
        raise no_file(path, "is not the file of an n-gram storage", "give a file that `save` wrote")
    version = metadata.get("version")
    if version != str(VERSION):
        raise no_file(path, f"has version {version} of the format, not {VERSION}", "use the specflow that wrote it")
    for name, expected in header.metadata.items():
        if metadata.get(name) != expected:
            happened = f"belongs to a storage with another {name}, {metadata.get(name)} and not {expected}"
            raise no_file(path, happened, "load it into a storage like the one it was saved from")
    if {name: tensor.dtype for name, tensor in tensors.items() if tensor.dim() == 1} != header.arrays:
        raise no_file(path, "does not hold the arrays of a storage", remedy)
    if sha != checksum(metadata, tensors):
        raise no_file(path, "is corrupted, its checksum does not match", remedy)
    if not _sound(tensors, header):
        raise contradiction(path)
    columns = {name: iter(tensor.tolist()) for name, tensor in tensors.items()}
    for length, width, rank in zip(columns["lengths"], columns["widths"], columns["ranks"], strict=True):
        context = tuple(islice(columns["contexts"], length))
        tokens, counts = islice(columns["tokens"], width), islice(columns["counts"], width)
        yield context, rank, dict(zip(tokens, counts, strict=True))


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """What a file says of its own content."""
    digest = sha256()
    for name, value in sorted(metadata.items()):
        digest.update(f"{name} {value}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {len(tensor)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _sound(tensors: Mapping[str, Tensor], header: Header) -> bool:
    """Whether the arrays fit together, and everything in them can be in a storage."""
    lengths, widths, ranks = tensors["lengths"], tensors["widths"], tensors["ranks"]
    return (
        len(lengths) == len(widths) == len(ranks)
        and int(lengths.sum()) == len(tensors["contexts"])
        and int(widths.sum()) == len(tensors["tokens"]) == len(tensors["counts"])
        and _within(lengths, header.shortest, header.n)
        and all(_within(tensors[name], 0, header.vocab_size) for name in ("contexts", "tokens"))
        and all(_within(tensor, 1, MOST) for tensor in (widths, tensors["counts"]))
        and _within(ranks, 0, MOST)
        and not bool((ranks.diff() < 0).any())
    )


def _within(tensor: Tensor, low: int, high: int) -> bool:
    return tensor.numel() == 0 or (low <= int(tensor.min()) and int(tensor.max()) < high)


def contradiction(path: object) -> DecodeError:
    """The error of a file whose checksum is right and whose content is impossible."""
    return no_file(path, "contradicts itself", "write it again with `save`")


def no_file(path: object, happened: str, remedy: str) -> DecodeError:
    """The error of a file that is not what it should be."""
    return DecodeError("path", f"the file {happened}", shown(str(path)), remedy)
