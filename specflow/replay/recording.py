"""Recordings: texts that a target wrote, what it said on the way, and what its passes took."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import accumulate, pairwise
from math import isfinite
from os import PathLike
from typing import Final, cast, final

import numpy
import torch
from attrs import evolve, field, frozen
from safetensors.torch import save
from torch import Tensor

from specflow.errors import DecodeError
from specflow.files import content_of, no_file, write
from specflow.guards.checks import MOST, a, are_facts, each, is_id, number, or_none, shown, temperature, valid, whole
from specflow.guards.ids import ids_of
from specflow.replay.rows import NAMED, Row
from specflow.state import DecodeState, Request, Tokens

FORMAT: Final = "specflow recording"
VERSION: Final = "1"
REMEDY: Final = "restore it from a copy, or record again"

ARRAYS: Final = {
    "prompts": torch.int32,
    "outputs": torch.int32,
    "sizes": torch.int32,
    "lengths": torch.int32,
    "seconds": torch.float64,
    "names": torch.uint8,
    "tokens": torch.int32,
    "logs": torch.float32,
    "rest": torch.float64,
}
"""The arrays of the file: what `Recording.save` says of each."""

_is_duration = number("a duration is not a number of seconds", "give 0 or more", lambda t: isfinite(t) and t >= 0)


@final
@frozen
class Costs:
    """What the target's passes took: `seconds[i]` over `lengths[i]` new tokens, and what else there is to a text.

    `prompt` is the first pass, which reads the prompt, and `own` what a step takes beside passes and drafting. By
    default each pass takes one second, so that seconds count passes. `DecodeError` for lengths that do not begin with 1
    and ascend, and for times that are no numbers of seconds.

    >>> costs = Costs((1, 3), (2.0, 3.0), prompt=9.0)
    >>> costs.of(2), costs.of(5)
    (2.5, 4.0)
    """

    lengths: tuple[int, ...] = field(default=(1,), validator=valid(each(whole(1, "give numbers of tokens", MOST))))
    seconds: tuple[float, ...] = field(default=(1.0,), validator=valid(each(_is_duration)))
    prompt: float = field(default=1.0, validator=valid(_is_duration))
    own: float = field(default=0.0, validator=valid(_is_duration))

    def __attrs_post_init__(self) -> None:
        ascend = all(one < other for one, other in pairwise(self.lengths))
        if not ascend or self.lengths[:1] != (1,) or len(self.seconds) != len(self.lengths):
            received = f"{shown(self.lengths)} and {shown(self.seconds)}"
            remedy = "give ascending lengths from 1 on, and a duration for each"
            raise DecodeError("lengths", "these are no costs", received, remedy)

    def of(self, k: int) -> float:
        """The seconds of a pass over k ≥ 1 tokens: on the line between its neighbours, or through the last two."""
        whole(1, "ask for one token or more", MOST)("k", k)
        k = int(k)
        if k > self.lengths[-1] and len(self.lengths) > 1:
            (a, b), (from_a, from_b) = self.lengths[-2:], self.seconds[-2:]
            return max(from_b, from_b + (from_b - from_a) / (b - a) * (k - b))
        return float(numpy.interp(k, self.lengths, self.seconds))

    def begin(self, k: int) -> float:
        """The seconds of a text's first pass, over the prompt and k - 1 drafts."""
        return self.prompt + max(0.0, self.of(k) - self.of(1))


@final
@frozen
class RecordedText:
    """A prompt, what the target wrote after it, how it was asked, and what its passes took.

    `limit` and `stop` are those of the `Request`; `seed` is that of the `SharedNoise` it was drawn with, None where
    there was none. `DecodeError` for what are no ids, and for a text that is longer than its limit.
    """

    prompt: Tokens = field(validator=valid(a(tuple, "give ids as a tuple")))
    output: Tokens = field(validator=valid(a(tuple, "give ids as a tuple")))
    limit: int = field(validator=valid(whole(1, "give the most tokens that the text may have", MOST)))
    stop: frozenset[int] = field(default=frozenset(), validator=valid(a(frozenset, "give ids as a frozenset")))
    seed: int | None = field(default=None, validator=valid(or_none(whole(-(2**63), "give a seed, or None", 2**63))))
    costs: Costs = field(default=Costs(), validator=valid(a(Costs, "give Costs(…)")))

    def __attrs_post_init__(self) -> None:
        for name, ids in (("prompt", self.prompt), ("output", self.output), ("stop", tuple(self.stop))):
            if any(not is_id(token) or token > MOST for token in ids_of(name, ids)):
                raise DecodeError(name, f"{name} holds what is no token id", shown(ids), "give ids of the target")
        if not self.prompt or len(self.tokens) > self.limit:
            received = f"{len(self.prompt)} and {len(self.output)} tokens of {self.limit}"
            raise DecodeError("prompt", "the text is empty, or beyond its limit", received, "record it again")

    @property
    def tokens(self) -> Tokens:
        """The prompt and the output."""
        return self.prompt + self.output

    def state(self, vocab_size: int) -> DecodeState:
        """Where its decoding starts."""
        whole(1, "give the target's vocabulary", MOST)("vocab_size", vocab_size)
        return DecodeState(Request(self.prompt, self.limit, self.stop, vocab_size), self.prompt)

    @property
    def is_cut(self) -> bool:
        """Whether it ended neither at a stop token nor at the limit, so that a condition must have ended it."""
        return len(self.tokens) < self.limit and not set(self.output[-1:]) & self.stop


def _are_rows(name: str, rows: object) -> None:
    if not isinstance(rows, Mapping) or not all(isinstance(row, Row) for row in rows.values()):
        raise DecodeError(name, "these are no rows of a target", shown(rows), "take them from `record`")


@final
@frozen(eq=False)
class Recording:
    """Texts of one target, and the rows of its logits that were kept, `kept` tokens of each.

    `temperature` is None for greedy texts. `facts` say what was recorded, where and when, and `origin` of which model
    and processor, which nobody else may go on with. `rows` are by a name of the text before them. `DecodeError` for
    texts with tokens outside the vocabulary.

    >>> recording = Recording((RecordedText((5, 6), (7, 8), limit=4),), vocab_size=10)
    >>> recording.texts[0].tokens
    (5, 6, 7, 8)
    """

    texts: tuple[RecordedText, ...] = field(validator=valid(each(a(RecordedText, "give what was recorded"))))
    vocab_size: int = field(validator=valid(whole(1, "give the target's vocabulary", MOST)))
    temperature: float | None = field(default=None, validator=valid(or_none(temperature)))
    kept: int = field(default=1, validator=valid(whole(1, "keep one token of a row at least", MOST)))
    rows: Mapping[bytes, Row] = field(factory=dict, repr=False, validator=valid(_are_rows))
    facts: Mapping[str, str] = field(factory=dict, validator=valid(are_facts))
    origin: Mapping[str, str] = field(factory=dict, validator=valid(are_facts))

    def __attrs_post_init__(self) -> None:
        most = max([max(text.tokens) for text in self.texts], default=0)
        if most >= self.vocab_size:
            happened = f"a token is outside the vocabulary of {self.vocab_size}"
            raise DecodeError("texts", happened, most, "give the target's vocab_size")
        widths = {len(row.tokens) for row in self.rows.values()}
        if widths - {self.kept}:
            happened = f"rows do not have the {self.kept} tokens that were kept"
            raise DecodeError("rows", happened, max(widths), "take them from one recording")

    def knowing(self, rows: Mapping[bytes, Row]) -> Recording:
        """The same with more rows."""
        _are_rows("rows", rows)
        return evolve(self, rows={**self.rows, **rows}) if rows else self

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to a safetensors file, whole or not at all. `DecodeError` where nothing can be written.

        `prompts` and `outputs` hold the ids of all texts, one after the other, `sizes` [n, 2] how many each has.
        `lengths` [n, c] and `seconds` [n, c + 2] are the costs, then those of the prompt and of a step; fewer lengths
        than c are filled up with 0. `names` [m, 16], `tokens` and `logs` [m, kept] and `rest` [m] are the rows. The
        limits, stop tokens and seeds, and all else, are JSON in the metadata.
        """
        widest = max([len(text.costs.lengths) for text in self.texts], default=1)
        table = [(text.costs, widest - len(text.costs.lengths)) for text in self.texts]
        rows = list(self.rows.values())
        arrays = {
            "prompts": numpy.array([token for text in self.texts for token in text.prompt]),
            "outputs": numpy.array([token for text in self.texts for token in text.output]),
            "sizes": numpy.array([(len(text.prompt), len(text.output)) for text in self.texts]).reshape(-1, 2),
            "lengths": numpy.array([(*costs.lengths, *[0] * fill) for costs, fill in table]).reshape(-1, widest),
            "seconds": numpy.array(
                [(*costs.seconds, *[0.0] * fill, costs.prompt, costs.own) for costs, fill in table]
            ).reshape(-1, widest + 2),
            "names": numpy.frombuffer(b"".join(self.rows), numpy.uint8).reshape(-1, NAMED).copy(),
            "tokens": numpy.array([row.tokens for row in rows]).reshape(-1, self.kept),
            "logs": numpy.array([row.logs for row in rows]).reshape(-1, self.kept),
            "rest": numpy.array([row.rest for row in rows]),
        }
        tensors = {name: torch.from_numpy(arrays[name]).to(dtype) for name, dtype in ARRAYS.items()}
        asked = [_asked(text) for text in self.texts]
        said = {
            "vocab_size": int(self.vocab_size),
            "temperature": None if self.temperature is None else float(self.temperature),
            "kept": int(self.kept),
            "facts": dict(self.facts),
            "origin": dict(self.origin),
            "texts": asked,
        }
        metadata = {"format": FORMAT, "version": VERSION, "said": json.dumps(said)}
        write(path, save(tensors, metadata | {"sha256": checksum_of(metadata["said"], tensors)}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Recording:
        """Read what `save` wrote. `DecodeError` for any other file, and for one that is damaged."""
        metadata, arrays = content_of(path, REMEDY)
        if metadata.get("format") != FORMAT:
            raise no_file(path, "holds no recording", "name one that `save` wrote")
        if metadata.get("version") != VERSION:
            happened = f"has version {metadata.get('version')} of the format, not {VERSION}"
            raise no_file(path, happened, "use the specflow that wrote it, or record again")
        if metadata.get("sha256") != checksum_of(metadata.get("said", ""), arrays):
            raise no_file(path, "is corrupted, its checksum does not match", REMEDY)
        try:
            return _read(json.loads(metadata["said"]), arrays)
        except (DecodeError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise no_file(path, "contradicts itself", REMEDY) from error


def _asked(text: RecordedText) -> dict[str, object]:
    seed = None if text.seed is None else int(text.seed)
    return {"limit": int(text.limit), "stop": sorted(map(int, text.stop)), "seed": seed}


def checksum_of(said: str, arrays: Mapping[str, Tensor]) -> str:
    """What a file says of its own content."""
    digest = sha256(said.encode())
    for name, tensor in sorted(arrays.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _read(said: Mapping[str, object], arrays: Mapping[str, Tensor]) -> Recording:
    if {name: tensor.dtype for name, tensor in arrays.items()} != ARRAYS:
        raise ValueError
    match said:
        case {
            "texts": list(asked),
            "kept": int(kept),
            "facts": dict(facts),
            "vocab_size": int(vocab_size),
            "temperature": float() | None as heat,
        }:
            pass
        case _:
            raise ValueError
    origin = cast(Mapping[str, str], said.get("origin", {}))  # files of before have none
    prompts, outputs = (_cut(arrays[name], arrays["sizes"][:, i]) for i, name in enumerate(("prompts", "outputs")))
    columns = prompts, outputs, arrays["lengths"].tolist(), arrays["seconds"].tolist()
    texts = [_text(*row) for row in zip(asked, *columns, strict=True)]
    names = [bytes(name) for name in arrays["names"].numpy()]
    rows = zip(arrays["tokens"].numpy(), arrays["logs"].numpy(), arrays["rest"].tolist(), strict=True)
    if arrays["tokens"].shape[1:] != (kept,) or arrays["logs"].shape != arrays["tokens"].shape:
        raise ValueError
    if names and not 0 <= int(arrays["tokens"].min()) <= int(arrays["tokens"].max()) < vocab_size:
        raise ValueError
    named = dict(zip(names, [Row(*row) for row in rows], strict=True))
    return Recording(tuple(texts), vocab_size, heat, kept, named, facts, origin)


def _cut(ids: Tensor, sizes: Tensor) -> list[Tokens]:
    """The ids of each of several texts that lie one after the other."""
    if int(sizes.sum()) != len(ids):
        raise ValueError
    ends = list(accumulate(sizes.tolist(), initial=0))
    flat = ids.tolist()
    return [tuple(flat[begin:end]) for begin, end in pairwise(ends)]


def _text(
    asked: Mapping[str, object], prompt: Tokens, output: Tokens, lengths: Sequence[int], seconds: Sequence[float]
) -> RecordedText:
    known = [length for length in lengths if length]
    costs = Costs(tuple(known), tuple(seconds[: len(known)]), seconds[-2], seconds[-1])
    match asked:
        case {"limit": int(limit), "stop": list(stop), "seed": int() | None as seed}:
            return RecordedText(prompt, output, limit, frozenset(stop), seed, costs)
    raise ValueError
