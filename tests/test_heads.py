"""Heads that read what the target holds: each layout against its paper, the laws of their memo, and exactness."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from heapq import nlargest
from itertools import islice
from pathlib import Path
from random import Random
from threading import Thread
from time import sleep
from typing import Any, Final, TypeAlias, cast, final

import pytest
import torch
from attrs import define, field
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

import specflow.heads.reading
from specflow import (
    TEXT,
    CachedPredictor,
    Categorical,
    CostAware,
    CostMeter,
    DecodeError,
    Dice,
    Drafter,
    Fixed,
    GreedyProcessor,
    MultinomialProcessor,
    PointMass,
    Proposal,
    Reject,
    Step,
    SuffixDrafter,
    Tokens,
    TopKProcessor,
    Traverse,
    at_most,
    first_of,
    run,
    seed_coupled_step,
    speculative_step,
    start,
    then,
    verified_step,
)
from specflow.batch import BatchPredictor, together
from specflow.caches import Past
from specflow.catalogue import Drafting, step_of
from specflow.constraints import Constrained, CutForbidden, Forced, Grammar
from specflow.distribution import Distribution
from specflow.drafters import propose_nothing
from specflow.heads import Eagle3, HeadDrafter, HeadPredictor, HeadTree, Medusa, Norms, Vocabulary, load_head
from specflow.heads.layer import Caching, Shape
from specflow.prefix import common_prefix
from specflow.processors import Processor
from specflow.stages import Block, Draft
from specflow.state import Rule, parents_of
from specflow.steps import constrained_step
from specflow.testing import CASES, SEEDED_CASES, Branch, Ending, World, certify, certify_seed, exact_law
from specflow.testing.tables import TableModel
from specflow.trees import path_to
from tests import heads
from tests.heads import FreshFeatures, Published
from tests.toys import VOCABULARY, oracle, passes_of, tiny_llama

TEXTS: Final = ((3, 17, 40, 8, 22), (3, 17), (9, 9, 9, 1, 60, 33, 2, 2, 11))

DRAFTS: Final = (
    Proposal(5),
    Proposal(7, parent=TEXT),
    Proposal(63),
    Proposal(5, parent=1),
    Proposal(20, parent=0),
    Proposal(0, parent=1),
)
GREEDY: Final = GreedyProcessor()
SAMPLED: Final = MultinomialProcessor(0.8)


@cache
def target() -> PreTrainedModel:
    return tiny_llama(3, layers=6)


SPECULATORS: Final = partial(heads.eagle3, first="layers.0", speculators=True)

LAYOUTS: Final[dict[str, Callable[[Path], Published]]] = {
    "eagle": lambda folder: heads.eagle(folder, target()),
    "eagle, no bias": lambda folder: heads.eagle(folder, target(), bias=False, pickled=False),
    "eagle3": lambda folder: heads.eagle3(folder, target()),
    "eagle3, all tokens": lambda folder: heads.eagle3(folder, target(), drafts=None),
    "eagle3, no embeddings": lambda folder: heads.eagle3(folder, target(), embeds=False, first="layers.0"),
    "eagle3, other layers": lambda folder: heads.eagle3(folder, target(), reads=(1, 6), biases=True),
    "speculators": lambda folder: SPECULATORS(
        folder, target(), reads=(1, 4, 5), said={"norm_before_residual": True, "norm_output": True}
    ),
    "speculators, norms": lambda folder: SPECULATORS(folder, target(), said={"fc_norm": True}),
    "speculators, a norm": lambda folder: SPECULATORS(folder, target(), said={"norm_before_fc": True}),
    "medusa": lambda folder: heads.medusa(folder, target()),
    "medusa, two blocks": lambda folder: heads.medusa(folder, target(), heads=2, blocks=2, prefix="medusa_head."),
    "jump": lambda folder: heads.jump(folder, target()),
}


def reading(published: Published, model: PreTrainedModel | None = None) -> HeadPredictor:
    model = target() if model is None else model
    head = load_head(published.folder, model)
    return HeadPredictor(head, FreshFeatures(model, head.reads))


def path_of(drafts: tuple[Proposal, ...], i: int) -> Tokens:
    return tuple([drafts[k].token for k in path_to(parents_of(drafts), i)])


def same(predict: HeadPredictor, published: Published, bound: float) -> None:
    """What a head says of some texts and of a tree after them is what its paper says."""
    most = predict.head.ahead or len(DRAFTS)
    drafts = DRAFTS if most > 2 else DRAFTS[:2]
    for text in TEXTS:
        rows = predict(text, drafts)
        for i in range(TEXT, len(drafts)):
            expected = published.says(text, path_of(drafts, i)).to(rows.dtype)
            torch.testing.assert_close(rows[i + 1], expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_says_what_its_paper_says(layout: str, tmp_path: Path) -> None:
    published = LAYOUTS[layout](tmp_path / "head")
    same(reading(published), published, 1e-9)


# Multi-token prediction of stock models.


def tiny(kind: str, seed: int, **more: object) -> PreTrainedModel:
    """A random model of a family with experts, which compute in fp32 at most."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": None,
    }
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | more))
    return model.eval()


DEEPSEEK: Final[dict[str, object]] = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}

STOCK: Final[dict[str, tuple[heads.Names, dict[str, object]]]] = {
    "qwen3_next": (
        heads.QWEN,
        {
            "head_dim": 8,
            "num_experts": 4,
            "shared_expert_intermediate_size": 12,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        heads.DEEPSEEK,
        DEEPSEEK
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "glm4_moe": (heads.DEEPSEEK, DEEPSEEK | {"head_dim": 8}),
}


def published_stock(kind: str, folder: Path) -> tuple[PreTrainedModel, Published]:
    names, more = STOCK[kind]
    model = tiny(kind, 0, **more)
    return model, heads.stock(folder, model, tiny(kind, 1, **more), names)


@pytest.mark.parametrize("kind", STOCK)
def test_a_stock_models_multi_token_prediction_is_its_own_layer(kind: str, tmp_path: Path) -> None:
    model, published = published_stock(kind, tmp_path)
    same(reading(published, model), published, 5e-3)


# The memo.


def scripts(seed: int, most: int = 30) -> Iterator[tuple[Tokens, tuple[Proposal, ...]]]:
    """Texts in turns that grow, lose their ends, part from one another, and come back; with chains and trees."""
    random = Random(seed)
    texts = [tuple(random.choices(range(VOCABULARY), k=random.randint(2, 9))) for _ in range(3)]
    for _ in range(most):
        i = random.randrange(len(texts))
        change = random.random()
        if change < 0.6:
            texts[i] += tuple(random.choices(range(VOCABULARY), k=random.randint(1, 4)))
        elif change < 0.75:
            texts[i] = texts[i][: max(2, len(texts[i]) - random.randint(1, 5))]
        elif change < 0.85:
            texts[i] = texts[random.randrange(len(texts))]
        drafts: list[Proposal] = []
        for _ in range(random.randint(0, 5)):
            parent = random.choice([TEXT, len(drafts) - 1, random.randint(TEXT, len(drafts) - 1)])
            drafts.append(Proposal(random.randrange(VOCABULARY), parent=parent))
            yield texts[i], tuple(drafts)  # as a drafter asks: more and more of a tree
        yield texts[i], tuple(drafts)


def small(published: Published, drafts: tuple[Proposal, ...], ahead: int | None) -> tuple[Proposal, ...]:
    """The first drafts that are not deeper than a head can draft."""
    parents, kept = parents_of(drafts), 0
    while kept < len(drafts) and (ahead is None or len(path_to(parents, kept)) < ahead):
        kept += 1
    return drafts[:kept]


@pytest.mark.parametrize("layout", ["eagle", "eagle3", "speculators", "medusa", "jump"])
@pytest.mark.parametrize("memos", [1, 3])
def test_a_memo_never_changes_what_a_head_says(layout: str, memos: int, tmp_path: Path) -> None:
    published = LAYOUTS[layout](tmp_path)
    fresh = reading(published)
    kept = HeadPredictor(fresh.head, fresh.target, memos)
    for seed in range(4):
        for text, several in scripts(seed):
            drafts = small(published, several, fresh.head.ahead)
            fresh.forget()
            torch.testing.assert_close(kept(text, drafts), fresh(text, drafts), rtol=1e-9, atol=1e-9)


@final
@define(eq=False)
class Asked:
    """Features, and how many rows each asking was for."""

    features_of: FreshFeatures
    rows: list[int] = field(factory=list)
    fails: bool = False

    @property
    def limits(self) -> object:
        return self.features_of.limits

    def features(self, tokens: Tokens, last: int, /) -> Tensor:
        self.rows.append(last)
        if self.fails:
            raise KeyboardInterrupt
        return self.features_of.features(tokens, last)


def asked(published: Published) -> tuple[HeadPredictor, Asked]:
    head = load_head(published.folder, target())
    features = Asked(FreshFeatures(target(), head.reads))
    return HeadPredictor(head, cast(FreshFeatures, features)), features


def test_a_head_is_fed_what_is_new(tmp_path: Path) -> None:
    predict, features = asked(LAYOUTS["eagle3"](tmp_path))
    text = (3, 17, 40, 8, 22)
    predict(text, ())
    predict(text, DRAFTS[:2])
    predict(text, DRAFTS)
    assert features.rows == [4]  # drafts cost the target nothing, and neither does asking again
    predict((*text, 5, 1), ())
    predict((*text, 5, 1, 9), ())
    assert features.rows == [4, 2, 1]
    predict((*text, 6), ())  # three were rejected
    assert features.rows == [4, 2, 1, 1]
    predict((9, *text), ())
    predict((*text, 6, 7), ())  # another text came between
    assert features.rows == [4, 2, 1, 1, 5, 1]


def test_a_head_that_looks_at_one_place_asks_for_one_row(tmp_path: Path) -> None:
    for layout in ("medusa", "jump"):
        predict, features = asked(LAYOUTS[layout](tmp_path / layout))
        predict((3, 17, 40, 8, 22), DRAFTS[:2])
        predict((3, 17, 40, 8, 22, 1, 1), DRAFTS[:2])
        assert features.rows == [1, 1]


@pytest.mark.parametrize("layout", ["eagle", "eagle3"])
def test_a_text_that_was_parted_in_inference_mode_goes_on_outside_of_it(layout: str, tmp_path: Path) -> None:
    published = LAYOUTS[layout](tmp_path)
    predict, text = reading(published), (0, 1, 2, 3, 31, 30)
    with torch.inference_mode():
        predict(tuple(range(30)), ())
        predict(text, ())
    rows = predict((*text, 7), DRAFTS)
    torch.testing.assert_close(rows, reading(published)((*text, 7), DRAFTS), rtol=1e-9, atol=1e-9)


def test_what_is_interrupted_leaves_no_wrong_memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = LAYOUTS["eagle3"](tmp_path)
    predict, features = asked(published)
    text = (3, 17, 40, 8, 22)
    predict(text, DRAFTS[:1])
    head = cast(Eagle3, predict.head)
    whole = head.advance

    def interrupted(*arguments: object) -> Tensor:
        whole(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(head, "advance", interrupted)
    for drafts in (DRAFTS, DRAFTS[1:2]):
        with pytest.raises(KeyboardInterrupt):
            predict(text, drafts)
    monkeypatch.undo()
    features.fails = True
    with pytest.raises(KeyboardInterrupt):
        predict((*text, 4), ())
    features.fails = False
    for now in (text, (*text, 4)):
        torch.testing.assert_close(predict(now, DRAFTS), reading(published)(now, DRAFTS), rtol=1e-9, atol=1e-9)


def test_threads_share_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same texts, and each lets the others go on while it looks for what is remembered."""
    published = LAYOUTS["eagle3"](tmp_path)
    shared, alone = reading(published), reading(published)
    expected = [(text, drafts, alone(text, drafts)) for text, drafts in scripts(0, 6)]
    right: list[bool] = []

    def slowly(one: Sequence[object], other: Sequence[object]) -> int:
        sleep(0.0005)
        return common_prefix(one, other)

    monkeypatch.setattr(specflow.heads.reading, "common_prefix", slowly)

    def work(turn: int) -> None:
        for text, drafts, rows in expected[turn:] + expected[:turn]:
            right.append(torch.allclose(shared(text, drafts), rows, rtol=1e-9, atol=1e-9))

    threads = [Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * (4 * len(expected))


# What is drafted.


def law(processor: Processor, text: Tokens, row: Tensor) -> Distribution:
    return processor.laws(text, row[None])[0]


DRAWN_FROM: Final = ("eagle", "eagle3", "medusa", "jump")


@pytest.mark.parametrize("layout", DRAWN_FROM)
@pytest.mark.parametrize("processor", [GREEDY, SAMPLED, TopKProcessor(1.0, 5)], ids=["greedy", "sampled", "top-k"])
@pytest.mark.parametrize("widths", [(), (3, 2)], ids=["chain", "tree"])
def test_each_draft_is_drawn_from_the_law_that_it_carries(
    layout: str, processor: Processor, widths: tuple[int, ...], tmp_path: Path
) -> None:
    published = LAYOUTS[layout](tmp_path)
    drafter = HeadDrafter(reading(published), processor, Dice(torch.Generator().manual_seed(1)), widths)
    text = TEXTS[0]
    drafts = tuple(islice(drafter(text), 9 if widths else 3))
    parents = parents_of(drafts)
    assert parents == ((-1, -1, -1, 0, 0, 1, 1, 2, 2) if widths else (-1, 0, 1))
    for i, draft in enumerate(drafts):
        path = path_of(drafts, parents[i])
        row = published.says(text, path)
        before = [drafts[k].token for k in range(i) if parents[k] == parents[i]]
        q = law(processor, (*text, *path), row)
        if isinstance(draft.q, PointMass):
            assert draft.token == row.topk(len(before) + 1).indices[-1]
            continue
        assert isinstance(q, Categorical)
        assert isinstance(draft.q, Categorical)
        probs = q.probs.clone()
        probs[before] = 0
        torch.testing.assert_close(draft.q.probs, probs / probs.sum(), rtol=1e-9, atol=1e-9)


def dynamic_tree(published: Published, text: Tokens, beam: int, depth: int) -> list[tuple[Tokens, float]]:
    """EAGLE-2's candidates as (path, chance), the likeliest first: the paper's expansion, one path at a time."""
    found: list[tuple[Tokens, float]] = []
    level: list[tuple[Tokens, float]] = [((), 1.0)]
    for _ in range(depth):
        candidates = []
        for path, chance in level:
            probs = published.says(text, path).softmax(-1)
            for p, token in zip(*probs.topk(beam), strict=True):
                if p > 0:  # a confident head leaves some none
                    candidates.append(((*path, int(token)), chance * float(p)))
        level = nlargest(beam, candidates, key=lambda candidate: candidate[1])
        found += candidates
    return sorted(found, key=lambda candidate: -candidate[1])


@pytest.mark.parametrize("layout", DRAWN_FROM)
@pytest.mark.parametrize(("beam", "depth"), [(1, 3), (3, 2), (4, 3)])
def test_the_dynamic_tree_is_the_papers(layout: str, beam: int, depth: int, tmp_path: Path) -> None:
    published = LAYOUTS[layout](tmp_path)
    for text in TEXTS:
        drafts = tuple(HeadTree(reading(published), beam, depth)(text))
        expected = dynamic_tree(published, text, beam, depth)
        assert [path_of(drafts, i) for i in range(len(drafts))] == [path for path, _ in expected]
        assert [draft.chance for draft in drafts] == pytest.approx([chance for _, chance in expected], rel=1e-9)


def test_a_tree_is_made_as_far_as_it_is_pulled(tmp_path: Path) -> None:
    predict, _ = asked(LAYOUTS["eagle3"](tmp_path))
    head = cast(Eagle3, predict.head)
    passes: list[int] = []
    whole = head.say

    def say(states: Tensor, depths: Sequence[int]) -> Tensor:
        passes.append(len(states))
        return whole(states, depths)

    vars(head)["say"] = say
    stream = HeadTree(predict, beam=3, depth=3)(TEXTS[0])
    next(stream)
    assert passes == [1]
    list(stream)
    assert passes == [1, 3, 3]


def test_a_drafter_ends_where_its_head_does(tmp_path: Path) -> None:
    three = reading(LAYOUTS["medusa"](tmp_path))
    assert len([*HeadDrafter(three, GREEDY, Dice())(TEXTS[0])]) == 3
    assert max(len(path) for path, _ in dynamic_tree(LAYOUTS["medusa"](tmp_path), TEXTS[0], 2, 3)) == 3
    drafts = tuple(HeadTree(three, 2, 9)(TEXTS[0]))
    assert max(len(path_of(drafts, i)) for i in range(len(drafts))) == 3
    for drafter in (HeadDrafter(three, GREEDY, Dice()), HeadTree(three)):
        assert [*drafter((3,))] == []  # nothing was read yet
    context = 128
    long = tuple(range(2)) * (context // 2)
    assert len([*HeadDrafter(three, GREEDY, Dice())(long)]) == 1
    assert [*HeadDrafter(three, GREEDY, Dice())((*long, 3))] == []


# Exactness.


KINDS: Final = ("eagle", "eagle3", "medusa", "jump", "mtp")

MakeDrafter: TypeAlias = Callable[[HeadPredictor, World], Drafter]

DRAFTERS: Final[dict[str, MakeDrafter]] = {
    "chain": lambda predict, world: HeadDrafter(predict, world.processor, world.rng),
    "tree": lambda predict, world: HeadDrafter(predict, world.processor, world.rng, (2,)),
    "certain tree": lambda predict, world: HeadTree(predict, beam=2, depth=2),
}

RULES: Final[dict[str, Callable[[World], Rule]]] = {
    "reject": lambda world: Reject(world.rng),
    "block": lambda world: Block(world.rng),
    "traverse": lambda world: Traverse(world.rng),
}


def over_table(kind: str, world: World) -> HeadPredictor:
    table = world.target
    assert isinstance(table, TableModel)
    return HeadPredictor(heads.table_head(kind, table.vocab_size, table.width, table.seed), table)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rule", RULES)
def test_heads_are_exact_under_every_rule(kind: str, drafter: str, rule: str) -> None:
    def compose(world: World) -> Step:
        drafts = DRAFTERS[drafter](over_table(kind, world), world)
        return verified_step(drafts, world.target, world.processor, world.rng, RULES[rule](world), Fixed(2))

    certificate = certify(compose, cases=(CASES[0], CASES[2], CASES[6], CASES[7], CASES[13], CASES[14]))
    assert 0 < certificate.accepted < 1


@pytest.mark.parametrize("rule", ["block", "traverse"])
def test_heads_that_draw_with_noise_are_exact(rule: str) -> None:
    def compose(world: World) -> Step:
        drafts = HeadDrafter(over_table("medusa", world), world.processor, world.noise)
        return verified_step(drafts, world.target, world.processor, world.rng, RULES[rule](world), Fixed(2))

    assert 0 < certify(compose, cases=(CASES[0], CASES[2])).accepted < 1


@pytest.mark.parametrize("kind", ["eagle3", "medusa"])
@pytest.mark.parametrize("drafter", ["chain", "tree", "certain tree"])
def test_a_seed_has_one_text_whatever_a_head_drafts(kind: str, drafter: str) -> None:
    def compose(world: World) -> Step:
        predict = over_table(kind, world)
        drafts: Drafter = HeadTree(predict, 2, 2)
        if drafter != "certain tree":
            drafts = HeadDrafter(predict, world.processor, world.noise, (2,) if drafter == "tree" else ())
        return seed_coupled_step(drafts, world.target, world.processor, world.noise, Fixed(2))

    certify_seed(compose, cases=(SEEDED_CASES[0], SEEDED_CASES[6]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widths", [(), (2, 1)], ids=["chain", "tree"])
@pytest.mark.parametrize("processor", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_head_drafts_under_a_grammar_up_to_its_end(kind: str, widths: tuple[int, ...], processor: Processor) -> None:
    """Some heads do not know all tokens, and none knows where the text ends."""
    grammar = Grammar.regex("(a|bc){1,2}", (b"a", b"b", b"c", b""), stop=(3,))
    table = TableModel(4, seed=3)
    for prompt in ((2, 0), (1, 1), (0, 2)):

        def ended(branch: Branch, *, drafted: bool, prompt: Tokens = prompt) -> Ending:
            answer = grammar.after(prompt)
            head = HeadPredictor(heads.table_head(kind, 4, table.width, 1), table)
            drafts = HeadDrafter(head, Constrained(processor, answer), branch, widths) if drafted else propose_nothing
            step = constrained_step(answer, drafts, table, processor, branch, Reject(branch), Fixed(3))
            return Ending.of(run(step, start(prompt, 4, (3,)).unwrap()))

        laws = [exact_law(partial(ended, drafted=drafted)).probabilities for drafted in (True, False)]
        assert laws[0] == pytest.approx(laws[1])


def test_behind_a_stop_token_a_head_drafts_nothing(tmp_path: Path) -> None:
    drafter = HeadDrafter(reading(LAYOUTS["eagle3"](tmp_path)), GREEDY, Dice())
    text = TEXTS[0]
    first, second = (draft.token for draft in islice(drafter(text), 2))
    state = start(text, 20, (second,)).unwrap()
    assert Draft(drafter, Fixed(6))(state).tokens == (first, second)


def test_forced_tokens_before_a_heads_drafts_are_not_read_for_it(tmp_path: Path) -> None:
    """A head drafts from what the target holds, so to go on behind forced tokens would be a pass of the target's."""
    published = LAYOUTS["eagle3"](tmp_path)
    model = tiny_llama(3, layers=6)
    fed = passes_of(model)
    head = load_head(published.folder, model)
    grammar = Grammar.regex("((a|b)ccc){4}", (b"a", b"b", b"c", b""), stop=())
    passes, texts = [], []
    for combined in (first_of, then):
        fed.clear()
        answer, dice, cached = grammar.after(TEXTS[0]), Dice(), CachedPredictor(model, features=head.reads)
        drafter = combined(Forced(answer), HeadDrafter(HeadPredictor(head, cached), Constrained(GREEDY, answer), dice))
        step = step_of(
            Drafting(drafter), Fixed(6), cached, Constrained(GREEDY, answer), dice, Reject(dice),
            until=answer.is_over, cut=CutForbidden(answer),
        )  # fmt: skip
        finished = run(step, start(TEXTS[0], 30).unwrap())
        passes.append(len(fed) - finished.state.tally.steps)
        texts.append(finished.state.output)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 16
    assert passes[0] <= 1 < passes[1]  # the prompt may be read for the head, once


def decoders(predict: HeadPredictor) -> dict[str, Drafter]:
    chain, tree = HeadDrafter(predict, GREEDY, Dice()), HeadTree(predict, 4, 3)
    return {
        "chain": chain,
        "wide": HeadDrafter(predict, GREEDY, Dice(), (2, 2)),
        "tree": tree,
        "behind a copy": then(at_most(2, SuffixDrafter()), tree),
        "where there is no copy": first_of(SuffixDrafter(shortest=2), tree),
        "the tree, then a copy": then(tree, at_most(1, SuffixDrafter())),
    }


@pytest.mark.parametrize("layout", ["eagle", "eagle3", "speculators", "medusa", "jump"])
def test_greedy_texts_are_the_targets_own(layout: str, tmp_path: Path) -> None:
    predict = reading(LAYOUTS[layout](tmp_path))
    prompt = [3, 17, 40, 8, 22, 3, 17]
    expected = tuple(oracle(prompt, target(), 16))
    cached = CachedPredictor(target())
    for name, drafter in decoders(predict).items():
        for gamma in (Fixed(5), CostAware(CostMeter(), 6)):
            step = speculative_step(drafter, cached, GREEDY, Dice(), gamma, prune=(cached,))
            finished = run(step, start(prompt, 16).unwrap())
            assert finished.state.output == expected, (name, gamma)


def test_a_head_with_the_targets_own_weights_is_right(tmp_path: Path) -> None:
    """Medusa's first head made to be the target: it foretells what the target says of the token that it read last."""
    published = heads.medusa(tmp_path, target())
    rows = target()(torch.tensor([TEXTS[0]]), output_hidden_states=True)
    head = load_head(tmp_path, target())
    assert isinstance(head, Medusa)
    with torch.no_grad():
        head.get_parameter("heads.0.0.linear.weight").zero_()
        head.get_parameter("heads.0.0.linear.bias").zero_()
        head.get_parameter("heads.0.1.weight").copy_(target().get_parameter("lm_head.weight"))
    predict = HeadPredictor(head, FreshFeatures(target(), head.reads))
    torch.testing.assert_close(predict(TEXTS[0], ())[0], rows.logits[0, -2])
    assert published.weights


def test_texts_decoded_together_share_a_head(tmp_path: Path) -> None:
    predict, batched = reading(LAYOUTS["eagle3"](tmp_path)), BatchPredictor(target(), slots=3)
    prompts = [[3, 17, 40], [8, 22, 3, 17, 9], [60, 1], [9, 9, 9, 9]]

    def decode(prompt: list[int]) -> Callable[[], Tokens]:
        step = speculative_step(HeadTree(predict, 3, 2), batched, GREEDY, Dice(), Fixed(4), prune=(batched,))
        return lambda: run(step, start(prompt, 10).unwrap()).state.output

    outputs = dict(together([decode(prompt) for prompt in prompts], 3))
    assert [outputs[i] for i in range(4)] == [tuple(oracle(prompt, target(), 10)) for prompt in prompts]


# What is refused.


def changed(folder: Path, change: Callable[[dict[str, Tensor], dict[str, object]], object]) -> Path:
    """The same checkpoint with something wrong."""
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(weights, config)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


Wrong: TypeAlias = Callable[[dict[str, Tensor], dict[str, object]], object]

WRONG: Final[dict[str, tuple[str, Wrong]]] = {
    "no norm": ("norm.weight is missing", lambda weights, config: weights.pop("norm.weight")),
    "no output": ("lm_head.weight is missing", lambda weights, config: weights.pop("lm_head.weight")),
    "an output of another vocabulary": (
        r"lm_head.weight has another shape: received \[9, 32\] for \[24, 32\]",
        lambda weights, config: weights.update({"lm_head.weight": torch.zeros(9, 32)}),
    ),
    "fc over two layers": (
        r"fc.weight has another shape: received \[32, 64\]",
        lambda weights, config: weights.update({"fc.weight": torch.zeros(32, 64)}),
    ),
    "something strange": (
        "tensor layers.7.mlp is none of this head's",
        lambda weights, config: weights.update({"layers.7.mlp": torch.zeros(2)}),
    ),
    "embeddings of another vocabulary": (
        "different vocabularies: received 900 and 64",
        lambda weights, config: weights.update({"embed_tokens.weight": torch.zeros(900, 32)}),
    ),
    "d2t that leads out of the vocabulary": (
        "d2t names tokens that the target does not have",
        lambda weights, config: weights.update({"d2t": weights["d2t"] + 60}),
    ),
    "d2t of another size": (
        "d2t has another shape",
        lambda weights, config: weights.update({"d2t": weights["d2t"][:-1].clone()}),
    ),
    "d2t that names a token twice": (
        "d2t and t2d name different tokens",
        lambda weights, config: weights["d2t"].copy_(-torch.arange(24)),
    ),
    "t2d of other tokens": ("d2t and t2d", lambda weights, config: weights["t2d"].logical_not_()),
    "no maps": (
        "different vocabularies: received 24 and 64",
        lambda weights, config: [weights.pop(name) for name in ("d2t", "t2d")],
    ),
    "another activation": ("activation: received 'gelu'", lambda weights, config: config.update(hidden_act="gelu")),
    "no size": ("hidden_size is not a whole number", lambda weights, config: config.pop("hidden_size")),
    "a size in words": ("hidden_size is not a whole", lambda weights, config: config.update(hidden_size="wide")),
    "rotary positions of no kind": (
        "rotary embedding cannot be made",
        lambda weights, config: config.update(rope_scaling={"rope_type": "mystery"}),
    ),
    "rotary positions that depend on the length": (
        "depends on the length",
        lambda weights, config: config.update(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    ),
    "a layer that the target does not have": (
        "a target of 6 does not have: received 7",
        lambda weights, config: config.update(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 6]}),
    ),
    "a target of another size": (
        "layers of different sizes: received 48 numbers for 32",
        lambda weights, config: config.update(target_hidden_size=48),
    ),
    "no layout": ("no layout that is known", lambda weights, config: [weights.pop(name) for name in [*weights][1:]]),
}


@pytest.mark.parametrize(
    ("outputs", "states", "reads"),
    [
        ([0, 3, 5], None, (1, 4, 6)),
        (None, [0, 3, 5], (0, 3, 5)),
        ([0, 3, 5], [2, 3, 4], (1, 4, 6)),
        ([], [2, 3, 4], (2, 3, 4)),
        ([], [], (2, 3, 3)),
        (None, None, (2, 3, 3)),
    ],
)
def test_an_eagle_config_names_layers_by_their_outputs(
    outputs: list[int] | None, states: list[int] | None, reads: tuple[int, ...], tmp_path: Path
) -> None:
    """As SGLang and SpecForge do; ids beside it count hidden states, as vLLM and speculators do."""

    def say(weights: dict[str, Tensor], config: dict[str, object]) -> None:
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": outputs}
        config["eagle_aux_hidden_state_layer_ids"] = states

    heads.eagle3(tmp_path, target())
    assert load_head(changed(tmp_path, say), target()).reads == reads


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_checkpoint_is_refused_by_name(wrong: str, tmp_path: Path) -> None:
    said, change = WRONG[wrong]
    heads.eagle3(tmp_path, target())
    load_head(tmp_path, target())
    with pytest.raises(DecodeError, match=said):
        load_head(changed(tmp_path, change), target())


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="has no weights"):
        load_head(tmp_path, target())
    with pytest.raises(DecodeError, match="cannot be found"):
        load_head(tmp_path / "nowhere", target())
    heads.eagle3(tmp_path, target())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DecodeError, match="cannot be read"):
        load_head(tmp_path, target())
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DecodeError, match=r"config\.json is no config"):
        load_head(tmp_path, target())
    heads.eagle(tmp_path / "pickled", target())
    torch.save([1], tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(DecodeError, match="holds no tensors by name"):
        load_head(tmp_path / "pickled", target())


def test_another_target_is_refused(tmp_path: Path) -> None:
    for layout in ("eagle", "eagle3", "medusa", "jump"):
        LAYOUTS[layout](tmp_path / layout)
        with pytest.raises(DecodeError):
            load_head(tmp_path / layout, tiny_llama(0, vocab_size=1000, layers=6))
    with pytest.raises(DecodeError, match="a target of 2 does not have"):
        load_head(tmp_path / "jump", tiny_llama(0, layers=2))
    model, _ = published_stock("qwen3_next", tmp_path / "stock")
    with pytest.raises(DecodeError, match="is not the target's: received 'llama'"):
        load_head(tmp_path / "stock", target())
    assert load_head(tmp_path / "stock", model).width == 32


def test_what_a_head_cannot_read_is_refused(tmp_path: Path) -> None:
    three = reading(LAYOUTS["medusa"](tmp_path))
    with pytest.raises(DecodeError, match="nothing for a head to read"):
        three((3,), ())
    with pytest.raises(DecodeError, match="outside the head's vocabulary"):
        three((3, VOCABULARY), ())
    with pytest.raises(DecodeError, match="the head drafts 3 tokens: received 3 drafts in a row"):
        three((3, 4), (Proposal(1), Proposal(1), Proposal(1)))
    narrow = HeadPredictor(three.head, FreshFeatures(target(), (0, 1)))
    with pytest.raises(DecodeError, match=r"shows no rows of 32 numbers: received torch.float64 of shape \[1, 64\]"):
        narrow((3, 4), ())
    with pytest.raises(DecodeError, match="different vocabularies"):
        HeadPredictor(three.head, FreshFeatures(tiny_llama(0, vocab_size=65), (2,)))


def test_a_target_whose_vocabulary_was_resized_is_another(tmp_path: Path) -> None:
    model: Any = tiny_llama(3, layers=6)
    head = load_head(LAYOUTS["medusa"](tmp_path).folder, model)
    cached = CachedPredictor(model, features=head.reads)
    predict = HeadPredictor(head, cached)
    step = speculative_step(HeadTree(predict, 3, 2), cached, GREEDY, Dice(), Fixed(4))
    run(step, start((3, 4), 4).unwrap())
    model.resize_token_embeddings(VOCABULARY + 16, mean_resizing=False)
    for ask in (lambda: run(step, start((3, 4), 4).unwrap()), lambda: predict.limits, lambda: predict.reach((3, 4))):
        with pytest.raises(DecodeError, match="different vocabularies: received 64 and 80; load the head"):
            ask()


@pytest.mark.parametrize("missing", ["vocabulary", "reads", "width", "looks_back", "ahead"])
def test_a_module_that_leaves_out_what_a_head_tells_is_refused(missing: str) -> None:
    made = Medusa(32, Vocabulary(64, 64), (2,), 2, 1, 64)
    delattr(made, missing)
    with pytest.raises(DecodeError, match="does not tell what a head tells"):
        HeadPredictor(made, FreshFeatures(target(), (2,)))


def test_norms_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(DecodeError, match="before_fc is not a bool"):
        Norms(before_fc="yes")  # type: ignore[arg-type]


def test_rotary_positions_of_a_part_do_not_depend_on_the_length() -> None:
    rope = {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert Shape(8, 8, 2, 1, 4, rope={"rope_parameters": rope}).rotary().rope_type == "proportional"


def test_rotary_positions_stay_where_the_head_is() -> None:
    """They are not copied to its device in every pass."""
    caching = Caching(Shape(8, 8, 2, 1, 4), 1)
    like, rotary = torch.empty(1, 8, device="meta"), caching._rotary
    caching.reading(Past(caching.begin(like), 0), torch.arange(3, device="meta"), None, like)
    there = rotary.inv_freq
    assert there.device == like.device
    caching.reading(Past(caching.begin(like), 0), torch.arange(3, device="meta"), None, like)
    assert rotary.inv_freq is there
