"""Linear layers whose weights are laid out once, for the processor that is there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final, TypeAlias, final

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from specflow.errors import DecodeError

Linear: TypeAlias = Callable[[Tensor], Tensor]
"""x [k, in] → x · Wᵀ + bias, [k, out], in a tensor of its own."""

MakeLinear: TypeAlias = Callable[[Tensor, Tensor | None], Linear]
"""(weight [out, in], bias [out] or None) → a linear layer that computes what they do, or nearly."""

LAYOUT: Final = 8
"""The number of tokens that weights are laid out for. The layout for one is another, and slow from two tokens on."""

ALIGNED: Final = 64
"""Where torch puts tensors: at multiples of so many bytes."""

TOKENS: Final = 128
"""The most tokens that are read at a time. At this size the attention of a long prompt was fastest."""


@final
@frozen(eq=False)
class Plain:
    """torch's own linear layer, where there is nothing better."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, /) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@final
@frozen(eq=False)
class Packed:
    """A linear layer in oneDNN's own layout, by the private operations that inductor's frozen graphs use too.

    `can_pack` tells whether this build of torch has them, and has them right. Two to four times as fast as `Plain` on
    the processors we measured.
    """

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Packed:
        """The layer of a weight [out, in], which is copied."""
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), LAYOUT)
        return cls(packed, bias)

    def __call__(self, x: Tensor, /) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product


@final
@frozen(eq=False)
class Widened:
    """A layer of half precision computed in fp32 and rounded once, for processors that have no products in half.

    As fast as the layer in fp32, which there is up to ten times as fast as torch's own in half, and takes its memory.
    """

    single: Linear

    def __call__(self, x: Tensor, /) -> Tensor:
        return self.single(x.float()).to(x.dtype)


@final
@frozen(eq=False)
class Summed:
    """A linear layer as a sum over equal parts of its input, added in this order: W₁x₁ + W₂x₂ + …"""

    parts: tuple[Linear, ...]

    def __call__(self, x: Tensor, /) -> Tensor:
        total, *rest = [part(piece) for part, piece in zip(self.parts, x.chunk(len(self.parts), dim=-1), strict=True)]
        for addend in rest:
            total.add_(addend)
        return total


@final
@frozen(eq=False)
class Int8:
    """A linear layer over bf16 with weights of 8 bits and a scale for each output: a quarter of fp32's memory. Lossy.

    w ≈ round(w / s) · s with s = max|w| / 127 over each row. For drafting: the law it gives is not the model's.
    The kernel reads 16 inputs at a time from aligned addresses without looking, so the inner dimension is filled up
    with zeros and inputs that lie elsewhere are copied.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    padding: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Int8:
        """The layer of a weight [out, in], rounded."""
        padding = -weight.shape[1] % ALIGNED
        exact = F.pad(weight.float(), (0, padding)).contiguous()
        scales = exact.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (exact / scales[:, None]).round_().to(torch.int8)
        return cls(rounded, scales.bfloat16(), None if bias is None else bias.bfloat16(), padding)

    def __call__(self, x: Tensor, /) -> Tensor:
        x = F.pad(x, (0, self.padding)) if self.padding else x.contiguous()
        x = x.clone() if x.data_ptr() % ALIGNED else x
        product = torch._weight_int8pack_mm(x, self.weight, self.scales)
        return product if self.bias is None else product.add_(self.bias)


def fast_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """The fastest layer there is here for this dtype."""
    if can_pack(weight.dtype):
        return Packed.of(weight, bias)
    return _widened(weight, bias, Packed.of) if can_widen(weight.dtype) else Plain(weight, bias)


def int8_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A layer with weights of 8 bits. `DecodeError` where this build of torch has none."""
    if not can_round():
        remedy = "use accelerate.lossy_bf16"
        raise DecodeError("model", "this torch has no right product with weights of 8 bits", torch.__version__, remedy)
    return Int8.of(weight, bias)


def steady_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A layer that computes a row alike, bit for bit, however many rows there are, up to `TOKENS`.

    oneDNN cuts a long inner dimension in ways that depend on the number of rows, so it is cut here, into as few equal
    parts as it takes. `DecodeError` where no number of parts helps.
    """
    if can_widen(weight.dtype):
        return _widened(weight, bias, steady_linear)
    out, inner = weight.shape
    parts = steady_parts(out, inner, weight.dtype, torch.get_num_threads(), Packed.of)
    first, *rest = weight.chunk(parts, dim=1)
    layers = (Packed.of(first, bias), *[Packed.of(part, None) for part in rest])
    return layers[0] if parts == 1 else Summed(layers)


@cache
def steady_parts(out: int, inner: int, dtype: torch.dtype, threads: int, make: MakeLinear) -> int:
    """Into how many equal parts `inner` must be cut for `make`, found out by trying.

    `threads` is how many torch has: the answer may depend on it.
    """
    for parts in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        if inner % parts == 0 and _is_steady(out, inner // parts, dtype, make):
            return parts
    received = f"a {dtype} layer from {inner} to {out} on {threads} threads"
    happened = "no layout of a linear layer gives the same bits for one token and for many"
    raise DecodeError("model", happened, received, "use accelerate.fast, and fp32 for equal texts")


def _is_steady(out: int, inner: int, dtype: torch.dtype, make: MakeLinear) -> bool:
    """Whether 1 to `TOKENS` rows come out as each of them does alone.

    The inputs pair up so that every exact result is 0. What comes out is rounding alone, and any other order of the
    additions shows in nearly every element; with ordinary numbers bf16 would round it away in all but a few.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randperm(inner - inner % 2, generator=generator).chunk(2)
    weight = torch.randn(min(out, 256), inner, generator=generator)
    weight[:, right] = -weight[:, left]
    rows = torch.randn(32, inner, generator=generator)
    rows[:, right] = rows[:, left]
    if inner % 2:
        rows[:, -1] = 0
    layer = make(weight.to(dtype).repeat(-(-out // len(weight)), 1)[:out], None)
    rows = rows.to(dtype).repeat(TOKENS // 32, 1)
    alone = torch.cat([layer(row[None]) for row in rows[:32]]).repeat(TOKENS // 32, 1)
    counts = (*range(2, 34), 40, 48, 63, 64, 96, 127, 128)
    return all(torch.equal(layer(rows[:count]), alone[:count]) for count in counts)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether the private operations of `Packed` are there and right: tried once, on a small layer."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    return is_right(Packed.of, dtype, 2**-6 if dtype == torch.bfloat16 else 1e-5)


def has_layers(dtype: torch.dtype) -> bool:
    """Whether there are layers of ours in this dtype here."""
    return can_pack(dtype) or can_widen(dtype)


def can_widen(dtype: torch.dtype) -> bool:
    """Whether layers in this half precision are computed in fp32 here, for want of anything faster."""
    return dtype in (torch.float16, torch.bfloat16) and not can_pack(dtype) and can_pack(torch.float32)


def _widened(weight: Tensor, bias: Tensor | None, make: MakeLinear) -> Widened:
    return Widened(make(weight.float(), None if bias is None else bias.float()))


@cache
def can_round() -> bool:
    """Whether the private operation of `Int8` is there and right: tried once, on a small layer."""
    return is_right(Int8.of, torch.bfloat16, 2**-4)


def is_right(make: MakeLinear, dtype: torch.dtype, tolerance: float) -> bool:
    """Whether layers that `make` makes are within the tolerance, relative to the largest output, on a small example."""
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((48, 32), (3, 32), (48,)))
    expected = F.linear(x.double(), weight.double(), bias.double())
    try:
        got = make(weight, bias)(x)
    except (AttributeError, RuntimeError):  # missing, renamed, or not for this processor
        return False
    return got.shape == expected.shape and bool((got - expected).abs().max() <= tolerance * expected.abs().max())
