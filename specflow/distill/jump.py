"""Fitting a linear jump: least squares, and no gradient."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Final

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from specflow.distill.folder import CONFIG, WEIGHTS, made_folder, refuse_filled
from specflow.errors import DecodeError
from specflow.files import write
from specflow.guards.checks import MOST, a, each, number, shown, whole
from specflow.guards.ids import ids_of
from specflow.heads.load import KIND
from specflow.heads.target import Target
from specflow.predictors import CachedPredictor
from specflow.predictors.reader import refuse_weightless
from specflow.state import Tokens

_are_layers: Final = each(whole(0, "give the numbers of hidden states: 0 is the embeddings", MOST))


def fit_jump(
    model: PreTrainedModel,
    texts: Iterable[Sequence[int]],
    out: str | PathLike[str],
    layers: tuple[int, ...],
    ridge: float = 1e-3,
) -> None:
    """Fits a `Jump` for a model to texts, such as its own answers, and keeps it in the folder `out` for `load_head`.

    minimise Σ |h' - (A f + E e(x') + b)|², then Σ |h'' - (C ĥ' + E e(x'') + b)|²

    f is what the `layers` held at a token, h' and h'' what the model held last at the next two tokens x' and x'', and
    ĥ' what the first map makes of f; the head mixes f by M with C M = A. `ridge` is added to the diagonals, as a part
    of their mean. It reads each text twice, and holds sums of (layers · H + H)² numbers in fp64.

    `DecodeError` for layers that the model does not have, for texts of which none has three tokens, for a folder that
    cannot be written or holds a head.
    """
    a(PreTrainedModel, "give a transformers model")("model", model)
    refuse_weightless("model", model)
    _are_layers("layers", layers)
    number("ridge is not a positive number", "give 0.001", lambda part: 0 < part < 1)("ridge", ridge)
    target, folder = Target(model), made_folder(out)
    reads = target.reads(tuple(layers))
    if not reads:
        raise DecodeError("layers", "there are no layers to read", shown(layers), "give one at least")
    refuse_filled(folder)
    rows, predictor = _rows(texts), CachedPredictor(model, memos=1, features=(*reads, target.layers))
    first = _Sums()
    for tokens in rows:
        held, last, embedded = _read(predictor, target, tokens)
        first.add(_beside(held[:-1], embedded[1:]), last[1:])
    both = first.solved(ridge)
    further, token, bias = _Sums(), both[len(reads) * target.hidden : -1], both[-1]
    for tokens in rows:
        held, last, embedded = _read(predictor, target, tokens)
        foretold = _beside(held[:-2], embedded[1:-1]) @ both
        further.add(foretold, last[2:] - embedded[2:] @ token - bias)
    carry = further.solved(ridge)
    mix = both[: len(reads) * target.hidden] @ torch.linalg.pinv(carry)
    tensors = {"mix.weight": mix.T, "carry.weight": carry.T, "token.weight": token.T, "token.bias": bias}
    write(folder / WEIGHTS, save({name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}))
    config = {KIND: "jump", "layers": list(reads), "vocab_size": target.vocab_size}
    write(folder / CONFIG, json.dumps(config).encode())


class _Sums:
    """What least squares need of rows x [k, n] and what they should give, y [k, m]: Σ xᵀx and Σ xᵀy."""

    def __init__(self) -> None:
        self.square: Tensor | float = 0.0
        self.across: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """More rows."""
        self.square, self.across = self.square + x.T @ x, self.across + x.T @ y

    def solved(self, ridge: float) -> Tensor:
        """The map [n, m] with the least squares."""
        assert isinstance(self.square, Tensor)
        assert isinstance(self.across, Tensor)
        diagonal = self.square.diagonal()
        eye = torch.eye(len(diagonal), dtype=diagonal.dtype, device=diagonal.device)
        solution: Tensor = torch.linalg.solve(self.square + ridge * diagonal.mean() * eye, self.across)
        return solution


def _beside(held: Tensor, embedded: Tensor) -> Tensor:
    """[f, e, 1] in rows."""
    return torch.cat((held, embedded, held.new_ones(len(held), 1)), dim=-1)


def _read(predictor: CachedPredictor, target: Target, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """What the layers held at each token, what the last one held, and the embeddings, in fp64."""
    held, last = predictor.features(tokens, len(tokens)).double().tensor_split([-target.hidden], dim=-1)
    with torch.no_grad():
        return held, last, target.embeddings(torch.tensor(tokens, device=held.device)).double()


def _rows(texts: object) -> list[Tokens]:
    if isinstance(texts, str | bytes | Tensor) or not isinstance(texts, Iterable):
        raise DecodeError("texts", "texts are no rows of ids", shown(texts), "give several in a list")
    rows = [tokens for text in texts if len(tokens := ids_of("texts", text)) > 2]
    if not rows:
        raise DecodeError("texts", "no text has three tokens", "none", "give texts, such as the model's answers")
    return rows
