"""Files: what is written whole or not at all, and read once, with a checksum of its own content."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_hex

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from specflow.errors import DecodeError, said
from specflow.guards.checks import shown


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


def can_be_written(path: Path) -> bool:
    """Whether a file can be there: its name is possible in a folder that may be written, and so may what is there.

    In that folder it is written beside what is there, and put in its place once it is whole.

    >>> can_be_written(Path("answers.json")), can_be_written(Path("a" * 300)), can_be_written(Path("/"))
    (True, False, False)
    """
    try:
        if path.exists() and (path.is_dir() or not os.access(path, os.W_OK)):
            return False
        folder = path.resolve().parent
        return _takes_what_comes(path) or (folder.is_dir() and os.access(folder, os.W_OK))
    except (OSError, RuntimeError):  # the name is too long, its folder may not be searched, or links lead in a circle
        return False


def save_text(path: Path, text: str) -> None:
    """Puts a text where `can_be_written`: into a file whole or not at all, or to a device, such as /dev/stdout.

    `DecodeError` where nothing can be written.
    """
    content = text.encode(errors="backslashreplace")
    if not _takes_what_comes(path):
        write(path, content)
        return
    try:
        path.write_bytes(content)
    except OSError as error:
        raise no_file(path, f"cannot be written ({said(error)})", "name a file in a folder") from error


def _takes_what_comes(path: Path) -> bool:
    """Whether it is a device or a pipe, of which nothing is put in the place."""
    return path.exists() and not path.is_file() and not path.is_dir()


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


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """What a file says of its own content.

    SHA-256 of the lines `name value` of its metadata, then, for each array, of the line `name shape` and its
    little-endian bytes, both in the order of the names.
    """
    digest = sha256()
    for name, value in sorted(metadata.items()):
        digest.update(f"{name} {value}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {' '.join(map(str, tensor.shape))}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def no_file(path: object, happened: str, remedy: str) -> DecodeError:
    """The error of a file that is not what it should be."""
    return DecodeError("path", f"the file {happened}", shown(str(path)), remedy)
