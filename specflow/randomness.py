"""All randomness goes through two small protocols, so that one pipeline runs on dice, on seeds, or on every branch."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from hashlib import blake2b
from numbers import Real
from typing import Protocol, TypeVar, final, runtime_checkable

import torch
from attrs import field, frozen
from torch import Tensor

from specflow.distribution import BlackBox, Categorical, Distribution, PointMass, flaw, lawful, no_law, vector
from specflow.errors import DecodeError
from specflow.guards.checks import a, is_id, is_whole, named, or_none, shown, valid
from specflow.guards.finite import NOTICED, is_near
from specflow.laws import Laws

Q = TypeVar("Q", bound=Distribution)


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


@runtime_checkable
class _Decides(Protocol):
    """What takes decisions: only fresh randomness can."""

    def accept(self, probability: float, /) -> bool: ...


def q_of(rng: Sampling, law: Q, position: int) -> Q | BlackBox:
    """The q of a draft that `rng` draws from the law: the law itself, or where noise is not fresh an unknown one.

    Noise of a position is drawn from again in the next step, if the draft there did not stand. By then a rule may have
    decided by what it had given, as `Block` does where it looks at later drafts first, so that it gives the law no
    more. Siblings share it, too. A draft whose law is not known is compared with the target's own sample, which is
    exact.

    >>> law = Categorical(torch.tensor([0.2, 0.8]))
    >>> q_of(Dice(), law, 5) is law, type(q_of(SharedNoise(1), law, 5))
    (True, <class 'specflow.distribution.BlackBox'>)
    """
    if isinstance(rng, _Decides) or not isinstance(law, Categorical):
        return law
    return BlackBox(law.probs, lambda probs: rng.draw_there(probs[0], position))


@final
@frozen(eq=False)
class Dice:
    """Randomness from a torch generator; from torch's default one, which `torch.manual_seed` governs, when None.

    Certain outcomes (a point mass, a probability of 0 or 1) consume nothing. A law on a device is drawn from there, by
    argmax(p / e) with e exponential, and only the token is copied. A generator on the CPU makes its noise on the CPU.
    `DecodeError` for a law that is not one.

    One seed gives one text: where drafts are certain, a decoder draws once for each token that it commits, whatever is
    drafted and however far, so the text is that of `autoregressive_step` with the same seed. A condition (`until`)
    that ends it within accepted drafts leaves out tokens that were drawn: then the next text of the dice is another.
    Where drafts are drawn, how many there are decides what is left for the next draw: there `seed_coupled_step` has one
    text for a seed.

    >>> dice = Dice(torch.Generator().manual_seed(0))
    >>> dice.draw(PointMass(3), 0), dice.accept(1.0), dice.accept(0.0)
    (3, True, False)
    """

    generator: torch.Generator | None = field(
        default=None, validator=valid(or_none(a(torch.Generator, "give torch.Generator().manual_seed(seed)")))
    )

    def draw(self, law: Distribution, position: int, /) -> int:
        """One token; a `BlackBox` draws its own."""
        if not isinstance(law, Categorical):
            return _without_noise(law, position)
        if is_near(law.probs) and (self.generator is None or self.generator.device == law.probs.device):
            return self._drawn_here(law, position)
        return _brought(self.draw_there(law.probs, position), law, position)

    def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
        """One token of `probs` [V], as an id [] on its device."""
        vector(probs)
        there = probs.device if self.generator is None else self.generator.device
        exact = torch.promote_types(probs.dtype, torch.float32)  # noise of 16 bits can be 0, and 0 / 0 would be drawn
        noise = torch.empty(probs.shape, dtype=exact, device=there).exponential_(generator=self.generator)
        return (probs / noise.to(probs.device)).argmax()

    def accept(self, probability: float, /) -> bool:
        """u < probability, with u uniform on [0, 1), 53 bits of it: never true at 0, always at 1."""
        if type(probability) is not float:
            _is_number("probability", probability)
        if not 0.0 < probability < 1.0:
            if probability != probability:  # noqa: PLR0124 - NaN is the one number that is not itself
                raise DecodeError("probability", "a probability is not a number", probability, "give a number")
            return probability >= 1.0
        there = None if self.generator is None else self.generator.device
        return torch.rand((), generator=self.generator, dtype=torch.float64, device=there).item() < probability

    def mark(self, place: torch.device, /) -> Callable[[], object]:
        """A way back: what it returns takes back all that was drawn for laws at `place` since.

        >>> dice = Dice(torch.Generator().manual_seed(0))
        >>> back = dice.mark(torch.device("cpu"))
        >>> first = dice.accept(0.5), dice.accept(0.5), dice.accept(0.5)
        >>> _ = back()
        >>> (dice.accept(0.5), dice.accept(0.5), dice.accept(0.5)) == first
        True
        """
        if self.generator is not None:
            return partial(self.generator.set_state, self.generator.get_state())
        if place.type in ("cuda", "xpu"):
            module = torch.get_device_module(place)
            return partial(module.set_rng_state, module.get_rng_state(place), place)
        module = torch.mps if place.type == "mps" else torch
        return partial(module.set_rng_state, module.get_rng_state())

    def _drawn_here(self, law: Categorical, position: int) -> int:
        probs = law.probs.to(torch.promote_types(law.probs.dtype, torch.float32))  # as in `draw_there`
        try:
            return int(torch.multinomial(probs, 1, generator=self.generator))
        except RuntimeError as error:  # torch has looked at them
            if flaw(law) is None:
                raise
            raise no_law(law, position) from error


_is_number = a(Real, "give a number")


def _without_noise(law: PointMass | BlackBox, position: int) -> int:
    match law:
        case PointMass(token):
            return token
        case BlackBox():
            return law.draw()
    raise no_law(law, position)


def _whole(name: str, value: object) -> None:
    if not is_whole(value):
        raise DecodeError(name, f"{name} is not a whole number", shown(value), "give any whole number")


@final
@frozen
class SharedNoise:
    """Draws by Gumbel noise that depends on (seed, position) alone: argmax(log p + g).

    Drafter and target that share it draw the same token whenever their laws are close, and with
    `Match` the text depends on the seed and not on the drafter: P(accept) ≥ (1 - TV) / (1 + TV).
    It cannot `accept`, so type checkers keep it away from `Reject`, where shared noise would bend the law. Drafts that
    are drawn with it are compared with the target's own sample under every rule, as their q, once a part of the noise
    was seen, is not known.
    argmax(log p + g) is computed as argmax(p / e), with e exponential; the same numbers on every device.
    torch keeps 32 bits of what (seed, position) is hashed to, so two positions have one noise with probability 2^-32.
    Source: Daliri et al. 2408.07978, section 3.

    >>> law = Categorical(torch.tensor([0.2, 0.3, 0.5]))
    >>> SharedNoise(1).draw(law, 9) == SharedNoise(1).draw(law, 9)
    True
    """

    seed: int = field(validator=valid(_whole))

    def draw(self, law: Distribution, position: int, /) -> int:
        """One token; the noise is drawn in fp32 on the CPU. A `BlackBox` draws its own and shares nothing."""
        if not isinstance(law, Categorical):
            return _without_noise(law, position)
        return _brought(self.draw_there(law.probs, position), law, position)

    def draw_there(self, probs: Tensor, position: int, /) -> Tensor:
        """One token of `probs` [V], as an id [] on its device."""
        vector(probs)
        key = blake2b(f"{self.seed}/{position}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        noise = torch.empty(probs.shape[-1], dtype=torch.float32, device="cpu").exponential_(generator=generator)
        return (probs / noise.to(probs.device)).argmax()


def draws(rng: Sampling, laws: Laws, start: int, span: range) -> Generator[int, None, None]:
    """One token of each law in turn whose number is in `span`; that of law i stands at position `start` + i.

    Each is drawn when it is asked for. But where `laws` are a tuple, those on a device are drawn at the first one, and
    copied at once. Close it when no more are wanted: what was drawn for nothing is taken back from `Dice`, so that
    they go on as if it had not been. `DecodeError` at a law that is not one, and for what is not a token of it.

    >>> list(draws(Dice(), (PointMass(3), Categorical(torch.tensor([0.0, 1.0]))), 5, range(2)))
    [3, 1]
    """
    far = _far(laws, span)
    sent: list[int] = []
    marks: list[Callable[[], object]] = []
    if far:
        ids = []
        for i, law in far:
            marks += [rng.mark(law.probs.device)] if isinstance(rng, Dice) else []
            ids.append(rng.draw_there(law.probs, start + i))
        good = lawful(torch.stack([law.probs for _, law in far]))
        sent = torch.where(good, torch.stack(ids), NOTICED).tolist()
    asked = 0
    try:
        for i in span:
            if asked < len(far) and far[asked][0] == i:
                asked += 1
                if sent[asked - 1] == NOTICED:
                    raise no_law(far[asked - 1][1], start + i)
                yield sent[asked - 1]
            else:
                p = laws[i]
                yield p.token if isinstance(p, PointMass) else drawn(rng, p, start + i)
    finally:
        if asked < len(marks):
            marks[asked]()


def drawn(rng: Sampling, law: Distribution, position: int) -> int:
    """One token of the law; `DecodeError` where what draws gives anything but a token id."""
    token = rng.draw(law, position)
    if is_id(token) and token < 2**63:
        return int(token)
    if isinstance(law, PointMass) and token is law.token:
        raise no_law(law, position)
    raise DecodeError("rng", f"{named(rng)} draws what is not a token id", shown(token), "return int(id)")


def _far(laws: Laws, span: range) -> list[tuple[int, Categorical]]:
    """The laws of a tuple that are on a device, where no other but certain ones are among them."""
    if not isinstance(laws, tuple):
        return []
    uncertain = [(i, laws[i]) for i in span if not isinstance(laws[i], PointMass)]
    far = [(i, law) for i, law in uncertain if isinstance(law, Categorical) and not is_near(law.probs)]
    return far if len(far) == len(uncertain) else []


def _brought(token: Tensor, law: Categorical, position: int) -> int:
    """The id on the host, in one copy; `DecodeError` if the law is not one."""
    brought = int(torch.where(lawful(law.probs), token, NOTICED))
    if brought == NOTICED:
        raise no_law(law, position)
    return brought
