"""The benchmark: its numbers are right, whoever decodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Final, final

import pytest
import torch
from attrs import define, evolve, frozen
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.nn import Module
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from typing_extensions import override

from benchmarks.accelerate import generating
from specflow import (
    TEXT,
    CachedPredictor,
    CostMeter,
    DecodeError,
    Dice,
    Fixed,
    GreedyProcessor,
    MultinomialProcessor,
    PointMass,
    Proposal,
    Step,
    Tokens,
    autoregressive_step,
    speculative_step,
    start,
)
from specflow.batch import Asked, BatchPredictor, Reply
from specflow.bench import command, read_prompts
from specflow.bench.batches import All, Turn, in_batches, turns
from specflow.bench.context import Context, composed
from specflow.bench.decoders import Decoder, Models, decoder
from specflow.bench.measure import UNMEASURED, Plan, Round, Run, measure, run_one, warmed_up
from specflow.bench.peers import padded
from specflow.bench.prompts import Prompt, spread
from specflow.bench.report import Report, accepted_text, build, positions_text, show, to_json
from specflow.bench.stopwatch import Pass, Stopwatch
from specflow.bench.summary import bootstrap, compare, pass_costs, summarise
from specflow.catalogue import POLICIES, RULES, Policy
from specflow.cli import main
from specflow.models import Loaded
from specflow.randomness import Randomness
from specflow.state import Count, GammaPolicy, Rule, Tally
from tests.toys import VOCABULARY, disturbed, oracle, tiny_llama

PROMPTS = (
    Prompt(1, "chat", ("w5 w6 w7 w5 w6 w7 w5 w6",)),
    Prompt(2, "chat", ("w9 w3",)),
    Prompt(3, "code", ("w1 w2 w3 w4 w1 w2 w3 w4 w1 w2 w3 w4",)),
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Each token is a word: w5 is 5."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")


def plan_of(model: PreTrainedModel, *labels: str, assistant: Module | None = None, repeats: int = 1) -> Plan:
    models = Models({"": model}, assistant)
    decoders = tuple([decoder(label, models).unwrap() for label in labels])
    loaded = Loaded(model, tokenizer())
    return Plan(loaded, models, decoders, PROMPTS, GreedyProcessor(), max_new_tokens=24, repeats=repeats)


def prompt_ids(prompt: Prompt) -> list[int]:
    return [int(word[1:]) for word in prompt.text.split()]


@final
@define
class Hand:
    """A clock that moves only when somebody works."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@final
class Slow(Module):
    """A model whose call takes 1 + 0.125 k seconds of a hand-moved clock and that always predicts token + 1."""

    def __init__(self, hand: Hand) -> None:
        super().__init__()
        self.hand = hand

    @override
    def forward(self, input_ids: Tensor) -> object:
        self.hand.now += 1 + 0.125 * input_ids.shape[-1]
        logits = torch.zeros(1, input_ids.shape[-1], VOCABULARY)
        logits[0, torch.arange(input_ids.shape[-1]), (input_ids[0] + 1) % VOCABULARY] = 1.0
        return Output(logits)


@final
@frozen(eq=False)
class Output:
    logits: Tensor


@final
class Working(GreedyProcessor):
    """Greedy, and busy for 0.0625 s each time: time that is neither the target's nor the drafter's."""

    def __init__(self, hand: Hand) -> None:
        super().__init__()
        self.hand = hand

    @override
    def laws(self, tokens: Tokens, logits: Tensor, /) -> tuple[PointMass, ...]:
        self.hand.now += 0.0625
        return tuple([PointMass(int(token)) for token in logits.argmax(dim=-1)])


def test_the_time_of_a_text_is_split_exactly() -> None:
    hand = Hand()

    def counting(tokens: Tokens) -> Iterator[Proposal]:
        for token in (tokens[-1] + 1, tokens[-1] + 2, 0):  # right, right, wrong
            hand.now += 0.25
            yield Proposal(token % VOCABULARY)

    def compose(context: Context) -> Step:
        return speculative_step(context.timed(counting), context.target, context.processor, context.rng, Fixed(3))

    base = plan_of(tiny_llama())
    slow = Slow(hand)
    CachedPredictor(slow)((5, 6), ())  # it is tried before anything is timed
    plan = evolve(
        base,
        models=Models({"": slow}),
        processor=Working(hand),
        clock=hand,
        decoders=(Decoder("mine", "", composed(compose)),),
    )
    prompt = Prompt(1, "chat", ("w5 w6",))
    run = run_one(
        plan,
        plan.decoders[0],
        prompt,
        plan.state(prompt).unwrap(),
        0,
    )

    assert run.output == tuple(range(7, 31))
    first, *rest = run.rounds
    # Without a cache the whole text is fed: 2 tokens and 3 drafts.
    counted = Tally(1, (("draft", Count(3, 2)),), (1, 1, 1), (1, 1))
    assert first == Round(3, counted, (Pass(5, 1.625),), 0.75, 1.625 + 0.75 + 0.0625)
    for i, one in enumerate(rest[:-1], 1):
        assert one.passes == (Pass(5 + 3 * i, 1 + 0.125 * (5 + 3 * i)),)
        assert one.own == pytest.approx(0.0625)
    assert run.seconds == sum(one.seconds for one in run.rounds)
    assert all(one.target + one.drafting + one.own == pytest.approx(one.seconds) for one in run.rounds)

    summary = summarise([run], "mine", "", pass_costs([run], {"mine": ""}))
    assert summary.tokens_per_pass == 24 / len(run.rounds)
    split = summary.split
    assert split is not None
    assert split.target + split.drafting + split.own == pytest.approx(1.0)
    assert split.own_microseconds == pytest.approx(62500)
    whole = sum(one.seconds for one in rest)
    assert split.drafting == pytest.approx(sum(one.drafting for one in rest) / whole)
    assert summary.achieved == pytest.approx(sum(one.target for one in rest) / whole)


def test_every_decoder_writes_the_oracles_text_and_its_counts_fit() -> None:
    model = tiny_llama(3)
    helper = disturbed(model, 1, 0.05)
    for each in (model, helper):  # tried before anything is counted, as by the warm-up of a benchmark
        CachedPredictor(each)((0, 1), (Proposal(0), Proposal(1, parent=TEXT)))
    before = helper.generation_config.to_dict()
    labels = (
        "autoregressive",
        "llm@3",
        "suffix",
        "suffix@cost",
        "lookup@4",
        "suffix+lookup",
        "suffix+lookup@cost",
        "memory@4",
        "memory@cost",
        "ngram",
        "tree",
        "tree@8",
        "tree@4",
        "tree@cost",
        "tree@heuristic",
        "tree@8@match",
        "llm@cost",
        "llm@egag@block",
        "llm@traverse",
        "none",
        "generate",
        "hf-lookup@4",
        "hf-lookup-3@4",
        "hf-assistant@3",
    )
    plan = plan_of(model, *labels, assistant=helper)
    runs = list(measure(plan))
    assert len(runs) == len(PROMPTS) * len(labels) == plan.texts

    expected = [oracle(prompt_ids(prompt), model, 24, plan.loaded.stop) for prompt in PROMPTS]
    for run in runs:
        prompt = PROMPTS[run.question_id - 1]
        assert list(run.output) == expected[run.question_id - 1]
        assert run.prompt_tokens == len(prompt_ids(prompt))
        assert sum(one.tokens for one in run.rounds) == len(run.output)
        assert {one.tally.steps for one in run.rounds} == {1}
        assert all(one.tally.accepted <= one.tally.drafted for one in run.rounds)
        assert all(one.tokens == one.tally.accepted + 1 for one in run.rounds[:-1])
        first, *others = run.rounds
        if not run.decoder.startswith("tree"):  # for which the text is read, and the model tried, before the first tree
            assert [one.fed for one in first.passes] == [first.tally.drafted + run.prompt_tokens]
        assert [[one.fed for one in each.passes] for each in others] == [[each.tally.drafted + 1] for each in others]
    by_label = {label: [run for run in runs if run.decoder == label] for label in labels}
    drafts = {label: [[one.tally.drafted for one in run.rounds] for run in by_label[label]] for label in labels}
    assert drafts["tree@8"] == drafts["tree@8@match"] != drafts["tree@4"]
    assert max(max(each) for each in drafts["tree@8"]) == 8
    by_cost = [label for label in labels if "@cost" in label or "@egag" in label or label == "tree"]
    assert all(max(each) <= 16 for label in by_cost for each in drafts[label])
    for label in ("autoregressive", "none", "generate"):
        assert all(one.tally.drafted == 0 for run in by_label[label] for one in run.rounds)
        assert all(len(run.rounds) == len(run.output) for run in by_label[label])
    for label in ("llm@3", "hf-assistant@3"):  # a good drafter: fewer passes than tokens, the drafting is seen
        assert sum(len(run.rounds) for run in by_label[label]) < 0.7 * sum(len(run.output) for run in by_label[label])
        assert all(run.rounds[0].drafting > 0 for run in by_label[label])
    assert helper.generation_config.to_dict() == before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks

    report = build(plan, runs, "autoregressive", (), {})
    assert list(report.identities) == list(labels[1:])
    assert all((one.equal, one.compared) == (3, 3) for one in report.identities.values())


def test_transformers_decoders_decode_as_we_do_whatever_the_checkpoint_says() -> None:
    model = tiny_llama(3)
    helper = disturbed(model, 1, 0.05)
    saying = GenerationConfig(repetition_penalty=1.8, no_repeat_ngram_size=1, min_new_tokens=20, num_beams=3)
    model.generation_config = saying
    before = saying.to_dict()
    plan = plan_of(model, "generate", "hf-lookup@4", "hf-assistant@3", assistant=helper)
    expected = [oracle(prompt_ids(prompt), model, 24, plan.loaded.stop) for prompt in PROMPTS]
    for run in measure(plan):
        assert list(run.output) == expected[run.question_id - 1], run.decoder
    states = [plan.state(prompt).unwrap() for prompt in PROMPTS]
    assert [list(text) for text in padded(model, states, plan.processor, 2)] == expected
    state = start([3, 4], 24).unwrap()
    assert generating(model)(state.tokens, 24)[0] == padded(model, [state], plan.processor, 1)[0]
    assert model.generation_config is saying
    assert saying.to_dict() == before


def test_tokens_that_come_a_pass_late_are_no_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on mps, where `generate` learns one pass later that a text is over."""

    class Event:
        def __init__(self, **_: object) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

    monkeypatch.setattr(torch, "Event", Event)
    deferred = "transformers.generation.utils.DeferredStopCheck"
    monkeypatch.setattr(f"{deferred}.is_supported", lambda *_, **__: True)
    plan = plan_of(tiny_llama(3), "generate", "autoregressive")
    runs = list(measure(plan))
    late = [run for run in runs if run.decoder == "generate"]
    assert all(len(run.rounds[0].passes) == 2 and not run.rounds[-1].passes for run in late)
    assert {run.question_id: run.output for run in late} == {run.question_id: run.output for run in runs}
    assert all(one.tally.drafted == one.tally.accepted == 0 for run in late for one in run.rounds)
    assert {one.tally.steps for run in late for one in run.rounds} == {1}


def test_a_memory_is_kept_from_text_to_text_and_each_decoder_has_its_own() -> None:
    model = tiny_llama(3)
    prompts = (PROMPTS[1], evolve(PROMPTS[1], question_id=99))
    plan = evolve(plan_of(model, "memory@20", "ngram@5", repeats=2), prompts=prompts)
    runs = {(run.decoder, run.question_id, run.repeat): run for run in measure(plan)}
    accepted = {key: [one.tally.accepted for one in run.rounds] for key, run in runs.items()}
    first, again = prompts[0].question_id, 99
    for repeat in (0, 1):
        # It has said this before.
        assert sum(accepted["memory@20", again, repeat]) > sum(accepted["memory@20", first, repeat]) + 5
        assert accepted["ngram@5", again, repeat] == accepted["ngram@5", first, repeat]
        # Not in another repeat, though, and not in a decoder that is made anew.
        assert accepted["memory@20", first, repeat] == accepted["memory@20", first, 0]
    fresh = list(measure(evolve(plan_of(model, "memory@20"), prompts=PROMPTS[1:2])))
    assert [one.tally.accepted for one in fresh[0].rounds] == accepted["memory@20", first, 0]


def test_every_text_knows_its_repeat_and_a_warm_up_is_none_of_them() -> None:
    """Of texts that are decoded one by one, and of those in batches."""
    heard: list[int] = []

    def compose(context: Context) -> Step:
        heard.append(context.repeat)
        return autoregressive_step(context.target, context.processor, context.rng)

    mine = Decoder("mine", "", composed(compose))
    plan = evolve(plan_of(tiny_llama(3), repeats=2), decoders=(mine,), prompts=PROMPTS[:2])
    warmed_up(plan, mine).unwrap()
    assert [*measure(plan)]
    assert heard == [UNMEASURED, 0, 1, 0, 1]
    heard.clear()
    assert [*turns({"mine": in_batches(plan, mine, 2).unwrap()}, plan)]
    assert heard == [UNMEASURED, UNMEASURED, 0, 0, 1, 1]


def test_the_longer_draft_is_taken() -> None:
    """In a text that repeats itself the suffix goes on for 20 tokens, a lookup for 10."""
    model = tiny_llama(3)
    runs = list(measure(plan_of(model, "suffix@20", "lookup@10", "suffix+lookup@20")))
    drafted = {run.decoder: run.rounds[0].tally.drafted for run in runs if run.question_id == 1}
    assert drafted["suffix+lookup@20"] == max(drafted["suffix@20"], drafted["lookup@10"]) > min(drafted.values())


def test_a_label_names_the_drafter_the_policy_and_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled, each policy is told the temperature, and each rule decides where it is named, `reject` elsewhere."""
    paced: list[tuple[str, int, float]] = []
    judged: set[str] = set()

    def policy(name: str, made: Policy) -> Policy:
        def make(most: int, temperature: float, meter: CostMeter) -> GammaPolicy:
            paced.append((name, most, temperature))
            return made(most, temperature, meter)

        return make

    def rule(name: str, made: Callable[[Randomness], Rule]) -> Callable[[Randomness], Rule]:
        def make(rng: Randomness) -> Rule:
            judged.add(name)
            return made(rng)

        return make

    for name, made in POLICIES.items():
        monkeypatch.setitem(POLICIES, name, policy(name, made))
    for name, each in RULES.items():
        monkeypatch.setitem(RULES, name, rule(name, each))
    model = tiny_llama(3)
    for label, expected, judge in (
        ("suffix", ("cost", 16, 0.7), "reject"),
        ("tree", ("cost", 16, 0.7), "reject"),
        ("tree@5", ("fixed", 5, 0.7), "reject"),
        ("tree@5@traverse", ("fixed", 5, 0.7), "traverse"),
        ("tree@cost", ("cost", 16, 0.7), "reject"),
        ("llm@5@block", ("fixed", 5, 0.7), "block"),
        ("llm@svip@match", ("svip", 16, 0.7), "match"),
    ):
        plan = evolve(plan_of(model, label, assistant=model), processor=MultinomialProcessor(0.7))
        assert len(list(measure(plan))) == len(PROMPTS)
        assert paced == [expected]  # once for all texts
        assert judged == {judge}
        paced.clear()
        judged.clear()


def test_a_model_that_drafts_for_itself_drafts() -> None:
    model = tiny_llama(3)
    for run in measure(plan_of(model, "llm@3", assistant=model)):
        assert sum(len(one.passes) for one in run.rounds) == len(run.rounds) == 6
        assert all(one.drafting > 0 for one in run.rounds[:-1])


def test_decoders_take_turns() -> None:
    plan = plan_of(tiny_llama(), "autoregressive", "generate", repeats=2)
    order = [(run.question_id, run.repeat, run.decoder) for run in measure(plan)]
    assert order[:4] == [(1, 0, "autoregressive"), (1, 0, "generate"), (1, 1, "generate"), (1, 1, "autoregressive")]
    assert len(set(order)) == 12


def test_a_text_that_differs_is_found_with_its_margin() -> None:
    model = tiny_llama(3)

    def forgetful(context: Context) -> Step:
        """Decodes as if the text began 4 tokens before its end, from the sixth new token on."""

        def target(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
            return context.target(tokens[-4:] if len(tokens) > 7 else tokens, drafts)

        return autoregressive_step(target, context.processor, context.rng)

    plan = plan_of(model, "autoregressive")
    plan = evolve(plan, prompts=PROMPTS[1:2], decoders=(*plan.decoders, Decoder("forgetful", "", composed(forgetful))))
    runs = list(measure(plan))
    right, wrong = runs[0].output, runs[1].output
    same = build(plan, runs, "autoregressive", (), {}).identities["forgetful"]
    assert (same.compared, same.equal) == (1, 0)
    (difference,) = same.differences
    assert difference.position >= 6
    assert right[: difference.position] == wrong[: difference.position]
    assert right[difference.position] != wrong[difference.position]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids(PROMPTS[1]), *right[: difference.position]]])).logits[0, -1]
    best = logits.sort(descending=True).values
    assert difference.margin == pytest.approx(float(best[0] - best[1]), rel=1e-5)


def synthetic(label: str, question_id: int, seconds: list[float], tokens: int = 1, category: str = "chat") -> Run:
    counted = Tally(1, (("", Count(tokens, tokens - 1)),))
    rounds = tuple([Round(tokens, counted, (Pass(tokens, each / 2),), each / 4, each) for each in seconds])
    return Run(label, question_id, category, 0, 5, (0,) * (tokens * len(rounds)), rounds, sum(seconds))


def test_ratios_are_paired_by_prompt_and_leave_the_prefill_out_or_in() -> None:
    runs = [
        synthetic("slow", 1, [1.0, 2.0, 2.0]),
        synthetic("fast", 1, [1.0, 1.0, 1.0]),
        synthetic("slow", 2, [1.0, 8.0, 8.0]),
        synthetic("fast", 2, [1.0, 2.0, 2.0]),
        synthetic("slow", 3, [1.0, 3.0, 3.0]),
        synthetic("fast", 3, [1.0, 1.0, 1.0]),
        synthetic("fast", 4, [1.0, 1.0, 1.0]),  # not measured with both: left out
        synthetic("slow", 5, [1.0]),
        synthetic("fast", 5, [1.0]),  # one round only: it has no decoding rate
    ]
    comparison = compare(runs, "fast", "slow")
    assert comparison is not None
    assert comparison.ratios == {1: 2.0, 2: 4.0, 3: 3.0}
    assert (comparison.decode.median, comparison.decode.worst, comparison.decode.worst_prompt) == (3.0, 2.0, 1)
    assert comparison.total.median == pytest.approx((5 / 3 + 7 / 3) / 2)  # of 5/3, 17/5, 7/3 and 1
    assert compare(runs, "fast", "absent") is None


def test_repeats_are_reduced_to_their_median() -> None:
    runs = [evolve(synthetic("a", 1, [1.0, each]), repeat=i) for i, each in enumerate((1.0, 1.0, 50.0))]
    runs += [evolve(synthetic("b", 1, [1.0, each]), repeat=i) for i, each in enumerate((2.0, 90.0, 2.0))]
    comparison = compare(runs, "a", "b")
    assert comparison is not None
    assert comparison.decode.median == 2.0


def test_the_bootstrap_on_known_data() -> None:
    same = bootstrap(dict.fromkeys(range(20), 1.5))
    assert (same.median, same.low, same.high) == (1.5, 1.5, 1.5)
    # The median of three resampled values is the smallest with probability 7/27, the largest as often: more than 2.5 %.
    three = bootstrap({1: 1.0, 2: 2.0, 3: 3.0})
    assert (three.median, three.low, three.high) == (2.0, 1.0, 3.0)
    # Of 101 values 0..100 the resampled median has a standard deviation of about 101 / (2 √101).
    many = bootstrap({i: float(i) for i in range(101)}, resamples=20000)
    assert many.median == 50.0
    assert many.low == pytest.approx(50 - 1.96 * 101 / (2 * 101**0.5), abs=1.0)
    assert many.high == pytest.approx(50 + 1.96 * 101 / (2 * 101**0.5), abs=1.0)
    assert (many.worst, many.worst_prompt, many.prompts) == (0.0, 0, 101)


@pytest.mark.parametrize("drafts", [list, tuple, iter])
def test_a_drafter_may_return_what_it_may_in_a_decode(drafts: Callable[[list[Proposal]], Iterator[Proposal]]) -> None:
    def propose(tokens: Tokens) -> Iterator[Proposal]:
        return drafts([Proposal((tokens[-1] + 1) % VOCABULARY), Proposal((tokens[-1] + 2) % VOCABULARY)])

    watch = Stopwatch()
    assert [each.token for each in watch.timed(propose)((5,))] == [6, 7]
    assert watch.drafting > 0


def test_a_drafter_that_yields_none_is_refused_by_its_name() -> None:
    def lost(tokens: Tokens) -> Iterator[Proposal]:
        yield None  # type: ignore[misc]

    target = Slow(Hand())
    step = speculative_step(Stopwatch().timed(lost), CachedPredictor(target), GreedyProcessor(), Dice())
    with pytest.raises(DecodeError, match="lost proposes what is not a Proposal"):
        step(start((5,), 9).unwrap())


def after_the_last(tokens: Tokens) -> Iterator[Proposal]:
    """A tree: what comes after the last token, which stands and has no children, and a token that never comes."""
    yield Proposal((tokens[-1] + 1) % VOCABULARY, parent=TEXT)
    yield Proposal((tokens[-1] + 7) % VOCABULARY, parent=TEXT)


def test_a_position_where_a_tree_has_no_draft_is_not_counted() -> None:
    """Nothing was drafted after the leaf, so that nothing was rejected there."""

    def compose(context: Context) -> Step:
        return speculative_step(after_the_last, context.target, context.processor, context.rng, Fixed(2))

    mine = Decoder("mine", "", composed(compose))
    plan = evolve(plan_of(tiny_llama()), models=Models({"": Slow(Hand())}), decoders=(mine,), prompts=PROMPTS[1:2])
    runs = list(measure(plan))
    tally = summarise(runs, "mine", "", pass_costs(runs, {"mine": ""})).tally
    assert tally.drafted == 2 * tally.accepted == 2 * tally.steps == 24
    assert tally.judged_at == tally.accepted_at == (12,)
    assert positions_text(tally) == "100"


def test_what_somebody_elses_decoder_drafted_is_a_chain() -> None:
    (run,) = measure(evolve(plan_of(tiny_llama(3), "hf-lookup@4"), prompts=PROMPTS[:1]))
    for one in run.rounds[:-1]:
        tally = one.tally
        assert tally.accepted == one.tokens - 1
        assert tally.accepted_at == (1,) * tally.accepted
        assert tally.judged_at == (1,) * min(tally.drafted, one.tokens)
    assert any(one.tally.accepted < one.tally.drafted for one in run.rounds)


def test_shares_are_shown_of_the_first_positions() -> None:
    tally = Tally(4, (("a", Count(9, 4)),), (4, 3, 2), (3, 1))
    assert (accepted_text(tally), positions_text(tally), positions_text(tally, 2)) == ("4/9", "75 33 0", "75 33")
    assert (accepted_text(Tally(3)), positions_text(Tally(3))) == ("", "")


def test_pass_costs_pool_the_decoders_of_one_model() -> None:
    runs = [synthetic("a", 1, [9.0, 2.0, 4.0]), synthetic("b", 1, [9.0, 6.0, 8.0]), synthetic("c", 1, [9.0, 100.0])]
    costs = pass_costs(runs, {"a": "", "b": "", "c": "other"})
    assert costs == {("", 1, 1): 2.5, ("other", 1, 1): 50.0}
    summary = summarise(runs, "a", "", costs)
    assert summary.achieved == pytest.approx((2.5 + 2.5) / 6.0)
    assert summary.split is not None
    assert (summary.split.target, summary.split.drafting, summary.split.own) == (0.5, 0.25, 0.25)


def test_a_prompt_may_hold_what_ends_lines_elsewhere(tmp_path: Path) -> None:
    path, asked = tmp_path / "prompts.jsonl", "a\u2028b\x85c"
    line = json.dumps({"question_id": 1, "category": "chat", "turns": [asked]}, ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(f"{line}\r\n\n", encoding=encoding)
        assert [prompt.text for prompt in read_prompts(path).unwrap()] == [asked]


def test_our_prompts() -> None:
    prompts = read_prompts().unwrap()
    categories = ["chat", "translation", "summarising", "code edits", "extraction", "arithmetic"]
    assert [prompt.category for prompt in spread(prompts, 6)] == categories
    assert spread(prompts, None) == prompts
    assert len({prompt.text for prompt in prompts}) == 36


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no prompts"),
        ('{"question_id": 1, "category": "a", "turns": ["?"]}\nnonsense', "line 2 of"),
        ('{"question_id": 1, "category": "a", "turns": []}', "line 1 of"),
        ('{"question_id": 1, "turns": ["?"]}', "line 1 of"),
        ('{"question_id": 1, "category": "a", "turns": ["?"]}\n' * 2, "a question_id occurs twice"),
        ("[" * 100_000, "line 1 of"),
        ('{"question_id": ' + "1" * 5000 + "}", "line 1 of"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    assert complaint in str(read_prompts(path).failure())
    assert "cannot be read" in str(read_prompts(tmp_path / "missing.jsonl").failure())


@pytest.mark.parametrize(
    ("label", "complaint"),
    [
        ("sufix@5", "no decoder has this name"),
        ("llm@0", "no decoder has this name"),
        ("llm@5", "no draft model"),
        ("head@cost", "there is no head: received head; name one with --head"),
        ("generate@cost", "no decoder has this name"),
        ("generate@match", "no decoder has this name"),
        ("autoregressive@cost", "no decoder has this name"),
        ("suffix@sometimes", "no decoder has this name"),
        ("suffix@5@sometimes", "no decoder has this name"),
        ("suffix@match@5", "no decoder has this name"),
        ("suffix@5@cost", "no decoder has this name"),
        ("hf-assistant", "no draft model"),
        ("other/generate", "no such model was made"),
        ("plain/generate", "its own models only"),
        ("llama.cpp", "llama.cpp decodes its own targets only: received llama.cpp; use --engine llama.cpp"),
        ("llama.cpp-lookup@4", "llama.cpp decodes its own targets only"),
        ("llama.cpp@cost", "no decoder has this name"),
        ("nowhere:step", "cannot be imported"),
        ("specflow.bench:nothing", "cannot be imported"),
    ],
)
def test_decoders_that_cannot_run(label: str, complaint: str) -> None:
    models = Models({"": tiny_llama(), "plain": Slow(Hand())})
    assert complaint in str(decoder(label, models).failure())


def test_a_decoder_that_fails_in_the_warm_up_is_known_before_the_measurement() -> None:
    def broken(context: Context) -> Step:
        raise DecodeError("gamma", "it is broken", 0, "mend it")

    plan = plan_of(tiny_llama(), "autoregressive")
    assert warmed_up(plan, plan.decoders[0]).unwrap() is plan.decoders[0]
    failure = warmed_up(plan, Decoder("broken", "", composed(broken))).failure()
    assert "it failed in the warm-up (it is broken" in str(failure)


@final
class Page(HTMLParser):
    """What is in a page; its tags must nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "br"}:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"href", "src", "xlink:href"}]

    @override
    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        self.words.append(data)


def some_report() -> Report:
    plan = plan_of(tiny_llama(3), "autoregressive", "generate", "hf-lookup@4")
    return build(plan, list(measure(plan)), "autoregressive", (), {"model": "a <tiny> model"})


def test_the_page_opens_offline_and_says_what_was_measured() -> None:
    pytest.importorskip("matplotlib")
    from specflow.bench.page import to_html  # noqa: PLC0415 - an optional extra

    report = some_report()
    page = Page()
    page.feed(to_html(report))
    page.close()
    assert page.open == []
    assert page.tags.count("svg") == 4
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    text = " ".join(page.words)
    assert "a <tiny> model" in text
    for one in report.summaries:
        assert one.decoder in text
        assert f"{one.tokens_per_pass:.2f}" in text


def test_the_terminal_and_the_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console  # noqa: PLC0415

    report = some_report()
    show(report, Console(width=160))
    printed = capsys.readouterr().out
    written = json.loads(to_json(report))
    assert [one["decoder"] for one in written["summaries"]] == ["autoregressive", "generate", "hf-lookup@4"]
    for one in written["summaries"]:
        assert f"{one['tokens_per_pass']:.2f}" in printed
    assert "3/3" in printed
    assert len(written["runs"]) == 9
    assert written["runs"][0]["output"] == list(report.runs[0].output)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A tiny model in a directory, with its tokenizer."""
    model = tiny_llama(3, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join(
            json.dumps({"question_id": one.question_id, "category": one.category, "turns": list(one.turns)})
            for one in PROMPTS
        ),
        encoding="utf-8",
    )
    return str(tmp_path / "model")


MINE = """
from specflow import Fixed, PointMass, Proposal, speculative_step

def repeat_last(tokens):
    while True:
        yield Proposal(tokens[-1], source="mine")

def step(context):
    drafter = context.timed(repeat_last)
    return speculative_step(drafter, context.target, context.processor, context.rng, Fixed(2))
"""


def test_the_command(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_decoders.py").write_text(MINE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["bench", "--model", saved, "--prompts", "prompts.jsonl", "--max-new-tokens", "8", "--limit", "2"]
    arguments += ["--decoders", "autoregressive", "my_decoders:step", "hf-assistant@2", "hf-assistant", "missing:step"]
    arguments += ["--draft-model", saved, "--json", "out.json", "--html", "out.html"]
    monkeypatch.setattr(command, "_can_draw", lambda: False)
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert "absent: missing:step" in output.out
    assert "absent: out.html: matplotlib or jinja2 is not installed; run `pip install 'specflow[bench]'`" in " ".join(
        output.err.split()
    )
    assert not (tmp_path / "out.html").exists()
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len(written["runs"]) == 2 * 4
    assert written["facts"]["draft model"] == f"{saved}, float32"
    mine = next(one for one in written["summaries"] if one["decoder"] == "my_decoders:step")
    assert mine["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] > 0
    assert written["identities"]["my_decoders:step"]["equal"] == 2


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        (["--prompts", "missing.jsonl"], "the prompts cannot be read"),
        (["--baseline", "llm@5"], "the baseline is not among the decoders that run"),
        (["--decoders", "nonsense"], "no decoder can run"),
        (["--temperature", "0"], "temperature is not a positive number"),
        (["--max-new-tokens", "-1"], "the number of new tokens is negative"),
        (["--max-new-tokens", "0"], "there is nothing to measure"),
        (["--max-prompt-tokens", "0"], "max_prompt_tokens is below 1"),
        (["--limit", "0"], "limit is below 1"),
        (["--repeats", "0"], "repeats is below 1"),
        (["--slots", "0"], "slots is below 1"),
        (["--slots", "2", "--baseline", "autoregressive"], "--baseline means nothing beside --slots"),
        (["--slots", "2", "--html", "page.html"], "--html means nothing beside --slots"),
        (["--decoders", "suffix", "suffix"], "a decoder is named twice"),
        (["--decoders", "suffix@99999999999999999999"], "no decoder has this name"),
        (["--draft-dtype", "float64"], "there is no draft model"),
        (["--device", "meta"], "nothing is computed there"),
        (["--device", "no such"], "the model cannot be moved there"),
        (["--prompts", "."], "the prompts cannot be read"),
        (["--json", "."], "no file can be written there"),
        (["--json", "a" * 300], "no file can be written there"),
        (["--html", "no/such/folder/page.html"], "no file can be written there"),
        (["--also", "fast"], "this declares no model"),
        (["--also", "=json:loads"], "this declares no model"),
        (["--also", "a=json:loads", "a=json:dumps"], "two models have one name: received a"),
        (["--also", "fast=json:no_such"], "it cannot be imported"),
        (["--also", "fast=sys:version"], "it is no function"),
        (["--also", "fast=json:loads"], "the function fails (TypeError"),
        (["--also", "fast=builtins:id"], "also is not a Module"),
        (["--decoders", "builtins:id"], "compose one, such as speculative_step"),
    ],
)
def test_the_command_refuses(saved: str, extra: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = str(Path(saved).parent / "prompts.jsonl")
    assert main(["bench", "--model", saved, "--prompts", prompts, "--decoders", "autoregressive", *extra]) == 2
    assert complaint in capsys.readouterr().err


def test_results_that_cannot_be_kept_after_all_are_one_sentence(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "can_be_written", lambda path: True)
    prompts = str(Path(saved).parent / "prompts.jsonl")
    arguments = ["bench", "--model", saved, "--prompts", prompts, "--max-new-tokens", "4", "--limit", "1"]
    assert main([*arguments, "--decoders", "autoregressive", "--json", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "autoregressive" in captured.out
    assert "specflow: the path is that of a folder, not of a file" in captured.err


def test_ctrl_c_reports_what_is_complete(
    saved: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(plan: Plan) -> Iterator[Run]:
        for i, run in enumerate(measure(plan)):
            if i == 3:
                raise KeyboardInterrupt
            yield run

    monkeypatch.setattr(command, "measure", interrupted)
    out = Path(saved).parent / "out.json"
    prompts = str(Path(saved).parent / "prompts.jsonl")
    arguments = ["bench", "--model", saved, "--prompts", prompts, "--max-new-tokens", "4", "--json", str(out)]
    assert main([*arguments, "--decoders", "autoregressive", "generate"]) == 130
    assert len(json.loads(out.read_text(encoding="utf-8"))["runs"]) == 2
    assert "generate" in capsys.readouterr().out


BATCHED: Final = ["suffix@cost", "llm@3@block", "memory", "suffix@4@match"]


@pytest.mark.parametrize("slots", ["1", "2"])
def test_many_texts_at_once_are_the_same_texts(
    slots: str, saved: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(saved).parent)
    read: list[int] = []
    asked = BatchPredictor.read

    def watched(batched: BatchPredictor, some: Sequence[Asked]) -> list[Reply]:
        read.append(len(some))
        return asked(batched, some)

    monkeypatch.setattr(BatchPredictor, "read", watched)
    arguments = ["bench", "--model", saved, "--prompts", "prompts.jsonl", "--max-new-tokens", "9", "--json", "out.json"]
    arguments += ["--slots", slots, "--draft-model", saved, "--repeats", "2"]
    assert main([*arguments, "--decoders", "autoregressive", *BATCHED, "generate", "hf-lookup@3"]) == 0
    output = capsys.readouterr().out
    assert "absent: hf-lookup@3" in output
    assert "the decoder reads one text at a time" in output
    assert output.count("6/6") == 1 + 1 + len(BATCHED) + 1
    assert max(read) == int(slots)
    written = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert written["slots"] == int(slots)
    names = ["autoregressive, one by one", "autoregressive", *BATCHED, "generate"]
    assert [turn["decoder"] for turn in written["turns"]] == names + names[1:] + names[:1]
    assert len({json.dumps(turn["texts"]) for turn in written["turns"]}) == 1


def test_sampled_batches_have_their_own_seeds_and_no_text_to_compare(
    saved: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(saved).parent)
    arguments = ["bench", "--model", saved, "--prompts", "prompts.jsonl", "--max-new-tokens", "9", "--json", "out.json"]
    arguments += ["--slots", "2", "--temperature", "1.5", "--decoders", "autoregressive", "generate"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*arguments, "--seed", seed]) == 0
        turns = json.loads(Path("out.json").read_text(encoding="utf-8"))["turns"]
        texts.append({turn["decoder"]: turn["texts"] for turn in turns})
    assert "3/3" not in capsys.readouterr().out
    assert texts[0]["autoregressive"] == texts[0]["autoregressive, one by one"] == texts[1]["autoregressive"]
    assert texts[0]["autoregressive"] != texts[2]["autoregressive"]
    assert texts[0]["generate"] == texts[1]["generate"] != texts[2]["generate"]
    assert main([*arguments, "--repeats", "2"]) == 0
    turns = json.loads(Path("out.json").read_text(encoding="utf-8"))["turns"]
    first, second = (turn["texts"] for turn in turns if turn["decoder"] == "autoregressive")
    assert first != second


def test_ctrl_c_reports_the_turns_of_batches_that_are_complete(
    saved: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(decoders: Mapping[str, All], plan: Plan) -> Iterator[Turn]:
        for i, turn in enumerate(turns(decoders, plan)):
            if i == stop:
                raise KeyboardInterrupt
            yield turn

    monkeypatch.setattr(command, "turns", interrupted)
    monkeypatch.chdir(Path(saved).parent)
    arguments = ["bench", "--model", saved, "--prompts", "prompts.jsonl", "--max-new-tokens", "4", "--json", "out.json"]
    arguments += ["--slots", "2", "--repeats", "2", "--decoders", "autoregressive"]
    stop = 1
    assert main(arguments) == 130
    assert not Path("out.json").exists()
    stop = 3
    assert main(arguments) == 130
    assert len(json.loads(Path("out.json").read_text(encoding="utf-8"))["turns"]) == 2
    assert "3/3" in capsys.readouterr().out


def test_a_step_of_ones_own_is_measured_in_batches_too(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = MINE + "\n\ndef once(context):\n    raise KeyError(context.prompt)\n"
    (tmp_path / "my_decoders.py").write_text(broken, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_decoders", raising=False)
    arguments = ["bench", "--model", saved, "--prompts", "prompts.jsonl", "--max-new-tokens", "8", "--slots", "3"]
    assert main([*arguments, "--decoders", "autoregressive", "my_decoders:step", "my_decoders:once"]) == 0
    output = capsys.readouterr().out
    assert output.count("3/3") == 3
    assert "absent: my_decoders:once: it failed in the warm-up (KeyError" in output
    monkeypatch.delitem(sys.modules, "my_decoders", raising=False)
    assert main([*arguments, "--decoders", "hf-lookup"]) == 2
    assert "none decodes several texts at once" in capsys.readouterr().err


def test_other_models_are_made_by_a_function(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text("import copy\n\n\ndef twin(model):\n    return copy.deepcopy(model)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["bench", "--model", saved, "--prompts", "prompts.jsonl", "--max-new-tokens", "4", "--json", "out.json"]
    arguments += ["--also", "twin=my_models:twin", "--decoders", "autoregressive", "twin/autoregressive"]
    assert main(arguments) == 0
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written["identities"]["twin/autoregressive"]["equal"] == 3
    assert set(written["costs"]) == {"model", "twin"}
    assert written["facts"]["also"] == "twin=my_models:twin"


@pytest.mark.parametrize("made", ["fast", "bit_for_bit"])
def test_accelerated_models_are_targets_too(saved: str, made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(saved).parent)
    arguments = ["bench", "--model", saved, "--prompts", "prompts.jsonl", "--max-new-tokens", "8", "--json", "out.json"]
    arguments += ["--also", f"made=specflow.accelerate:{made}"]
    assert main([*arguments, "--decoders", "autoregressive", "made/suffix@cost", "made/autoregressive"]) == 0
    written = json.loads((Path(saved).parent / "out.json").read_text(encoding="utf-8"))
    assert written["absent"] == []
    assert [written["identities"][f"made/{name}"]["equal"] for name in ("suffix@cost", "autoregressive")] == [3, 3]
    assert set(written["costs"]) == {"model", "made"}


def test_the_help_names_decoders_and_shows_how_to_accelerate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--also fast=specflow.accelerate:fast --decoders autoregressive fast/suffix@cost" in text
    assert all(name in text.replace(" ", "") for name in ("suffix+lookup", "memory", "tree", "hf-lookup-3"))
    assert all(name in text for name in (*POLICIES, *RULES))


def test_sampling_is_seeded_by_the_prompt_and_claims_no_identity() -> None:
    plan = evolve(plan_of(tiny_llama(3), "autoregressive", "generate"), processor=MultinomialProcessor(1.0))
    runs = list(measure(plan))
    again = list(measure(plan))
    assert [run.output for run in runs] == [run.output for run in again]
    assert [run.output for run in runs] != [run.output for run in measure(evolve(plan, seed=1))]
    assert build(plan, runs, "autoregressive", (), {}).identities == {}
