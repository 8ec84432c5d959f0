"""Models small enough to know everything about: a law for every text, and a user's processor that hides its law."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log
from random import Random
from typing import final

import torch
from attrs import Factory, field, frozen
from torch import Tensor
from typing_extensions import override

from specflow.distribution import Categorical
from specflow.errors import DecodeError
from specflow.guards.checks import MOST, does, shown, valid, whole
from specflow.guards.ids import reading_of, text_of
from specflow.paths import along_paths
from specflow.processors import LogitsProcessor
from specflow.protocols import Limits
from specflow.randomness import Sampling, drawn
from specflow.state import Predictor, Proposal, Tokens


@final
@frozen(eq=False)
class TableModel:
    """A predictor whose law is random but fixed: another one for every text, drawn from `seed`. Logits are log p, fp64.

    A law is uniform on the simplex, and every fourth one gives some token the probability 0. Nothing is shared between
    texts, so a decoder that reads the wrong row, or a row after the wrong token, emits another law. So it is with what
    its layers hold, `width` numbers at a token, for drafters that read that.

    >>> model = TableModel(vocab_size=3, seed=1)
    >>> from specflow import chain
    >>> model((0,), chain((2,))).exp().sum(dim=-1).round(decimals=9)
    tensor([1., 1.], dtype=torch.float64)
    >>> torch.equal(model((0,), chain((2,)))[1], model((0, 2), ())[0])
    True
    """

    vocab_size: int = field(validator=valid(whole(1, "give a vocabulary of at least one token")))
    seed: int = field(default=0, validator=valid(whole(0, "give a whole number")))
    width: int = field(default=4, validator=valid(whole(1, "give how many numbers its layers hold", MOST)))
    _rows: dict[Tokens, Tensor] = field(init=False, factory=dict, repr=False)
    _read: Predictor = field(init=False, repr=False, default=Factory(lambda it: along_paths(it._row), takes_self=True))

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each draft."""
        return self._read(text_of(tokens), drafts)

    @property
    def limits(self) -> Limits:
        """The vocabulary; texts may have any length."""
        return Limits(self.vocab_size)

    def features(self, tokens: Tokens, last: int, /) -> Tensor:
        """What its layers hold at each of the last `last` tokens, [last, width]: a function of the text up to there.

        >>> model = TableModel(vocab_size=3, width=2)
        >>> torch.equal(model.features((0, 2), 2)[0], model.features((0,), 1)[0])
        True
        """
        tokens, last = reading_of(tokens, last)
        ends = range(len(tokens) - last + 1, len(tokens) + 1)
        return torch.tensor([self._held(tokens[:end]) for end in ends], dtype=torch.float64, device="cpu")

    def _held(self, tokens: Tokens) -> list[float]:
        random = Random(f"{self.seed}/held/{tokens}")
        return [random.gauss(0.0, 1.0) for _ in range(self.width)]

    def _row(self, tokens: Tokens) -> Tensor:
        if tokens not in self._rows:
            random = Random(f"{self.seed}/{tokens}")
            weights = [random.expovariate(1.0) for _ in range(self.vocab_size)]
            if random.random() < 0.25:
                weights[random.randrange(self.vocab_size)] = 0.0
            total = sum(weights)
            logits = [log(weight / total) if weight else -inf for weight in weights]
            self._rows[tokens] = torch.tensor(logits, dtype=torch.float64, device="cpu")
        return self._rows[tokens]


@final
class HiddenProcessor(LogitsProcessor):
    """Stands for a user's own sampler: it prefers likely tokens more than its probabilities say, and nobody can see it.

    Its law is ∝ probs², but `laws` only knows that `sample` is not one of ours, so every draft is judged by
    sample-and-match. It draws from the randomness it was given, so that all its choices can be enumerated.
    """

    def __init__(self, rng: Sampling) -> None:
        super().__init__()
        does("a source of draws", "give the randomness of the world", "draw")("rng", rng)
        self._rng = rng

    @override
    def _process(self, logits: Tensor) -> Tensor:
        return logits

    @override
    def sample(self, probs: Tensor) -> Tensor:
        """One draw for each row of `probs` [k, V] from probs² / Σ probs², as [k, 1]."""
        given: object = probs
        if not (isinstance(given, Tensor) and given.ndim == 2 and given.is_floating_point() and not given.is_meta):
            raise DecodeError("probs", "probs are no rows", shown(given), "give floats [k, V]")
        laws = [Categorical(row.square() / row.square().sum()) for row in probs]
        drawn_ids = [drawn(self._rng, law, 0) for law in laws]
        if max(drawn_ids, default=0) >= probs.shape[1]:
            happened, remedy = "what is drawn is outside the vocabulary", "return an id of the law"
            raise DecodeError("rng", happened, shown(max(drawn_ids)), remedy)
        return torch.tensor(drawn_ids, device="cpu").reshape(-1, 1)
