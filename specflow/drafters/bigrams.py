"""A model's own bigrams: what it would say after each token if it knew nothing but that token."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Final, final

import numpy
import torch
from attrs import field, frozen
from numpy.typing import NDArray
from safetensors.numpy import save
from torch.nn.functional import softmax

from specflow.asked import rows_of
from specflow.errors import DecodeError
from specflow.files import checksum, content_of, no_file, write
from specflow.guards.checks import calls, shown, whole
from specflow.guards.ids import ids_of
from specflow.prefix import tokens_of
from specflow.state import TEXT, Predictor, Proposal, Tokens

TOGETHER: Final = 127  # tokens asked about in one pass; with the one before them they fill an accelerated model's pass
FORMAT: Final = "specflow bigrams 2"
ARRAYS: Final = {"tokens": torch.int32, "chances": torch.float32}
REMEDY: Final = "make the table again, and `save` it"


@final
@frozen(eq=False)
class Bigrams:
    """For each token of the vocabulary its k most probable followers, in order: `tokens` and `chances`, each [V, k].

    `Bigrams.of(target, before, vocab_size)` asks a model once, in V / 127 passes over trees, what follows `before` and
    each token. `before` should tell nothing, as `specflow.models.bigrams_of` chooses it. For SmolLM2-135M it takes a
    minute or two, and 3 MB. No text is needed, and nothing is trained.

    `DecodeError` where the two tables are not of one shape [V, k], k ≥ 1, name tokens outside [0, V), or hold chances
    that are no probabilities.
    Source: Stewart et al. 2411.03786 (The N-Grammys), the model-derived bigram.

    >>> table = Bigrams(numpy.array([[1, 2], [2, 0], [0, 1]]), numpy.array([[0.5, 0.25]] * 3))
    >>> table.after((1,))
    [(2, 0.5), (0, 0.25)]
    """

    tokens: NDArray[numpy.integer] = field(repr=False)
    chances: NDArray[numpy.floating] = field(repr=False)

    def __attrs_post_init__(self) -> None:
        for name, kind in (("tokens", numpy.integer), ("chances", numpy.floating)):
            table: object = getattr(self, name)
            if not isinstance(table, numpy.ndarray) or not numpy.issubdtype(table.dtype, kind):
                received = f"an array of {table.dtype}" if isinstance(table, numpy.ndarray) else shown(table)
                happened = f"{name} is not a numpy array of {kind.__name__} numbers"
                raise DecodeError(name, happened, received, "give two tables")
        shapes = self.tokens.shape, self.chances.shape
        if self.tokens.ndim != 2 or 0 in self.tokens.shape or shapes[0] != shapes[1]:
            raise DecodeError("bigrams", "the tables are not both [V, k]", shapes, "give tables of one shape")
        if self.tokens.min() < 0 or self.tokens.max() >= len(self.tokens):
            received = f"{self.tokens.min()} to {self.tokens.max()} of {len(self.tokens)}"
            raise DecodeError("bigrams", "a follower is not in the vocabulary", received, "give a row for each token")
        if not (self.chances.min() >= 0 and self.chances.max() <= 1.001):
            received = f"{self.chances.min()} to {self.chances.max()}"
            raise DecodeError("bigrams", "a chance is outside 0 to 1", received, "give probabilities")

    @classmethod
    def of(cls, target: Predictor, before: Tokens, vocab_size: int, k: int = 8) -> Bigrams:
        """What the target finds most probable after `before`, which is not empty, and each token; 1 ≤ k ≤ V.

        `DecodeError` for anything else, and where the target's rows are none of `vocab_size` tokens.
        """
        calls("a predictor", "give a CachedPredictor")("target", target)
        whole(1, "give the target's vocab_size")("vocab_size", vocab_size)
        whole(1, "ask for as many followers as there are", most=int(vocab_size))("k", k)
        vocab_size, k = int(vocab_size), int(k)
        context = ids_of("before", before)
        if not context:
            raise DecodeError("before", "there is no token to begin with", "no tokens", "give one that tells nothing")
        # Tables of their own from the start: what is kept between two passes would lie between the rows of one and the
        # next, and hold the room of them all.
        every = range(vocab_size)
        tokens = torch.empty(len(every), k, dtype=torch.long, device="cpu")
        chances = torch.empty(len(every), k, dtype=torch.float32, device="cpu")
        for first in every[::TOGETHER]:
            some = every[first : first + TOGETHER]
            logits = rows_of(target, context, [Proposal(token, parent=TEXT) for token in some])[1:]
            if logits.shape[1] != vocab_size:
                happened = f"the target does not give logits of {vocab_size} tokens"
                raise DecodeError("target", happened, logits.shape[1], "give the target and its vocab_size")
            best = softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1).topk(k, dim=-1)
            tokens[first : first + TOGETHER], chances[first : first + TOGETHER] = best.indices.cpu(), best.values.cpu()
        return cls(tokens.numpy(), chances.numpy())

    def after(self, tokens: Tokens, /) -> Sequence[tuple[int, float]]:
        """The followers of a text's last token and their probabilities, the most probable first.

        None of a text without tokens, and of a token outside the table. `DecodeError` for what holds no ids.
        """
        last = ids_of("tokens", tokens_of(tokens)[-1:])
        if not last or not 0 <= last[0] < len(self.tokens):
            return ()
        return list(zip(self.tokens[last[0]].tolist(), self.chances[last[0]].tolist(), strict=True))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the tables to a safetensors file, whole or not at all, as `NGramStorage.save` does."""
        arrays = {"tokens": self.tokens.astype(numpy.int32), "chances": self.chances.astype(numpy.float32)}
        tensors, metadata = {name: torch.from_numpy(each) for name, each in arrays.items()}, {"format": FORMAT}
        write(path, save(arrays, metadata | {"sha256": checksum(metadata, tensors)}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Bigrams:
        """Read what `save` wrote. `DecodeError` for any other file, and for one that is damaged."""
        metadata, arrays = content_of(path, REMEDY)
        sha = metadata.pop("sha256", None)
        if metadata.get("format") != FORMAT:
            raise no_file(path, "holds no table of bigrams, or one of another version", REMEDY)
        kinds = {name: each.dtype for name, each in arrays.items()}
        if kinds != ARRAYS or {each.dim() for each in arrays.values()} != {2}:
            raise no_file(path, "does not hold the arrays of a table", REMEDY)
        if sha != checksum(metadata, arrays):
            raise no_file(path, "is damaged, its checksum does not match", REMEDY)
        return cls(arrays["tokens"].numpy(), arrays["chances"].numpy())
