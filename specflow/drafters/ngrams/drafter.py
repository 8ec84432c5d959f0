"""Drafting from an n-gram storage: no model, no training, a few dict lookups a token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import takewhile
from numbers import Integral
from operator import itemgetter
from typing import final

from attrs import field, frozen

from specflow.distribution import PointMass
from specflow.drafters.ngrams.storage import INgramStorage
from specflow.errors import DecodeError
from specflow.guards.checks import a, does, named, or_none, shown, valid, whole
from specflow.state import Proposal, Tokens


@final
@frozen(eq=False)
class NGramDrafter:
    """Proposes what the storage knows to follow, and ends where it knows nothing: the spec's `stop_if_unknown`.

    Each draft is a point mass, as it is drawn independently of the target; so verification is exact. With a
    `vocab_size` it ends at a token that the target does not have, for a storage with a larger vocabulary.
    """

    storage: INgramStorage = field(validator=valid(does("an n-gram storage", "give an NGramStorage", "continuation")))
    vocab_size: int | None = field(default=None, validator=valid(or_none(whole(1, "give the target's vocab_size"))))
    source: str = field(default="ngram", validator=valid(a(str, "name the drafter")))

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        known = takewhile(itemgetter(1), _pairs(self.storage, self.storage.continuation(tokens)))
        return _proposals(known, self.vocab_size, self.source)


@final
@frozen(eq=False)
class GuessingNGramDrafter:
    """`NGramDrafter` that never ends: where the storage knows nothing it proposes the storage's random token.

    The spec's default. A guess is right once in a vocabulary and costs the target a position, so prefer `NGramDrafter`.
    """

    storage: INgramStorage = field(validator=valid(does("an n-gram storage", "give an NGramStorage", "continuation")))
    vocab_size: int | None = field(default=None, validator=valid(or_none(whole(1, "give the target's vocab_size"))))
    source: str = field(default="ngram", validator=valid(a(str, "name the drafter")))

    def __call__(self, tokens: Tokens, /) -> Iterator[Proposal[PointMass]]:
        return _proposals(_pairs(self.storage, self.storage.continuation(tokens)), self.vocab_size, self.source)


def _pairs(storage: INgramStorage, said: object) -> Iterator[tuple[int, bool]]:
    """What the storage says follows: (token, whether it knows it)."""
    if not isinstance(said, Iterable):
        raise _no_pairs(storage, said)
    for pair in said:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise _no_pairs(storage, pair)
        yield pair


def _no_pairs(storage: INgramStorage, said: object) -> DecodeError:
    happened, remedy = (
        f"the storage {named(storage)} says nothing of what follows",
        "yield (token, whether it is known)",
    )
    return DecodeError("storage", happened, shown(said), remedy)


def _proposals(
    drafts: Iterable[tuple[int, bool]], vocab_size: int | None, source: str
) -> Iterator[Proposal[PointMass]]:
    for token, _ in drafts:
        said: object = token
        if vocab_size is not None and isinstance(said, Integral) and not 0 <= int(said) < vocab_size:
            return
        yield Proposal(token, PointMass(token), source=source)
