"""The verification rules against each other: exactly, on every branch of small models."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import count, islice
from math import exp
from typing import Final, TypeAlias
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specflow import (
    TEXT,
    Block,
    Categorical,
    DecodeState,
    Dice,
    Drafted,
    EachPrefix,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    Match,
    MultinomialProcessor,
    PointMass,
    Predictor,
    Proposal,
    Reject,
    Rule,
    Scored,
    Tokens,
    Traverse,
    Verdict,
    along_paths,
    chain,
    run,
    speculative_step,
    start,
    verified_step,
)
from specflow.distribution import BlackBox, Distribution
from specflow.laws import Laws
from specflow.randomness import Randomness, Sampling, draws
from specflow.stages import LossyTypical, Score, Verify
from specflow.stages.rules import samples
from specflow.state import Request
from specflow.testing import Branch, Law, TableModel, branches, exact_law
from specflow.trees import preorder
from tests.mutants import capped_ratio, hierarchical, highest, plain_ratio

Make: TypeAlias = Callable[[Randomness], Rule]
"""What makes a rule of randomness."""

SAMPLING: Final = MultinomialProcessor(1.0)
RULES: Final[dict[str, Make]] = {"Reject": Reject, "Match": Match, "Block": Block, "Traverse": Traverse}


def behind_zero(stop: frozenset[int] = frozenset()) -> DecodeState:
    """The text (0,)."""
    return DecodeState(Request((0,), 99, stop), (0,))


def one_step(
    make: Make, target: Predictor, drafter: Predictor, gamma: int, widths: tuple[int, ...] = ()
) -> Law[tuple[int, Tokens]]:
    """The exact law of (accepted, the tokens emitted) in one step behind the text (0,)."""

    def step(branch: Branch) -> tuple[int, Tokens]:
        stream = LLMDrafter(drafter, SAMPLING, branch, widths=widths)((0,))
        drafted = Drafted(behind_zero(), preorder(tuple(islice(stream, gamma))))
        verified = Verify(target, SAMPLING, make(branch))(drafted)
        assert verified.correction is not None
        return verified.accepted, (*verified.tokens, branch.draw(verified.correction, 1 + verified.accepted))

    return exact_law(step)


def accepted_tokens(
    make: Make, target: Predictor, drafter: Predictor, gamma: int, widths: tuple[int, ...] = ()
) -> float:
    return one_step(make, target, drafter, gamma, widths).mean(lambda outcome: outcome[0])


def scored(proposals: Sequence[Proposal], laws: Sequence[Distribution]) -> Scored:
    """Drafts behind the text (0,), where the target has these laws: behind the text, and behind each draft."""
    drafted = Drafted(behind_zero(), tuple(proposals))
    return Scored(drafted, torch.zeros(len(proposals) + 1, 2), lambda way: tuple([laws[i + 1] for i in way]))


def behind(scored: Scored, verdict: Verdict) -> Distribution:
    """The law of the token behind the drafts that stand."""
    return verdict.correction or scored.law(verdict.path[-1] if verdict.path else TEXT)


def always(*probs: float) -> Predictor:
    """A model that does not look at the text."""
    row = torch.tensor(probs, dtype=torch.float64).log()
    return along_paths(lambda tokens: row)


def test_the_example_of_the_paper() -> None:
    """Sun et al. 2403.10444, section 2: 10/9 accepted tokens by tokens, 11/9 by blocks."""
    target, drafter = always(1 / 3, 2 / 3), always(2 / 3, 1 / 3)
    assert accepted_tokens(Reject, target, drafter, 2) == pytest.approx(10 / 9, abs=1e-14)
    assert accepted_tokens(Block, target, drafter, 2) == pytest.approx(11 / 9, abs=1e-14)
    assert accepted_tokens(Traverse, target, drafter, 2) == pytest.approx(11 / 9, abs=1e-14)


def test_what_the_listing_of_hierarchical_verification_gains_is_not_the_targets_text() -> None:
    """In the same example."""
    target, drafter = always(1 / 3, 2 / 3), always(2 / 3, 1 / 3)

    def listed(rng: Randomness) -> Rule:
        return hierarchical(rng, highest, plain_ratio)

    def goes_on(tokens: Tokens) -> float:
        """The probability that the text of two tokens is (1, 0)."""
        return float(tokens[:2] == (1, 0)) + float(tokens == (1,)) / 3

    assert accepted_tokens(listed, target, drafter, 2) == pytest.approx(12 / 9, abs=1e-14)
    chances = [one_step(make, target, drafter, 2).mean(lambda outcome: goes_on(outcome[1])) for make in (Block, listed)]
    assert chances == pytest.approx([2 / 9, 3 / 9], abs=1e-14)


@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_blocks_never_accept_fewer(gamma: int, seed: int) -> None:
    vocab_size = 3 if gamma < 3 else 2
    target, drafter = TableModel(vocab_size, 2 * seed), TableModel(vocab_size, 2 * seed + 1)
    tokens, blocks, samples = (accepted_tokens(make, target, drafter, gamma) for make in (Reject, Block, Match))
    assert blocks >= tokens - 1e-14
    assert tokens >= samples - 1e-14
    assert gamma > 1 or blocks == pytest.approx(tokens, abs=1e-14)


def test_blocks_do_accept_more() -> None:
    gains = [
        accepted_tokens(Block, TableModel(3, seed), TableModel(3, seed + 50), 2)
        - accepted_tokens(Reject, TableModel(3, seed), TableModel(3, seed + 50), 2)
        for seed in range(10)
    ]
    assert sum(gain > 0.01 for gain in gains) >= 3


@given(st.integers(0, 10_000), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_for_certain_drafts_all_rules_are_one(seed: int, drafts: list[tuple[int, int]]) -> None:
    """On chains, and on trees that may hold a token twice behind the same one."""
    certain = chain([token for token, _ in drafts])
    tree = [Proposal(token, parent=parent % (i + 1) - 1) for i, (token, parent) in enumerate(drafts)]
    for proposals in (certain, preorder(tree)):

        def law(make: Make, proposals: tuple[Proposal, ...] = proposals) -> Law[tuple[Tokens, int]]:
            def judge(branch: Branch) -> tuple[Tokens, int]:
                verified = Verify(TableModel(3, seed), SAMPLING, make(branch))(Drafted(behind_zero(), proposals))
                assert verified.correction is not None
                return verified.path, branch.draw(verified.correction, 1 + verified.accepted)

            return exact_law(judge)

        for make in (Block, Match, Traverse):
            assert law(make).distance(law(Reject)) < 1e-14


def test_what_no_draft_can_be_is_refused_by_every_rule() -> None:
    """p(x) = 0."""
    p = Categorical(torch.tensor([0.0, 0.4, 0.6]))
    for q in (PointMass(0), Categorical(torch.tensor([0.5, 0.5, 0.0]))):
        for make in RULES.values():
            drafts = scored([Proposal(0, q)], [p, p])
            verdicts = branches(lambda branch: make(branch)(drafts).path)  # noqa: B023 - called here
            assert {path for _, path in verdicts} == {()}


def test_a_block_may_run_into_a_target_that_is_certain() -> None:
    """A weight between 0 and 1 in front of a point mass: a processor may know one token for sure and not another."""
    likely = Categorical(torch.tensor([0.75, 0.25], dtype=torch.float64))
    unlikely = Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64))
    laws: list[Distribution] = [unlikely, PointMass(1), unlikely]

    def text(branch: Branch, make: Make) -> Tokens:
        drafts = scored([Proposal(branch.draw(likely, 1), likely), Proposal(branch.draw(likely, 2), likely)], laws)
        verdict = make(branch)(drafts)
        tokens = [drafts.drafted.proposals[i].token for i in verdict.path]
        tokens.append(branch.draw(behind(drafts, verdict), 1 + len(tokens)))
        return tuple([*tokens, *[branch.draw(law, 2) for law in laws[len(tokens) : 2]]][:2])

    for make in (Block, Traverse):
        law = exact_law(lambda branch: text(branch, make))  # noqa: B023 - called here
        assert law.distance(Law({(0, 1): 0.25, (1, 1): 0.75}, 1)) < 1e-14


@pytest.mark.parametrize("rule", RULES)
def test_a_draft_may_be_deeper_than_pythons_stack(rule: str) -> None:
    p = Categorical(torch.tensor([1.0, 0.0]))
    drafts = scored([Proposal(0, p)] * 1500, [p] * 1501)
    assert len(RULES[rule](Dice())(drafts).path) == 1500


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("dtype", "total", "within"), [(torch.bfloat16, 0.992, 1e-6), (torch.float64, 0.99995, 1e-12)])
def test_what_sums_to_nearly_1_is_one_law_whatever_is_drafted(
    name: str, dtype: torch.dtype, total: float, within: float
) -> None:
    """Drawing divides by the sum, and so must accepting."""
    p = Categorical(torch.tensor([total / 2, total / 2], dtype=dtype))

    def text(drafted: Categorical, branch: Branch) -> Tokens:
        def drafter(tokens: Tokens) -> Iterator[Proposal]:
            for position in count(len(tokens)):
                yield Proposal(branch.draw(drafted, position), drafted)

        def target(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
            return torch.zeros(len(drafts) + 1, 2)

        step = verified_step(drafter, target, EachPrefix(lambda *_: p), branch, RULES[name](branch), Fixed(2))
        return run(step, start((0,), 2).unwrap()).state.output

    for unlikely in (0, 1):
        weights = torch.tensor([0.01, 0.99], dtype=dtype)
        q = Categorical(weights if unlikely == 0 else weights.flip(0))
        law = exact_law(partial(text, q)).probabilities
        assert [law[first, second] for first in (0, 1) for second in (0, 1)] == pytest.approx([0.25] * 4, abs=within)


def test_equal_laws_accept_everything() -> None:
    p = Categorical(torch.tensor([0.2, 0.8]))
    for make in (Reject, Block, Traverse):
        drafts = scored([Proposal(1, p), Proposal(0, p)], [p, p, p])
        verdict = make(Branch())(drafts)
        assert verdict.path == (0, 1)
        assert behind(drafts, verdict) is p  # p itself


def test_hidden_laws_behind_a_known_block_are_judged_by_samples() -> None:
    """A block ends in front of the first law that nobody knows; what is behind it is matched with samples."""
    known = Categorical(torch.tensor([0.5, 0.5]))
    hidden = BlackBox(torch.tensor([0.5, 0.5]), lambda probs: torch.tensor([[1]]))
    proposals = [Proposal(0, known), Proposal(1, known), Proposal(0, known)]
    laws: list[Distribution] = [known, hidden, hidden, known]
    for make in (Block, Traverse):
        verdict = make(Branch())(scored(proposals, laws))
        assert verdict.path == (0, 1)
        assert verdict.correction == PointMass(1)


def typical(proposals: Sequence[Proposal], laws: Sequence[Distribution]) -> Verdict:
    return LossyTypical(Branch())(scored(proposals, laws)).value


def test_typical_acceptance_keeps_what_is_not_unlikely() -> None:
    probs = torch.tensor([0.90, 0.07, 0.03], dtype=torch.float64)
    p = Categorical(probs)
    threshold = min(0.09, 0.3 * exp(-p.entropy()))
    assert threshold > 0.07
    expected: tuple[tuple[Tokens, Distribution | None], ...] = (((0,), None), ((), p), ((), p))
    for token, (path, correction) in enumerate(expected):
        verdict = typical([Proposal(token)], [p, p])
        assert verdict.path == path
        assert verdict.correction is correction
    flat = Categorical(torch.full((20,), 0.05, dtype=torch.float64))
    assert typical([Proposal(3, flat)], [flat, flat]).path == (0,)  # 0.05 > 0.3 / 20
    assert typical([Proposal(3, flat)], [PointMass(3), flat]).path == (0,)
    verdict = typical([Proposal(3, flat)], [PointMass(4), flat])
    assert (verdict.path, verdict.correction) == ((), PointMass(4))


def test_typical_acceptance_takes_the_first_sibling_that_is_not_unlikely() -> None:
    p = Categorical(torch.tensor([0.90, 0.07, 0.03], dtype=torch.float64))
    siblings = [Proposal(1), Proposal(0, parent=TEXT), Proposal(0, parent=TEXT), Proposal(2)]
    assert typical(siblings, [p] * 5).path == (1,)


def test_typical_acceptance_of_a_users_sampler_matches_samples() -> None:
    hidden = BlackBox(torch.tensor([0.5, 0.5]), lambda probs: torch.tensor([[1]]))
    verdict = typical([Proposal(0, hidden)], [hidden, hidden])
    assert (verdict.path, verdict.correction) == ((), PointMass(1))
    assert typical([Proposal(1, hidden)], [hidden, hidden]).path == (0,)


# Trees


@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_on_a_chain_traversal_is_block_verification(gamma: int, seed: int) -> None:
    vocab_size = 3 if gamma < 3 else 2
    target, drafter = TableModel(vocab_size, 2 * seed), TableModel(vocab_size, 2 * seed + 1)
    assert one_step(Traverse, target, drafter, gamma).distance(one_step(Block, target, drafter, gamma)) < 1e-14


@pytest.mark.parametrize("seed", range(6))
def test_where_all_siblings_follow_the_text_traversal_is_token_rejection(seed: int) -> None:
    target, drafter = TableModel(3, 2 * seed), TableModel(3, 2 * seed + 1)
    by_tokens = one_step(Reject, target, drafter, 2, (2,))
    for make in (Block, Traverse):
        assert one_step(make, target, drafter, 2, (2,)).distance(by_tokens) < 1e-14


@pytest.mark.parametrize(
    ("gamma", "widths"), [(1, ()), (2, ()), (3, ()), (4, ()), (3, (2, 1)), (4, (2, 1)), (4, (1, 2))]
)
@pytest.mark.parametrize("seed", range(4))
def test_hierarchical_verification_is_block_verification(seed: int, gamma: int, widths: tuple[int, ...]) -> None:
    """Not in the mean only: the same drafts stand with the same probabilities, and the same token follows them."""
    target, drafter = (TableModel(2 if gamma > 2 else 3, number) for number in (2 * seed, 2 * seed + 1))
    by_ratios = one_step(lambda rng: hierarchical(rng, highest, capped_ratio), target, drafter, gamma, widths)
    assert by_ratios.distance(one_step(Block, target, drafter, gamma, widths)) < 1e-14


def residual(p: Tensor, q: Tensor) -> Tensor:
    rest = (p - q).clamp(min=0)
    return rest / rest.sum()


@pytest.mark.parametrize("seed", range(6))
def test_siblings_are_judged_by_what_those_before_them_left(seed: int) -> None:
    """P(one of two stands) = (1 - TV(p, q)) + TV(p, q) · (1 - TV(p', q)), for two draws from q."""
    p, q = (TableModel(3, one)((0,), ())[0].exp() for one in (2 * seed, 2 * seed + 1))
    law = Categorical(q)

    def accepted(branch: Branch, make: Make) -> int:
        proposals = [Proposal(branch.draw(law, 1), law, TEXT) for _ in range(2)]
        return len(make(branch)(scored(proposals, [Categorical(p)] * 3)).path)

    first, second = (0.5 * float((one - q).abs().sum()) for one in (p, residual(p, q)))
    two = 1 - first * second
    matched = float((p * (1 - (1 - q) ** 2)).sum())
    expected = {"Reject": two, "Traverse": two, "Block": two, "Match": matched}
    for name, make in RULES.items():
        mean = exact_law(lambda branch: accepted(branch, make)).mean(float)  # noqa: B023 - called here
        assert mean == pytest.approx(expected[name], abs=1e-14)


@pytest.mark.parametrize("seed", range(6))
def test_of_all_tokens_one_stands(seed: int) -> None:
    """Drawn without putting back; a sibling that is rejected leaves nothing of itself."""
    target, drafter = TableModel(3, 100 + seed), always(0.5, 0.25, 0.25)
    for make in RULES.values():
        accepted = one_step(make, target, drafter, 3, (3,)).map(lambda outcome: outcome[0])
        assert accepted.of(1) == pytest.approx(1.0, abs=1e-14)


def test_branches_are_of_use_to_the_rules_for_trees() -> None:
    """A second sibling behind the text never makes fewer drafts stand."""
    gains: dict[str, list[float]] = {name: [] for name in RULES}
    for seed in range(6):
        target, drafter = TableModel(3, 2 * seed), TableModel(3, 2 * seed + 1)
        for name, make in RULES.items():
            alone = accepted_tokens(make, target, drafter, 1)
            gains[name].append(accepted_tokens(make, target, drafter, 2, (2,)) - alone)
    for name, gain in gains.items():
        assert min(gain) > -1e-14
        assert sum(more > 0.01 for more in gain) >= 4, name


@pytest.mark.parametrize("make", [Block, Traverse])
def test_whole_paths_of_a_tree_are_accepted_more_often_than_tokens(make: Make) -> None:
    gains = []
    for seed in range(8):
        target, drafter = TableModel(2, seed), TableModel(2, seed + 50)
        by_paths, by_tokens = (accepted_tokens(each, target, drafter, 4, (2, 1)) for each in (make, Reject))
        gains.append(by_paths - by_tokens)
    assert sum(gain > 0.01 for gain in gains) >= 3
    assert min(gains) > -1e-14


def test_traversal_accepts_more_of_a_tree_than_blocks() -> None:
    """Where drafts further down have siblings: it looks at those before it gives up what they follow."""
    gains = []
    for seed in range(6):
        target, drafter = TableModel(3, seed), TableModel(3, seed + 50)
        by_paths, by_blocks = (accepted_tokens(make, target, drafter, 3, (1, 2)) for make in (Traverse, Block))
        gains.append(by_paths - by_blocks)
    assert sum(gain > 0.01 for gain in gains) >= 3
    assert min(gains) > -1e-14


@pytest.mark.parametrize("q", [Categorical(torch.tensor([0.4, 0.4, 0.2])), None], ids=["drawn", "certain"])
@pytest.mark.parametrize("name", RULES)
def test_no_rule_goes_below_a_stop_token(name: str, q: Categorical | None) -> None:
    p = Categorical(torch.tensor([0.3, 0.3, 0.4]))
    asked: list[Tokens] = []

    def law(prefix: Tokens, logits: Tensor) -> Distribution:
        asked.append(prefix)
        return p

    def judged(*drafts: tuple[int, int]) -> dict[Tokens, bool]:
        """What may stand of drafts (token, parent) where 1 is a stop token, and whether the text is over then."""
        several = tuple([Proposal(token, q or PointMass(token), parent) for token, parent in drafts])
        drafted = Drafted(behind_zero(frozenset({1})), several)
        verifications = [
            verified
            for _, verified in branches(
                lambda branch: Verify(always(0.3, 0.3, 0.4), EachPrefix(law), RULES[name](branch))(drafted)
            )
        ]
        return {verified.tokens: verified.correction is None for verified in verifications}

    assert judged((0, TEXT), (1, 0), (1, 1)) == {(): False, (0,): False, (0, 1): True}
    of_a_tree = judged((1, TEXT), (1, 0), (0, TEXT), (0, 2))
    assert of_a_tree.items() >= {(): False, (1,): True}.items()
    assert of_a_tree.keys() <= {(), (1,), (0,), (0, 0)}
    assert asked
    assert not any(1 in prefix for prefix in asked)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_no_processor_hears_of_a_draft_that_cannot_stand(name: str, seed: int) -> None:
    """A strict automaton refuses what is not in its language."""
    target = TableModel(3, seed)

    def strict(prefix: Tokens, logits: Tensor) -> Distribution:
        for end in range(1, len(prefix)):
            assert target(prefix[:end], ())[0][prefix[end]] > -torch.inf, f"{prefix} is not in the language"
        return SAMPLING.laws(prefix, logits[None])[0]

    def judged(branch: Branch, widths: tuple[int, ...]) -> int:
        stream = LLMDrafter(always(0.4, 0.3, 0.3), SAMPLING, branch, widths=widths)((0,))
        drafted = Drafted(behind_zero(), preorder(tuple(islice(stream, 3))))
        return Verify(target, EachPrefix(strict), RULES[name](branch))(drafted).accepted

    for widths in ((), (2, 1)):
        assert exact_law(lambda branch: judged(branch, widths)).branches > 10  # noqa: B023 - called here


@pytest.mark.parametrize("processor", [GreedyProcessor(), MultinomialProcessor(1.0)])
def test_a_step_leaves_no_logits_to_the_garbage_collector(processor: GreedyProcessor | MultinomialProcessor) -> None:
    """They are large: memory that is only freed now and then makes each step slower, and a device full."""
    seen: list[ref[Tensor]] = []

    def target(tokens: Tokens, drafts: Sequence[Proposal]) -> Tensor:
        logits = torch.zeros(len(drafts) + 1, 8)
        seen.append(ref(logits))
        return logits

    step = speculative_step(lambda tokens: iter((Proposal(1), Proposal(2))), target, processor, Dice())
    gc.disable()
    try:
        step(start([1], 9).unwrap())
        assert [logits() for logits in seen] == [None]
    finally:
        gc.enable()


def test_tokens_are_drawn_ahead_only_where_rejection_judges_by_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever's randomness it is loses nothing at a draft that was drawn, which is judged by its law."""
    spans: list[range] = []

    def spy(rng: Sampling, laws: Laws, start: int, span: range) -> Generator[int, None, None]:
        spans.append(span)
        return draws(rng, laws, start, span)

    monkeypatch.setattr(samples, "draws", spy)
    target = along_paths(lambda text: torch.nn.functional.one_hot(torch.tensor(text[-1] + 1), 9).double())
    sure = Categorical(torch.nn.functional.one_hot(torch.tensor(4), 9).double())
    drafts = (Proposal(2), Proposal(3), Proposal(4, sure), Proposal(5), Proposal(6))
    drafted = Drafted(start([1], 9).unwrap(), drafts)
    verdict = Reject(Dice())(Score(target, GreedyProcessor())(drafted))
    assert verdict.path == (0, 1, 2, 3, 4)
    assert spans == [range(2), range(3, 5)]
