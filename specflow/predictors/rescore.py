"""Near-ties: where rounding may decide between two tokens, let a pass over one token decide."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Final, final

import torch
from attrs import define, field, frozen
from torch import Tensor

from specflow.asked import law_after, rows_of
from specflow.constraints.constraint import ends_of
from specflow.distribution import PointMass
from specflow.errors import DecodeError
from specflow.guards.checks import calls, does, named, number, shown, valid, whole
from specflow.guards.ids import text_of
from specflow.paths import path_by_path
from specflow.prefix import common_prefix
from specflow.processors import GreedyProcessor, Processor
from specflow.state import TEXT, Predictor, Proposal, Tokens, parents_of
from specflow.trees import path_to

HUGE: Final = 1e30  # no margin is larger, and fp32 holds it


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
    best, second = logits.topk(2, dim=-1).values.double().unbind(-1)
    gaps: list[float] = (best - second).tolist()
    return gaps


_is_predictor = valid(calls("a predictor", "give a function of (text, drafts), such as a CachedPredictor"))


@final
@frozen
class RescoreNearTies:
    """A target whose rows with a margin below `below` are replaced by those of `single`, a pass over one token each.

    It makes any greedy step one that re-scores near-ties: `Score(RescoreNearTies(target, …), …)`. The margin is that of
    what `processor` chooses among: give it the step's, where a grammar, a bias or a penalty has a say. It is below
    `below` where another token would be chosen if the best logit were half of that lower and all others half of it
    higher. Rows after a draft that is not the best token are left alone, since greedy decoding does not look at them.

    In exact arithmetic nothing changes. In bf16 a pass over k tokens rounds otherwise than k passes over one, and
    near-ties are where that shows in a greedy text.

    `single` decides what it costs and what it gives:

    - `OneByOne(CachedPredictor(model), len(prompt))` rounds as autoregressive decoding does. If `below` exceeds what
      rounding can do to a margin, the text is that of autoregressive decoding, token for token. But up to the last
      near-tie it takes as many passes as autoregressive decoding: a proof, not a gain.
    - The target itself takes one pass more at each near-tie, over a cache that passes over several tokens have
      written. Its roundings are in there, so that some texts still differ.

    Give it the `stop` tokens of `start`: after a drafted one the processor is not asked. After anything else that can
    be the text it is, and the step asks again, so it may keep no state: no `InOrder`.

    docs/margins.md has the numbers. A model from `accelerate.bit_for_bit` needs none of this. `DecodeError` for a
    processor that is not certain of a token.

    >>> from specflow import Proposal
    >>> def target(tokens, drafts):
    ...     return torch.tensor([[1.0, 1.125], [5.0, 0.0]])[: len(drafts) + 1]
    >>> def single(tokens, drafts):
    ...     return torch.tensor([[1.125, 1.0]])
    >>> RescoreNearTies(target, single, below=0.5)((7,), (Proposal(0),))
    tensor([[1.1250, 1.0000],
            [5.0000, 0.0000]])
    """

    target: Predictor = field(validator=_is_predictor)
    single: Predictor = field(validator=_is_predictor)
    below: float = field(validator=valid(number("below is no margin", "give a number of 0 or more", lambda x: x >= 0)))
    processor: Processor = field(
        default=GreedyProcessor(),
        validator=valid(does("a processor", "give the step's, such as GreedyProcessor()", "laws")),
    )
    stop: frozenset[int] = field(default=frozenset(), converter=ends_of)

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each draft."""
        tokens, parents = text_of(tokens), parents_of(drafts)
        logits = rows_of(self.target, tokens, drafts)
        rows = list(logits.unbind())
        reached = {TEXT}
        for i in range(TEXT, len(drafts)):
            if i not in reached:
                continue
            text = tokens + tuple([drafts[k].token for k in path_to(parents, i)])
            best = self._best(text, rows[i + 1])
            if best is None:
                continue
            if self._best(text, self._at_worst(rows[i + 1], best)) != best:
                rows[i + 1] = rows_of(self.single, text, (), "single")[0]
                if rows[i + 1].shape != logits[0].shape:
                    happened, received = "single and target have different vocabularies", f"{len(rows[i + 1])} logits"
                    raise DecodeError("single", happened, received, f"give {logits.shape[1]}, as the target does")
                best = self._best(text, rows[i + 1])
            if best is not None and best.token not in self.stop:
                reached |= {k for k, parent in enumerate(parents) if parent == i and drafts[k].token == best.token}
        return torch.stack(rows)

    def _at_worst(self, row: Tensor, best: PointMass) -> Tensor:
        """Logits [V] moved by half of `below` each, against the best of them."""
        off = min(self.below, HUGE) / 2
        moved = row.to(torch.promote_types(row.dtype, torch.float32)) + off
        moved[best.token] -= 2 * off
        return moved

    def _best(self, text: Tokens, row: Tensor) -> PointMass | None:
        """What is chosen after a text, of logits [V]; None where nothing can follow."""
        law = law_after(self.processor, text, row)
        if law is None or isinstance(law, PointMass):
            return law
        remedy = "give the processor of greedy decoding, such as GreedyProcessor()"
        raise DecodeError("processor", f"{named(self.processor)} is not certain of a token", shown(law), remedy)


@final
@define(eq=False)
class OneByOne:
    """A predictor that reads the prompt in one pass and every token after it in a pass of its own.

    The same function of tokens as the predictor in it. In floats its roundings are those of autoregressive decoding
    from a prompt of `prompt` tokens, whatever is asked for and when. It costs a pass for each new token.

    >>> import torch
    >>> passes = []
    >>> def model(tokens, drafts):
    ...     passes.append(tokens)
    ...     return torch.zeros(1, 4)
    >>> logits = OneByOne(model, prompt=2)((1, 2, 3, 0), ())
    >>> passes
    [(1, 2), (1, 2, 3), (1, 2, 3, 0)]
    """

    predictor: Predictor = field(validator=_is_predictor)
    prompt: int = field(validator=valid(whole(1, "give the length of the prompt")))
    _read: Tokens = field(init=False, default=(), repr=False)

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        """Logits [n + 1, V] after `tokens`, and after them and the path down to each draft."""
        return path_by_path(self._last)(text_of(tokens), drafts)

    def _last(self, tokens: Tokens, last: int) -> Tensor:
        wanted = len(tokens) - last
        begin = max(min(self.prompt, wanted + 1), min(common_prefix(self._read, tokens), wanted) + 1)
        rows = [rows_of(self.predictor, tokens[:end], (), "predictor") for end in range(begin, len(tokens) + 1)]
        self._read = tokens
        return torch.cat(rows[-last:])
