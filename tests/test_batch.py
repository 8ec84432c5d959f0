"""A batch over one ragged memo: every text is the text it is alone, and no token is read twice that need not be."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import permutations
from random import Random
from weakref import ref

import pytest
import torch
from attrs import evolve
from greenlet import GreenletExit
from torch import Tensor
from torch.nn import Module
from transformers import LlamaConfig, PreTrainedModel, StaticCache

from specflow import (
    TEXT,
    Block,
    CachedPredictor,
    Categorical,
    DecodeError,
    DecodeState,
    Dice,
    Finished,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    LookupTree,
    Match,
    MultinomialProcessor,
    NGramDrafter,
    NGramStorage,
    Predictor,
    Proposal,
    Reject,
    SharedNoise,
    Step,
    SuffixDrafter,
    Tokens,
    TopKProcessor,
    Traverse,
    autoregressive_generate,
    autoregressive_step,
    chain,
    ngram_step,
    run,
    seed_coupled_step,
    speculative_step,
    start,
    verified_step,
)
from specflow.accelerate import bit_for_bit, fast
from specflow.batch import (
    Asked,
    BatchPredictor,
    Failed,
    Reply,
    Shared,
    generate_many,
    ragged,
    seed_of,
    together,
)
from specflow.batch.ragged import Piece, new_past, read_together
from specflow.batch.texts import Text
from specflow.batch.trial import reads_together
from specflow.caches import BLOCK, Pair, Shelves
from specflow.drafters import Recycled
from specflow.policies import CostMeter
from specflow.predictors import Resumed, UncachedPredictor, early_exit
from specflow.predictors.reader import Reader
from specflow.stages import Recycle, UpdateNgram
from specflow.state import Tally
from specflow.testing import Branch, Ending, TableModel, exact_law
from tests.architectures import ARCHITECTURES, EACH, Architecture, built
from tests.test_captured import captured
from tests.toys import VOCABULARY, Unrunnable, disturbed, oracle, passes_of, tiny_llama

TARGET = tiny_llama(0)
SMALL = disturbed(TARGET, 1, 0.05)


def dice(seed: int) -> Dice:
    return Dice(torch.Generator().manual_seed(seed))


def taught(target: Predictor, number: int) -> Step:
    storage = NGramStorage(3, VOCABULARY)
    storage.initialize(PROMPTS[number])
    drafter, update = NGramDrafter(storage), UpdateNgram(storage, 2)
    return ngram_step(drafter, target, GreedyProcessor(), dice(number), update, Fixed(4))


def recycling(target: Predictor, number: int, table: Recycled) -> Step:
    return ngram_step(LookupTree(table), target, GreedyProcessor(), dice(number), Recycle(table), Fixed(6))


Make = Callable[[Predictor, Predictor, int], Step]

STEPS: dict[str, Make] = {
    "autoregressive": lambda target, small, n: autoregressive_step(target, GreedyProcessor(), dice(n)),
    "suffix": lambda target, small, n: speculative_step(
        SuffixDrafter(), target, GreedyProcessor(), dice(n), Fixed(n % 4 + 1)
    ),
    "tree": lambda target, small, n: speculative_step(LookupTree(), target, GreedyProcessor(), dice(n), Fixed(6)),
    "model": lambda target, small, n: speculative_step(
        LLMDrafter(small, GreedyProcessor(), dice(n)), target, GreedyProcessor(), dice(n), Fixed(3)
    ),
    "model's tree": lambda target, small, n: speculative_step(
        LLMDrafter(small, GreedyProcessor(), dice(n), widths=(2, 2)), target, GreedyProcessor(), dice(n), Fixed(5)
    ),
    "n-grams that learn": lambda target, small, n: taught(target, n),
    "a table that learns": lambda target, small, n: recycling(target, n, Recycled(VOCABULARY)),
    "sampled, by rejection": lambda target, small, n: sampled(target, small, n, Reject),
    "sampled, by blocks": lambda target, small, n: sampled(target, small, n, Block),
    "sampled, by matching": lambda target, small, n: sampled(target, small, n, Match),
    "sampled, a tree by traversal": lambda target, small, n: sampled(target, small, n, Traverse, (2, 2)),
    "by seed": lambda target, small, n: seed_coupled_step(
        LLMDrafter(small, MultinomialProcessor(1.5), SharedNoise(n)),
        target,
        MultinomialProcessor(1.5),
        SharedNoise(n),
        Fixed(4),
    ),
}


def sampled(
    target: Predictor, small: Predictor, number: int, rule: Callable[[Dice], object], widths: tuple[int, ...] = ()
) -> Step:
    rng, processor = dice(number), TopKProcessor(1.5, 20)
    drafter = LLMDrafter(small, processor, rng, widths=widths)
    return verified_step(drafter, target, processor, rng, rule(rng), Fixed(4))  # type: ignore[arg-type] # of the table


def prompts(count: int, seed: int = 1, longest: int = 30) -> list[list[int]]:
    """Random texts with repetitions in them; some begin alike, two are one."""
    random = Random(seed)
    texts = [random.choices(range(3, 12), k=random.randrange(2, longest)) for _ in range(count)]
    for i in range(3, count, 4):
        texts[i] = texts[i - 1][:]
    for i in range(5, count, 4):
        texts[i] = [*texts[i - 1], 5, 6]
    return texts


PROMPTS = prompts(9)


def decode(make: Make, target: Predictor, small: Predictor, number: int, length: int = 14) -> Finished:
    prompt = PROMPTS[number]
    return run(make(target, small, number), start(prompt, length + number, [40, 41, 42]).unwrap())


@cache
def said_alone(name: str) -> list[Finished]:
    alone, small = CachedPredictor(TARGET), CachedPredictor(SMALL)
    return [decode(STEPS[name], alone, small, i) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("slots", [1, 2, 7])
@pytest.mark.parametrize("name", STEPS)
def test_every_decoder_says_in_a_batch_what_it_says_alone(name: str, slots: int) -> None:
    """Texts of several lengths, which begin and end at different steps, one of them failing in the middle."""

    def failing() -> Finished:
        text: tuple[int, ...] = (3, 4)
        for _ in range(3):
            batched(text, ())
            text = (*text, 5)
        raise ZeroDivisionError

    batched, small = BatchPredictor(TARGET, slots), BatchPredictor(SMALL, slots)
    decodes = [partial(decode, STEPS[name], batched, small, i) for i in range(len(PROMPTS))]
    some: list[Callable[[], Finished]] = [*decodes[:4], failing, *decodes[4:]]
    ends = dict(together(some, slots))
    failed = ends.pop(4)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ZeroDivisionError)
    assert [*map(ends.get, sorted(ends))] == said_alone(name)


def test_texts_of_a_batch_may_teach_one_table() -> None:
    """What is drafted depends on who else is there, and no text does."""
    batched, table = BatchPredictor(TARGET, 4), Recycled(VOCABULARY)
    decodes = [
        partial(decode, lambda target, small, n: recycling(target, n, table), batched, batched, i)
        for i in (*range(len(PROMPTS)), *range(len(PROMPTS)))
    ]
    ends = dict(together(decodes, 4))
    states = [end.state for _, end in sorted(ends.items()) if isinstance(end, Finished)]
    alone = [end.state for end in said_alone("autoregressive")]
    assert [state.tokens for state in states] == [state.tokens for state in (*alone, *alone)]
    steps = [state.tally.steps for state in states]
    assert sum(steps[len(alone) :]) < sum(steps[: len(alone)])  # the second time they are known


@pytest.mark.parametrize("name", [name for name in STEPS if "sampled" in name or "seed" in name])
def test_a_sampled_text_is_the_same_in_another_order(name: str) -> None:
    ends = []
    for order in (range(9), [8, 2, 5, 0, 1, 7, 3, 6, 4]):
        target, small = BatchPredictor(TARGET, 4), BatchPredictor(SMALL, 4)
        decodes = [partial(decode, STEPS[name], target, small, i) for i in order]
        ends.append({order[n]: end for n, end in together(decodes, 4)})
    assert ends[0] == ends[1]


def read_by(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """The shape of the ids of each pass from now on."""
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda module, arguments: shapes.append(tuple(arguments[0].shape)))
    return shapes


BLOOM = next(each for each in ARCHITECTURES if each.kind == "bloom")
ONE_BY_ONE = {
    *("bloom", "mpt", "openai-gpt", "dory", "gemma3n_text", "gpt_neo", "llama4_text", "deepseek_v32"),
    *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe"),
    *("mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next", "recurrent_gemma"),
    *("rwkv", "zaya", "zamba", "zamba2"),
}
"""The architectures whose texts are read one by one: they take no positions, no masks, or keep more than rows."""


@pytest.mark.parametrize("architecture", EACH)
@pytest.mark.filterwarnings("ignore:some texts over")
def test_every_architecture_says_in_a_batch_what_it_says_alone(architecture: Architecture) -> None:
    """Read together where it can be, windows that texts outgrow among them, and else row by row."""
    model = built(architecture.kind)
    batched, alone = BatchPredictor(model, 4), CachedPredictor(model)
    decodes = [
        partial(decode, STEPS[decoder], batched, batched, i)
        for i, decoder in enumerate(("suffix", "tree", "tree", "suffix", "suffix"))
    ]
    expected = [
        decode(STEPS[decoder], alone, alone, i)
        for i, decoder in enumerate(("suffix", "tree", "tree", "suffix", "suffix"))
    ]
    ends = dict(together(decodes, 4))
    assert [ends[i] for i in sorted(ends)] == expected
    shapes: list[tuple[int, ...]] = []
    with model.register_forward_pre_hook(lambda module, arguments: shapes.append(tuple(arguments[0].shape))):
        batched((3, 4), ())  # what is tried again, as the model now has a hook, is tried here
        before = len(shapes)
        list(together([partial(batched, (i, 3, 4, 5), ()) for i in range(6, 9)], 3))
    shapes = shapes[before:]
    assert (len(shapes) == 1) is (architecture.kind not in ONE_BY_ONE)


def test_what_is_read_one_by_one_is_said_once() -> None:
    batched = BatchPredictor(BLOOM.build(), 4)
    with pytest.warns(UserWarning, match="are read one by one") as said:
        list(together([partial(batched, (3, 4, i), ()) for i in range(3)], 3))
    assert len([each for each in said if "one by one" in str(each.message)]) == 1


def rows_of(model: PreTrainedModel, text: Sequence[int], drafts: Sequence[Proposal] = ()) -> torch.Tensor:
    return UncachedPredictor(model)(tuple(text), drafts)


DRAFTS: dict[str, tuple[Proposal, ...]] = {
    "none": (),
    "a chain": chain((5, 6, 7)),
    "a tree": (Proposal(5), Proposal(6), Proposal(7, parent=0), Proposal(8, parent=TEXT), Proposal(9, parent=3)),
}


@pytest.mark.parametrize("seed", range(6))
def test_any_script_of_readings_is_that_of_fresh_passes(seed: int) -> None:
    """Texts that grow, go back, part, end and begin, with chains and trees after them, by one and by several."""
    random, batched = Random(seed), BatchPredictor(TARGET, 3, piece=9)
    texts = [tuple(prompt) for prompt in prompts(5, seed)]
    for _ in range(25):
        chosen = random.sample(range(5), k=random.randrange(1, 6))
        for i in chosen:
            text = texts[i]
            match random.randrange(5):
                case 0:
                    text = text[: random.randrange(1, len(text) + 1)]
                case 1:
                    text = texts[random.randrange(5)]
                case _:
                    text = (*text, *random.choices(range(3, 9), k=random.randrange(0, 4)))
            texts[i] = text[-100:]
        drafts = [random.choice([*DRAFTS.values()]) for _ in chosen]
        asks = [partial(batched, texts[i], each) for i, each in zip(chosen, drafts, strict=True)]
        for number, rows in together(asks, 4):
            truth = rows_of(TARGET, texts[chosen[number]], drafts[number])
            assert isinstance(rows, torch.Tensor)
            assert torch.allclose(rows, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("slots", [1, 2])
def test_more_askers_than_slots_whose_prompts_are_read_in_pieces_all_come_to_an_end(slots: int) -> None:
    """Who waits takes nobody's place: else each would find what was read of its prompt forgotten, for ever."""
    model = tiny_llama(9)
    batched = BatchPredictor(model, slots, piece=3)
    texts = [(3 + i, 4, 5, 6, 7, 8, 9, 10) for i in range(5)]
    batched((3,), ())

    def counted(asked: Sequence[Asked]) -> list[Reply]:
        reads.append(len(asked))
        if len(reads) > 20:
            raise TimeoutError
        return batched.read(asked)

    reads, target = list[int](), Shared(counted)
    for number, rows in together([partial(target, text, ()) for text in texts], 5):
        assert isinstance(rows, torch.Tensor)
        assert torch.allclose(rows, rows_of(model, texts[number]))


def test_alone_it_is_a_predictor_as_any_other() -> None:
    batched = BatchPredictor(TARGET)
    for drafts in DRAFTS.values():
        assert torch.allclose(batched((3, 4, 5), drafts), rows_of(TARGET, (3, 4, 5), drafts))
    assert batched.limits == CachedPredictor(TARGET).limits


def test_one_prompt_of_many_samples_is_read_once() -> None:
    model = tiny_llama(4)
    batched = BatchPredictor(model, 8)
    prompt = Random(2).choices(range(3, 60), k=60)
    decodes = [
        partial(run, autoregressive_step(batched, MultinomialProcessor(3.0), dice(i)), start(prompt, 6).unwrap())
        for i in range(8)
    ]
    batched((3,), ())
    shapes = read_by(model)
    ends = dict(together(decodes, 8))
    assert len({end.state.output for end in ends.values() if isinstance(end, Finished)}) > 4
    assert sum(rows * k for rows, k in shapes) == 60 + 7 + 8 * 5
    alone = CachedPredictor(model)
    assert ends == {
        i: run(autoregressive_step(alone, MultinomialProcessor(3.0), dice(i)), start(prompt, 6).unwrap())
        for i in range(8)
    }


def test_of_drafts_that_were_accepted_none_is_read_again_whoever_is_read_between() -> None:
    """Each step of a text reads the token that it added and its next drafts, in a batch and where texts take turns."""
    model = tiny_llama(4)
    prompts = [(3, 4, 5, 6), (7, 8), (9, 10, 11)]
    known = [(*prompt, *oracle(prompt, model, 40)) for prompt in prompts]

    def drafter(tokens: Tokens) -> Iterator[Proposal]:
        first, second, *_ = (*next(text for text in known if text[: len(tokens)] == tokens)[len(tokens) :], 1, 1)
        yield from (Proposal(first), Proposal(VOCABULARY - 1 - first, parent=TEXT), Proposal(second, parent=0))

    def step(target: Predictor, gamma: int) -> Step:
        return speculative_step(drafter, target, GreedyProcessor(), dice(0), Fixed(gamma))

    made = fast(model)
    batched = BatchPredictor(made, 3)
    read: list[list[int]] = []
    made.register_forward_pre_hook(
        lambda module, arguments, named: read.append([len(text.ids) for text in named.get("texts", ())]),
        with_kwargs=True,
    )
    batched((3,), ())
    batched.forget()
    read.clear()
    ends = dict(together([partial(run, step(batched, 3), start(prompt, 17).unwrap()) for prompt in prompts], 3))
    for i, prompt in enumerate(prompts):
        assert isinstance(end := ends[i], Finished)
        assert end.state.tokens == known[i][: len(prompt) + 17]
    assert read == [[4 + 3, 2 + 3, 3 + 3], *[[1 + 3] * 3] * 4, [1 + 1] * 3]

    fed = passes_of(model)
    turns = CachedPredictor(model)
    states = [start(prompt, 17).unwrap() for prompt in prompts]
    for _ in range(4):
        outcomes = [step(turns, 3)(state) for state in states]
        states = [outcome for outcome in outcomes if isinstance(outcome, DecodeState)]
    assert fed[-6:] == [1 + 3] * 6


def test_of_a_chats_next_turn_only_the_new_tokens_are_read_whoever_spoke_between() -> None:
    model = tiny_llama(4, context=512)
    batched = BatchPredictor(model, 3)
    random = Random(5)
    chats = [tuple(random.choices(range(3, 60), k=100)) for _ in range(3)]
    shapes = read_by(model)
    batched((3,), ())  # what makes room
    read = []
    for turn in range(4):
        for c, chat in enumerate(chats):
            before = len(shapes)
            end = dict(together([partial(decode_on, batched, chat)], 1))[0]
            assert isinstance(end, Finished)
            chats[c] = (*end.state.tokens, *random.choices(range(3, 60), k=5))
            read.append((turn, sum(rows * k for rows, k in shapes[before:])))
    assert [k for turn, k in read if turn == 0] == [100 + 3] * 3
    assert [k for turn, k in read if turn > 0] == [6 + 3] * 9


def decode_on(target: Predictor, text: tuple[int, ...]) -> Finished:
    return run(autoregressive_step(target, GreedyProcessor(), dice(0)), start(text, 4).unwrap())


def test_a_long_prompt_is_read_in_pieces_while_the_others_go_on() -> None:
    model = tiny_llama(4, context=512)
    batched = BatchPredictor(model, 4, piece=20)
    long = Random(3).choices(range(3, 60), k=200)
    batched((3,), ())
    shapes = read_by(model)
    decodes: list[Callable[[], object]] = [partial(batched, tuple(long), ())]
    decodes += [partial(decode_on, batched, (3, i)) for i in range(3)]
    order = [number for number, _ in together(decodes, 4)]
    assert order == [1, 2, 3, 0]
    assert max(rows * k for rows, k in shapes) <= 20 + 3 * 20
    assert len([1 for _, k in shapes if k >= 20]) == 10


def test_nobody_waits_again_for_a_prefix_that_there_is_no_room_to_keep() -> None:
    """Two wait for the first, whose memo makes room for another text's; then neither waits for the other."""
    model = tiny_llama(4)
    batched = BatchPredictor(model, 4, tokens=2)
    prompt, other = (tuple(Random(seed).choices(range(3, 60), k=50)) for seed in (2, 3))
    done: list[int] = []

    def one(number: int, prompt: tuple[int, ...], new: int) -> None:
        for length in range(new):
            batched((*prompt, *[number] * length), ())
        done.append(number)

    asks = [(5, prompt, 12), (6, other, 2), (7, prompt, 1), (8, prompt, 1)]
    list(together([partial(one, *each) for each in asks], 4))
    assert done == [7, 8, 6, 5]


@pytest.mark.parametrize("tokens", [None, 64])
def test_memory_is_bounded_by_texts_or_by_tokens(tokens: int | None) -> None:
    batched = BatchPredictor(TARGET, 4, tokens=tokens)
    for i in range(12):
        list(together([partial(batched, (3 + i, *[k + 3] * 29), ()) for k in range(4)], 4))
        assert batched.held <= (4 * 30 if tokens is None else tokens)


def test_a_text_of_more_tokens_than_are_kept_is_read_all_the_same() -> None:
    batched = BatchPredictor(TARGET, 2, tokens=4)
    text = tuple(range(3, 40))
    for drafts in DRAFTS.values():
        assert torch.allclose(batched(text, drafts), rows_of(TARGET, text, drafts))


def test_texts_stay_side_by_side_while_some_end_and_others_begin() -> None:
    """What the model sees is the shelf itself, in every pass over one token of all."""
    seen: list[bool] = []
    shown = ragged._Writing.shown

    def spied(writing: ragged._Writing, i: int, new: Pair) -> Pair:
        keys, values = shown(writing, i, new)
        if new[0].shape[2] == 1 and len(writing.layout.spots) == 4:
            shelf = writing.layout.spots[0].piece.row.shelf
            places = [held.untyped_storage().data_ptr() for held in shelf.layer(i, new)]
            seen.append([part.untyped_storage().data_ptr() for part in (keys, values)] == places)
            assert shelf._rows == 4
        return keys, values

    batched = BatchPredictor(TARGET, 4)
    batched((3, 4), ())  # tried here
    step, alone = (STEPS["autoregressive"](each, each, 0) for each in (batched, CachedPredictor(TARGET)))
    decodes = [partial(run, step, start([3 + i, 4, 5], 9 + 3 * (i % 5)).unwrap()) for i in range(14)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged._Writing, "shown", spied)
        ends = dict(together(decodes, 4))
    for i, end in ends.items():
        assert end == run(alone, start([3 + i, 4, 5], 9 + 3 * (i % 5)).unwrap())
    assert len(seen) > 60
    assert all(seen)


def test_texts_of_which_one_outgrows_its_shelf_are_read_together() -> None:
    model = tiny_llama(7, context=2 * BLOCK)
    batched, alone = BatchPredictor(model, 3), CachedPredictor(model)
    long = tuple(random.choice(range(3, 60)) for random in [Random(1)] for _ in range(BLOCK + 6))
    drafts = DRAFTS["a tree"]
    for end in range(BLOCK - 9, BLOCK + 6, 3):
        texts = long[:end], (5, 6, end % 60), long[: end - 1]
        ends = dict(together([partial(batched, text, drafts[: i + 1]) for i, text in enumerate(texts)], 3))
        for i, text in enumerate(texts):
            assert torch.allclose(rows_in(ends[i]), alone(text, drafts[: i + 1]))


def rows_in(reply: torch.Tensor | Failed) -> torch.Tensor:
    assert isinstance(reply, torch.Tensor)
    return reply


def test_texts_in_inference_mode_and_others_share_a_shelf_in_turns() -> None:
    batched, step = BatchPredictor(TARGET, 4), STEPS["suffix"]

    def one(number: int) -> Finished:
        with torch.inference_mode(mode=number % 2 == 0):
            return decode(step, batched, batched, number)

    alone = CachedPredictor(TARGET)
    ends = dict(together([partial(one, i) for i in range(6)], 4))
    assert ends == {i: decode(step, alone, alone, i) for i in range(6)}
    assert batched._alone._memos.held == 0  # no pass broke down, after which texts are read one by one


@pytest.mark.parametrize(
    ("drafted", "told"),
    [
        ([0, 0, 0, 0], [14, 14.14]),
        ([1, 0, 0, 0], [14, 18]),
        ([3, 0, 0, 0], [14, 18]),
        ([4, 2, 0, 0], [14, 18]),
        ([2, 2, 2, 2], [14, 18, 22]),
        ([9, 2, 0, 0], [14, 18, 22, 26]),
    ],
)
def test_a_meter_hears_what_a_pass_takes_if_all_texts_have_as_many_tokens(drafted: list[int], told: list[int]) -> None:
    """A pass over n tokens takes 10 + n seconds here, whoever of four texts has them."""
    model, now = fast(tiny_llama(8)), [0.0]

    def takes(module: Module, given: object, named: dict[str, list[Text]]) -> None:
        now[0] += 10 + sum(len(text.ids) for text in named["texts"])

    meter = CostMeter(lambda: now[0])
    batched = BatchPredictor(model, 4, meter=meter)
    texts: list[tuple[int, ...]] = [(3 + i, 4, 5, 6) for i in range(4)]
    list(together([partial(batched, text, ()) for text in texts], 4))
    model.register_forward_pre_hook(takes, with_kwargs=True)
    list(together([partial(batched, text, ()) for text in texts], 4))  # the hook made another model of it
    for token in (5, 6):
        texts = [(*text, token) for text in texts]
        list(together([partial(batched, text, ()) for text in texts], 4))
    for token in (7, 8):
        texts = [(*text, token) for text in texts]
        asks = zip(texts, drafted, strict=True)
        list(together([partial(batched, text, chain(range(20, 20 + n))) for text, n in asks], 4))
    assert (meter.seconds(len(told)) or [])[: len(told)] == pytest.approx(told, rel=0.01)


def test_of_a_pass_in_which_hardly_a_text_drafts_a_meter_hears_nothing() -> None:
    now = [0.0]
    meter = CostMeter(lambda: now[0])
    batched = BatchPredictor(TARGET, 5, meter=meter)
    handle = TARGET.register_forward_pre_hook(lambda module, given: now.__setitem__(0, now[0] + 9))
    texts: list[tuple[int, ...]] = [(3 + i, 4, 5, 6) for i in range(5)]
    list(together([partial(batched, text, ()) for text in texts], 5))
    for token, drafts in ((5, 0), (6, 0), (7, 1)):
        texts = [(*text, token) for text in texts]
        asks = [partial(batched, text, chain((9,) * drafts if i == 0 else ())) for i, text in enumerate(texts)]
        list(together(asks, 5))
        now[0] += 1000
    handle.remove()
    assert meter.seconds(2) == pytest.approx([9, 9 * 1.01])


def test_of_a_pass_that_breaks_down_a_meter_hears_nothing() -> None:
    """It would be a very cheap one, which a policy that goes by cost would ask for again."""
    now, model = [0.0], fast(tiny_llama(8))

    def takes(module: Module, given: object, named: dict[str, list[Text]]) -> None:
        fed = sum(len(text.ids) for text in named.get("texts", ()))
        if fed == 10:  # both texts with their drafts; each of them alone can be read
            raise torch.OutOfMemoryError
        now[0] += fed

    meter = CostMeter(lambda: now[0])
    batched = BatchPredictor(model, 2, meter=meter)
    texts: list[tuple[int, ...]] = [(3 + i, 4, 5, 6) for i in range(2)]
    list(together([partial(batched, text, ()) for text in texts], 2))  # its trial
    model.register_forward_pre_hook(takes, with_kwargs=True)
    texts = [(*text, 7) for text in texts]
    with pytest.warns(UserWarning, match="a pass over 2 of them failed, and each alone did not"):
        # With the hook it is another model, which reads the texts anew: ten tokens, too.
        list(together([partial(batched, text, ()) for text in texts], 2))
    for token in (8, 9, 10):
        texts = [(*text, token) for text in texts]
        list(together([partial(batched, text, ()) for text in texts], 2))
    texts = [(*text, 11) for text in texts]
    ends = list(together([partial(batched, text, chain((1, 2, 3, 4))) for text in texts], 2))
    assert not any(isinstance(end, Failed) for _, end in ends)
    assert meter.seconds(5) == pytest.approx([2, 2 * 1.01])  # nothing of five tokens, of which it timed none


def test_a_batch_that_is_never_full_is_paced_as_what_it_is() -> None:
    prompt = [3, 1, 3, 1, 3, 1]
    (end,) = generate_many([prompt], tiny_llama(3), max_gen_len=100, eos_tokens_id=[], slots=8)
    assert end.state.tally.drafted > 0


def test_what_is_wrong_with_one_text_is_its_own() -> None:
    batched = BatchPredictor(TARGET, 4)
    texts: list[tuple[int, ...]] = [(3, 4), (VOCABULARY, 1), (5,), (), (2.5,), (7, 8)]  # type: ignore[list-item] # what is tested
    ends = dict(together([partial(batched, text, ()) for text in texts], 6))
    for i, text in enumerate(texts):
        end = ends[i]
        if i in (0, 2, 5):
            assert isinstance(end, torch.Tensor)
            assert torch.allclose(end, rows_of(TARGET, text))
        else:
            assert isinstance(end, Failed)
            assert isinstance(end.error, DecodeError)


def test_one_text_whose_logits_are_not_finite_leaves_the_others_theirs() -> None:
    """Its keys are NaN, and a mask does not hide those from a text in the same row."""
    model = tiny_llama(5)
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    batched, alone = BatchPredictor(model, 4), CachedPredictor(model)
    texts = [(3, 4, 5, 6), (7, 9), (8,), (3, 4), (10, 11, 12)]
    for drafts in ((), chain((4, 5))):
        ends = dict(together([partial(batched, text, drafts) for text in texts], 5))
        failed = ends.pop(1)
        assert isinstance(failed, Failed)
        assert "not finite" in str(failed.error)
        for i, rows in ends.items():
            assert isinstance(rows, torch.Tensor)
            assert torch.allclose(rows, alone(texts[i], drafts))


def inner(model: PreTrainedModel) -> Module:
    """A part in the middle of a model: what breaks there has written some of the cache."""
    return model.get_submodule("model.layers.1.mlp")


def test_a_pass_that_breaks_down_is_nobodys_loss() -> None:
    """Those who were read in it are read alone, and what it had half read is forgotten."""
    model = tiny_llama(6)
    batched = BatchPredictor(model, 4)
    decodes = [partial(decode, STEPS["suffix"], batched, batched, i) for i in range(6)]
    expected = dict(together(decodes, 4))
    broken: list[int] = []

    def breaks(module: object, arguments: tuple[torch.Tensor, ...]) -> None:
        if len(arguments[0]) > 1 and len(broken) < 5:
            broken.append(1)
            raise RuntimeError("out of luck")

    batched.forget()
    inner(model).register_forward_pre_hook(breaks)
    with pytest.warns(UserWarning, match="one by one: a pass over 4 of them failed.*out of luck") as told:
        assert dict(together(decodes, 4)) == expected
    assert len(told) == 1
    assert len(broken) == 5


def test_of_a_pass_that_one_of_its_texts_breaks_nothing_is_said_but_in_its_decode() -> None:
    model, refused = tiny_llama(6), set[int]()

    def breaks(module: object, arguments: tuple[torch.Tensor, ...]) -> None:
        if refused & {*arguments[0].flatten().tolist()}:
            raise RuntimeError("no nines")

    model.register_forward_pre_hook(breaks)
    texts = [(3, 4), (5, 9), (6, 7)]
    batched = BatchPredictor(model, 3)
    batched((3,), ())  # it is tried
    refused.add(9)
    ends = dict(together([partial(batched, text, ()) for text in texts], 3))  # a warning would be an error here
    failed = ends.pop(1)
    assert isinstance(failed, Failed)
    assert "no nines" in str(failed.error)
    for i, rows in ends.items():
        assert torch.allclose(rows_in(rows), rows_of(model, texts[i]))


def test_ctrl_c_in_a_pass_leaves_what_was_decoded() -> None:
    model = tiny_llama(6)
    batched = BatchPredictor(model, 4)
    decodes = [partial(decode, STEPS["suffix"], batched, batched, i) for i in range(6)]
    expected = dict(together(decodes, 4))
    passes: list[int] = []

    def breaks(module: object, arguments: tuple[torch.Tensor, ...]) -> None:
        passes.append(1)
        if len(passes) == 7:
            raise KeyboardInterrupt

    inner(model).register_forward_pre_hook(breaks)
    with pytest.raises(KeyboardInterrupt):
        list(together(decodes, 4))
    assert dict(together(decodes, 4)) == expected


def test_a_model_under_autocast_is_tried_by_what_it_rounds_to() -> None:
    model = tiny_llama(7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert Reader.of(model).rounding == torch.bfloat16
        assert CachedPredictor(model).feeding.name == "any pieces"
        assert reads_together(Reader.of(model), 0, trees=True)
        assert Resumed(model, early_exit(model, layers=1))((3, 4, 5), ()).isfinite().all()
        assert Reader.of(tiny_llama()).rounding == torch.float64
    assert Reader.of(model).rounding == torch.float32


def test_a_model_that_says_never_of_some_ids_is_read_beside_others() -> None:
    model = tiny_llama(7)

    def masked(head: object, given: object, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([0, 5]), -torch.inf)

    model.get_submodule("lm_head").register_forward_hook(masked)
    assert reads_together(Reader.of(model), 0, trees=True)


def test_a_model_that_says_no_number_is_not_read_beside_others() -> None:
    model = tiny_llama(7)
    model.get_submodule("lm_head").register_forward_hook(lambda head, given, logits: logits * torch.nan)
    assert not reads_together(Reader.of(model), 0, trees=True)


def in_static(model: PreTrainedModel) -> CachedPredictor:
    return CachedPredictor(model, make_cache=lambda: StaticCache(model.config, max_cache_len=64))


def seen(model: PreTrainedModel) -> CachedPredictor:
    return CachedPredictor(model, features=(1,))


@pytest.mark.parametrize(
    ("reads", "kind"),
    [
        *[(CachedPredictor, kind) for kind in ("llama", "mistral", "mamba", "falcon_h1", "rwkv")],
        *[(BatchPredictor, kind) for kind in ("llama", "mistral")],
        (in_static, "llama"),
        (seen, "llama"),
    ],
)
def test_a_text_that_was_begun_in_inference_mode_goes_on_in_any(
    reads: Callable[[PreTrainedModel], Predictor], kind: str
) -> None:
    model = built(kind)
    predict, fresh, text = reads(model), UncachedPredictor(model), tuple(range(3, 40))
    for now in (True, False, True, False):
        for tokens in (text, text[:-2], (*text[:5], 7, 9), (*text, 40)):
            with torch.inference_mode(now):
                rows = predict(tokens, chain((4, 5, 6)))
            torch.testing.assert_close(rows, fresh(tokens, chain((4, 5, 6))), rtol=0, atol=1e-4)


def test_a_model_that_was_made_in_inference_mode_is_read_in_any() -> None:
    with torch.inference_mode():
        model = tiny_llama(7)
    for predict in (CachedPredictor(model), BatchPredictor(model)):
        for now in (False, True, False):
            with torch.inference_mode(now):
                rows = predict((3, 4, 5), DRAFTS["a tree"])
            assert (rows - rows_of(model, (3, 4, 5), DRAFTS["a tree"])).abs().max() < 1e-9


@pytest.mark.parametrize(("slots", "limit"), [(2, None), (2, 30), (1, None)])
def test_long_prompts_in_different_modes_are_read_to_their_ends(slots: int, limit: int | None) -> None:
    model, passes = tiny_llama(7, dtype=torch.float32), 0

    def counted(*_: object) -> None:
        nonlocal passes
        passes += 1
        assert passes < 300

    batched = BatchPredictor(model, slots, piece=8, tokens=limit)
    batched((1,), ())
    with torch.autocast("cpu", torch.bfloat16):
        batched((1,), ())
    model.register_forward_pre_hook(counted)

    def read(first: int, on: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            return batched(tuple(range(first, first + 25)), ())

    ends = dict(together([partial(read, 1, True), partial(read, 30, False)], 2))
    exact, rough = ends[1], ends[0]
    assert isinstance(exact, torch.Tensor)
    assert isinstance(rough, torch.Tensor)
    torch.testing.assert_close(exact, rows_of(model, tuple(range(30, 55))), rtol=0, atol=1e-4)
    assert rough.dtype == torch.bfloat16


def test_memos_of_different_modes_are_kept_beside_each_other_and_apart() -> None:
    model, text = tiny_llama(7, dtype=torch.float32), tuple(range(3, 20))
    fed = passes_of(model)
    for predict in (CachedPredictor(model), BatchPredictor(model, 4)):
        for on in (True, False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                predict(text, ())
        fed.clear()
        for on in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                assert predict((*text, 30), ()).dtype == (torch.bfloat16 if on else torch.float32)
        assert fed == [1, 1]
        torch.testing.assert_close(predict((*text, 31), ()), rows_of(model, (*text, 31)), rtol=0, atol=1e-4)


def test_what_was_read_of_other_weights_is_forgotten() -> None:
    model = tiny_llama(7)
    batched = BatchPredictor(model, 4)
    texts = [(3, 4, 5), (6, 7)]
    list(together([partial(batched, text, ()) for text in texts], 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for number, rows in together([partial(batched, text, ()) for text in texts], 2):
        assert isinstance(rows, torch.Tensor)
        assert torch.allclose(rows, rows_of(model, texts[number]))


@pytest.mark.parametrize("kind", [BatchPredictor, CachedPredictor])
def test_weights_that_were_replaced_are_let_go(kind: type[BatchPredictor | CachedPredictor]) -> None:
    model = tiny_llama(7)
    predict, text = kind(model), (3, 4, 5)
    predict(text, ())
    with torch.autocast("cpu", torch.bfloat16):
        predict(text, ())
    predict(text, ())
    old = ref(model.get_parameter("lm_head.weight"))
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    predict(text, ())
    gc.collect()
    assert old() is None
    assert predict(text, ()).isfinite().all()


@pytest.mark.parametrize("kind", [BatchPredictor, CachedPredictor])
def test_of_drafts_that_were_read_nothing_is_kept_but_their_ids(kind: type[BatchPredictor | CachedPredictor]) -> None:
    """Their logits may hang on a graph, which cannot be copied, and are large."""
    model, text = tiny_llama(0), tuple(range(30))
    logits = torch.zeros(VOCABULARY, requires_grad=True) * 2
    probs = logits.detach().softmax(-1)
    predict, held = kind(model), [ref(logits), ref(probs)]
    predict(text[:-1], ())
    predict(text, (Proposal(5, Categorical(probs), logits=logits), Proposal(6, parent=TEXT)))
    del logits, probs
    gc.collect()
    assert [tensor() for tensor in held] == [None, None]
    for other in ((*text[:10], 50, 51), (*text, 6, 7)):  # of these the first goes on with a copy
        assert (predict(other, ()) - UncachedPredictor(model)(other, ())).abs().max() < 1e-9


def test_nothing_of_the_model_is_changed() -> None:
    model = tiny_llama(8)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    batched = BatchPredictor(model, 3)
    list(together([partial(batched, (3, i), chain((4,))) for i in range(3)], 3))
    assert model.training
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_thousand_short_prompts_through_sixteen_slots() -> None:
    """No text waits for ever, memory stays flat, each number comes once; places are taken in order."""
    batched = BatchPredictor(TARGET, 16)
    random = Random(1)
    texts = [tuple(random.choices(range(3, 60), k=random.randrange(1, 9))) for _ in range(1000)]
    begun: list[int] = []

    def one(i: int) -> Finished:
        begun.append(i)
        step = speculative_step(SuffixDrafter(), batched, GreedyProcessor(), dice(i), Fixed(2))
        return run(step, start(texts[i], 3 + i % 4).unwrap())

    seen, held, late, some = [], [], 0, {}
    for number, end in together((partial(one, i) for i in range(1000)), 16):
        assert isinstance(end, Finished)
        seen.append(number)
        if number in (0, 499, 999):
            some[number] = end
        held.append(batched.held)
        late = max(late, max(begun) - number)
    assert sorted(seen) == list(range(1000))
    assert begun == list(range(1000))
    assert late <= 5 * 16
    assert max(held) <= 16 * 20
    alone = CachedPredictor(TARGET)
    for i, end in some.items():
        step = speculative_step(SuffixDrafter(), alone, GreedyProcessor(), dice(i), Fixed(2))
        assert run(step, start(texts[i], 3 + i % 4).unwrap()) == end
    assert len(some) == 3


def test_two_texts_of_one_batch_are_independent_and_each_has_its_law() -> None:
    """Over all choices of both, exactly: the joint law is the product of what each has alone."""
    table = TableModel(3, seed=5)
    shared = Shared(lambda asks: [table(each.tokens, each.drafts) for each in asks])

    def one(target: Predictor, branch: Branch, first: int) -> Ending:
        drafter = LLMDrafter(TableModel(3, seed=6), MultinomialProcessor(1.0), branch)
        step = speculative_step(drafter, target, MultinomialProcessor(1.0), branch, Fixed(1))
        return Ending.of(run(step, start((first,), 2).unwrap()))

    def both(branch: Branch) -> tuple[Ending, Ending]:
        ends = dict(together([partial(one, shared, branch, 0), partial(one, shared, branch, 1)], 2))
        assert isinstance(ends[0], Ending)
        assert isinstance(ends[1], Ending)
        return ends[0], ends[1]

    def alone(first: int) -> Callable[[Branch], Ending]:
        def program(branch: Branch) -> Ending:
            return Ending.of(
                run(autoregressive_step(table, MultinomialProcessor(1.0), branch), start((first,), 2).unwrap())
            )

        return program

    joint, laws = exact_law(both), (exact_law(alone(0)), exact_law(alone(1)))
    total = sum(
        abs(joint.of((a, b)) - laws[0].of(a) * laws[1].of(b))
        for a in laws[0].probabilities
        for b in laws[1].probabilities
    )
    assert total < 1e-12
    assert sum(joint.probabilities.values()) == pytest.approx(1.0, abs=1e-12)


FAMILY = [each for each in ARCHITECTURES if each.kind in ("llama", "mistral", "ministral", "cwm", "qwen3", "smollm3")]


@pytest.mark.parametrize("captured_too", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("architecture", FAMILY, ids=lambda architecture: architecture.kind)
def test_an_accelerated_model_says_in_a_batch_what_it_says_alone(
    architecture: Architecture, captured_too: bool
) -> None:
    model = architecture.build()
    made: Module = captured(model) if captured_too else fast(model)
    batched, alone = BatchPredictor(made, 4), CachedPredictor(model)
    names = ("suffix", "tree", "tree", "suffix", "model", "model's tree", "suffix", "autoregressive", "by seed")
    ends = dict(together([partial(decode, STEPS[name], batched, batched, i) for i, name in enumerate(names)], 4))
    assert ends == {i: decode(STEPS[name], alone, alone, i) for i, name in enumerate(names)}
    assert sizes_read_by(made, batched) == [3]


def sizes_read_by(model: Module, batched: BatchPredictor) -> list[int]:
    """How many texts each pass reads that answers three."""
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, arguments, named: sizes.append(len(named.get("texts", (1,)))), with_kwargs=True
    )
    batched((3, 4), ())  # what is tried again, as the model now has a hook, is tried here
    before = len(sizes)
    list(together([partial(batched, (i, 3, 4, 5), ()) for i in range(6, 9)], 3))
    return sizes[before:]


@pytest.mark.filterwarnings("ignore:some texts over")  # trees
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", FAMILY, ids=lambda architecture: architecture.kind)
def test_bit_for_bit_no_bit_depends_on_who_else_is_in_the_batch(architecture: Architecture, dtype: torch.dtype) -> None:
    """Nor on how a text is cut into passes, with drafts or without, in small passes and over the border of one."""
    model = bit_for_bit(evolve(architecture, dtype=dtype).build())
    alone = CachedPredictor(model)
    random = Random(3)
    texts = [tuple(random.choices(range(3, 60), k=k)) for k in (1, 30, 9, 60, 31, 5, 90)]
    for slots, piece in ((2, 512), (7, 512), (7, 13)):
        batched = BatchPredictor(model, slots, piece)
        for drafts in ((), chain((4, 5, 6)), DRAFTS["a tree"]):
            asks = [partial(batched, text, drafts[: i + 1]) for i, text in enumerate(texts)]
            for number, rows in together(asks, slots):
                assert isinstance(rows, torch.Tensor)
                assert torch.equal(rows, alone(texts[number], drafts[: number + 1]))


# Prompts in, finished texts out.


@pytest.mark.parametrize("drafter", [None, SMALL, tiny_llama(2, vocab_size=72)], ids=["no model", "a model", "padded"])
@pytest.mark.parametrize("slots", [1, 4])
def test_many_texts_are_those_of_each_prompt_in_their_order(drafter: PreTrainedModel | None, slots: int) -> None:
    heard: list[tuple[int, int]] = []
    ends = generate_many(
        PROMPTS, TARGET, drafter, max_gen_len=12, eos_tokens_id=[40, 41], slots=slots,
        progress=lambda number, end: heard.append((number, len(end.state.output))),
    )  # fmt: skip
    expected = [autoregressive_generate(prompt, TARGET, 12, eos_tokens_id=[40, 41]) for prompt in PROMPTS]
    assert [list(end.state.output) for end in ends] == expected
    assert sorted(heard) == [(i, len(text)) for i, text in enumerate(expected)]


def test_a_listener_that_raises_ends_the_other_texts() -> None:
    class Asked:
        limits, meter = BatchPredictor(TARGET).limits, CostMeter()
        unwound = 0

        def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> torch.Tensor:
            try:
                return shared(tokens, drafts)
            except GreenletExit:
                self.unwound += 1
                raise

    def heard(number: int, end: Finished) -> None:
        raise LookupError("mine")

    shared, asked = BatchPredictor(TARGET, slots=3), Asked()
    with pytest.raises(LookupError) as raised:
        generate_many([[5, 6], [7, 8], [9]], asked, max_gen_len=9, eos_tokens_id=[], slots=3, progress=heard)
    assert (asked.unwound, raised.value.args) == (2, ("mine",))


def test_a_text_that_ends_first_keeps_its_place() -> None:
    texts = [autoregressive_generate(prompt, TARGET, 12, eos_tokens_id=[]) for prompt in PROMPTS]
    late, early = next((a, b) for a, b in permutations(range(len(texts)), 2) if texts[b][0] not in texts[a])
    stop = texts[early][0]
    ends = generate_many([PROMPTS[late], PROMPTS[early]], TARGET, gamma=1, max_gen_len=12, eos_tokens_id=stop)
    assert [list(end.state.output) for end in ends] == [texts[late], [stop]]


@pytest.mark.parametrize("drafter", [None, SMALL], ids=["no model", "a model"])
def test_many_texts_of_a_seed_depend_on_nothing_else(drafter: PreTrainedModel | None) -> None:
    processor = MultinomialProcessor(1.5)
    texts = [
        [end.state.output for end in generate_many(PROMPTS, TARGET, some, gamma, processor, 12, [], -7, slots)]
        for some, gamma, slots in ((drafter, 5, 4), (None, 1, 1), (drafter, 3, 9))
    ]
    assert texts[0] == texts[1] == texts[2]
    noise = SharedNoise(seed_of(-7, 3))
    step = autoregressive_step(CachedPredictor(TARGET), processor, noise)
    assert texts[0][3] == run(step, start(PROMPTS[3], 12).unwrap()).state.output
    assert texts[0][2] != texts[0][3]
    assert PROMPTS[2] == PROMPTS[3]
    assert texts[0] != [end.state.output for end in generate_many(PROMPTS, TARGET, None, 5, processor, 12, [], 8)]


def test_drafts_of_many_texts_are_paced_by_the_clock_that_is_given() -> None:
    """By nothing else: by one clock everything is repeated, whatever this machine is doing."""

    def tallies(price: float) -> list[Tally]:
        """On a clock that a pass of the target moves by 1, and a look at it by `price`."""
        now, looks = [0.0], [0]

        def passed(*_: object) -> None:
            now[0] += 1.0

        def clock() -> float:
            looks[0] += 1
            now[0] += price
            return now[0]

        moving = TARGET.register_forward_pre_hook(passed)
        try:
            ends = generate_many(PROMPTS, TARGET, SMALL, 5, max_gen_len=20, eos_tokens_id=[], slots=3, clock=clock)
        finally:
            moving.remove()
        assert looks[0] > 20
        return [end.state.tally for end in ends]

    assert tallies(0.01) == tallies(0.01)
    assert sum(tally.drafted for tally in tallies(0.01)) > sum(tally.drafted for tally in tallies(1.0))


def test_what_is_wrong_with_many_texts_is_told_with_the_number_of_the_prompt() -> None:
    model = tiny_llama(5)
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    with pytest.raises(DecodeError, match="not finite") as raised:
        generate_many([[3, 4], [5, 9], [6]], model, eos_tokens_id=[])
    assert raised.value.__notes__ == ["in prompt 1 of 3"]
    with pytest.raises(DecodeError, match="outside the vocabulary") as raised:
        generate_many([[3], [4], [VOCABULARY]], Unrunnable(TARGET), eos_tokens_id=[])
    assert raised.value.__notes__ == ["in prompt 2"]
    assert raised.value.parameter == "prompts"


def test_no_prompts_are_no_texts() -> None:
    assert generate_many([], TARGET) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"slots": 0}, "slots"),
        ({"slots": 2.5}, "slots"),
        ({"piece": 0}, "piece"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": "many"}, "tokens"),
        ({"model": None}, "model"),
        ({"model": LlamaConfig()}, "model"),
    ],
)
def test_what_cannot_be_a_batch_is_refused(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(DecodeError, match=named):
        BatchPredictor(**{"model": TARGET, **arguments})  # type: ignore[arg-type] # what is tested


def test_the_ids_of_all_texts_go_to_a_device_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fast(tiny_llama(dtype=torch.float32))
    reader, sent, ids_of = Reader.of(model), list[object](), Reader.ids

    def sending(self: Reader, tokens: Tokens) -> Tensor:
        sent.append([*tokens])
        return ids_of(self, tokens)

    texts = (5, 9, 7), (3,)
    pieces = [Piece(new_past(reader, Shelves()), text, (-1, 0, 1)[: len(text)], 1) for text in texts]
    monkeypatch.setattr(Reader, "ids", sending)
    rows = read_together(reader, pieces)
    assert sent == [[5, 9, 7, 3]]
    monkeypatch.undo()
    fresh = UncachedPredictor(model)
    assert all((row[0] - fresh(text, ())[0]).abs().max() < 1e-3 for row, text in zip(rows, texts, strict=True))
