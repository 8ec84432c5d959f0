"""What predictors may be asked beside logits, and what they tell of themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, final

from attrs import frozen
from torch import Tensor

from specflow.guards.checks import a, or_none, own, whole
from specflow.state import Tokens

Choose: TypeAlias = Callable[[Tensor, int], Tensor]
"""(logits [V], position) → the id [] of the token that shall stand there, on the device of the logits."""


@final
@frozen
class Limits:
    """What a model can take: its vocabulary, and the most tokens it can read. None where the model does not tell."""

    vocab_size: int | None = None
    context: int | None = None


class Prunable(Protocol):
    """A provider that remembers what it read and can be told which text is still wanted."""

    def prune(self, tokens: Tokens, /) -> None:
        """Forget what is not a prefix of `tokens`. It never changes what the provider answers later."""
        ...


class ReadsAhead(Protocol):
    """A model that goes on by itself for a while, where it is, before anybody on the host looks at what it chose."""

    @property
    def limits(self) -> Limits:
        """What a text can take."""
        ...

    def read_ahead(self, tokens: Tokens, most: int, choose: Choose, /) -> Tokens:
        """Up to `most` tokens that follow, each chosen from the logits after those before it."""
        ...


class ReadsFeatures(Protocol):
    """A model that shows what some of its layers hold. They are a function of the text, as its logits are."""

    @property
    def limits(self) -> Limits:
        """What a text can take."""
        ...

    def features(self, tokens: Tokens, last: int, /) -> Tensor:
        """What the layers held at each of the last `last` tokens of a text, side by side: [last, F]."""
        ...


def checked_limits(limits: object, name: str) -> Limits:
    """`limits`, which have to be numbers of tokens or None; `DecodeError` for anything else."""
    a(Limits, "give limits_of(model)")(name, limits)
    assert isinstance(limits, Limits)
    or_none(whole(1, "give how many tokens the model knows"))("vocab_size", limits.vocab_size)
    or_none(whole(1, "give how many tokens the model can read"))("context", limits.context)
    return Limits(own(limits.vocab_size), own(limits.context))
