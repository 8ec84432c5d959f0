"""Replays: what a decoder does on a recorded text is what it does live; times are those of the recorded costs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from shutil import copytree
from typing import final

import numpy
import pytest
import torch
from attrs import define, evolve, field
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks import never_slower, replayed
from specflow import (
    TEXT,
    CachedPredictor,
    CostAware,
    CostMeter,
    Dice,
    Drafter,
    Fixed,
    GammaPolicy,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    Match,
    MultinomialProcessor,
    NGramDrafter,
    NGramStorage,
    PointMass,
    Predictor,
    Processor,
    Proposal,
    SharedNoise,
    Step,
    SuffixDrafter,
    Tokens,
    TopKProcessor,
    run,
    seed_coupled_step,
    speculative_step,
    start,
    unfold,
)
from specflow.batch import seed_of
from specflow.bench.decoders import Models, decoder
from specflow.catalogue import POLICIES, Drafting, Setting
from specflow.cli import main
from specflow.drafters import Recycled, RecyclingTree, propose_nothing
from specflow.errors import DecodeError
from specflow.files import content_of
from specflow.origin import law_of
from specflow.policies import EGAG, Heuristic
from specflow.replay import Costs, Decoder, RecordedText, Recording, Replay, record, replay
from specflow.replay import command as replaying
from specflow.replay.command import decoder_of
from specflow.replay.recording import checksum_of
from specflow.stages import Block, Looks, Recycle, Rows, Traverse, UpdateNgram, stop_string
from specflow.stages.ngram import top_tokens
from specflow.state import Committed, DecodeState, Finished, Pace, Rule, Scored, Tally, Verdict
from specflow.steps import ngram_step, verified_step
from specflow.testing import TableModel
from tests.toys import disturbed, once, tiny_llama

PROMPTS = ((5, 6, 7, 5, 6), (9,), (3, 4, 3, 4, 3))
NEW = 24
MODEL = tiny_llama()
STOP = frozenset({11, 40})


@pytest.fixture(scope="module")
def greedy() -> Recording:
    """Greedy texts of a tiny llama."""
    return record(once(MODEL), PROMPTS, NEW, STOP, CachedPredictor(MODEL).limits)


@pytest.fixture(scope="module")
def seeded() -> Recording:
    """The texts of a seed."""
    limits = CachedPredictor(MODEL).limits
    return record(once(MODEL), PROMPTS, NEW, STOP, limits, MultinomialProcessor(0.8), seed=3)


@final
@define(eq=False)
class Told:
    """What a live decode did: how many drafts each pass had, and what each step counted and wrote."""

    target: Predictor
    drafts: list[int] = field(factory=list)
    steps: list[tuple[Tally, int]] = field(factory=list)

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        self.drafts.append(len(drafts))
        return self.target(tokens, drafts)

    def decode(self, step: Step, state: DecodeState) -> Tokens:
        for outcome in unfold(step, state):
            after = outcome.state if isinstance(outcome, Finished) else outcome
            self.steps.append((after.tally - state.tally, len(after.tokens) - len(state.tokens)))
            state = after
        return state.tokens


def same(live: Sequence[Told], played: Replay) -> None:
    """Pass by pass and step by step."""
    for told, text in zip(live, played.texts, strict=True):
        assert [one.fed - 1 for step in text.rounds for one in step.passes] == told.drafts
        assert [(one.tally, one.tokens) for one in text.rounds] == told.steps


def begun(text: RecordedText) -> DecodeState:
    return start(text.prompt, NEW, STOP, CachedPredictor(MODEL).limits).unwrap()


def assistant(processor: Processor, rng: Dice | SharedNoise, widths: tuple[int, ...] = ()) -> LLMDrafter:
    return LLMDrafter(once(HELPER), processor, rng, widths=widths)


HELPER = disturbed(MODEL, 1, 0.05)

GREEDY: dict[str, tuple[Callable[[], Drafter], Callable[[], GammaPolicy]]] = {
    "nothing": (lambda: propose_nothing, Fixed),
    "suffix": (SuffixDrafter, lambda: Fixed(4)),
    "tree": (LookupTree, lambda: Fixed(7)),
    "model": (lambda: assistant(GreedyProcessor(), Dice()), lambda: Fixed(3)),
    "tree of a model": (lambda: assistant(GreedyProcessor(), Dice(), (2, 2)), lambda: Fixed(6)),
    "model, egag": (lambda: assistant(GreedyProcessor(), Dice()), lambda: EGAG(gamma_max=8, ema_beta=0.5)),
    "model, heuristic": (lambda: assistant(GreedyProcessor(), Dice()), lambda: Heuristic(3, 9)),
}


@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_replay_is_the_live_decode(name: str, greedy: Recording) -> None:
    drafter, policy = GREEDY[name]
    live = []
    for text in greedy.texts:
        told = Told(once(MODEL))
        assert told.decode(speculative_step(drafter(), told, GreedyProcessor(), Dice(), policy()), begun(text)) == (
            text.tokens
        )
        live.append(told)
    played = replay(greedy, Decoder.of(drafter(), policy()), most=None)
    same(live, played)
    assert played.tokens == sum(len(text.output) for text in greedy.texts)
    assert played.passes == sum(len(told.drafts) for told in live)


@pytest.mark.parametrize("rule", [Block, Traverse, Match])
def test_so_it_is_under_any_rule(rule: Callable[[Dice], Rule], greedy: Recording) -> None:
    drafter, live = assistant(GreedyProcessor(), Dice(), (2,)), []
    for text in greedy.texts:
        told = Told(once(MODEL))
        step = verified_step(drafter, told, GreedyProcessor(), Dice(), rule(Dice()), Fixed(5))
        assert told.decode(step, begun(text)) == text.tokens
        live.append(told)
    same(live, replay(greedy, Decoder.of(drafter, Fixed(5), rule(Dice())), most=None))


@pytest.mark.parametrize("policy", [Fixed(4), EGAG(gamma_max=6)])
@pytest.mark.parametrize("widths", [(), (2, 2)])
def test_the_text_of_a_seed_is_replayed(policy: GammaPolicy, widths: tuple[int, ...], seeded: Recording) -> None:
    processor, live = MultinomialProcessor(0.8), []
    for number, text in enumerate(seeded.texts):
        noise, told = SharedNoise(seed_of(3, number)), Told(once(MODEL))
        assert text.seed == noise.seed
        step = seed_coupled_step(assistant(processor, noise, widths), told, processor, noise, policy)
        assert told.decode(step, begun(text)) == text.tokens
        live.append(told)

    def make(setting: Setting) -> Drafting:
        assert isinstance(setting.rng, SharedNoise)
        return Drafting(assistant(setting.processor, setting.rng, widths))

    same(live, replay(seeded, Decoder(make, lambda meter: policy, Match(Dice())), most=None))


def test_chance_is_not_replayed(seeded: Recording) -> None:
    drawn = assistant(MultinomialProcessor(0.8), Dice())
    with pytest.raises(DecodeError, match="chance decides which drawn drafts of a sampled text stand"):
        replay(seeded, Decoder.of(drawn))
    assert replay(seeded, Decoder.of(SuffixDrafter()), most=None).tokens  # certain drafts need no chance


def test_a_seeded_text_of_certain_drafts_is_that_of_dice() -> None:
    """Certain drafts stand where they are the target's own sample, whatever it was drawn with."""
    torch.manual_seed(5)
    processor, prompts = MultinomialProcessor(1.0), ((1, 2, 1, 2), (3, 3))
    recording = record(TableModel(4), prompts, 30, processor=processor)
    torch.manual_seed(5)
    live = []
    for prompt in prompts:
        told = Told(TableModel(4))
        told.decode(speculative_step(SuffixDrafter(), told, processor, Dice()), start(prompt, 30).unwrap())
        live.append(told)
    same(live, replay(recording, Decoder.of(SuffixDrafter()), most=None))


def test_what_learns_from_the_text_is_replayed(greedy: Recording) -> None:
    """n-grams with fillers read the rows of tokens that stand, which were kept."""

    taught: list[NGramStorage] = []

    def parts(prompt: Tokens) -> tuple[Drafter, UpdateNgram]:
        storage = NGramStorage(3, 64)
        storage.initialize(prompt)
        taught.append(storage)
        return NGramDrafter(storage), UpdateNgram(storage, filler_top_k=3)

    live = []
    for text in greedy.texts:
        told, (drafter, update) = Told(once(MODEL)), parts(text.prompt)
        told.decode(ngram_step(drafter, told, GreedyProcessor(), Dice(), update, Fixed(4)), begun(text))
        live.append(told)
    learnt = [storage.counts() for storage in taught]
    taught.clear()

    def make(setting: Setting) -> Drafting:
        drafter, update = parts(setting.text)
        return Drafting(drafter, (update,))

    played = replay(greedy, Decoder(make, lambda meter: Fixed(4)))
    same(live, played)
    again = [storage.counts() for storage in taught]  # and those that hindsight asked for, and left alone
    assert [counts for counts in learnt if counts not in again] == []
    assert played.regret is None
    assert played.tally.accepted


def test_rows_that_are_missing_are_asked_for_once(greedy: Recording, tmp_path: Path) -> None:
    def table() -> Callable[[Setting], Drafting]:
        recycled = Recycled(64)
        return lambda setting: Drafting(RecyclingTree(recycled), (Recycle(recycled),))

    recycled, live = Recycled(64), []
    for text in greedy.texts:
        told = Told(once(MODEL))
        step = ngram_step(RecyclingTree(recycled), told, GreedyProcessor(), Dice(), Recycle(recycled), Fixed(6))
        told.decode(step, begun(text))
        live.append(told)

    def policy(meter: CostMeter) -> GammaPolicy:
        return Fixed(6)

    with pytest.raises(DecodeError, match="a stage learns from rows of the target, and one that it reads was not"):
        replay(greedy, Decoder(table(), policy))
    asked = Told(once(MODEL))
    played = replay(greedy, Decoder(table(), policy), asked)
    same(live, played)
    assert 0 < len(asked.drafts) <= played.passes
    played.recording.save(tmp_path / "file")
    again = replay(Recording.load(tmp_path / "file"), Decoder(table(), policy))  # nobody is asked
    same(live, again)
    assert len(greedy.rows) < len(again.recording.rows) == len(played.recording.rows)


@pytest.mark.parametrize("stage", [UpdateNgram(NGramStorage(2, 9), filler_top_k=3), Recycle(Recycled(9, k=3))])
def test_a_stage_that_looks_further_than_was_kept_is_refused(stage: UpdateNgram | Recycle) -> None:
    recording = record(TableModel(9), [(1, 2)], 5, kept=2)

    def make(setting: Setting) -> Drafting:
        return Drafting(propose_nothing, (stage,))

    with pytest.raises(DecodeError, match="a stage looks at 3 tokens of a row: received 2 that were kept"):
        replay(recording, Decoder(make))


def seeing(seen: list[list[list[int]]]) -> Callable[[Committed], Committed]:
    """A stage of a user's own that looks at three tokens of each row along the text."""

    def stage(committed: Committed) -> Committed:
        seen.append(top_tokens(committed.adjusted.verified.logits, 3))
        return committed

    return stage


def taught(stage: Callable[[Committed], Committed]) -> Decoder:
    return Decoder(lambda setting: Drafting(propose_nothing, (stage,)))


def test_a_stage_that_does_not_say_how_much_it_looks_at_is_refused_unless_all_was_kept() -> None:
    """Of a row the tokens that were not kept have one level, which no target said."""
    seen: list[list[list[int]]] = []
    short, whole = (record(TableModel(5), [(1, 2)], 4, kept=kept) for kept in (1, 5))
    storage = NGramStorage(2, 5)
    for stage in (seeing(seen), partial(UpdateNgram(storage, 3))):
        with pytest.raises(DecodeError, match="does not say how many tokens of a row it looks at: received 1 "):
            replay(short, taught(stage))
    assert seen == []
    live: list[list[list[int]]] = []
    run(ngram_step(propose_nothing, TableModel(5), GreedyProcessor(), Dice(), seeing(live)), start((1, 2), 4).unwrap())
    replay(whole, taught(seeing(seen)))
    assert seen == live


def test_a_stage_that_says_how_much_it_looks_at_is_given_that() -> None:
    short, enough = (record(TableModel(5), [(1, 2)], 4, kept=kept) for kept in (2, 3))
    seen: list[list[list[int]]] = []
    for rows in (Rows(3), Rows(3, along=True)):
        with pytest.raises(DecodeError, match="a stage looks at 3 tokens of a row: received 2 that were kept"):
            replay(short, taught(Looks(seeing(seen), rows)))
        assert replay(enough, taught(Looks(seeing(seen), rows))).tokens == 4
    assert seen[:4] == seen[4:]
    assert replay(short, taught(Looks(lambda committed: committed, Rows(0)))).tokens == 4


# Time.


@final
@define(eq=False)
class Ticking:
    """A clock that says what it was told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


COSTS = Costs((1, 4, 16), (1.0, 1.25, 2.0), prompt=7.0, own=0.5)


def costing(recording: Recording, costs: Costs = COSTS) -> Recording:
    return evolve(recording, texts=tuple([evolve(text, costs=costs) for text in recording.texts]))


def ticking(drafter: Drafter, clock: Ticking, seconds: float) -> Drafter:
    """A drafter each of whose drafts takes so many seconds."""

    def stream(tokens: Tokens) -> Iterator[Proposal]:
        for proposal in drafter(tokens):
            clock.now += seconds
            yield proposal

    return stream


def at_once(drafter: Drafter, clock: Ticking, seconds: float) -> Drafter:
    """A drafter that takes so many seconds before it returns anything."""

    def propose(tokens: Tokens) -> Iterator[Proposal]:
        clock.now += seconds
        return iter([*islice(drafter(tokens), 20)])

    return propose


def taking(target: Predictor, clock: Ticking, prompt: int) -> Predictor:
    """A target whose passes take what `COSTS` says."""

    def predict(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        clock.now += (COSTS.begin if len(tokens) == prompt else COSTS.of)(len(drafts) + 1)
        return target(tokens, drafts)

    return predict


@pytest.mark.parametrize("slow", [ticking, at_once])
@pytest.mark.parametrize("tree", [False, True])
def test_a_policy_that_looks_at_the_clock_chooses_as_it_did_and_time_is_what_the_clock_says(
    tree: bool, slow: Callable[[Drafter, Ticking, float], Drafter], greedy: Recording
) -> None:
    recording, base = costing(greedy), LookupTree() if tree else SuffixDrafter(shortest=0)
    clock, live = Ticking(), []
    meter = CostMeter(clock)
    policy, drafter = CostAware(meter, 12), slow(base, clock, 0.03125)
    for text in recording.texts:
        told = Told(taking(once(MODEL), clock, len(text.prompt)))
        told.decode(speculative_step(drafter, meter.timed(told), GreedyProcessor(), Dice(), policy), begun(text))
        clock.now += COSTS.own * len(told.drafts)
        live.append(told)
    assert len({drafts for told in live for drafts in told.drafts}) > 1  # it has chosen

    watch = Ticking()
    drafted = slow(base, watch, 0.03125)
    played = replay(
        recording,
        Decoder(lambda setting: Drafting(drafted), lambda meter: POLICIES["cost"](12, 1.0, meter)),
        most=None,
        clock=watch,
    )
    same(live, played)
    assert played.seconds == pytest.approx(clock.now, rel=1e-12)
    assert played.drafting == watch.now


@pytest.mark.parametrize("slow", [ticking, at_once])
def test_hindsight_is_what_each_gamma_takes(
    slow: Callable[[Drafter, Ticking, float], Drafter], greedy: Recording
) -> None:
    recording, most = costing(greedy), 6
    for base in (SuffixDrafter(shortest=0), LookupTree()):
        clock = Ticking()
        drafter = slow(base, clock, 0.125)
        played = replay(recording, Decoder.of(drafter, Fixed(2)), most=most, clock=clock)
        alone = [replay(recording, Decoder.of(propose_nothing), most=None, clock=clock)]
        alone += [replay(recording, Decoder.of(drafter, Fixed(g)), most=None, clock=clock) for g in range(1, most + 1)]
        seconds = [each.seconds for each in alone]
        seen = [text.hindsight for text in played.texts]
        for g in range(most + 1):
            assert sum(one.fixed[g] for one in seen if one is not None) == pytest.approx(seconds[g])
        assert played.best_gamma == seconds.index(min(seconds))
        assert played.regret == pytest.approx(seconds[2] / min(seconds) - 1)


def test_no_choice_of_gammas_is_quicker_than_hindsight_says() -> None:
    """Every sequence of γ is tried."""
    text = RecordedText((1, 2, 1, 2), (1, 2, 3, 1, 2, 1), 10, costs=COSTS)
    recording, clock = Recording((text,), 8), Ticking()
    drafter = ticking(SuffixDrafter(shortest=0), clock, 0.0625)

    def quickest(tokens: int, spent: tuple[int, ...]) -> float:
        played = replay(recording, Decoder.of(drafter, Planned(spent)), most=None, clock=clock).texts[0]
        steps = len(spent)
        if len(played.rounds) <= steps:
            return played.seconds
        return min(quickest(tokens, (*spent, gamma)) for gamma in range(4))

    played = replay(recording, Decoder.of(drafter, Fixed(1)), most=3, clock=clock)
    (seen,) = played.texts
    assert seen.hindsight is not None
    assert seen.hindsight.best == pytest.approx(quickest(0, ()))
    assert played.regret_of_steps == pytest.approx(seen.seconds / seen.hindsight.best - 1)


@final
@define(eq=False)
class Planned:
    """A policy of the user's own: γ as planned, by the number of the step, and then none."""

    gammas: tuple[int, ...]

    def __call__(self, stream: Iterator[Proposal], state: DecodeState, /) -> tuple[tuple[Proposal, ...], Pace]:
        step = state.tally.steps
        return tuple(islice(stream, self.gammas[step] if step < len(self.gammas) else 0)), state.pace


def test_costs() -> None:
    costs = Costs((1, 3, 5), (1.0, 2.0, 2.5), prompt=9.0)
    assert [costs.of(k) for k in (1, 2, 3, 5, 9)] == [1.0, 1.5, 2.0, 2.5, 3.5]
    assert costs.begin(3) == 10.0
    assert Costs((1, 2), (2.0, 1.0)).of(7) == 1.0  # what falls does not fall below 0
    for wrong in ((), (2,), (1, 1)):
        with pytest.raises(DecodeError, match="these are no costs"):
            Costs(wrong, (1.0,) * len(wrong))
    with pytest.raises(DecodeError, match="a duration is not a number of seconds"):
        Costs((1,), (-1.0,))


def test_passes_are_timed_as_they_are_fed() -> None:
    """A target whose passes take as many seconds as they are fed tokens, and observers a whole one."""
    clock = Ticking()
    read: list[Tokens] = [()]

    def target(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        shared = next((i for i, (a, b) in enumerate(zip(read[-1], tokens, strict=False)) if a != b), None)
        shared = min(len(read[-1]), len(tokens)) if shared is None else shared
        clock.now += max(1, len(tokens) - shared) + len(drafts)
        read.append(tokens)
        return TableModel(6)(tokens, drafts)

    recording = record(target, [(1, 2, 3), (4, 5)], 9, lengths=(1, 2, 7), clock=clock)
    for text in recording.texts:
        assert text.costs.seconds == (1.0, 2.0, 7.0)
        assert text.costs.own == 0.0


def test_a_pass_is_timed_until_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device it returns at once, and the prompt's is longer than those that a predictor waits for itself."""
    clock = Ticking()

    def wait(rows: Tensor) -> None:
        clock.now += len(rows)

    monkeypatch.setattr(sys.modules[record.__module__], "wait_for", wait)
    costs = record(TableModel(6), [(1, 2, 3)], 9, lengths=(1, 2, 7), clock=clock).texts[0].costs
    assert (costs.prompt, costs.own, *costs.seconds) == (1.0, 0.0, 1.0, 2.0, 7.0)


def test_what_was_recorded_takes_as_long_when_it_is_replayed() -> None:
    """Of a target that stalls now and then, which no median of a few passes shows; longer passes stall alike."""
    clock, passes = Ticking(), list[float]()

    def target(tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        passes.append((len(drafts) + 1) * (5.0 if len(passes) % 4 == 3 else 1.0))
        clock.now += passes[-1]
        return TableModel(6)(tokens, drafts)

    recording = record(target, [(1, 2, 3)], 18, lengths=(1, 3), clock=clock)
    decoded = passes[1:19]  # before them the target was tried
    played = replay(recording, Decoder.of(propose_nothing), most=None, clock=clock)
    assert played.seconds == pytest.approx(sum(decoded))
    costs = recording.texts[0].costs
    assert costs.of(1) == pytest.approx(sum(decoded[1:]) / 17) != 1.0
    assert costs.of(3) == pytest.approx(3 * costs.of(1))


def test_costs_are_as_they_were_timed_where_there_is_nothing_to_scale_by() -> None:
    """A clock that stands still, and a text of one token, whose pass read the prompt."""
    assert record(TableModel(6), [(1, 2)], 4, clock=Ticking()).texts[0].costs.seconds == (0.0,) * 7
    clock = Ticking()
    short = record(taking(TableModel(6), clock, 2), [(1, 2)], 1, lengths=(1, 4), clock=clock).texts[0].costs
    assert (short.prompt, *short.seconds) == pytest.approx((7.0, 1.0, 1.25))


# Recordings.


def test_recording_goes_on_where_it_stopped() -> None:
    said: list[int] = []
    first = record(TableModel(6), [(1, 2), (3,)], 5, seed=1, processor=MultinomialProcessor(1.0), facts={"a": "b"})
    told = Told(TableModel(6))
    both = record(
        told,
        [(1, 2), (3,), (4, 4)],
        5,
        seed=1,
        processor=MultinomialProcessor(1.0),
        onto=first,
        progress=lambda recording: said.append(len(recording.texts)),
    )
    assert said == [3]
    assert both.texts[:2] == first.texts
    assert both.facts == first.facts
    anew = record(TableModel(6), [(1, 2), (3,), (4, 4)], 5, seed=1, processor=MultinomialProcessor(1.0))
    assert [text.output for text in both.texts] == [text.output for text in anew.texts]


def test_a_recording_is_of_one_target_and_one_law(tmp_path: Path) -> None:
    ours = {"model": "ours"}
    first = record(TableModel(6), [(1, 2)], 5, processor=MultinomialProcessor(1.0), seed=1, origin=ours)
    first.save(tmp_path / "texts")
    first = Recording.load(tmp_path / "texts")
    again = partial(record, Told(TableModel(6)), [(1, 2), (3,)], 5, seed=1)
    heated = MultinomialProcessor(1.0)
    for processor in (TopKProcessor(1.0, 1), MultinomialProcessor(0.5), GreedyProcessor()):
        with pytest.raises(DecodeError, match="comes of another processor: received '"):
            again(processor=processor, onto=first, origin=ours)
    for origin in ({"model": "theirs"}, {}):
        with pytest.raises(DecodeError, match="comes of another model: received "):
            again(processor=heated, onto=first, origin=origin)
    with pytest.raises(DecodeError, match="what is there does not say its model"):
        again(processor=heated, onto=evolve(first, origin={}), origin=ours)
    with pytest.raises(DecodeError, match="kept other rows"):
        again(processor=heated, onto=first, origin=ours, kept=2)
    assert len(again(processor=heated, onto=first, origin=ours).texts) == 2


@final
class Favouring(MultinomialProcessor):
    """One that adds to some logits; what it is given may be anything."""

    def __init__(self, favoured: object) -> None:
        super().__init__(1.0)
        self.favoured = favoured


@final
@define(init=False, eq=False)
class Slotted(MultinomialProcessor):
    """One that holds its number in a slot."""

    number: int

    def __init__(self, number: int) -> None:
        super().__init__(1.0)
        self.number = number


def test_two_laws_have_two_names() -> None:
    def held() -> list[object]:
        ids, bias = list(range(9)), torch.zeros(2000)
        other = bias.index_fill(0, torch.tensor(1000), 0.5)  # which neither prints
        nested = MultinomialProcessor(0.5), MultinomialProcessor(0.25), GreedyProcessor()
        numbers = 5, numpy.int64(6), numpy.float32(0.5), True, None, "5"
        several = tuple(ids), (3, 4), [bias], [other], {3: bias}, {3: other}, {4, 3, 70}, frozenset((5, 70))
        return [bias, other, other.bfloat16(), bias.numpy(), other.numpy(), *nested, *numbers, *several]

    names = [law_of(Favouring(each)) for each in held()]
    assert len({*names}) == len(names)
    assert names == [law_of(Favouring(each)) for each in held()]
    assert law_of(Favouring(numpy.int64(5))) == law_of(Favouring(5))
    assert law_of(Favouring({70, 3, 4})) == law_of(Favouring({4, 3, 70}))
    assert law_of(Favouring(held)) != law_of(Favouring(lambda: 0))
    assert law_of(Slotted(1)) == law_of(Slotted(1)) != law_of(Slotted(2))


def test_a_prompt_that_is_asked_twice_has_two_texts_where_recording_goes_on() -> None:
    heated = MultinomialProcessor(1.0)
    first = record(TableModel(6), [(1, 2)], 5, processor=heated)
    both = record(TableModel(6), [(1, 2), (1, 2)], 5, processor=heated, onto=first)
    assert [text.prompt for text in both.texts] == [(1, 2), (1, 2)]
    assert record(TableModel(6), [(1, 2), (1, 2)], 5, processor=heated, onto=both).texts == both.texts


def test_stop_tokens_that_can_be_read_once_end_every_text() -> None:
    prompts = [(1, 2), (3,), (4, 4)]
    texts = [record(TableModel(5), prompts, 9, stop, clock=Ticking()).texts for stop in ((2,), iter((2,)))]
    assert texts[0] == texts[1]
    assert all(text.stop == {2} for text in texts[1])


def test_a_prompt_that_is_none_is_told_by_its_number() -> None:
    with pytest.raises(DecodeError, match="the prompt is empty") as caught:
        record(TableModel(5), [(1,), ()], 4)
    assert (caught.value.parameter, caught.value.__notes__) == ("prompts", ["in prompt 1"])
    with pytest.raises(DecodeError, match="there is no room for a token after prompt 0: received 1 tokens of 1"):
        record(TableModel(5), [(1,), (2,)], 0)


def test_a_file_holds_all_of_it(seeded: Recording, tmp_path: Path) -> None:
    several = evolve(seeded, texts=(*costing(seeded).texts, *seeded.texts), facts={"model": "tiny"})
    several.save(tmp_path / "file")
    loaded = Recording.load(tmp_path / "file")
    assert loaded.texts == several.texts
    assert (loaded.temperature, loaded.kept, loaded.facts) == (0.8, several.kept, {"model": "tiny"})
    assert loaded.rows.keys() == several.rows.keys()
    for name, row in several.rows.items():
        assert (loaded.rows[name].tokens == row.tokens).all()
        assert (loaded.rows[name].logs == row.logs).all()
        assert loaded.rows[name].rest == row.rest


def test_a_damaged_file_is_refused_in_one_sentence(greedy: Recording, tmp_path: Path) -> None:
    path = tmp_path / "file"
    greedy.save(path)
    content = path.read_bytes()
    for at in (0, 9, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(DecodeError, match=r"the file (is|holds|has|contradicts)"):
            Recording.load(path)
    for size in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DecodeError, match="the file is truncated, corrupted or not of this kind"):
            Recording.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(DecodeError, match="the file holds no recording"):
        Recording.load(path)
    with pytest.raises(DecodeError, match="the file does not exist"):
        Recording.load(tmp_path / "none")


@pytest.mark.parametrize("wrong", ["sizes", "tokens", "lengths", "said", "names"])
def test_a_file_that_contradicts_itself_is_refused(wrong: str, greedy: Recording, tmp_path: Path) -> None:
    """Its checksum is right, and its content impossible."""
    path = tmp_path / "file"
    greedy.save(path)
    metadata, arrays = content_of(path, "")
    said = metadata["said"]
    match wrong:
        case "said":
            said = json.dumps({**json.loads(said), "vocab_size": "many"})
        case "names":
            arrays["names"] = arrays["names"][1:]
        case _:
            arrays[wrong] = arrays[wrong] + 1000
    save_file(arrays, path, metadata | {"said": said, "sha256": checksum_of(said, arrays)})
    with pytest.raises(DecodeError, match="the file contradicts itself"):
        Recording.load(path)


# Texts that end otherwise, and parts of users' own.


class Letters:
    """A tokenizer of letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join([chr(97 + i) for i in ids])


def test_a_text_that_a_condition_ended_is_replayed(greedy: Recording) -> None:
    prompt = PROMPTS[0]
    whole = next(text for text in greedy.texts if text.prompt == prompt)
    for end in range(2, len(whole.output)):
        until = stop_string(Letters(), Letters().decode(list(whole.output[end - 2 : end])))
        drafter, told = assistant(GreedyProcessor(), Dice()), Told(once(MODEL))
        step = speculative_step(drafter, told, GreedyProcessor(), Dice(), Fixed(4), until=until)
        tokens = told.decode(step, begun(whole))
        cut = evolve(whole, output=tokens[len(prompt) :])
        same([told], replay(evolve(greedy, texts=(cut,)), Decoder.of(drafter, Fixed(4)), most=3))


def test_a_drafter_and_a_policy_of_the_users_own(greedy: Recording) -> None:
    def either(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        followed = [after for before, after in pairwise(tokens) if before == tokens[-1]]
        for token in list(dict.fromkeys(reversed(followed)))[:2]:
            yield Proposal(token, parent=TEXT, source="either")

    policy, live = Planned((1, 2, 0) * 20), []
    for text in greedy.texts:
        told = Told(once(MODEL))
        told.decode(speculative_step(either, told, GreedyProcessor(), Dice(), policy), begun(text))
        live.append(told)
    same(live, replay(greedy, Decoder.of(either, policy)))


def test_a_rule_that_writes_another_text_is_refused(greedy: Recording) -> None:
    def all_stand(scored: Scored) -> Verdict:
        drafted = scored.drafted
        return Verdict(drafted.path(len(drafted.proposals) - 1) if drafted.proposals else ())

    def curious(scored: Scored) -> Verdict:
        scored.law(len(scored.drafted.proposals) - 1)
        return Verdict(())

    wrong = ("a rule that", all_stand), ("another", curious)
    for _, rule in wrong:
        with pytest.raises(DecodeError, match=r"(does not write the text|asks for a law that was not recorded)"):
            replay(greedy, Decoder.of(lambda tokens: iter([Proposal(63), Proposal(62)]), Fixed(2), rule))


@pytest.mark.parametrize(
    "label", ["none", "suffix", "suffix@cost", "lookup@3", "ngram", "memory@egag", "tree@8", "tree@heuristic@match"]
)
def test_names_are_those_of_bench(label: str, greedy: Recording) -> None:
    assert replay(greedy, decoder_of(label, greedy, None, None), most=2).tokens
    assert decoder(label, Models({"": MODEL})).unwrap().label == label


def test_nothing_that_was_given_is_changed(greedy: Recording) -> None:
    rows, texts = dict(greedy.rows), greedy.texts
    recycled = Recycled(64)
    decoder = Decoder(lambda setting: Drafting(RecyclingTree(recycled), (Recycle(recycled),)))
    assert replay(greedy, decoder, once(MODEL)).recording is not greedy
    assert greedy.rows == rows
    assert greedy.texts is texts


# The commands.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a tokenizer, and a file of prompts."""
    folder = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(folder)
    tiny_llama(dtype=torch.float32).save_pretrained(folder)
    lines = [{"question_id": i, "category": "chat", "turns": [f"w{i} w7 w{i} w7"]} for i in range(3)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def ran(*arguments: object) -> int:
    return main(list(map(str, arguments)))


def test_record_and_replay(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "texts", tmp_path / "figures.json"
    asked = ("record", "--model", saved, "--prompts", saved / "prompts.jsonl", "--max-new-tokens", 12, "--out", out)
    assert ran(*asked, "--limit", 1) == 0
    assert ran(*asked) == 2
    assert "the file is there already" in capsys.readouterr().err
    assert ran(*asked, "--resume") == 0
    recording = Recording.load(out)
    assert len(recording.texts) == 3
    tokens = sum(len(text.output) for text in recording.texts)
    assert recording.facts["model"].startswith(str(saved))
    capsys.readouterr()

    labels = ("autoregressive", "suffix@5", "suffix@cost", "tree@4@match", "memory")
    assert ran("replay", out, "--decoders", *labels, "--hindsight", 4, "--json", page) == 0
    said = capsys.readouterr()
    assert all(label in said.out for label in labels)
    assert "tree@4@match is replayed without the target's bigrams" in said.err
    figures = json.loads(page.read_text())["decoders"]
    assert figures["autoregressive"]["passes"] == tokens
    assert figures["suffix@5"]["passes"] == replay(recording, Decoder.of(SuffixDrafter(), Fixed(5)), most=None).passes
    assert figures["memory"]["regret"] is None


def test_a_models_rows_are_asked_for_and_kept(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "texts"
    assert (
        ran("record", "--model", saved, "--prompts", saved / "prompts.jsonl", "--max-new-tokens", 6, "--out", out) == 0
    )
    before = len(Recording.load(out).rows)
    assert ran("replay", out, "--decoders", "recycle@4") == 2
    assert "one that it reads was not recorded" in capsys.readouterr().err
    assert ran("replay", out, "--decoders", "recycle@4", "--model", saved) == 0
    assert len(Recording.load(out).rows) > before
    assert ran("replay", out, "--decoders", "recycle@4") == 0


def test_a_recording_holds_rows_of_one_model(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, out = tmp_path / "other", tmp_path / "texts"
    copytree(saved, other)
    tiny_llama(9, dtype=torch.float32).save_pretrained(other)
    asked = ("record", "--prompts", saved / "prompts.jsonl", "--max-new-tokens", 6, "--out", out)
    assert ran(*asked, "--model", saved, "--limit", 1) == 0
    before = out.read_bytes()
    for more, another in (
        (("--model", other), "model"),
        (("--model", saved, "--dtype", "bfloat16"), "dtype"),
        (("--model", saved, "--accelerate", "fast"), "accelerate"),
    ):
        for command in ((*asked, "--resume"), ("replay", out, "--decoders", "recycle@4")):
            capsys.readouterr()
            assert ran(*command, *more) == 2
            assert f"what is there comes of another {another}" in capsys.readouterr().err
    assert ran(*asked, "--model", saved, "--temperature", 1, "--resume") == 2
    assert "what is there comes of another processor" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_rows_of_an_accelerated_model_are_asked_of_it(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "texts"
    fast = ("--model", saved, "--accelerate", "fast")
    assert ran("record", *fast, "--prompts", saved / "prompts.jsonl", "--max-new-tokens", 6, "--out", out) == 0
    before = len(Recording.load(out).rows)
    assert ran("replay", out, "--decoders", "recycle@4", *fast) == 0
    assert len(Recording.load(out).rows) > before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--decoders", "generate"), "decoders of transformers and llama.cpp are not replayed"),
        (("--decoders", "llama.cpp"), "decoders of transformers and llama.cpp are not replayed"),
        (("--decoders", "head@4"), "a head reads what the target holds"),
        (("--decoders", "llm"), "there is no draft model"),
        (("--decoders", "nobody"), "no decoder has this name"),
        (("--decoders", "json:dumps"), "a decoder cannot be made"),
        (("--decoders", "builtins:dict"), "decoders is not a Decoder"),
        (("--hindsight", "-1"), "hindsight is below 0"),
        (("--bigrams", "nowhere"), "the file does not exist"),
        (("--accelerate", "fast"), "there is no model to accelerate: received --accelerate fast"),
        (("--dtype", "bfloat16"), "there is no model to load: received --dtype bfloat16"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    arguments: Sequence[str], said: str, greedy: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy.save(tmp_path / "texts")
    assert ran("replay", tmp_path / "texts", *arguments) == 2
    assert said in capsys.readouterr().err


def test_a_narrow_table_tells_the_whole_name_of_a_decoder(
    greedy: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy.save(tmp_path / "texts")
    monkeypatch.setattr(replaying, "PIPED", 60)
    label = "suffix+lookup@8@block"
    assert ran("replay", tmp_path / "texts", "--decoders", label) == 0
    rows = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert "".join(rows) == label


def test_what_cannot_be_recorded_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran("record", "--out", tmp_path / "texts", "--seed", 1) == 2
    assert "greedy texts have no seed" in capsys.readouterr().err
    assert ran("record", "--out", tmp_path / "texts", "--kept", 0) == 2
    assert ran("record", "--out", tmp_path / "nowhere" / "texts") == 2
    assert "no file can be written there" in capsys.readouterr().err
    (tmp_path / "texts").write_text("no recording")
    assert ran("record", "--out", tmp_path / "texts", "--resume") == 2
    assert "not of this kind" in capsys.readouterr().err


# Predicted and measured time.


def test_the_benchmark_tells_passes_that_a_live_decode_takes(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # it is a process's own
    asked = ("--model", saved, "--prompts", saved / "prompts.jsonl", "--limit", 2, "--max-new-tokens", 9)
    replayed.main(list(map(str, (*asked, "--repeats", 1, "--decoders", "suffix@2", "tree@4"))))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["autoregressive", "suffix@2", "tree@4"]
    assert all(float(figure) > 0 for row in rows for figure in row[1:])
    assert [row[4] for row in rows] == [row[5] for row in rows]
    assert float(rows[0][2]) == float(rows[0][3]) == 1
    assert float(rows[1][5]) < float(rows[0][5]) == 18


def test_what_a_policy_can_lose_is_told_of_texts_with_the_same_costs(
    greedy: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = ((1.0, 1.2), (2.0, 3.0), (30.0, 300.0))
    costs = [Costs((1, 9), seconds, prompt=40.0, own=own) for seconds, own in zip(taken, (0.0, 0.5, 9.0), strict=True)]
    uneven = [evolve(text, costs=each) for text, each in zip(greedy.texts, costs, strict=True)]
    recording = evolve(greedy, texts=tuple(uneven))
    even = never_slower.evened(recording, recording)
    assert [text.costs for text in even.texts] == [Costs((1, 9), (2.0, 3.0), prompt=40.0, own=0.5)] * 3
    assert [text.output for text in even.texts] == [text.output for text in greedy.texts]
    slow = evolve(recording, texts=(evolve(uneven[0], costs=Costs((1, 9), (9.0, 900.0), prompt=1.0, own=0.0)),))
    elsewhere = never_slower.evened(recording, slow)
    assert [text.costs for text in elsewhere.texts] == [Costs((1, 9), (9.0, 900.0), prompt=40.0, own=0.0)] * 3
    recording.save(tmp_path / "texts")
    slow.save(tmp_path / "slow")
    monkeypatch.setattr("sys.argv", ["never_slower", str(tmp_path / "texts"), "--costs", str(tmp_path / "slow")])
    never_slower.main()
    dear = capsys.readouterr().out.splitlines()
    assert "0.69" in dear[3]  # each text loses a draft that takes a dozen passes
    monkeypatch.setattr("sys.argv", ["never_slower", str(tmp_path / "texts")])
    never_slower.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == [
        f"{name}, {kept}" for name in ("suffix", "tree") for kept in ("kept from text to text", "each text anew")
    ]
    for _, middle, worst, good in rows:
        assert 0.9 < float(worst) <= float(middle) + 0.005
        assert good.endswith("of 3 |")
    assert never_slower.row("a", [1.0, 2.0, 3.0], [1.0, 1.0, 4.0]) == "| a | 1.00 | 0.750 | 2 of 3 |"
