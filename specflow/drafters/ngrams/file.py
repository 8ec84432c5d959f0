"""The file of an n-gram storage: safetensors, that is a JSON header and plain arrays, with a checksum.

`__metadata__` holds `format`, `version`, `kind`, `n`, `vocab_size` and `sha256`, all strings. Six arrays, one dimension
each: `lengths`, `widths` [contexts] int32 (tokens in a context, different continuations of it); `ranks` [contexts]
int64 (how long it is kept, ascending); `contexts` int32 (all contexts, one after the other); `tokens` int32 and
`counts` int64 (all continuations, those of one context together and the one that is drafted first). In a vocabulary of
more than 2³¹ tokens `contexts` and `tokens` are int64. `sha256` is the `files.checksum` of the other metadata and
the arrays.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from os import PathLike
from typing import Final, TypeAlias, final

import torch
from attrs import frozen
from safetensors.torch import save
from torch import Tensor

from specflow.errors import DecodeError
from specflow.files import checksum, content_of, no_file
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


def read(path: str | PathLike[str], header: Header) -> Iterator[Row]:
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
