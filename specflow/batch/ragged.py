"""Several texts in one pass over a model of transformers, each with as many new tokens and drafts as it has.

The new tokens lie in rows of one length. A row may hold several texts, so that a text with few new tokens does not fill
up to one with many: a mask lets each token see its own text alone. Keys and values stay with each text; a layer of the
cache that the model is given hands each text its own and shows the model all of them, side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias, cast, final

import torch
from attrs import define, field, frozen
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from typing_extensions import override

from specflow.batch.texts import ReadsTexts, Text
from specflow.caches import KVCache, Past
from specflow.predictors.reader import Reader
from specflow.state import Tokens
from specflow.trees import depths, is_chain, lineage

Masks: TypeAlias = "Tensor | dict[str, Tensor]"
"""What no token may see: one mask [rows, 1, k, n], or one for each kind of layer."""


@final
@frozen(eq=False)
class Piece:
    """What one text has in a pass: `ids` that follow what `past` covers, each after its parent among them (-1: after
    the past). Logits are wanted after the last `last` of them."""

    past: Past
    ids: Tokens
    parents: tuple[int, ...]
    last: int

    @property
    def tree(self) -> tuple[int, ...] | None:
        """The parents, where the ids do not follow one another."""
        return None if is_chain(self.parents) else self.parents


def joins(reader: Reader) -> bool:
    """Whether the model can be given several texts: by itself, or by masks, where all that it keeps are rows."""
    if isinstance(reader.model, ReadsTexts):
        return True
    kinds = {type(layer) for layer in _own_layers(reader)}
    return reader.takes_masks and bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def new_past(reader: Reader) -> Past:
    """What a text begins with: rows of all that was read, in each layer, whatever its window."""
    if isinstance(reader.model, ReadsTexts):
        return Past(reader.model.new_cache(), 0)
    cache = DynamicCache()
    cache.layers = [DynamicLayer() for _ in _own_layers(reader)]
    return Past(cache, 0)


def _own_layers(reader: Reader) -> Sequence[object]:
    """The layers of the cache that transformers makes for the model."""
    config = getattr(reader.model, "config", None)
    return DynamicCache(config=config).layers if isinstance(config, PreTrainedConfig) else ()


def windows_of(reader: Reader) -> dict[str, int | None]:
    """How far each kind of layer sees, by its name in the config; one kind "" where all layers are alike."""
    config = getattr(reader.model, "config", None)
    text = config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else None
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if isinstance(kinds, list | tuple) and len({*kinds}) > 1:
        return {str(kind): window if kind == "sliding_attention" else None for kind in {*kinds}}
    sees_all = isinstance(kinds, list | tuple) and {*kinds} == {"full_attention"}
    return {"": None if sees_all else window}


def read_together(reader: Reader, pieces: Sequence[Piece]) -> list[Tensor]:
    """Logits [last, V] of each piece, in one pass. Each past then covers its ids."""
    model = reader.model
    if len(pieces) == 1 and (isinstance(model, ReadsTexts) or set(windows_of(reader).values()) == {None}):
        (piece,) = pieces  # as a text alone is read, which is quicker
        return [reader.extend(piece.past, reader.ids([piece.ids]), piece.last, piece.tree)]
    if isinstance(model, ReadsTexts):
        texts = [
            Text(reader.ids(piece.ids), cast(KVCache, piece.past.cache), piece.tree, piece.last) for piece in pieces
        ]
        with reader.guard, torch.no_grad():
            logits = model(texts=texts).logits[0]
        _cover(pieces)
        return list(torch.split(logits, [piece.last for piece in pieces]))
    rows = _arranged(pieces, reader.device.type == "cpu")
    k = max(sum(len(piece.ids) for piece in row) for row in rows)
    ids = torch.zeros(len(rows), k, dtype=torch.long)
    positions = torch.zeros_like(ids)
    ends: dict[Piece, tuple[int, int]] = {}
    for r, row in enumerate(rows):
        end = k
        for piece in reversed(row):
            begin = end - len(piece.ids)
            ids[r, begin:end] = torch.tensor(piece.ids)
            positions[r, begin:end] = piece.past.length + torch.tensor(depths(piece.parents))
            ends[piece] = r, end
            end = begin
    joined = DynamicCache()
    shown = _Shown()
    caches = [[cast(DynamicCache, piece.past.cache) for piece in row] for row in rows]
    joined.layers = [
        _Joint(
            [[cast(DynamicLayer, cache.layers[i]) for cache in row] for row in caches],
            [[len(piece.ids) for piece in row] for row in rows],
            shown,
        )
        for i in range(len(caches[0][0].layers))
    ]
    last = max(k - end + piece.last for piece, (_, end) in ends.items())
    device = reader.device
    logits = reader.read_rows(ids.to(device), joined, last, positions.to(device), _masks(reader, rows, k))
    _cover(pieces)
    rows_of = []
    for piece in pieces:
        r, end = ends[piece]
        stop = last - (k - end)
        rows_of.append(logits[r, stop - piece.last : stop])
    return rows_of


def _cover(pieces: Sequence[Piece]) -> None:
    """Each past covers its ids from now on."""
    for piece in pieces:
        piece.past.extend(piece.past.cache, piece.past.length + len(piece.ids))


def _arranged(pieces: Sequence[Piece], shares: bool) -> list[list[Piece]]:
    """Rows of pieces, so that the pass costs least; each piece alone unless rows are shared.

    Padding costs as much as tokens do, and so does a token that looks at `SIGHT` keys of other texts. A row that is
    shared is shared in NaN, too, which only a host can look at without waiting.
    """
    if not shares or len(pieces) == 1:
        return [[piece] for piece in pieces]
    ordered = sorted(pieces, key=lambda piece: -len(piece.ids))
    longest, total = len(ordered[0].ids), sum(len(piece.ids) for piece in pieces)
    rooms = [longest]
    while rooms[-1] < total:
        rooms.append(min(2 * rooms[-1], total))
    return min([_packed(ordered, room) for room in rooms], key=_cost)


def _packed(pieces: Sequence[Piece], room: int) -> list[list[Piece]]:
    """Rows of at most `room` tokens: each piece, the longest first, in the first row that has room for it."""
    rows: list[list[Piece]] = []
    left: list[int] = []
    for piece in pieces:
        r = next((r for r, free in enumerate(left) if free >= len(piece.ids)), len(rows))
        if r == len(rows):
            rows.append([])
            left.append(room)
        rows[r].append(piece)
        left[r] -= len(piece.ids)
    return rows


def _cost(rows: Sequence[Sequence[Piece]]) -> float:
    """What a pass costs, in tokens that see nothing."""
    k = max(sum(len(piece.ids) for piece in row) for row in rows)
    n = max(sum(piece.past.length + len(piece.ids) for piece in row) for row in rows)
    return len(rows) * k * (1 + n / SIGHT)


SIGHT: Final = 4096
"""How many keys cost a token as much to look at as all else does, about: six times the width of a small model."""


def _masks(reader: Reader, rows: Sequence[Sequence[Piece]], k: int) -> Masks:
    """For each row, as the keys lie that `_Joint` shows: at the right the last piece's, its own new ones last."""
    n = max(sum(piece.past.length + len(piece.ids) for piece in row) for row in rows)
    masks = {}
    for kind, window in windows_of(reader).items():
        hidden = torch.ones(len(rows), 1, k, n, dtype=torch.bool)
        for r, row in enumerate(rows):
            end, right = k, n
            for piece in reversed(row):
                begin, left = end - len(piece.ids), right - len(piece.ids) - piece.past.length
                own = hidden[r, 0, begin:end]
                own[:, left : left + piece.past.length] = False
                own[:, left + piece.past.length : right] = torch.from_numpy(~lineage(piece.parents))
                if window is not None:
                    new = piece.past.length + torch.tensor(depths(piece.parents))
                    seen = torch.cat((torch.arange(piece.past.length), new))
                    own[:, left:right] |= seen <= new[:, None] - window
                end, right = begin, left
        least = torch.finfo(reader.dtype).min
        masks[kind] = torch.zeros(hidden.shape, dtype=reader.dtype).masked_fill_(hidden, least).to(reader.device)
    return masks.get("", masks)


@final
@define(eq=False)
class _Shown:
    """Room for what a layer shows the model: the layers of one pass use it one after the other."""

    rooms: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(factory=dict)

    def of(self, shape: tuple[int, ...], like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of a shape, 0 where nothing is written."""
        if shape not in self.rooms:
            self.rooms[shape] = like[0].new_zeros(shape), like[1].new_zeros(shape[:-1] + like[1].shape[-1:])
        return self.rooms[shape]


@final
class _Joint(DynamicLayer):
    """One layer of several texts. It is one of transformers' kinds as models take no other, hence the inheritance."""

    def __init__(self, layers: Sequence[Sequence[DynamicLayer]], sizes: Sequence[Sequence[int]], shown: _Shown) -> None:
        super().__init__()
        self.texts = layers
        self.sizes = sizes
        self.shown = shown

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: object, **named: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, n, size], the new ones [rows, heads, k, size] written to each text's own."""
        rows = []
        for r, (layers, sizes) in enumerate(zip(self.texts, self.sizes, strict=True)):
            begin = key_states.shape[-2] - sum(sizes)
            row = []
            for layer, size in zip(layers, sizes, strict=True):
                new = slice(begin, begin + size)
                row.append(layer.update(key_states[r : r + 1, :, new], value_states[r : r + 1, :, new]))
                begin += size
            rows.append(row)
        n = max(sum(keys.shape[-2] for keys, _ in row) for row in rows)
        shape = len(rows), key_states.shape[1], n, key_states.shape[-1]
        joined = self.shown.of(shape, (key_states, value_states))
        for r, row in enumerate(rows):
            right = n
            for own in reversed(row):
                left = right - own[0].shape[-2]
                for all_of_them, states in zip(joined, own, strict=True):
                    all_of_them[r, :, left:right] = states[0]
                right = left
        return joined

    @override
    def get_seq_length(self) -> int:
        """How much the longest row covers."""
        return max(sum(layer.get_seq_length() for layer in row) for row in self.texts)
