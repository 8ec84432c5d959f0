"""Text that obeys a grammar has the target's law, masked and renormalised step by step, whatever is drafted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from math import inf
from typing import Final

import pytest
import torch
from attrs import evolve

from specflow import (
    TEXT,
    Block,
    CachedPredictor,
    DecodeError,
    DecodeState,
    Dice,
    Drafter,
    Finished,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Match,
    MultinomialProcessor,
    NucleusProcessor,
    PointMass,
    Processor,
    Proposal,
    Reject,
    Rule,
    Step,
    SuffixDrafter,
    Tokens,
    TopKProcessor,
    Traverse,
    along_paths,
    at_most,
    autoregressive_step,
    chain,
    first_of,
    run,
    speculative_step,
    start,
    then,
)
from specflow.batch import Failed, Shared, generate_many, together
from specflow.constraints import (
    BannedWords,
    Constrained,
    Constraint,
    CutForbidden,
    Forced,
    Grammar,
    LogitBias,
    Matcher,
    MinLength,
    RepetitionPenalty,
    RequiredWords,
    following,
)
from specflow.drafters import propose_nothing
from specflow.errors import DeadEndError
from specflow.randomness import Randomness
from specflow.stages import Adjust, Draft, Verify, ending
from specflow.state import Drafted, Reason
from specflow.steps import constrained_step
from specflow.testing import Case, Ending, ExactnessError, TableModel, World, certify, exact_law
from specflow.testing.certificate import autoregressive
from specflow.testing.enumeration import Branch
from specflow.vocabulary import fitted
from tests.automata import (
    BRACKETS,
    END,
    LETTERS,
    LETTERS_END,
    REGEX,
    Allowed,
    Oracle,
    in_brackets,
    in_letters,
)
from tests.toys import tiny_llama

Inner = Callable[[], Processor]


def case(allowed: Allowed, prompt: Tokens, new: int, seed: int, inner: Processor) -> Case:
    vocab_size, end = (3, END) if allowed is in_brackets else (4, LETTERS_END)
    return Case(vocab_size, prompt, new, frozenset({end}), lambda rng: Oracle(inner, allowed, prompt), seed)


SAMPLED: Final = MultinomialProcessor(1.0)
CASES: Final = (
    case(in_brackets, (1,), 5, 3, SAMPLED),
    case(in_brackets, (0, 2), 4, 5, MultinomialProcessor(0.6)),
    case(in_brackets, (2, 2), 5, 13, GreedyProcessor()),
    case(in_letters, (3,), 4, 8, SAMPLED),
    case(in_letters, (0, 1), 3, 19, TopKProcessor(0.8, 2)),
    case(in_letters, (1, 2), 3, 9, NucleusProcessor(1.2, 0.7)),
)
RULES: Final = (Reject, Block, Traverse, Match)


def begun(world: World) -> Constraint:
    """The grammar of a world's text."""
    oracle = oracle_of(world)
    return (BRACKETS if oracle.allowed is in_brackets else REGEX).after(world.start.request.prompt)


def oracle_of(world: World) -> Oracle:
    assert isinstance(world.processor, Oracle)
    return world.processor


def obeying(
    world: World,
    draft: Callable[[World, Constraint], Drafter],
    rule: Callable[[Randomness], Rule],
    cut: bool = True,
) -> Step:
    """A step over the constraint: never over the oracle."""
    answer = begun(world)
    gamma = Fixed(2 if draft in (unaware, bushes) else 3)  # more of those only makes more branches
    drafting, adjust, end = Draft(draft(world, answer), gamma), Adjust(world.rng), ending()
    verify = Verify(world.target, Constrained(oracle_of(world).inner, answer), rule(world.rng))
    cutting: Callable[[Drafted], Drafted] = CutForbidden(answer) if cut else lambda drafted: drafted
    return lambda state: state.then(drafting).then(cutting).then(verify).then(adjust).then(end)


def unaware(world: World, answer: Constraint) -> Drafter:
    """Drafts drawn by a model that does not know the grammar."""
    return LLMDrafter(world.drafter, SAMPLED, world.rng)


def bushes(world: World, answer: Constraint) -> Drafter:
    """Trees drawn by a model that does not know the grammar."""
    return LLMDrafter(world.drafter, SAMPLED, world.rng, widths=(2, 1))


def aware(world: World, answer: Constraint) -> Drafter:
    """Forced tokens, and behind them drafts drawn under the grammar."""
    return then(Forced(answer), LLMDrafter(world.drafter, Constrained(SAMPLED, answer), world.rng))


def aware_trees(world: World, answer: Constraint) -> Drafter:
    """Trees drawn under the grammar, level by level: where a draft ends the text, nothing comes after it."""
    return LLMDrafter(world.drafter, Constrained(SAMPLED, answer), world.rng, widths=(2, 1))


def aware_choices(world: World, answer: Constraint) -> Drafter:
    """Trees of what is best and next best under the grammar."""
    return LLMDrafter(world.drafter, Constrained(GreedyProcessor(), answer), world.rng, widths=(2, 2))


def certain(world: World, answer: Constraint) -> Drafter:
    """Certain trees, legal, illegal and ended, with forced tokens behind them."""

    def bush(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        first = len(tokens) % 2
        yield Proposal(first, parent=TEXT)
        yield Proposal(1 - first, parent=TEXT)
        yield Proposal(END, parent=0)
        yield Proposal(1 - first, parent=0)

    return first_of(then(Forced(answer), bush), bush)


def forced_in_trees(world: World, answer: Constraint) -> Drafter:
    """Forced tokens behind two drawn siblings."""
    return then(at_most(2, bushes(world, answer)), Forced(answer))


def forced(world: World, answer: Constraint) -> Drafter:
    """Forced tokens alone."""
    return Forced(answer)


def propose(world: World, answer: Constraint) -> Drafter:
    """Nothing but what is forced."""
    return propose_nothing


def half_full(state: DecodeState) -> bool:
    """A condition of a user's own."""
    return state.output[-2:] == (0, 0)


DRAFTERS: Final = (unaware, bushes, aware, aware_trees, aware_choices, certain, forced_in_trees, forced)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("draft", DRAFTERS, ids=lambda draft: draft.__name__)
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "uncut"])
def test_obeying_text_is_exact(
    rule: Callable[[Randomness], Rule], draft: Callable[[World, Constraint], Drafter], cut: bool
) -> None:
    """Against a reference that shares no code with the room of constraints."""
    shorter = [evolve(each, new_tokens=min(each.new_tokens, 2 if rule is Match else 3)) for each in CASES]
    cases = CASES if draft in (aware_choices, certain, forced) else shorter
    certify(lambda world: obeying(world, draft, rule, cut), cases=cases)


def is_over(state: DecodeState) -> bool:
    """Whether only the end may follow, by looking."""
    end = max(state.request.stop)
    allowed = in_brackets if end == END else in_letters
    return end not in state.output and allowed(state.output) == {end}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("draft", [unaware, bushes, propose], ids=lambda draft: draft.__name__)
def test_the_prebuilt_step_is_exact(
    rule: Callable[[Randomness], Rule], draft: Callable[[World, Constraint], Drafter]
) -> None:
    def compose(world: World) -> Step:
        answer, inner = begun(world), oracle_of(world).inner
        drafter = draft(world, answer)
        return constrained_step(
            answer, drafter, world.target, inner, world.rng, rule(world.rng), Fixed(2), until=half_full
        )

    cases = [evolve(each, new_tokens=min(each.new_tokens, 3)) for each in CASES]
    certify(compose, cases=cases, until=lambda state: is_over(state) or half_full(state))


def test_a_wrong_law_is_shown_with_its_case() -> None:
    """Also where the processor is a value without a `__dict__`."""
    with pytest.raises(ExactnessError, match="Oracle"):
        certify(lambda world: speculative_step(propose_nothing, world.target, SAMPLED, world.rng), cases=CASES[:1])


def test_a_text_in_a_batch_has_its_law() -> None:
    """Over all choices of two texts, exactly: the joint law is the product of what each has alone."""
    table, prompts = TableModel(3, seed=6), ((1,), (2, 1))
    shared = Shared(lambda asks: [table(each.tokens, each.drafts) for each in asks])
    states = [start(prompt, 3, (END,)).unwrap() for prompt in prompts]

    def one(branch: Branch, number: int) -> Ending:
        answer = BRACKETS.after(prompts[number])
        drafter = then(Forced(answer), LLMDrafter(TableModel(3, seed=7), SAMPLED, branch))
        draft, cut, adjust, end = Draft(drafter, Fixed(2)), CutForbidden(answer), Adjust(branch), ending()
        verify = Verify(shared, Constrained(SAMPLED, answer), Reject(branch))
        return Ending.of(
            run(lambda state: state.then(draft).then(cut).then(verify).then(adjust).then(end), states[number])
        )

    def both(branch: Branch) -> tuple[Ending, Ending]:
        ends = dict(together([partial(one, branch, number) for number in (0, 1)], 2))
        assert isinstance(ends[0], Ending), ends[0]
        assert isinstance(ends[1], Ending), ends[1]
        return ends[0], ends[1]

    def alone(branch: Branch, number: int) -> Ending:
        oracle = Oracle(SAMPLED, in_brackets, prompts[number])
        world = World(states[number], table, table, oracle, branch, branch)
        return autoregressive(world, branch)

    joint, laws = exact_law(both), [exact_law(partial(alone, number=number)) for number in (0, 1)]
    pairs = [(a, b) for a in laws[0].probabilities for b in laws[1].probabilities]
    assert len(pairs) > 4
    assert sum(abs(joint.of((a, b)) - laws[0].of(a) * laws[1].of(b)) for a, b in pairs) < 1e-12


@pytest.mark.parametrize("tokens", [LETTERS, (b"a", b"bc", b"c", b"", b"b", b"ca")])
def test_a_matcher_is_a_function_of_the_text(tokens: tuple[bytes, ...]) -> None:
    """Wherever it was asked before, and behind rejected tokens, a place answers as a new matcher does."""
    grammar = Grammar.regex("(a|bc)*(ca)?", tokens, stop=(LETTERS_END,))
    dice = torch.Generator().manual_seed(1)
    places: list[tuple[Tokens, Matcher]] = [((), grammar.start())]
    for _ in range(300):
        text, place = places[int(torch.randint(len(places), (), generator=dice))]
        token = int(torch.randint(len(tokens) + 1, (), generator=dice))
        following = place.after(token)
        new = grammar.start()
        for before in text:
            stepped = new.after(before)
            assert stepped is not None
            new = stepped
        assert (place.mask().tolist(), place.may_end(), place.forced()) == (
            new.mask().tolist(),
            new.may_end(),
            new.forced(),
        )
        assert (following is None) == (new.after(token) is None)
        if following is not None and len(text) < 12:
            places.append(((*text, token), following))
    assert len(places) > 30


class Counting:
    """An engine that counts how often it is moved, and raises where it is told to."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.moves = 0
        self.fails = False

    def mask(self) -> torch.Tensor:
        if self.fails:
            raise KeyboardInterrupt
        return torch.tensor([True, len(self.tokens) % 2 == 0])

    def take(self, token: int, /) -> bool:
        self.moves += 1
        if token == 1 and len(self.tokens) % 2:
            return False
        self.tokens.append(token)
        return True

    def back(self, count: int, /) -> None:
        self.moves += 1
        del self.tokens[len(self.tokens) - count :]

    def forced(self) -> Tokens:
        return ()

    def may_end(self) -> bool:
        return True


def test_an_engine_goes_back_by_what_is_not_shared() -> None:
    engines: list[Counting] = []

    def make() -> Counting:
        engines.append(Counting())
        return engines[-1]

    first = following(make)
    place = first
    for token in (0, 0, 0, 0):
        place = place.after(token) or first
    engine = engines[0]
    assert (engine.tokens, engine.moves) == ([0, 0, 0, 0], 4)
    assert place.mask().tolist() == [True, True]
    branch = place.after(1)
    assert branch is not None
    assert place.after(0) is not None  # back by one, on by one
    assert (engine.tokens, engine.moves) == ([0, 0, 0, 0, 0], 7)
    assert branch.mask().tolist() == [True, False]
    assert engine.tokens == [0, 0, 0, 0, 1]
    engine.fails = True
    with pytest.raises(KeyboardInterrupt):
        place.mask()
    assert branch.mask().tolist() == [True, False]  # of a new engine, gone to the same place
    assert [engine.tokens for engine in engines] == [[0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert first.mask().tolist() == [True, True]


# The prebuilt step, in batches too.


def test_texts_of_a_batch_obey_and_are_those_of_the_prebuilt_step() -> None:
    pattern = "((a|b)ccc){3}"
    grammar = Grammar.regex(pattern, LETTERS, stop=(LETTERS_END,))
    model, small, prompts, stop = tiny_llama(3), tiny_llama(9), ([5, 6], [7], [8, 3, 4]), [LETTERS_END]
    alone = []
    for prompt in prompts:
        dice, target = Dice(), CachedPredictor(model)
        drafter, rule = SuffixDrafter(), Reject(dice)
        step = constrained_step(grammar.after(prompt), drafter, target, GreedyProcessor(), dice, rule, Fixed(3))
        alone.append(run(step, start(prompt, 20, stop).unwrap()))
        assert dict(alone[-1].state.tally.sources)["forced"].accepted > 3
    for assistant in (None, small):
        ends = generate_many(prompts, model, assistant, 3, GreedyProcessor(), 20, stop, grammar=grammar)
        assert [end.state.output for end in ends] == [end.state.output for end in alone]
        assert [end.reason for end in ends] == [end.reason for end in alone]
    drafted, lone = (
        generate_many(prompts, model, each, 3, SAMPLED, 20, stop, 5, grammar=grammar) for each in (small, None)
    )
    assert [end.state.output for end in drafted] == [end.state.output for end in lone]
    for end in (*alone, *lone):
        assert re.fullmatch(pattern, "".join("abc"[token] for token in end.state.output))


@pytest.mark.parametrize("stop", [(63,), ()])
@pytest.mark.parametrize(("processor", "seed"), [(GreedyProcessor(), None), (SAMPLED, 5), (SAMPLED, None)])
def test_a_model_drafts_under_a_grammar_up_to_its_end(stop: Tokens, processor: Processor, seed: int | None) -> None:
    """Where nothing can follow, and where the drafter's smaller vocabulary has no stop token."""
    spelled = (b"a", b"b", b"c", *[b""] * 61)
    pattern, prompts = "((a|b)cc){2}", ([5, 6], [7], [8, 3, 4])
    grammar = Grammar.regex(pattern, spelled, stop)
    ends = [
        generate_many(prompts, tiny_llama(3), each, 4, processor, 20, list(stop), seed, grammar=grammar)
        for each in (tiny_llama(3, vocab_size=60), None)
    ]
    for end in (*ends[0], *ends[1]):
        assert re.fullmatch(pattern, "".join("abc"[token] for token in end.state.output if token not in stop))
    if processor is not SAMPLED or seed is not None:
        assert [end.state.output for end in ends[0]] == [end.state.output for end in ends[1]]


def test_a_batch_refuses_a_grammar_that_ends_elsewhere() -> None:
    with pytest.raises(DecodeError, match="the grammar ends at other tokens") as refused:
        generate_many([[5]], tiny_llama(3), eos_tokens_id=[3], grammar=BRACKETS)
    assert refused.value.parameter == "grammar"


# The end of a text.


def letters(prompt: Tokens = (1,), new: int = 9) -> tuple[Constraint, DecodeState]:
    return REGEX.after(prompt), start(prompt, new, (LETTERS_END,)).unwrap()


def likes(*tokens: int) -> Callable[..., torch.Tensor]:
    """A model that likes a token the more, the earlier it stands here."""

    def predict(text: Tokens, drafts: tuple[Proposal, ...]) -> torch.Tensor:
        row = torch.tensor([-float(tokens.index(token)) for token in range(len(tokens))])
        return row.expand(len(drafts) + 1, -1)

    return predict


def decoded(
    answer: Constraint, state: DecodeState, target: Callable[..., torch.Tensor], drafter: Drafter = propose_nothing
) -> Finished:
    dice = Dice()
    draft, cut, adjust, end = Draft(drafter), CutForbidden(answer), Adjust(dice), ending(answer.is_over)
    verify = Verify(target, Constrained(GreedyProcessor(), answer), Reject(dice))
    return run(lambda state: state.then(draft).then(cut).then(verify).then(adjust).then(end), state)


def test_an_incomplete_text_cannot_stop_and_a_complete_one_may() -> None:
    answer, state = letters()
    end = decoded(answer, state, likes(3, 1, 2, 0))  # it would rather end, then say b
    assert (end.state.output, end.reason) == ((3,), Reason.STOP)
    once = Grammar.regex("bc(a|b)", LETTERS, stop=(3,)).after((1,))
    end = decoded(once, state, likes(3, 1, 2, 0))
    assert (end.state.output, end.reason) == ((1, 2, 1), Reason.CONDITION)  # nothing but the end is left
    assert once.is_complete(end.state)
    assert once.is_over(end.state)


def pairs(rng: Randomness, answer: Constraint) -> Drafter:
    """A certain tree, of which some paths end the text and some go on behind it."""
    tree = (Proposal(0, parent=TEXT), Proposal(1, parent=TEXT), Proposal(1, parent=0), Proposal(0, parent=1))
    return lambda tokens: iter((*tree, Proposal(0, parent=2), Proposal(0, parent=3)))


ENDLESS: Final[dict[str, Callable[[Randomness, Constraint], Drafter]]] = {
    "certain": pairs,
    "drawn": lambda rng, answer: LLMDrafter(TableModel(2, seed=4), SAMPLED, rng),
    "a drawn tree": lambda rng, answer: LLMDrafter(TableModel(2, seed=4), SAMPLED, rng, widths=(2,)),
    "knowing": lambda rng, answer: LLMDrafter(TableModel(2, seed=4), Constrained(SAMPLED, answer), rng),
    "a knowing tree": lambda rng, answer: LLMDrafter(
        TableModel(2, seed=4), Constrained(SAMPLED, answer), rng, widths=(2,)
    ),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("drafter", ENDLESS)
def test_a_text_without_stop_tokens_is_over_at_a_draft(rule: Callable[[Randomness], Rule], drafter: str) -> None:
    """Nothing can follow it, so it stands without a token behind it, and the text has the law of plain decoding."""
    state, table = start((0,), 9).unwrap(), TableModel(2, seed=3)

    def ended(branch: Branch, *, drafted: bool) -> Ending:
        answer = Grammar.regex("ab|ba(a|ba)", (b"a", b"b"), stop=()).after((0,))
        if not drafted:
            law = Constrained(SAMPLED, answer)
            return Ending.of(run(autoregressive_step(table, law, branch, until=answer.is_over), state))
        drafts = ENDLESS[drafter](branch, answer)
        step = constrained_step(answer, drafts, table, SAMPLED, branch, rule(branch), Fixed(4))
        return Ending.of(run(step, state))

    alone, law = (exact_law(partial(ended, drafted=drafted)).probabilities for drafted in (False, True))
    assert law == pytest.approx(alone)
    assert len(law) == 3


def test_a_draft_that_completes_an_answer_is_kept_and_none_behind_it() -> None:
    answer = Grammar.regex("ab|ba(a|ba)", (b"a", b"b"), stop=()).after((0,))
    law = Constrained(SAMPLED, answer).laws((0,), torch.zeros(1, 2))[0]
    drawn = (Proposal(0, law), Proposal(1, law), Proposal(0, law))
    for drafts in (drawn, chain((0, 1, 0))):
        assert CutForbidden(answer)(Drafted(start((0,), 9).unwrap(), drafts)).tokens == (0, 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("widths", [(), (1,), (2, 2), (3, 2, 2)])
@pytest.mark.parametrize("stop", [(LETTERS_END,), ()])
def test_a_drafter_that_knows_the_grammar_ends_with_the_answer(
    widths: tuple[int, ...], seed: int, stop: Tokens
) -> None:
    """And all that it drafts is allowed: also beside the best token and behind it."""
    answer, dice, greedy = Grammar.regex("(a|b){3}", LETTERS, stop).after((2,)), Dice(), GreedyProcessor()
    state, target = start((2,), 9, stop).unwrap(), TableModel(4, 4)
    drafter = LLMDrafter(TableModel(4, seed), Constrained(greedy, answer), dice, widths=widths)
    texts = [
        run(constrained_step(answer, each, target, greedy, dice, Reject(dice), Fixed(6)), state).state.output
        for each in (drafter, propose_nothing)
    ]
    assert texts[0] == texts[1]
    drafted = Drafted(state, tuple(islice(drafter((2,)), 40)))
    assert len(drafted.proposals) >= 3
    for i in range(len(drafted.proposals)):
        text = drafted.text(i)
        assert (answer.find(text[:-1] if text[-1] in stop else text)) is not None


def test_a_drafter_that_cannot_say_what_is_allowed_ends_its_draft() -> None:
    """A model of fewer tokens than the target, which does not know the one that ends the text."""
    answer, dice, greedy = Grammar.regex("(a|b){3}", LETTERS, (3,)).after((2,)), Dice(), GreedyProcessor()
    for widths in ((), (2, 1)):
        drafter = LLMDrafter(fitted(TableModel(3, 7), 4), Constrained(greedy, answer), dice, widths=widths)
        texts = [
            run(constrained_step(answer, each, TableModel(4, 4), greedy, dice, Reject(dice)), letters((2,))[1]).state
            for each in (drafter, propose_nothing)
        ]
        assert texts[0].tokens == texts[1].tokens
        assert texts[0].tally.drafted > 0


@pytest.mark.parametrize("drafts", [(1, 2, 3), (3,), (1, 3), (1, 2, 1, 2, 3, 0), (1, 2, 0, 3)])
def test_an_end_inside_a_draft(drafts: Tokens) -> None:
    answer, state = letters()
    alone = decoded(answer, state, likes(1, 2, 3, 0))
    drafted = decoded(answer, state, likes(1, 2, 3, 0), lambda tokens: iter(chain(drafts)))
    assert drafted.state.tokens == alone.state.tokens
    assert drafted.reason == alone.reason


@pytest.mark.parametrize("new", range(6))
def test_the_length_limit_leaves_a_valid_beginning(new: int) -> None:
    answer, state = letters(new=new)
    end = decoded(answer, state, likes(1, 2, 3, 0), Forced(answer))
    assert (end.reason, end.state.output) == (Reason.LIMIT, ((1, 2) * 3)[:new])
    assert answer.is_complete(end.state) == (new % 2 == 0)
    assert not answer.is_over(end.state)


def test_forced_drafts_make_steps_fewer_and_leave_the_text() -> None:
    long = Grammar.regex("bc(a|b)ccccc(a|b)", LETTERS, stop=(3,)).after((1,))
    state = start((1,), 20, (3,)).unwrap()
    alone, drafted = decoded(long, state, likes(0, 1, 2, 3)), decoded(long, state, likes(0, 1, 2, 3), Forced(long))
    assert drafted.state.tokens == alone.state.tokens
    assert (alone.state.tally.steps, drafted.state.tally.steps) == (9, 2)
    assert drafted.state.tally.acceptance_rate == 1.0


def test_the_target_reads_no_draft_that_the_grammar_forbids() -> None:
    answer, state = letters()
    read: list[Tokens] = []

    def target(text: Tokens, drafts: tuple[Proposal, ...]) -> torch.Tensor:
        read.append(tuple(draft.token for draft in drafts))
        return likes(1, 2, 0, 3)(text, drafts)

    decoded(answer, state, target, lambda tokens: iter(chain((1, 2, 2, 1))))
    assert read[0] == (1, 2, 2)  # "bcc" may become "bcca", and then no b
    assert all(len(drafts) <= 3 for drafts in read)


def test_of_drawn_drafts_the_forbidden_one_stays_and_what_follows_it_goes() -> None:
    answer, state = letters()
    law = SAMPLED.laws((0,), torch.zeros(1, 4))[0]
    drafted = Drafted(state, (Proposal(1, law, TEXT), Proposal(0, law), Proposal(1, law), Proposal(0, law, TEXT)))
    kept = CutForbidden(answer)(drafted)
    assert (kept.tokens, kept.parents) == ((1, 0, 0), (-1, 0, -1))
    certain = Drafted(state, tuple(evolve(draft, q=PointMass(draft.token)) for draft in drafted.proposals))
    assert (CutForbidden(answer)(certain).tokens, CutForbidden(answer)(certain).parents) == ((1, 0), (-1, -1))


# What is refused.


def test_what_cannot_be_obeyed_is_refused_by_name() -> None:
    answer, state = letters()
    law = Constrained(GreedyProcessor(), answer)
    with pytest.raises(DecodeError, match=r"does not obey its grammar.*token 1 at position 4"):
        law.laws((1, 1, 2, 1, 1), torch.zeros(1, 4))[0]
    with pytest.raises(DecodeError, match=r"goes on behind its end.*token 3 at position 2"):
        law.laws((1, 0, 3), torch.zeros(1, 4))[0]
    with pytest.raises(DecodeError, match="does not begin with the prompt"):
        law.laws((2, 0), torch.zeros(1, 4))[0]
    with pytest.raises(DecodeError, match="no chance to any token that the grammar allows"):
        law.laws((1, 1), torch.tensor([[0.0, 0.0, -torch.inf, 0.0]]))[0]
    with pytest.raises(DecodeError, match="ends at"):
        CutForbidden(answer)(Drafted(start((1,), 3, (2,)).unwrap(), ()))
    unwritable = Grammar.regex("abd", LETTERS, stop=(3,)).after((1,))
    with pytest.raises(DecodeError, match=r"cannot go on|no token that could follow"):
        decoded(unwritable, state, likes(1, 2, 3, 0))
    endless = Grammar.regex("ab", LETTERS, stop=()).after((1,))
    with pytest.raises(DecodeError, match="no token that could follow"):
        endless.allowed((1, 0, 1), 4)
    assert endless.is_over(evolve(state, tokens=(1, 0, 1)))
    step = autoregressive_step(likes(0, 1, 2, 3), Constrained(GreedyProcessor(), endless), Dice())
    with pytest.raises(DecodeError, match="no token that could follow"):
        run(step, start((1,), 9).unwrap())
    told = speculative_step(
        lambda tokens: iter(chain((0, 1))), likes(0, 1, 2, 3), Constrained(GreedyProcessor(), endless), Dice()
    )
    with pytest.raises(DecodeError, match="no token that could follow"):  # nothing ends the text at its end
        run(told, start((1,), 9).unwrap())


WISHES: Final[dict[str, Callable[[Processor], Processor]]] = {
    "bias": lambda inner: LogitBias(inner, {LETTERS_END: -inf}),
    "banned": lambda inner: BannedWords(inner, [(LETTERS_END,)]),
    "required": lambda inner: RequiredWords(inner, [(0, 0)], stop=(LETTERS_END,), begins=1),
    "length": lambda inner: RepetitionPenalty(MinLength(inner, 9, stop=(LETTERS_END,), begins=1), 1.2),
}


@pytest.mark.parametrize("inner", [SAMPLED, GreedyProcessor()], ids=["sampled", "greedy"])
@pytest.mark.parametrize("wish", WISHES)
def test_where_a_wish_leaves_nothing_of_a_grammar_an_answer_ends_as_it_does_without_drafts(
    wish: str, inner: Processor
) -> None:
    answer = Grammar.regex("(a|b)cccc", LETTERS, (LETTERS_END,)).after((2,))
    processor, state = WISHES[wish](inner), start((2,), 9, (LETTERS_END,)).unwrap()
    target, law = along_paths(lambda tokens: torch.zeros(4)), Constrained(processor, answer)
    dice = Dice(torch.Generator().manual_seed(1))
    plain = run(autoregressive_step(target, law, dice, until=answer.is_over), state)
    assert (plain.state.output[1:], plain.reason) == ((2, 2, 2, 2), Reason.CONDITION)
    for rule in RULES:
        for drafter in (propose_nothing, lambda tokens: iter(chain((LETTERS_END,)))):
            dice = Dice(torch.Generator().manual_seed(1))
            end = run(constrained_step(answer, drafter, target, processor, dice, rule(dice)), state)
            assert (end.state.output, end.reason) == (plain.state.output, plain.reason)
    assert len(list(LLMDrafter(target, law, Dice())((2,)))) == 5
    with pytest.raises(DeadEndError, match="no token has a chance"):
        run(autoregressive_step(target, law, dice), state)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Grammar.regex("(", LETTERS, (3,)), "pattern"),
        (lambda: Grammar.regex("(?=a)b", LETTERS, (3,)), "pattern"),
        (lambda: Grammar.lark("start: missing", LETTERS, (3,)), "text"),
        (lambda: Grammar.json_schema({"type": "nothing"}, LETTERS, (3,)), "schema"),
        (lambda: Grammar.json_schema("{", LETTERS, (3,)), "schema"),
        (lambda: Grammar.json_schema("3", LETTERS, (3,)), "schema"),
        (lambda: Grammar.choice([], LETTERS, (3,)), "texts"),
        (lambda: Grammar.choice(["a", ""], LETTERS, (3,)), "texts"),
        (lambda: Grammar.choice(["a"], "a tokenizer", (3,)), "tokenizer"),  # type: ignore[arg-type]
        (lambda: Grammar.choice(["a"], [b"a", "b"], (3,)), "tokenizer"),  # type: ignore[list-item]
        (lambda: Grammar.choice(["a"], LETTERS, None), "stop"),  # type: ignore[arg-type]
        (lambda: Grammar(3, (3,)), "start"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_grammar_is_refused_at_once(make: Callable[[], Grammar], named: str) -> None:
    with pytest.raises(DecodeError) as caught:
        make()
    assert caught.value.parameter == named


def test_a_failed_decode_of_a_batch_leaves_the_others_theirs() -> None:
    answers = [REGEX.after((1,)), Grammar.regex("abd", LETTERS, stop=(3,)).after((1,))]
    _, state = letters()
    ends = dict(together([partial(decoded, answer, state, likes(1, 2, 3, 0)) for answer in answers], 2))
    assert isinstance(ends[1], Failed)
    assert ends[0] == decoded(REGEX.after((1,)), state, likes(1, 2, 3, 0))
