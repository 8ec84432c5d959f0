"""The llama family's forward pass, written out for one text: few operations, and a cache that is written in place.

Source: Touvron et al. 2302.13971; grouped queries: Ainslie et al. 2305.13245; rotary positions: Su et al. 2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from math import inf
from typing import Final, Protocol, TypeVar, final

import torch
import torch.nn.functional as F
from attrs import define, evolve, field, frozen
from torch import Tensor
from torch.nn import Embedding, Identity, Module
from transformers import PreTrainedConfig
from typing_extensions import override

from specflow.accelerate.linear import TOKENS, Linear
from specflow.batch.texts import Text
from specflow.caches import KVCache, lasting
from specflow.errors import DecodeError
from specflow.guards.checks import shown
from specflow.predictors.autocast import uncast
from specflow.trees import depths, lineage

ELEMENTS: Final = 32768
"""A CPU cuts an elementwise operation over more elements than this among its threads, in the middle of a row too."""

M = TypeVar("M", bound=Module)


class Rotary(Protocol):
    """The given model's own rotary embedding: positions [1, n] → cos and sin, each [1, n, size] in the dtype of x."""

    def __call__(self, x: Tensor, position_ids: Tensor, /) -> tuple[Tensor, Tensor]: ...


@final
@frozen(eq=False)
class Layer:
    """One layer. The norms' weights are doubled, as `Stream.normed` wants them.

    `qk_norm` [query and key heads, size] is there where queries and keys are normalised. `window` is how many tokens a
    query sees, itself included; None is all.
    """

    before_attention: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    out: Linear
    before_mlp: Tensor
    gate_up: Linear
    down: Linear
    rotary: bool
    window: int | None


@final
@frozen(eq=False)
class Weights:
    """A model of the llama family: `heads` query heads share `kv_heads` key and value heads, each of `size`.

    The first `kv_heads` query heads are the first that share each key head, and so on: in this order attention gives
    what the next layer reads, as it lies.
    `of` names the model that they are those of, as `origin.weights_of` does.
    """

    embedding: Tensor
    layers: tuple[Layer, ...]
    before_head: Tensor
    head: Linear
    rotary: Rotary
    heads: int
    kv_heads: int
    size: int
    epsilon: float
    of: str

    @property
    def windows(self) -> set[int | None]:
        """The windows that its layers have."""
        return {layer.window for layer in self.layers}


@final
@frozen
class Shapes:
    """The shapes that a pass is cut into: a kernel that is given other shapes may add in another order.

    The rows that attend are padded to a multiple of `rows`, the keys that they see to a multiple of `keys`. At most
    `tokens` are read at a time.
    """

    rows: int
    keys: int
    tokens: int = TOKENS


@final
@frozen(eq=False)
class Output:
    """What a call returns: `logits` [1, k, V], and the `cache` that now covers the tokens, if one was wanted.

    And the `features` [1, k, F] of all ids that were given, where some were asked for.
    """

    logits: Tensor
    cache: KVCache | None
    features: Tensor | None = None


@final
class Llama(Module):
    """A model of the llama family, called as transformers' own is for one text, or with several `texts`.

    What goes into its layers, and what leaves them, passes through `entering` and `leaving`, [1, k, H] of each text:
    hooks there can look at it, or hand in something else. It computes in its own dtype, under `torch.autocast` too, as
    its kernels take no other.
    """

    def __init__(self, config: PreTrainedConfig, weights: Weights, shapes: Shapes) -> None:
        super().__init__()
        self.config = config
        self.weights = weights
        self.shapes = shapes
        ids, size = weights.embedding.shape
        self.embedding = Embedding(ids, size, _weight=weights.embedding, _freeze=True)
        self.angles = Angles(weights.rotary, weights.before_head[:0])
        self.entering, self.leaving = Identity(), Identity()
        self.eval()

    def get_input_embeddings(self) -> Embedding:
        """The table of the ids, by transformers' name for it: it has as many rows as there are ids."""
        return self.embedding

    @override
    def extra_repr(self) -> str:
        """What it computes: its weights are no tensors that a module shows, and differ in how they are laid out."""
        return f"{self.weights.of}, {type(self.weights.head).__name__}, {self.shapes}"

    @override
    def forward(
        self,
        input_ids: object = None,
        cache: object = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        parents: Sequence[int] | None = None,
        texts: Sequence[Text] = (),
        features: Sequence[int] = (),
    ) -> Output:
        """Logits [1, n, V] after the last n = `logits_to_keep` (0: all) of the ids [1, k], which follow the cache.

        The cache is written in place and returned; without one a new one is made. With `parents` the ids are a tree:
        each follows that one of them, or with -1 the cache, and sees its ancestors alone. Several texts are given as
        `texts` and nothing else; their logits are those of each, one after the other. `features` are numbers of layers:
        what leaves the k-th of them, as transformers counts its `hidden_states`, is then returned, too, side by side.
        `DecodeError` for ids of several rows, for a cache of another model, and for a tree where passes are to be equal
        bit for bit: its order of adding would be another. Texts in several threads, each with a cache of its own, do
        not disturb one another.
        """
        if not texts:
            if (
                not isinstance(input_ids, Tensor)
                or input_ids.dim() != 2
                or len(input_ids) != 1
                or not input_ids.numel()
            ):
                received = (
                    f"ids of shape {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else shown(input_ids)
                )
                raise DecodeError("input_ids", "an accelerated model reads one text at a time", received, "give [1, k]")
            made = self.new_cache() if cache is None else self.own(cache)
            texts = (Text(input_ids[0], made, parents, logits_to_keep),)
        for text in texts:
            self.own(text.cache).reserve(text.cache.length + len(text.ids))
        # What outlives the pass, the caches, the angles and the logits, is made outside of this mode.
        with torch.inference_mode(), uncast(self.weights.before_head.device.type):
            hidden: list[list[Tensor]] = [[] for _ in texts]
            held: list[Tensor] = []
            states = [self.entering(embedded(self.weights, text.ids)[None])[0] for text in texts]
            for chunk in _chunks(texts, states, self.shapes.tokens):
                segments = [self._segment(piece, texts[i]) for i, piece in chunk]
                rows, seen = read(self.weights, torch.cat([piece for _, piece in chunk]), segments, features)
                held.append(seen)
                for (i, _), own in zip(chunk, torch.split(rows, [segment.k for segment in segments]), strict=True):
                    hidden[i].append(own)
            left = [self.leaving(torch.cat(own)[None])[0] for own in hidden]
            last = torch.cat([own[-text.last :] for own, text in zip(left, texts, strict=True)])
            logits = [logits_of(self.weights, rows) for rows in torch.split(last, self.shapes.tokens)]
        beside = torch.cat(held)[None] if features else None
        return Output(torch.cat(logits)[None], texts[0].cache if use_cache else None, beside)

    def new_cache(self) -> KVCache:
        """The cache of a text of which nothing was read yet."""
        return KVCache(self.weights.before_head.new_empty(self._cache_shape(0)))

    def ends(self) -> tuple[Module, Module]:
        """`entering` and `leaving`."""
        return self.entering, self.leaving

    def without_layers(self, skip: frozenset[int], /) -> Llama:
        """The model without some of its layers, counted from 0, over the same weights."""
        kept = [i for i in range(len(self.weights.layers)) if i not in skip]
        config = deepcopy(self.config)
        config.num_hidden_layers = len(kept)
        layers = tuple([self.weights.layers[i] for i in kept])
        weights = evolve(self.weights, layers=layers, of=f"layers {kept} of {self.weights.of}")
        return refusing_as(self, Llama(config, weights, self.shapes))

    @override
    def _apply(self, *arguments: object, **named: object) -> Llama:
        remedy = "convert the given model and accelerate that"
        raise DecodeError("model", "an accelerated model stays where and as it was made", "a conversion", remedy)

    def _cache_shape(self, capacity: int) -> tuple[int, ...]:
        return len(self.weights.layers), 2, self.weights.kv_heads, capacity, self.weights.size

    def own(self, cache: object) -> KVCache:
        """This model's own cache. `DecodeError` for any other."""
        if not isinstance(cache, KVCache) or tuple(cache.buffer.shape) != self._cache_shape(cache.buffer.shape[3]):
            happened, remedy = "the cache is not one of this model's", "pass on what the last call returned, or None"
            raise DecodeError("cache", happened, shown(cache), remedy)
        return cache

    def _segment(self, states: Tensor, text: Text) -> Segment:
        """Where k tokens stand, as states [k, H], that follow what the text's cache covers, which then covers them."""
        cache, parents, k = text.cache, text.parents, len(states)
        start, end, keys, device = cache.length, cache.length + k, self.shapes.keys, states.device
        positions, angles, beside = torch.arange(start, end, device=device), self.angles.between(start, end), None
        if parents is not None:
            if keys > 1:
                remedy = "read its paths one by one"
                raise DecodeError("parents", "a tree is not read bit for bit as its paths are", len(parents), remedy)
            steps = torch.tensor(depths(parents), device=device)
            positions, angles = start + steps, (angles[0][steps], angles[1][steps])
            beside = torch.from_numpy(~lineage(parents)).to(device)
        sights = {}
        for window in self.weights.windows:
            nearest = 0 if window is None else max(0, start + 1 - window)
            first, last = nearest // keys * keys, -(-end // keys) * keys
            mask = None
            if k > 1 or (first, last) != (nearest, end):
                seen = torch.arange(first, last, device=device)
                seen[start - first : end - first] = positions
                mask = hiding(positions, seen, window)
                if beside is not None:
                    mask[:, start - first :] |= beside
            sights[window] = Sight.of(cache.buffer[:, :, :, first:last], mask, self.weights, k, self.shapes.rows)
        room = cache.buffer.flatten(1, 2)[:, :, start:end].transpose(1, 2).unbind()
        cache.length = end
        return Segment(k, angles, lambda i, new: room[i].copy_(new), sights)


def refusing_as(given: Module, made: M) -> M:
    """A model made of another, which refuses to be called where that does: once the weights of both are out of date."""
    made._forward_pre_hooks.update(given._forward_pre_hooks)
    made._forward_pre_hooks_with_kwargs.update(given._forward_pre_hooks_with_kwargs)
    return made


def _chunks(texts: Sequence[Text], states: Sequence[Tensor], most: int) -> list[list[tuple[int, Tensor]]]:
    """What is read at a time: states [k, H] of texts, with the number of each, `most` at most. A tree is not cut."""
    chunks: list[list[tuple[int, Tensor]]] = [[]]
    room = most
    for i, text in enumerate(texts):
        rest = states[i]
        while len(rest):
            if room == 0 or (text.parents is not None and room < min(len(rest), most)):
                chunks.append([])
                room = most
            piece = rest if text.parents is not None else rest[:room]
            chunks[-1].append((i, piece))
            rest, room = rest[len(piece) :], max(0, room - len(piece))
    return chunks


@final
@frozen(eq=False)
class Segment:
    """k tokens of one text in a pass: their rotary angles, how their keys and values are written, and what they see.

    `write(layer, new)` takes keys and values [k, 2 · heads, size]. There is a sight for each of the model's windows.
    """

    k: int
    angles: tuple[Tensor, Tensor]
    write: Callable[[int, Tensor], object]
    sights: Mapping[int | None, Sight]


def embedded(weights: Weights, ids: Tensor) -> Tensor:
    """What the first layer is given, [k, hidden], of ids [k]."""
    return F.embedding(ids, weights.embedding).to(weights.before_head.dtype)


def read(
    weights: Weights, states: Tensor, segments: Sequence[Segment], features: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """What the layers make of states [k, hidden], which are those of these segments, one after the other.

    And what leaves the layers that are named in `features`, side by side [k, F].
    """
    epsilon, k, heads, kv_heads, size = weights.epsilon, len(states), weights.heads, weights.kv_heads, weights.size
    stream = Stream.of(states, epsilon)
    cos, sin = (_joined([segment.angles[i] for segment in segments]) for i in (0, 1))
    sizes = [segment.k for segment in segments]
    seen_at = {0: stream.x.clone()} if 0 in features else {}
    for i, layer in enumerate(weights.layers):
        qkv = layer.qkv(stream.normed(layer.before_attention)).view(k, -1, size)
        qk = qkv[:, : heads + kv_heads]
        if layer.qk_norm is not None:
            qk.copy_(_normalised(qk, epsilon)).mul_(layer.qk_norm)
        if layer.rotary:
            _rotate(qk, (cos, sin))
        seen = []
        for segment, own in zip(segments, torch.split(qkv, sizes), strict=True):
            segment.write(i, own[:, heads:])
            seen.append(segment.sights[layer.window].attend(own[:, :heads], i))
        stream.x.add_(layer.out(_joined(seen)))
        gate, up = layer.gate_up(stream.normed(layer.before_mlp)).chunk(2, dim=-1)
        stream.x.add_(layer.down(_silu(gate).mul_(up)))
        if i + 1 in features:
            seen_at[i + 1] = stream.x.clone()
    if len(weights.layers) in features:  # transformers shows what the head reads
        seen_at[len(weights.layers)] = Stream.of(stream.x, epsilon).normed(weights.before_head)
    return stream.x, torch.cat([seen_at[k] for k in features], dim=-1) if features else stream.x[:, :0]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def logits_of(weights: Weights, hidden: Tensor) -> Tensor:
    """Logits [k, V] after hidden states [k, hidden]."""
    return weights.head(Stream.of(hidden, weights.epsilon).normed(weights.before_head))


@final
@frozen(eq=False)
class Stream:
    """The residual stream `x` [k, n] of a pass, with room for -x beside it, [k, 2n]: see `normed`."""

    x: Tensor
    minus: Tensor
    both: Tensor
    epsilon: float

    @classmethod
    def of(cls, x: Tensor, epsilon: float) -> Stream:
        """A stream that begins with x, which is copied."""
        both = torch.cat((x, x), dim=-1)
        x, minus = both.chunk(2, dim=-1)
        return cls(x, minus, both, epsilon)

    def normed(self, twice: Tensor) -> Tensor:
        """x / √(mean(x²) + ε) · weight over rows, with the weight given twice, [2n].

        Computed as the layer norm of [x, -x], whose mean is 0 and whose variance is mean(x²): one kernel, a row at a
        time, in half the time of the ten kernels of `F.rms_norm`.
        """
        n = self.x.shape[-1]
        if self.x.dtype == torch.float64:
            return _normalised(self.x, self.epsilon).mul_(twice[:n])
        torch.neg(self.x, out=self.minus)
        return torch.layer_norm(self.both, twice.shape, twice, None, self.epsilon)[:, :n]


def _normalised(x: Tensor, epsilon: float) -> Tensor:
    """x / √(mean(x²) + ε) over the last dimension, through fp32 in every dtype, as transformers does it."""
    single = x.float()
    return (single * torch.rsqrt(single.square().mean(dim=-1, keepdim=True) + epsilon)).to(x.dtype)


def _rotate(qk: Tensor, angles: tuple[Tensor, Tensor]) -> None:
    """Turn queries and keys [k, heads, size] by their positions, in place: x · cos + (-x₂, x₁) · sin."""
    cos, signed_sin = angles
    turned = qk.roll(qk.shape[-1] // 2, dims=-1).mul_(signed_sin)
    qk.mul_(cos).add_(turned)


def _silu(gate: Tensor) -> Tensor:
    """x · sigmoid(x) of [k, n], on a CPU in pieces that are not cut within a row."""
    if gate.numel() <= ELEMENTS or gate.is_cuda:
        return F.silu(gate)
    return torch.cat([F.silu(rows) for rows in torch.split(gate, max(1, ELEMENTS // gate.shape[-1]))])


@final
@frozen(eq=False)
class Sight:
    """What the tokens of a pass see: each layer's keys and values [1, heads, n, size], less what the `mask` hides.

    The queries that share a key head are rows of one attention, so that no key is repeated: `slots` [k, group, heads,
    size] are the places for them in `rows` [1, heads, k · group and padding, size]. The mask [rows, n] is 0 or -∞; None
    hides nothing.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    rows: Tensor
    slots: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, seen: Tensor, hidden: Tensor | None, weights: Weights, k: int, multiple: int) -> Sight:
        """The sight of k tokens over keys and values [layers, 2, heads, n, size], less what is `hidden` [k, n].

        The rows are padded to a `multiple`.
        """
        keys, values = seen[:, :, None].unbind(1)
        group = weights.heads // weights.kv_heads
        padding = -k * group % multiple
        rows = keys.new_zeros(1, k * group + padding, weights.kv_heads, weights.size)
        slots = rows[0, : k * group].view(k, group, weights.kv_heads, weights.size)
        mask = None
        if hidden is not None:
            mask = keys.new_zeros(hidden.shape).masked_fill_(hidden, -inf).repeat_interleave(group, dim=0)
            mask = F.pad(mask, (0, 0, 0, padding))
        return cls(keys.unbind(), values.unbind(), rows.transpose(1, 2), slots, mask)

    def attend(self, queries: Tensor, layer: int) -> Tensor:
        """softmax(q · kᵀ / √size) · v of queries [k, group · heads, size], as [k, group · heads · size]."""
        k, group, heads, size = self.slots.shape
        if self.rows.shape[2] == group:  # one token's queries are the rows as they lie
            rows = queries.view(1, group, heads, size).transpose(1, 2)
            return self._seen(rows, layer).reshape(1, -1)
        self.slots.copy_(queries.view(k, group, heads, size))
        return self._seen(self.rows, layer)[:, : k * group].reshape(k, -1)

    def _seen(self, rows: Tensor, layer: int) -> Tensor:
        seen = F.scaled_dot_product_attention(rows, self.keys[layer], self.values[layer], attn_mask=self.mask)
        return seen.transpose(1, 2)


def hiding(positions: Tensor, seen: Tensor, window: int | None) -> Tensor:
    """Which of the keys at the positions `seen` [n] are hidden from the tokens at `positions` [k], as [k, n]."""
    hidden = seen > positions[:, None]
    return hidden if window is None else hidden | (seen <= positions[:, None] - window)


@final
@define(eq=False)
class Angles:
    """cos and sin of the positions seen so far, from the model's own rotary embedding; sin with rotation's sign."""

    rotary: Rotary
    like: Tensor
    _table: tuple[Tensor, Tensor] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._grow(512)

    def between(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """cos and signed sin, each [end - start, 1, size]."""
        while end > len(self._table[0]):
            self._grow(2 * len(self._table[0]))
        cos, sin = self._table
        return cos[start:end], sin[start:end]

    def _grow(self, positions: int) -> None:
        with lasting(), torch.no_grad():
            cos, sin = self.rotary(self.like, torch.arange(positions, device=self.like.device)[None])
            lower, upper = sin[0, :, None].chunk(2, dim=-1)
            # In one assignment: another thread may be reading.
            self._table = cos[0, :, None], torch.cat((-lower, upper), dim=-1)
