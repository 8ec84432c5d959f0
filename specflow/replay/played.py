"""Replaying: a decoder of any parts decodes recorded texts, with what was recorded in the target's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from types import SimpleNamespace
from typing import Final, final

from attrs import define, evolve, field, frozen
from torch import Tensor
from torch.nn import Module

from specflow.asked import proposal_of, stream_of
from specflow.bench.measure import Round
from specflow.bench.stopwatch import Pass, Stopwatch
from specflow.bench.summary import Position, positions
from specflow.catalogue import Drafting, Make, Setting, step_of
from specflow.distribution import PointMass
from specflow.errors import DecodeError
from specflow.guards.checks import MOST, a, calls, does, named, or_none, valid, whole
from specflow.loop import unfold
from specflow.policies import CostMeter, Fixed
from specflow.policies.meter import Clock
from specflow.processors import GreedyProcessor, MultinomialProcessor, Processor
from specflow.randomness import Dice, SharedNoise
from specflow.replay.hindsight import Hindsight, hindsight
from specflow.replay.known import Known, Memory
from specflow.replay.recording import RecordedText, Recording
from specflow.stages import Match, Reject, never
from specflow.state import DecodeState, Drafter, Finished, GammaPolicy, Predictor, Proposal, Rule, Tokens

MOST_LOOKED: Final = 16
"""How many drafts of a step hindsight looks at."""


def _fixed(meter: CostMeter) -> GammaPolicy:
    return Fixed()


@final
@frozen(eq=False)
class Decoder:
    """What is replayed: a drafter for each text, a gamma policy for all of them, and a rule.

    `make` is a `Make` of the catalogue, such as `DRAFTERS["suffix"].make()`, or a function of your own from a `Setting`
    to a `Drafting`. `policy` is given the meter of the replay, on whose clock a pass takes what it took when it was
    recorded; policies that look at costs must ask that one. A rule draws nothing here, as each law is certain.

    >>> from specflow import SuffixDrafter
    >>> Decoder.of(SuffixDrafter(), Fixed(3)).policy(CostMeter())
    Fixed(gamma=3)
    """

    make: Make = field(validator=valid(calls("a maker of drafters", "give a function of a Setting")))
    policy: Callable[[CostMeter], GammaPolicy] = field(
        default=_fixed, validator=valid(calls("a maker of policies", "give a function of a meter"))
    )
    rule: Rule = field(default=Reject(Dice()), validator=valid(calls("a rule", "give one, such as Reject(Dice())")))

    @classmethod
    def of(cls, drafter: Drafter, gamma: GammaPolicy = Fixed(), rule: Rule = Reject(Dice())) -> Decoder:
        """A drafter that serves all texts, and a policy that looks at no clock."""
        drafting = Drafting(drafter)
        return cls(lambda setting: drafting, lambda meter: gamma, rule)


@final
@frozen
class Played:
    """One text, decoded once more: its steps, with the seconds that they are predicted to take, and hindsight."""

    text: RecordedText
    rounds: tuple[Round, ...]
    hindsight: Hindsight | None

    @property
    def seconds(self) -> float:
        """What the text is predicted to take: its passes, its drafting, and each step's own time."""
        return sum(one.seconds for one in self.rounds)


@final
@frozen(eq=False)
class Replay:
    """What became of a decoder on all texts. `recording` is the one that was replayed, and the rows asked meanwhile.

    Regrets are shares: 0.1 says that it takes 10 % longer than with the best γ. They are None where the drafter learns
    from step to step, and where hindsight was not asked for.
    """

    texts: tuple[Played, ...]
    recording: Recording = field(repr=False)

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The steps of all texts."""
        return tuple([one for text in self.texts for one in text.rounds])

    @property
    def tokens(self) -> int:
        """How many tokens the texts have."""
        return sum(one.tokens for one in self.rounds)

    @property
    def passes(self) -> int:
        """How many passes the target takes: exactly those of a live decode."""
        return sum(len(one.passes) for one in self.rounds)

    @property
    def drafted(self) -> int:
        """All drafts, as in a `Tally`."""
        return sum(one.drafted for one in self.rounds)

    @property
    def accepted(self) -> int:
        """Drafts that became text."""
        return sum(one.accepted for one in self.rounds)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens by passes of the target; 0.0 without any."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def positions(self) -> tuple[Position, ...]:
        """What became of the drafts at each position of their draft."""
        return positions([(one.drafted, one.accepted) for one in self.rounds])

    @property
    def seconds(self) -> float:
        """What all texts are predicted to take, prompts included."""
        return sum(text.seconds for text in self.texts)

    @property
    def drafting(self) -> float:
        """The seconds that the drafter took while it was replayed."""
        return sum(one.drafting for one in self.rounds)

    @property
    def best_gamma(self) -> int | None:
        """The one γ for all steps that would have been the quickest."""
        fixed = self._fixed
        return None if fixed is None else fixed.index(min(fixed))

    @property
    def regret(self) -> float | None:
        """How much longer it takes than with `best_gamma` at each step."""
        fixed = self._fixed
        return None if fixed is None else self.seconds / max(min(fixed), TINY) - 1

    @property
    def regret_of_steps(self) -> float | None:
        """How much longer it takes than with the γ at each step that would have been the best there."""
        seen = self._seen
        return None if seen is None else self.seconds / max(sum(one.best for one in seen), TINY) - 1

    @property
    def _seen(self) -> list[Hindsight] | None:
        seen = [text.hindsight for text in self.texts if text.hindsight is not None]
        return seen if seen and len(seen) == len(self.texts) else None

    @property
    def _fixed(self) -> list[float] | None:
        seen = self._seen
        return None if seen is None else [sum(each) for each in zip(*[one.fixed for one in seen], strict=True)]


TINY: Final = 1e-12
"""Nothing takes less."""


def replay(
    recording: Recording,
    decoder: Decoder,
    live: Predictor | None = None,
    processor: Processor | None = None,
    most: int | None = MOST_LOOKED,
    clock: Clock = perf_counter,
) -> Replay:
    """The decoder decodes each text of the recording once more; no target is asked.

    Target passes, drafts and accepted drafts are those of a live decode: what is accepted depends on the text alone.
    The seconds are a prediction, of what passes took when they were recorded and of the drafter's own time now, by
    `clock`.

    `live` is asked for rows that a stage learns from and that were not recorded, each once; the replay's `recording`
    holds them. `processor` is the target's law as a drafting model is told it, the recorded temperature unless given.
    Hindsight looks at γ = 0 … `most`; None leaves it out.

    `DecodeError` where the decoder would write another text; for a stage that learns from rows which are missing; and
    for drafts that are drawn against sampled texts under any rule but `Match`, which are judged by chance.

    >>> from specflow import SuffixDrafter
    >>> recording = Recording((RecordedText((1, 2, 1), (2, 1, 2, 1), limit=7),), vocab_size=5)
    >>> played = replay(recording, Decoder.of(SuffixDrafter()))
    >>> played.passes, played.accepted, played.drafted
    (1, 3, 3)
    """
    a(Recording, "give what `record` made")("recording", recording)
    a(Decoder, "give Decoder.of(drafter), or Decoder(make, policy, rule)")("decoder", decoder)
    or_none(calls("a predictor", "give one, such as a CachedPredictor, or None"))("live", live)
    or_none(does("a processor", "give one, or None", "laws"))("processor", processor)
    or_none(whole(0, "look at no draft at least, or give None", MOST))("most", most)
    now = CostMeter(clock).now
    if processor is None:
        heat = recording.temperature
        processor = GreedyProcessor() if heat is None else MultinomialProcessor(heat)
    memory = Memory(recording.rows, recording.vocab_size, recording.kept, live)
    simulated = _Simulated(Stopwatch(now))
    meter = CostMeter(simulated)
    gamma = decoder.policy(meter)
    calls("a gamma policy", "return one, such as Fixed(5), from the function of a meter")("policy", gamma)
    played = []
    for text in recording.texts:
        rng = Dice() if text.seed is None else SharedNoise(text.seed)
        setting = Setting(_Absent(recording.vocab_size), recording.vocab_size, text.prompt, processor, rng)
        rounds = _rounds(text, decoder, _made(decoder, setting, recording), gamma, meter, memory, simulated)
        seen = None
        if most is not None and not (again := _made(decoder, setting, recording)).teach:
            seen = hindsight(again.drafter, text, recording.vocab_size, int(most), Stopwatch(now))
        played.append(Played(text, rounds, seen))
    return Replay(tuple(played), recording.knowing(memory.new))


@final
class _Absent(Module):
    """In the place of a target that is not there: it knows its vocabulary and nothing else."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)


@final
@define(eq=False)
class _Simulated:
    """A clock on which passes take what they took when they were recorded, and drafting what it takes now."""

    watch: Stopwatch
    passed: float = 0.0

    def __call__(self) -> float:
        return self.passed + self.watch.drafting


def _made(decoder: Decoder, setting: Setting, recording: Recording) -> Drafting:
    """What drafts for a text; drafts that chance would judge are refused."""
    drafting: object = decoder.make(setting)
    a(Drafting, "return Drafting(drafter) from the function of a setting")("make", drafting)
    assert isinstance(drafting, Drafting)
    drafter, by_chance = drafting.drafter, recording.temperature is not None and not isinstance(decoder.rule, Match)

    def checked(tokens: Tokens) -> Iterator[Proposal]:
        for value in stream_of(drafter, drafter(tokens)):
            said = proposal_of(drafter, value, recording.vocab_size)
            if by_chance and not isinstance(said.q, PointMass):
                happened = "chance decides which drawn drafts of a sampled text stand"
                raise DecodeError("rule", happened, named(decoder.rule), "replay with the rule Match")
            yield said

    return evolve(drafting, drafter=checked)


def _rounds(
    text: RecordedText,
    decoder: Decoder,
    drafting: Drafting,
    gamma: GammaPolicy,
    meter: CostMeter,
    memory: Memory,
    clock: _Simulated,
) -> tuple[Round, ...]:
    """The steps of one text."""
    rows, passes = memory.for_stages(drafting.teach, text.tokens), list[Pass]()

    def target(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        k = len(drafts) + 1
        passes.append(Pass(k, text.costs.of(k) if passes else text.costs.begin(k)))
        clock.passed += passes[-1].seconds
        return rows(tokens, drafts)

    def is_over(state: DecodeState) -> bool:
        return len(state.tokens) >= len(text.tokens)

    timed = evolve(drafting, drafter=clock.watch.timed(drafting.drafter))
    until = is_over if text.is_cut else never
    step = step_of(timed, gamma, meter.timed(target), Known(text.tokens), Dice(), decoder.rule, until=until)
    state, rounds, counted = text.state(memory.vocab_size), list[Round](), 0
    drafted = clock.watch.drafting
    for outcome in unfold(step, state):
        after = outcome.state if isinstance(outcome, Finished) else outcome
        new, drafting_now = tuple(passes[counted:]), clock.watch.drafting
        counts = after.tally.drafted - state.tally.drafted, after.tally.accepted - state.tally.accepted
        seconds = sum(one.seconds for one in new) + drafting_now - drafted + text.costs.own
        rounds.append(Round(len(after.tokens) - len(state.tokens), *counts, new, drafting_now - drafted, seconds))
        state, counted, drafted = after, len(passes), drafting_now
        if state.tokens != text.tokens[: len(state.tokens)]:
            received = f"another token at position {len(state.tokens) - 1} or before"
            raise DecodeError("rule", f"the rule {named(decoder.rule)} does not write the text", received, "mend it")
    return tuple(rounds)
