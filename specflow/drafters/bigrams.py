"""A model's own bigrams: what it would say behind each token, if it knew nothing but that token."""

from __future__ import annotations

from os import PathLike
from typing import Final, final

import numpy
import torch
from attrs import field, frozen
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor
from torch.nn.functional import softmax

from specflow.drafters.storage_file import write
from specflow.errors import DecodeError
from specflow.state import Node, Tokens, TreePredictor

TOGETHER: Final = 127
"""How many tokens are asked about in one pass; with the token before them they fill an accelerated model's pass."""

FORMAT: Final = "specflow bigrams 1"


@final
@frozen(eq=False)
class Bigrams:
    """For each token of the vocabulary its k most probable followers, in order: `tokens` and `chances`, each [V, k].

    `Bigrams.of(target, before, vocab_size)` asks a model once, in V / 127 passes over trees: what follows each token
    behind the tokens `before`? Those should tell nothing, as `specflow.models.bigrams_of` chooses them. For
    SmolLM2-135M it takes a minute or two, and 3 MB; `save` keeps it for the next time. No text is needed, and nothing
    is trained.

    `DecodeError` where the two tables are not of one shape [V, k], k ≥ 1, or name tokens outside [0, V).
    Source: Stewart et al. 2411.03786 (The N-Grammys), the model-derived bigram.

    >>> table = Bigrams(numpy.array([[1, 2], [2, 0], [0, 1]]), numpy.array([[0.5, 0.25]] * 3))
    >>> table.behind(1)
    [(2, 0.5), (0, 0.25)]
    """

    tokens: NDArray[numpy.integer] = field(repr=False)
    chances: NDArray[numpy.floating] = field(repr=False)

    def __attrs_post_init__(self) -> None:
        shapes = self.tokens.shape, self.chances.shape
        if self.tokens.ndim != 2 or 0 in self.tokens.shape or shapes[0] != shapes[1]:
            raise DecodeError("bigrams", "the tables are not both [V, k]", shapes, "give tables of one shape")
        if self.tokens.min() < 0 or self.tokens.max() >= len(self.tokens):
            received = f"{self.tokens.min()} to {self.tokens.max()} of {len(self.tokens)}"
            raise DecodeError("bigrams", "a follower is not in the vocabulary", received, "give a row for each token")

    @classmethod
    def of(cls, target: TreePredictor, before: Tokens, vocab_size: int, k: int = 8) -> Bigrams:
        """What the target finds most probable behind `before` and each token. `DecodeError` for 1 > k or k > V."""
        if not 1 <= k <= vocab_size:
            raise DecodeError("k", f"k is outside 1 to {vocab_size}", k, "ask for as many followers as there are")
        starts = range(0, vocab_size, TOGETHER)
        parts = [_asked(target, before, range(i, min(i + TOGETHER, vocab_size)), k) for i in starts]
        tokens, chances = zip(*parts, strict=True)
        return cls(torch.cat(tokens).numpy(), torch.cat(chances).numpy())

    def behind(self, token: int) -> list[tuple[int, float]]:
        """The followers of a token and their probabilities, the most probable first."""
        return list(zip(self.tokens[token].tolist(), self.chances[token].tolist(), strict=True))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the tables to a safetensors file, whole or not at all."""
        arrays = {"tokens": self.tokens.astype(numpy.int32), "chances": self.chances.astype(numpy.float32)}
        write(path, save(arrays, {"format": FORMAT}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Bigrams:
        """Read what `save` wrote. `DecodeError` for any other file."""
        try:
            with safe_open(path, framework="np") as file:
                if (file.metadata() or {}).get("format") == FORMAT:
                    return cls(file.get_tensor("tokens"), file.get_tensor("chances"))
        except SafetensorError as error:
            raise _no_table(path, f"is truncated, corrupted or no table ({error})") from error
        raise _no_table(path, "holds no table of bigrams")


def _asked(target: TreePredictor, before: Tokens, some: range, k: int) -> tuple[Tensor, Tensor]:
    """The k most probable followers of some tokens, and their probabilities, each [n, k]."""
    logits = target(before, [Node(token) for token in some])[1:]
    best = softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1).topk(k, dim=-1)
    return best.indices.cpu(), best.values.cpu()


def _no_table(path: str | PathLike[str], happened: str) -> DecodeError:
    return DecodeError("path", f"the file {happened}", str(path), "make the table again, and `save` it")
