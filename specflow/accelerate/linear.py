"""Linear layers whose weights are laid out once, for the processor that is there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import frexp, inf
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

GROUP: Final = 32
"""How many weights of 4 bits share a scale: the fewest that torch's product takes."""

OUTPUTS: Final = 16
"""torch's product with weights of 4 bits takes multiples of so many outputs."""

TOKENS: Final = 128
"""The most tokens that a CPU reads at a time. At this size the attention of a long prompt was fastest."""


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
        return cls(packed, None if bias is None else bias.clone())

    def __deepcopy__(self, memo: object) -> Packed:
        return self  # what is laid out cannot be copied, and is never written

    def __call__(self, x: Tensor, /) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product


@final
@frozen(eq=False)
class Half:
    """A linear layer over fp32 whose weights are kept in fp16, by FBGEMM: half the memory to read, the same numbers.

    y = (x · (W · scale)ᵀ + bias · scale) / scale, with a power of two for a scale, so that bf16 weights, too, are kept
    exactly. docs/acceleration.md tells what that is worth on a processor without bf16 instructions.
    """

    packed: torch.ScriptObject
    scale: float

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, scale: float = 1.0) -> Half:
        """The layer of a weight [out, in], which is copied, and which is exact in fp16 times `scale`."""
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack_fp16(
            (weight.float() * scale).contiguous(), None if bias is None else bias.float() * scale
        )
        return cls(packed, scale)

    def __deepcopy__(self, memo: object) -> Half:
        return self  # what is laid out cannot be copied, and is never written

    def __call__(self, x: Tensor, /) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return product if self.scale == 1 else product.mul_(1 / self.scale)


@final
@frozen(eq=False)
class Padded:
    """A linear layer that is given a multiple of `rows` tokens, the last of them zeros."""

    layer: Linear
    rows: int

    def __call__(self, x: Tensor, /) -> Tensor:
        padding = -len(x) % self.rows
        return self.layer(F.pad(x, (0, 0, 0, padding)))[: len(x)] if padding else self.layer(x)


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
    """A linear layer in bf16 with weights of 8 bits and a scale for each output: a quarter of fp32's memory. Lossy.

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
        half = x.bfloat16()
        half = F.pad(half, (0, self.padding)) if self.padding else half.contiguous()
        half = half.clone() if half.data_ptr() % ALIGNED else half
        product = torch._weight_int8pack_mm(half, self.weight, self.scales)
        return (product if self.bias is None else product.add_(self.bias)).to(x.dtype)


@final
@frozen(eq=False)
class Int4:
    """A linear layer in bf16 with weights of 4 bits, and a scale and a middle for each 32: a sixth of fp32. Lossy.

    w ≈ (round((w - m) / s + 8) - 8) · s + m, from 0 to 15 before 8 is taken off, with s = (max w - min w) / 15 and
    m = min w + 8s over each group. For drafting: the law it gives is not the model's.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None
    out: int
    padding: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Int4:
        """The layer of a weight [out, in], rounded."""
        out, inner = weight.shape
        padding = -inner % GROUP
        filled = F.pad(weight.float(), (0, padding, 0, -out % OUTPUTS))
        groups = filled.view(len(filled), -1, GROUP)
        least, most = groups.aminmax(dim=-1, keepdim=True)
        scales = ((most - least) / 15).clamp_(min=torch.finfo(torch.float32).tiny).bfloat16()
        middles = (least + 8 * scales.float()).bfloat16()
        rounded = ((groups - middles.float()) / scales.float() + 8).round_().clamp_(0, 15).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded.flatten(1), 1)
        both = torch.cat((scales, middles), dim=-1).transpose(0, 1).contiguous()
        return cls(packed, both, None if bias is None else bias.bfloat16(), out, padding)

    def __call__(self, x: Tensor, /) -> Tensor:
        half = F.pad(x.bfloat16(), (0, self.padding)) if self.padding else x.bfloat16().contiguous()
        every: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(half, self.packed, GROUP, self.scales)
        product = every[:, : self.out]
        return (product if self.bias is None else product.add_(self.bias)).to(x.dtype)


def computing(dtype: torch.dtype) -> torch.dtype:
    """What the layers of weights in `dtype` compute in here: half precision only where there are products in it."""
    in_half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if in_half and not can_pack(dtype) and can_pack(torch.float32) else dtype


def fast_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """The fastest layer there is here, over `computing(weight.dtype)`."""
    half, dtype = half_linear(weight, bias), computing(weight.dtype)
    if half is not None:
        return half
    return (Packed.of if can_pack(dtype) else Plain)(weight.to(dtype), None if bias is None else bias.to(dtype))


def int8_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A layer with weights of 8 bits. `DecodeError` where this build of torch has none."""
    return _coarse(Int8.of, 8, 2**-4, weight, bias)


def int4_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A layer with weights of 4 bits. `DecodeError` where this build of torch has none."""
    return _coarse(Int4.of, 4, 2**-2, weight, bias)


def _coarse(make: MakeLinear, bits: int, tolerance: float, weight: Tensor, bias: Tensor | None) -> Linear:
    if not is_right(make, torch.bfloat16, tolerance):
        happened = f"this torch has no right product with weights of {bits} bits"
        raise DecodeError("model", happened, torch.__version__, "use accelerate.lossy_bf16")
    return make(weight, bias)


def steady_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A layer that computes a row alike, bit for bit, however many rows there are, up to `TOKENS`.

    FBGEMM's kernels add in an order of their own for each small number of rows, so those are padded, where that helps.
    oneDNN cuts a long inner dimension in ways that depend on the number of rows, so it is cut here, into as few equal
    parts as it takes. `DecodeError` where no number of parts helps.
    """
    out, inner = weight.shape
    dtype, threads = computing(weight.dtype), torch.get_num_threads()
    half = half_linear(weight, bias)
    rows = None if half is None else steady_rows(out, inner, threads)
    if half is not None and rows is not None:
        return Padded(half, rows)
    parts = steady_parts(out, inner, dtype, threads, Packed.of)
    first, *rest = weight.to(dtype).chunk(parts, dim=1)
    layers = (Packed.of(first, None if bias is None else bias.to(dtype)), *[Packed.of(part, None) for part in rest])
    return layers[0] if parts == 1 else Summed(layers)


@cache
def steady_rows(out: int, inner: int, threads: int) -> int | None:
    """To multiples of how many rows a `Half` layer must be padded, found out by trying; None if none of them helps.

    `threads` is how many torch has: the answer may depend on it.
    """

    def padded(rows: int) -> MakeLinear:
        return lambda weight, bias: Padded(Half.of(weight.half(), bias), rows)

    tried = (1, 2, 3, 4, 6, 8, 12, 14, 16)
    return next((rows for rows in tried if _is_steady(out, inner, torch.float32, padded(rows))), None)


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
    left, right = torch.randperm(inner - inner % 2, generator=generator, device="cpu").chunk(2)
    # In fp32 whatever torch's default is: of numbers of 16 bits no product is rounded, and the order shows less.
    weight = torch.randn(min(out, 256), inner, generator=generator, dtype=torch.float32, device="cpu")
    weight[:, right] = -weight[:, left]
    rows = torch.randn(32, inner, generator=generator, dtype=torch.float32, device="cpu")
    rows[:, right] = rows[:, left]
    if inner % 2:
        rows[:, -1] = 0
    layer = make(weight.to(dtype).repeat(-(-out // len(weight)), 1)[:out], None)
    rows = rows.to(dtype).repeat(TOKENS // 32, 1)
    alone = torch.cat([layer(row[None]) for row in rows[:32]]).repeat(TOKENS // 32, 1)
    counts = (*range(2, 34), 40, 48, 63, 64, 96, 127, 128)
    return all(torch.equal(layer(rows[:count]), alone[:count]) for count in counts)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether the private operations of `Packed` are there and right: tried once, on a small layer."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    return is_right(Packed.of, dtype, 2**-6 if dtype == torch.bfloat16 else 1e-5)


@cache
def can_halve() -> bool:
    """Whether FBGEMM's layers with weights in fp16 are there and right: tried once, on a small layer."""
    return is_right(lambda weight, bias: Half.of(weight.half(), bias), torch.float32, 2**-9)


def half_linear(weight: Tensor, bias: Tensor | None) -> Half | None:
    """A layer kept in fp16, where it is computed in fp32 and loses nothing; None elsewhere."""
    scale = exact_in_half(weight) if computing(weight.dtype) == torch.float32 and can_halve() else None
    return None if scale is None else Half.of(weight, bias, scale)


def exact_in_half(weight: Tensor) -> float | None:
    """A power of two times which `weight` is exact in fp16; None if there is none."""
    single = weight.float()
    largest = float(single.abs().max())
    if not 0 < largest < inf:
        return None
    for scale in (1.0, 2.0 ** (15 - frexp(largest)[1])):
        scaled = single * scale
        if torch.equal(scaled.half().float(), scaled):
            return scale
    return None


def has_layers(dtype: torch.dtype) -> bool:
    """Whether there are layers of ours in this dtype here."""
    return can_pack(computing(dtype))


@cache
def is_right(make: MakeLinear, dtype: torch.dtype, tolerance: float) -> bool:
    """Whether layers that `make` makes are within the tolerance, relative to the largest output, on a small example."""
    generator = torch.Generator().manual_seed(0)
    shapes = (48, 32), (3, 32), (48,)
    weight, x, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype) for shape in shapes
    )
    expected = F.linear(x.double(), weight.double(), bias.double())
    try:
        got = make(weight, bias)(x)
    except (AttributeError, RuntimeError):  # missing, renamed, or not for this processor
        return False
    return got.shape == expected.shape and bool((got - expected).abs().max() <= tolerance * expected.abs().max())
