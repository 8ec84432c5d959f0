"""Drafting from an n-gram storage: no model, no training, a few dict lookups a token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Final, final

from attrs import field, frozen

from specflow.distribution import PointMass
from specflow.drafters.ngrams.storage import INgramStorage, no_answer, pairs_of
from specflow.guards.checks import a, does, or_none, valid, whole
from specflow.state import Proposal, Tokens

_is_storage: Final = valid(does("an n-gram storage", "give an NGramStorage", "continuation", "known"))
_is_size: Final = valid(or_none(whole(1, "give the target's vocab_size")))
_is_name: Final = valid(a(str, "name the drafter"))


@final
@frozen(eq=False)
class NGramDrafter:
    """Proposes what the storage knows to follow, and ends where it knows nothing: the spec's `stop_if_unknown`.

    Each draft is a point mass, as it is drawn independently of the target; so verification is exact. With a
    `vocab_size` it ends at a token that the target does not have, for a storage with a larger vocabulary.

    >>> import torch
    >>> from specflow import NGramStorage
    >>> storage = NGramStorage(2, 9)
    >>> storage.initialize(torch.tensor([[1, 2, 3]]))
    >>> [proposal.token for proposal in NGramDrafter(storage)((1,))]
    [2, 3]
    """

    storage: INgramStorage = field(validator=_is_storage)
    vocab_size: int | None = field(default=None, validator=_is_size)
    source: str = field(default="ngram", validator=_is_name)

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        known: object = self.storage.known(tokens)
        if not isinstance(known, Iterable):
            raise no_answer(self.storage, known, "yield tokens")
        return _proposals(known, self.vocab_size, self.source)


@final
@frozen(eq=False)
class GuessingNGramDrafter:
    """`NGramDrafter` that never ends: where the storage knows nothing it proposes the storage's random token.

    The spec's default. A guess is right once in a vocabulary and costs the target a position, so prefer `NGramDrafter`.

    >>> from itertools import islice
    >>> from specflow.drafters import NGramStorage
    >>> storage = NGramStorage(2, vocab_size=9)
    >>> storage.initialize([5, 6])
    >>> [len([*islice(drafter(storage)((5,)), 4)]) for drafter in (NGramDrafter, GuessingNGramDrafter)]
    [1, 4]
    """

    storage: INgramStorage = field(validator=_is_storage)
    vocab_size: int | None = field(default=None, validator=_is_size)
    source: str = field(default="ngram", validator=_is_name)

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        pairs = pairs_of(self.storage, self.storage.continuation(tokens))
        return _proposals((token for token, _ in pairs), self.vocab_size, self.source)


def _proposals(drafts: Iterable[int], vocab_size: int | None, source: str) -> Iterator[Proposal[PointMass]]:
    for token in drafts:
        said: object = token
        if vocab_size is not None and isinstance(said, Integral) and not 0 <= int(said) < vocab_size:
            return
        yield Proposal(token, PointMass(token), source=source)
