"""What a head is: a small module that drafts from what the target holds, and the vocabulary that it drafts in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, final

import torch
from attrs import field, frozen
from torch import Tensor
from torch.nn import Module

from specflow.caches import Past
from specflow.errors import DecodeError
from specflow.guards.checks import MOST, a, each, shown, valid, whole
from specflow.vocabulary import fit


class Head(Protocol):
    """A module that reads what some of the target's layers held at a text's tokens, and drafts what comes after it.

    It makes a state of each place of a text: from what the target held there and from the token after it. The state of
    the text's end says what may follow, `say`; and that state and a draft make the state after the draft, `advance`,
    in which the target has no part.
    """

    @property
    def vocabulary(self) -> Vocabulary:
        """Which tokens it reads and drafts."""
        ...

    @property
    def reads(self) -> tuple[int, ...]:
        """Which of the target's hidden states it reads, as transformers counts them: 0 is the embeddings."""
        ...

    @property
    def width(self) -> int:
        """How many numbers those are at each token, side by side."""
        ...

    @property
    def looks_back(self) -> bool:
        """Whether a state depends on places before its own."""
        ...

    @property
    def ahead(self) -> int | None:
        """How many tokens in a row it can draft; None is any number."""
        ...

    def begin(self) -> object:
        """The cache of a text of which nothing was read; None where nothing is kept."""
        ...

    def enter(self, rows: Tensor, /) -> Tensor:
        """What the target held at k tokens, [k, width], as what `advance` takes, [k, H]."""
        ...

    def advance(self, states: Tensor, ids: Tensor, positions: Tensor, past: Past, hidden: Tensor | None, /) -> Tensor:
        """The states [k, H] after `ids` [k], each made of the state before it, `states` [k, H], and its token.

        `positions` [k] count from 0 at the text's second token. `hidden` [k, past.length + k] are the places that each
        does not see, those that `past` covers first; None hides nothing. `past` covers the new ones from then on.
        """
        ...

    def say(self, states: Tensor, depths: Sequence[int], /) -> Tensor:
        """Logits [k, D] over the vocabulary of drafts after `states` [k, H], so many drafts after the text each."""
        ...


@final
@frozen(eq=False)
class Vocabulary:
    """The tokens that a head drafts: the first D of the target's, or the `ids` [D] among its `size`.

    `known` is how many tokens it has embeddings for. `DecodeError` for ids that are not different tokens of the target.

    >>> Vocabulary(4, 4, torch.tensor([0, 3])).spread(torch.tensor([[1.0, 2.0]]))
    tensor([[1., -inf, -inf, 2.]])
    """

    size: int = field(validator=valid(whole(1, "give how many tokens the target knows", MOST)))
    known: int = field(validator=valid(whole(1, "give how many tokens it has embeddings for", MOST)))
    ids: Tensor | None = field(default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        ids: object = self.ids
        if ids is None:
            return
        if not isinstance(ids, Tensor) or ids.dim() != 1 or ids.dtype is not torch.long or not len(ids):
            raise DecodeError("ids", "draft tokens are no row of ids", shown(ids), "give a tensor of longs [D]")
        if int(ids.min()) < 0 or int(ids.max()) >= self.size or len(set(ids.tolist())) != len(ids):
            received = f"{len(ids)} ids from {int(ids.min())} to {int(ids.max())}"
            happened = f"draft tokens are not different tokens of a vocabulary of {self.size}"
            raise DecodeError("ids", happened, received, "give the target's id for each token that is drafted")

    def spread(self, logits: Tensor) -> Tensor:
        """Logits [k, D] of drafts over the target's vocabulary, [k, V]: -∞ for what is never drafted."""
        if self.ids is None:
            return fit(logits, self.size)
        return logits.new_full((len(logits), self.size), -torch.inf).index_copy_(1, self.ids, logits)

    def named(self, drafts: Tensor) -> Tensor:
        """The target's ids of drafts, both of any shape."""
        return drafts if self.ids is None else self.ids[drafts]

    def speakable(self, logits: Tensor) -> Tensor:
        """Logits [k, D] without the padding of a head that says more tokens than the target knows."""
        return logits if self.ids is not None else logits[:, : self.size]


_are_layers: Final = each(whole(0, "count the target's hidden states from 0, the embeddings", MOST))


def check_parts(vocabulary: object, reads: object, **modules: object) -> None:
    """Refuses what no head is made of."""
    a(Vocabulary, "give Vocabulary(size, known)")("vocabulary", vocabulary)
    a(tuple, "give the hidden states that it reads: (2, 14, 25)")("reads", reads)
    _are_layers("reads", reads)
    if not reads:
        raise DecodeError("reads", "the head reads none of the target's hidden states", "()", "name one at least")
    for name, module in modules.items():
        a(Module, "give one of the target's, or of your own")(name, module)
