"""All randomness goes through two small protocols, so that one pipeline runs on dice, on seeds, or on every branch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Protocol, final

import torch
from attrs import frozen
from torch import Tensor

from specflow.distribution import BlackBox, Categorical, Distribution, PointMass
from specflow.finite import arrived, is_near, on_arrival


class Sampling(Protocol):
    """Draws tokens. `position` is where in the text the token would stand, counted from 0 at the prompt's first."""

    def draw(self, law: Distribution, position: int, /) -> int:
        """One token of the law."""
        ...

    def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
        """One token of the law `probs` [V], as an id [] on its device. Nothing is copied to the host."""
        ...


class Randomness(Sampling, Protocol):
    """Draws tokens and takes decisions, each with fresh randomness."""

    def accept(self, probability: float, /) -> bool:
        """True with the given probability, which may exceed 1."""
        ...


@final
@frozen(eq=False)
class Dice:
    """Randomness from a torch generator; from torch's default one, which `torch.manual_seed` governs, when None.

    Certain outcomes (a point mass, a probability of 0 or 1) consume nothing. A law on a device is drawn from there, by
    argmax(p / e) with e exponential, and only the token is copied. A generator on the CPU makes its noise on the CPU.

    >>> dice = Dice(torch.Generator().manual_seed(0))
    >>> dice.draw(PointMass(3), 0), dice.accept(1.0), dice.accept(0.0)
    (3, True, False)
    """

    generator: torch.Generator | None = None

    def draw(self, law: Distribution, position: int, /) -> int:
        """One token; a `BlackBox` draws its own."""
        match law:
            case PointMass(token):
                return token
            case Categorical(probs):
                if is_near(probs) and (self.generator is None or self.generator.device == probs.device):
                    return int(torch.multinomial(probs, 1, generator=self.generator))
                return _brought(self.draw_there(probs, position), probs, position)
            case BlackBox():
                return law.draw()

    def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
        """One token of `probs` [V], as an id [] on its device."""
        there = probs.device if self.generator is None else self.generator.device
        noise = torch.empty(probs.shape, dtype=probs.dtype, device=there).exponential_(generator=self.generator)
        return (probs / noise.to(probs.device)).argmax()

    def accept(self, probability: float, /) -> bool:
        """u < probability, with u uniform on [0, 1), 53 bits of it: never true at 0, always at 1."""
        if probability <= 0.0 or probability >= 1.0:
            return probability >= 1.0
        return torch.rand((), generator=self.generator, dtype=torch.float64).item() < probability


@final
@frozen
class SharedNoise:
    """Draws by Gumbel noise that depends on (seed, position) alone: argmax(log p + g).

    Drafter and target that share it draw the same token whenever their laws are close, and with
    `stages.MatchSamples` the text depends on the seed and not on the drafter: P(accept) ≥ (1 - TV) / (1 + TV).
    It cannot `accept`, so mypy keeps it away from `stages.RejectTokens`, where shared noise would bend the law.
    argmax(log p + g) is computed as argmax(p / e), with e exponential; the same numbers on every device.
    Source: Daliri et al. 2408.07978, section 3.

    >>> law = Categorical(torch.tensor([0.2, 0.3, 0.5]))
    >>> SharedNoise(1).draw(law, 9) == SharedNoise(1).draw(law, 9)
    True
    """

    seed: int

    def draw(self, law: Distribution, position: int, /) -> int:
        """One token; the noise is drawn in fp32 on the CPU. A `BlackBox` draws its own and shares nothing."""
        match law:
            case PointMass(token):
                return token
            case Categorical(probs):
                return _brought(self.draw_there(probs, position), probs, position)
            case BlackBox():
                return law.draw()

    def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
        """One token of `probs` [V], as an id [] on its device."""
        key = blake2b(f"{self.seed}/{position}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        noise = torch.empty(probs.shape[-1]).exponential_(generator=generator)
        return (probs / noise.to(probs.device)).argmax()


def draws(rng: Sampling, laws: Sequence[Distribution], start: int) -> Iterator[int]:
    """One token of each law in turn, the first at position `start`.

    On the host each is drawn when it is asked for. On a device all are drawn at the first one, and copied at once:
    what is not asked for was drawn for nothing, which changes no law. `DecodeError` at a law that is none.

    >>> list(draws(Dice(), [PointMass(3), Categorical(torch.tensor([0.0, 1.0]))], 5))
    [3, 1]
    """
    far = [(i, law.probs) for i, law in enumerate(laws) if isinstance(law, Categorical) and not is_near(law.probs)]
    sent: dict[int, int] = {}
    if far:
        ids = torch.stack([on_arrival(rng.draw_there(probs, start + i), probs) for i, probs in far])
        sent = dict(zip([i for i, _ in far], ids.tolist(), strict=True))
    for i, law in enumerate(laws):
        yield arrived([sent[i]], start + i - 1)[0] if i in sent else rng.draw(law, start + i)


def _brought(token: Tensor, probs: Tensor, position: int) -> int:
    """The id on the host, in one copy; `DecodeError` if the law is none, as its logits were not finite."""
    if is_near(token):
        return int(token)
    return arrived([int(on_arrival(token, probs))], position - 1)[0]
