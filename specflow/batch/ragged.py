"""Several texts in one pass over a model of transformers, each with as many new tokens and drafts as it has.

The new tokens lie in rows of one length. Keys and values lie side by side on a shelf, where the model sees a row of
each text without a copy; a mask lets each token see its own text alone. Where some texts have more new tokens than
others, a row may hold several texts, so that little is filled up: then what the model sees is copied together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Final, TypeAlias, cast, final

import torch
from attrs import define, field, frozen
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from typing_extensions import override

from specflow.batch.texts import ReadsTexts, Text
from specflow.caches import KVCache, Pair, Past, Row, Shelf, Shelves, lasting
from specflow.predictors.reader import Reader, config_of
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
    def row(self) -> Row:
        """The past of a model that is shown all texts at once."""
        return cast(Row, self.past.cache)

    @property
    def covered(self) -> int:
        """How many tokens the past covers after the pass."""
        return self.past.length + len(self.ids)

    @property
    def positions(self) -> Tensor:
        """Where the ids stand in the text."""
        return self.past.length + torch.tensor(depths(self.parents), device="cpu")

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


def new_past(reader: Reader, shelves: Shelves) -> Past:
    """What a text begins with: a row that holds all that was read, in each layer, whatever its window."""
    if isinstance(reader.model, ReadsTexts):
        return Past(reader.model.new_cache(), 0)
    return Past(Row.on(shelves, len(_own_layers(reader))), 0)


def _own_layers(reader: Reader) -> Sequence[object]:
    """The layers of the cache that transformers makes for the model."""
    config = getattr(reader.model, "config", None)
    return DynamicCache(config=config).layers if isinstance(config, PreTrainedConfig) else ()


def windows_of(reader: Reader) -> dict[str, int | None]:
    """How far each kind of layer sees, by its name in the config; one kind "" where all layers are alike."""
    config = config_of(reader.model)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list | tuple) and len({*kinds}) > 1:
        return {str(kind): window if kind == "sliding_attention" else None for kind in {*kinds}}
    sees_all = isinstance(kinds, list | tuple) and {*kinds} == {"full_attention"}
    return {"": None if sees_all else window}


def read_together(reader: Reader, pieces: Sequence[Piece]) -> list[Tensor]:
    """Logits [last, V] of each piece, in one pass. Each past then covers its ids."""
    rows = _of_texts(reader, reader.model, pieces) if isinstance(reader.model, ReadsTexts) else _of_rows(reader, pieces)
    for piece, (_, features) in zip(pieces, rows, strict=True):
        piece.past.extend(piece.past.cache, piece.past.length + len(piece.ids), features)
    return [logits for logits, _ in rows]


_Read: TypeAlias = tuple[Tensor, "Tensor | None"]
"""Of one text the logits [last, V], and the features [k, F] where they are wanted."""


def _of_texts(reader: Reader, model: ReadsTexts, pieces: Sequence[Piece]) -> list[_Read]:
    """The same of a model that reads several texts by itself."""
    sizes = [len(piece.ids) for piece in pieces]
    joined = tuple([token for piece in pieces for token in piece.ids])
    ids = torch.split(reader.ids(joined), sizes)  # copied to a device once
    texts = [
        Text(own, cast(KVCache, piece.past.cache), piece.tree, piece.last)
        for own, piece in zip(ids, pieces, strict=True)
    ]
    with reader.guard, lasting(), torch.no_grad():
        output, features = reader.tapped(
            lambda numbers: model(texts=texts, features=numbers), torch.Size((1, sum(sizes)))
        )
    logits = torch.split(output.logits[0], [piece.last for piece in pieces])
    shown = repeat(None) if features is None else torch.split(features[0], sizes)
    return [*zip(logits, shown, strict=False)]


def _of_rows(reader: Reader, pieces: Sequence[Piece]) -> list[_Read]:
    """The same of a model that is shown all texts at once."""
    for piece in pieces:
        row = piece.row
        row.reserve(row.length + len(piece.ids))
    layout = _laid_out(pieces, reader.device.type == "cpu")
    joined, writing, windows = DynamicCache(), _Writing(layout), windows_of(reader)
    joined.layers = [_Joint(i, writing) for i in range(pieces[0].row.layers)]
    if len(pieces) == 1 and set(windows.values()) == {None}:
        (piece,) = pieces  # as a text alone is read, which is quicker
        read = reader.read(reader.ids([piece.ids]), joined, piece.row.length, piece.last, piece.tree)
    else:
        ids = torch.zeros(layout.rows, layout.k, dtype=torch.long, device="cpu")
        positions = torch.zeros_like(ids)
        for spot in layout.spots:
            ids[spot.row, spot.tokens] = torch.tensor(spot.piece.ids, device="cpu")
            positions[spot.row, spot.tokens] = spot.piece.positions
        device = reader.device
        last = max(layout.k - spot.tokens.stop + spot.piece.last for spot in layout.spots)
        read = reader.read_rows(ids.to(device), joined, last, positions.to(device), _masks(reader, windows, layout))
    for piece in pieces:
        piece.row.length += len(piece.ids)
    found: dict[Piece, _Read] = {}
    for spot in layout.spots:
        stop = read.logits.shape[1] - (layout.k - spot.tokens.stop)
        logits = read.logits[spot.row, stop - spot.piece.last : stop]
        found[spot.piece] = logits, None if read.features is None else read.features[spot.row, spot.tokens]
    return [found[piece] for piece in pieces]


@final
@frozen(eq=False)
class Spot:
    """Where a piece stands in a pass: its tokens in a `row` of tokens, its keys in the same row of those shown."""

    piece: Piece
    row: int
    tokens: slice
    keys: slice


@final
@frozen(eq=False)
class Layout:
    """Rows of `k` tokens, each of which sees what stands in a row of `n` keys.

    The keys lie on a `shelf` as they are shown; with None they are copied, each pass and layer.
    """

    spots: Sequence[Spot]
    rows: int
    k: int
    n: int
    shelf: Shelf | None

    @classmethod
    def of(cls, rows: Sequence[Sequence[Piece]]) -> Layout:
        """The tokens at the right of each row, as the last logits of a pass are wanted, and the keys at the left."""
        k = max(sum(len(piece.ids) for piece in row) for row in rows)
        n = max(sum(piece.covered for piece in row) for row in rows)
        spots = []
        for r, row in enumerate(rows):
            begin, left = k - sum(len(piece.ids) for piece in row), 0
            for piece in row:
                end, right = begin + len(piece.ids), left + piece.covered
                spots.append(Spot(piece, r, slice(begin, end), slice(left, right)))
                begin, left = end, right
        shelves = {piece.row.shelf for row in rows for piece in row}
        lies = len(shelves) == 1 and all(len(row) == 1 for row in rows)
        return cls(spots, len(rows), k, n, shelves.pop() if lies else None)

    @property
    def cost(self) -> float:
        """What a pass costs, in tokens that see nothing.

        Padding costs as much as tokens do, and so does a token that looks at `SIGHT` keys, be they of other texts.
        """
        copied = 0 if self.shelf is not None else sum(spot.piece.covered for spot in self.spots)
        return self.rows * self.k * (1 + self.n / SIGHT) + copied / COPIED


SIGHT: Final = 4096
"""How many keys cost a token as much to look at as all else does, about: six times the width of a small model."""

COPIED: Final = 512
"""How many keys cost as much to copy in all layers as a token more costs, about."""


def _laid_out(pieces: Sequence[Piece], shares: bool) -> Layout:
    """Where the pieces stand, so that the pass costs least; each in a row of its own unless rows are shared.

    A row that is shared is shared in NaN, too, which only a host can look at without waiting.
    """
    alone = Layout.of([[piece] for piece in sorted(pieces, key=lambda piece: piece.row.number)])
    if not shares or len(pieces) == 1:
        return alone
    longest_first = sorted(pieces, key=lambda piece: -len(piece.ids))
    longest, total = len(longest_first[0].ids), sum(len(piece.ids) for piece in pieces)
    rooms = [longest]
    while rooms[-1] < total:
        rooms.append(min(2 * rooms[-1], total))
    return min([alone, *[Layout.of(_packed(longest_first, room)) for room in rooms]], key=lambda layout: layout.cost)


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


def _masks(reader: Reader, windows: Mapping[str, int | None], layout: Layout) -> Masks:
    """What no token of a row may see: the keys of others, and of its own those that do not come before it."""
    masks = {}
    for kind, window in windows.items():
        hidden = torch.ones(layout.rows, 1, layout.k, layout.n, dtype=torch.bool, device="cpu")
        for spot in layout.spots:
            piece, own = spot.piece, hidden[spot.row, 0, spot.tokens, spot.keys]
            covered = piece.row.length
            own[:, :covered] = False
            own[:, covered:] = torch.from_numpy(~lineage(piece.parents))
            if window is not None:
                seen = torch.cat((torch.arange(covered, device="cpu"), piece.positions))
                own |= seen <= piece.positions[:, None] - window
        least = torch.finfo(reader.dtype).min
        mask = torch.zeros(hidden.shape, dtype=reader.dtype, device="cpu")
        masks[kind] = mask.masked_fill_(hidden, least).to(reader.device)
    return masks.get("", masks)


@final
@define(eq=False)
class _Writing:
    """How the layers of a pass write what is new onto the shelves, and what they show the model."""

    layout: Layout
    _rows: slice | list[int] = field(init=False)
    """Of the shelf, where the layout has one: side by side, they are seen without a copy."""
    _places: dict[torch.device, list[tuple[Shelf, Tensor]]] = field(init=False, factory=dict)
    _room: dict[tuple[object, ...], Pair] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        numbers = [spot.piece.row.number for spot in self.layout.spots]
        beside = range(numbers[0], numbers[0] + len(numbers))
        self._rows = slice(beside.start, beside.stop) if numbers == [*beside] else numbers

    def write(self, i: int, new: Pair) -> None:
        """Write keys and values [rows, heads, k, size] of layer i, each text's to its own row."""
        for shelf, (row, column, number, place) in self._placed(new[0].device):
            for held, states in zip(shelf.layer(i, new), new, strict=True):
                held[number, :, place] = states[row, :, column]

    def shown(self, i: int, new: Pair) -> Pair:
        """Keys and values [rows, heads, n, size] of layer i, as the layout has them."""
        layout, shelf = self.layout, self.layout.shelf
        if shelf is not None:
            keys, values = (held[:, :, : layout.n][self._rows] for held in shelf.layer(i, new))
            return keys, values
        joined = self._roomy(new)
        for spot in layout.spots:
            row = spot.piece.row
            for room, held in zip(joined, row.shelf.layer(i, new), strict=True):
                room[spot.row, :, spot.keys] = held[row.number, :, : spot.piece.covered]
        return joined

    def _placed(self, device: torch.device) -> list[tuple[Shelf, Tensor]]:
        """For each shelf, of each token: its row and column in the pass, the number of its text, its place in it."""
        if device not in self._places:
            found: dict[Shelf, list[tuple[int, int, int, int]]] = {}
            for spot in self.layout.spots:
                row = spot.piece.row
                found.setdefault(row.shelf, []).extend(
                    (spot.row, column, row.number, row.length + j)
                    for j, column in enumerate(range(spot.tokens.start, spot.tokens.stop))
                )
            self._places[device] = [(shelf, torch.tensor(at, device=device).T) for shelf, at in found.items()]
        return self._places[device]

    def _roomy(self, like: Pair) -> Pair:
        """Room for what a layer shows, 0 where nothing is written: the layers of a pass use it one after the other."""
        of = *[(new.shape[1], new.shape[-1]) for new in like], like[0].device
        if of not in self._room:
            keys, values = (new.new_zeros(self.layout.rows, new.shape[1], self.layout.n, new.shape[-1]) for new in like)
            self._room[of] = keys, values
        return self._room[of]


@final
class _Joint(DynamicLayer):
    """One layer of several texts. It is one of transformers' kinds as models take no other, hence the inheritance."""

    def __init__(self, number: int, writing: _Writing) -> None:
        super().__init__()
        self.number = number
        self.writing = writing

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: object, **named: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, n, size], the new ones [rows, heads, k, size] written to each text's own."""
        new = key_states, value_states
        self.writing.write(self.number, new)
        return self.writing.shown(self.number, new)

    @override
    def get_seq_length(self) -> int:
        """How many keys a row shows before this pass, but for those that it adds."""
        return self.writing.layout.n - self.writing.layout.k
