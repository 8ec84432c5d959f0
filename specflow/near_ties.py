"""Near-ties: where rounding may decide between two tokens, let a pass over one token decide."""

from __future__ import annotations

from math import inf
from typing import final

import torch
from attrs import define, field, frozen
from torch import Tensor

from specflow.asked import rows_of
from specflow.checks import calls, number, shown, valid, whole
from specflow.distribution import PointMass
from specflow.errors import DecodeError
from specflow.ids import reading_of
from specflow.prefix import common_prefix
from specflow.processors import GreedyProcessor
from specflow.state import Predictor, Tokens


def margins_of(logits: Tensor) -> list[float]:
    """How far the largest logit is from the second in each row of `logits` [k, V]: 0 at a tie, ∞ where there is one.

    >>> import torch
    >>> margins_of(torch.tensor([[1.0, 4.0, 3.5], [2.0, 2.0, 0.0]]))
    [0.5, 0.0]
    """
    given: object = logits
    if not (isinstance(given, Tensor) and given.ndim == 2 and given.is_floating_point() and not given.is_meta):
        raise DecodeError("logits", "logits are no rows", shown(logits), "give floats [k, V]")
    if logits.shape[-1] < 2:
        return [inf] * len(logits)
    best = logits.topk(2, dim=-1).values.double()
    gaps: list[float] = (best[:, 0] - best[:, 1]).tolist()
    return gaps


_is_predictor = valid(calls("a predictor", "give a function of (tokens, last), such as a CachedPredictor"))


@final
@frozen
class RescoreNearTies:
    """A target whose rows with a margin below `below` are replaced by those of `single`, a pass over one token each.

    It makes any verification stage one that re-scores near-ties: `RejectTokens(RescoreNearTies(target, …), …)`. Rows
    behind a draft that is not the best token are left alone, since greedy decoding does not look at them. In exact
    arithmetic nothing changes. In bf16 a pass over k tokens rounds otherwise than k passes over one, and near-ties are
    where that shows in a greedy text.

    `single` decides what it costs and what it gives:

    - `OneByOne(CachedPredictor(model), len(prompt))` rounds as autoregressive decoding does. If `below` exceeds what
      rounding can do to a margin, the text is that of autoregressive decoding, token for token. But up to the last
      near-tie it takes as many passes as autoregressive decoding: a proof, not a gain.
    - The target itself takes one pass more at each near-tie, over a cache that passes over several tokens have
      written. Its roundings are in there, so that some texts still differ.

    docs/margins.md has the numbers. A model from `accelerate.bit_for_bit` needs none of this.

    >>> def target(tokens, last):
    ...     return torch.tensor([[1.0, 1.125], [5.0, 0.0]])[-last:]
    >>> def single(tokens, last):
    ...     return torch.tensor([[1.125, 1.0]])
    >>> RescoreNearTies(target, single, below=0.5)((7, 0), 2)
    tensor([[1.1250, 1.0000],
            [5.0000, 0.0000]])
    """

    target: Predictor = field(validator=_is_predictor)
    single: Predictor = field(validator=_is_predictor)
    below: float = field(validator=valid(number("below is no margin", "give a number of 0 or more", lambda x: x >= 0)))

    def __call__(self, tokens: Tokens, last: int, /) -> Tensor:
        """Logits [last, V] behind each of the last `last` prefixes of `tokens`."""
        tokens = reading_of(tokens, last)
        logits, greedy = rows_of(self.target, tokens, last), GreedyProcessor()
        rows = list(logits.unbind())
        for i, margin in enumerate(margins_of(logits)):
            end = len(tokens) - last + 1 + i
            if margin < self.below:
                rows[i] = rows_of(self.single, tokens[:end], 1, "single")[0]
                if rows[i].shape != logits[i].shape:
                    happened, received = "single and target have different vocabularies", f"{len(rows[i])} logits"
                    raise DecodeError("single", happened, received, f"give {len(logits[i])}, as the target does")
            if end < len(tokens) and greedy.laws(tokens[:end], rows[i][None]) != (PointMass(tokens[end]),):
                break
        return torch.stack(rows)


@final
@define(eq=False)
class OneByOne:
    """A predictor that reads the prompt in one pass and every token behind it in a pass of its own.

    The same function of tokens as the predictor in it. In floats its roundings are those of autoregressive decoding
    from a prompt of `prompt` tokens, whatever is asked for and when. It costs a pass for each new token.

    >>> import torch
    >>> passes = []
    >>> def model(tokens, last):
    ...     passes.append((tokens, last))
    ...     return torch.zeros(last, 4)
    >>> logits = OneByOne(model, prompt=2)((1, 2, 3, 0), 1)
    >>> passes
    [((1, 2), 1), ((1, 2, 3), 1), ((1, 2, 3, 0), 1)]
    """

    predictor: Predictor = field(validator=_is_predictor)
    prompt: int = field(validator=valid(whole(1, "give the length of the prompt")))
    _read: Tokens = field(init=False, default=(), repr=False)

    def __call__(self, tokens: Tokens, last: int, /) -> Tensor:
        """Logits [last, V] behind each of the last `last` prefixes of `tokens`."""
        tokens = reading_of(tokens, last)
        wanted = len(tokens) - last
        begin = max(min(self.prompt, wanted + 1), min(common_prefix(self._read, tokens), wanted) + 1)
        rows = [rows_of(self.predictor, tokens[:end], 1, "predictor") for end in range(begin, len(tokens) + 1)]
        self._read = tokens
        return torch.cat(rows[-last:])
