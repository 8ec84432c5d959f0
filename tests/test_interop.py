"""transformers' parts inside our decoders, and our decoders behind transformers' own `generate`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
import torch
from attrs import evolve
from returns.pipeline import flow
from torch import Tensor
from transformers import (
    AsyncTextIteratorStreamer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TextStreamer,
)

from specflow import (
    TEXT,
    CachedPredictor,
    DecodeError,
    DecodeState,
    Dice,
    Finished,
    Fixed,
    GreedyProcessor,
    LLMDrafter,
    MultinomialProcessor,
    PointMass,
    Processor,
    Proposal,
    Step,
    Tokens,
    autoregressive_step,
    run,
    speculative_step,
    start,
)
from specflow.batch.modes import Modes, modes_now
from specflow.interop import Generate, ProcessorList, new_tokens, sampled, stops, stream
from specflow.models import Loaded
from specflow.stages import Adjust, Draft, Reject, StopWhen, Verify, advance, commit
from specflow.state import CertainDrafter
from tests.toys import disturbed, oracle, tiny_llama

PROMPT = (5, 9, 5, 9, 7, 3, 5, 9, 7, 3, 5)
NEW = 20
STOP = (2,)  # the eos of its config, at which `generate` stops


def mostly(text: Tokens, wrong: int = 4) -> CertainDrafter:
    """Drafts `text`, but for every token at a multiple of `wrong`."""

    def draft(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        for i in range(len(tokens), len(text)):
            token = (text[i] + 1) % 64 if i % wrong == 0 else text[i]
            yield Proposal(token)

    return draft


def forked(text: Tokens) -> CertainDrafter:
    """Drafts a tree: each token of `text` with a wrong one beside it, which is the first of the two at even places."""

    def draft(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        right = TEXT
        for i in range(len(tokens), len(text)):
            both = [text[i], (text[i] + 1) % 64]
            for token in both if i % 2 else both[::-1]:
                yield Proposal(token, parent=right)
            right = 2 * (i - len(tokens)) + 1 - i % 2

    return draft


def generated(**settings: object) -> Tokens:
    """What `generate` itself says."""
    ids = tiny_llama().generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, **settings)
    return tuple(ids[0].tolist())


def decoded(processor: Processor, drafter: CertainDrafter | None = None) -> Tokens:
    target = CachedPredictor(tiny_llama())
    if drafter is None:
        step = autoregressive_step(target, processor, Dice())
    else:
        step = speculative_step(drafter, target, processor, Dice(), Fixed(5), (target,))
    return run(step, start(PROMPT, NEW, STOP).unwrap()).state.tokens


def test_transformers_processors_see_the_prefix_of_each_position() -> None:
    expected = generated(repetition_penalty=1.3, no_repeat_ngram_size=2)
    assert expected != generated()

    def processor() -> ProcessorList:
        return ProcessorList(
            LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(2)])
        )

    assert decoded(processor()) == expected
    assert decoded(processor(), mostly(expected)) == expected


class Witness:
    """A processor with a state: it bans what it has chosen at every third call, and remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: list[Tokens] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(tuple(input_ids[0].tolist()))
        if len(self.seen) % 3 == 0:
            scores[:, scores.argmax(dim=-1)] = -torch.inf
        return scores


def prefixes(text: Tokens) -> list[Tokens]:
    return [text[:end] for end in range(len(PROMPT), len(text))]


@pytest.mark.parametrize("wrong", [1, 2, 3, 50])
def test_a_stateful_processor_has_seen_exactly_the_committed_prefixes(wrong: int) -> None:
    given = Witness()
    honest = tiny_llama().generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, logits_processor=LogitsProcessorList([given])
    )
    expected = tuple(honest[0].tolist())
    assert given.seen == prefixes(expected)

    untouched = Witness()
    processor = ProcessorList(LogitsProcessorList([untouched]))
    assert decoded(processor, mostly(expected, wrong)) == expected
    (after,) = processor._states[len(expected)]
    assert isinstance(after, Witness)
    assert after.seen == prefixes(expected)
    assert untouched.seen == []


def test_going_back_to_a_state_that_is_lost_is_refused_and_to_the_prompt_it_is_not() -> None:
    processor = ProcessorList(LogitsProcessorList([Witness()]))
    step = autoregressive_step(CachedPredictor(tiny_llama()), processor, Dice())
    text = run(step, start(PROMPT, 100).unwrap()).state.tokens
    logits = torch.zeros(1, 64)
    with pytest.raises(DecodeError, match="go back by more than 64 positions: received position 30"):
        processor.laws(text[:30], logits)[0]
    for length in (100, len(PROMPT)):
        processor.laws(text[:length], logits)[0]
        (state,) = processor._states[length + 1]
        assert isinstance(state, Witness)
        assert state.seen == prefixes(text[: length + 1])


def test_another_text_needs_another_list_where_processors_have_a_state() -> None:
    processor, logits = ProcessorList(LogitsProcessorList([Witness()])), torch.zeros(1, 64)
    processor.laws(PROMPT, logits)[0]
    for other in ((1, 2), PROMPT[:-1], (*PROMPT[:-1], 60, 61)):
        with pytest.raises(DecodeError, match="one list is for one text"):
            processor.laws(other, logits)[0]


def test_functions_of_the_prefix_can_be_taken_back_anywhere() -> None:
    processor = ProcessorList(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(2.0)]))
    text, logits = tuple(range(5, 60)) * 3, torch.arange(64.0)[None] + 1
    for end in (150, 30, 100, 12):
        assert processor.laws(text[:end], logits)[0] == PointMass(63)


def test_sampled_laws_are_softmaxes_of_the_processed_scores() -> None:
    logits = torch.randn(3, 64, dtype=torch.float64)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)])
    laws = ProcessorList(processors, sampled).laws(PROMPT, logits)
    for i in range(len(laws)):
        law = laws[i]
        ids = torch.tensor([PROMPT[: len(PROMPT) - 2 + i]])
        scores = processors(ids, logits[i][None].float())
        assert torch.equal(law.probs if not isinstance(law, PointMass) else torch.empty(0), scores[0].softmax(-1))


def test_stopping_criteria_see_each_committed_prefix_and_end_the_text_inside_a_draft() -> None:
    expected = tuple(oracle(PROMPT, tiny_llama(), NEW))
    seen: list[Tokens] = []

    def unlucky(input_ids: Tensor, scores: object) -> Tensor:
        seen.append(tuple(input_ids[0].tolist()))
        return torch.tensor([len(seen) == 7])

    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=len(PROMPT) + 12), unlucky])
    target = CachedPredictor(tiny_llama())
    draft = Draft(mostly(PROMPT + expected, 5))
    verify, adjust, stop = Verify(target, GreedyProcessor(), Reject(Dice())), Adjust(Dice()), StopWhen(stops(criteria))

    def step(state: DecodeState) -> DecodeState | Finished:
        return flow(state, draft, verify, adjust, stop, commit, advance)

    finished = run(step, start(PROMPT, NEW).unwrap())
    assert finished.state.output == expected[:7]
    assert seen == [PROMPT + expected[:end] for end in range(1, 8)]


LLAMA = tiny_llama()
CLOSE = disturbed(LLAMA, 1, 0.05)
KNOWN = (*PROMPT, *oracle(PROMPT, LLAMA, 60))
DRAFTERS: dict[str, Callable[[], Generate]] = {
    "nothing": Generate,
    "llm": lambda: Generate(LLMDrafter(CachedPredictor(CLOSE), GreedyProcessor(), Dice()), Fixed(4)),
    "lookup": lambda: Generate(mostly(KNOWN)),
    "tree": lambda: Generate(forked(KNOWN), Fixed(7)),
}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 15, "eos_token_id": [3, 60]},
        {"eos_token_id": list(range(40))},
        {"suppress_tokens": [1, 2, 3], "forced_eos_token_id": 7},
        {"use_cache": False, "bad_words_ids": [[5, 6]]},
        {"max_length": 40, "max_new_tokens": None},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
def test_generate_says_what_it_says_without_us(drafter: str, settings: dict[str, object]) -> None:
    arguments: dict[str, object] = {"max_new_tokens": NEW, "do_sample": False, **settings}
    ids = torch.tensor([PROMPT])
    expected = LLAMA.generate(ids, **arguments)
    ours = LLAMA.generate(ids, custom_generate=DRAFTERS[drafter](), **arguments)
    if "return_dict_in_generate" in settings:
        expected, ours = expected.sequences, ours.sequences
    assert ours.tolist() == expected.tolist()


@pytest.mark.parametrize("drafter", ["nothing", "llm", "tree"])
def test_a_left_padded_batch_is_generated_row_by_row(drafter: str) -> None:
    ids = torch.tensor([[0, 0, 5, 9, 5], [0, 3, 7, 9, 9], [5, 9, 5, 9, 7]])
    arguments: dict[str, object] = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "attention_mask": (ids > 0).long(),
        "pad_token_id": 0,
        "eos_token_id": [4, 5, 6, 7, 8],
        "repetition_penalty": 1.2,
    }
    expected = LLAMA.generate(ids, **arguments)
    assert LLAMA.generate(ids, custom_generate=DRAFTERS[drafter](), **arguments).tolist() == expected.tolist()


def test_sampling_through_generate_has_the_law_of_its_warpers() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=3, top_p=0.95, max_new_tokens=1)
    with torch.no_grad():
        logits = LLAMA(torch.tensor([PROMPT])).logits[0, -1].float() / 0.7
    best = logits.topk(3)
    probs = best.values.softmax(-1)
    kept = probs.cumsum(-1) - probs < 0.95
    probs = torch.where(kept, probs, 0.0) / probs[kept].sum()
    draws = 600
    ids = LLAMA.generate(
        torch.tensor([PROMPT]), config, custom_generate=DRAFTERS["nothing"](), num_return_sequences=draws
    )
    counts = torch.bincount(ids[:, -1], minlength=64)[best.indices]
    assert counts.sum() == draws
    assert ((counts / draws - probs).abs() < 5 * (probs * (1 - probs) / draws).sqrt() + 1e-6).all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("num_beams", {"num_beams": 3}),
        ("output_scores", {"return_dict_in_generate": True, "output_scores": True}),
        ("output_logits", {"return_dict_in_generate": True, "output_logits": True}),
        ("cache_implementation", {"cache_implementation": "static"}),
        ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 3}),
        ("prefill_chunk_size", {"prefill_chunk_size": 4}),
        ("position_ids", {"position_ids": torch.arange(3, 3 + len(PROMPT))[None]}),
        ("attention_mask", {"attention_mask": torch.tensor([[1] * (len(PROMPT) - 1) + [0]])}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(DecodeError) as caught:
        LLAMA.generate(torch.tensor([PROMPT]), custom_generate=Generate(), max_new_tokens=3, pad_token_id=0, **settings)
    assert caught.value.parameter == name


def test_a_cache_that_was_filled_before_is_refused() -> None:
    cache = DynamicCache(config=LLAMA.config)
    LLAMA(torch.tensor([PROMPT[:4]]), cache=cache)
    with pytest.raises(DecodeError, match="a cache of the caller's cannot be filled"):
        LLAMA.generate(torch.tensor([PROMPT]), custom_generate=Generate(), max_new_tokens=3, cache=cache)


def greedy_step(model_text: Tokens) -> Step:
    return speculative_step(mostly(model_text), CachedPredictor(tiny_llama()), GreedyProcessor(), Dice(), Fixed(4))


class Kept:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.values.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_prompt_and_then_what_each_step_adds() -> None:
    expected = tuple(oracle(PROMPT, tiny_llama(), NEW))
    kept = Kept()
    finished = stream(greedy_step(PROMPT + expected), start(PROMPT, NEW).unwrap(), kept)
    assert finished.state.output == expected
    assert kept.values[0] == list(PROMPT)
    assert [token for new in kept.values[1:] for token in new] == list(expected)
    assert all(len(new) == 1 for new in kept.values[1:])
    assert finished.state.tally.steps < NEW
    assert kept.ended == 1


def test_new_tokens_come_while_others_run_and_stop_when_nobody_asks() -> None:
    expected = tuple(oracle(PROMPT, tiny_llama(), NEW))
    step, steps = greedy_step(PROMPT + expected), 0

    def counted(state: DecodeState) -> DecodeState | Finished:
        nonlocal steps
        steps += 1
        return step(state)

    async def everything() -> Tokens:
        text: Tokens = ()
        async for tokens in new_tokens(counted, start(PROMPT, NEW).unwrap()):
            text += tokens
        return text

    async def two_steps() -> None:
        seen = 0
        async for _ in new_tokens(counted, start(PROMPT, NEW).unwrap()):
            seen += 1
            if seen == 2:
                return

    async def both() -> tuple[Tokens, Tokens]:
        other = greedy_step(PROMPT + expected)
        text: Tokens = ()
        mine = asyncio.create_task(everything())
        async for tokens in new_tokens(other, start(PROMPT, NEW).unwrap()):
            text += tokens
        return await mine, text

    assert asyncio.run(both()) == (expected, expected)
    steps = 0
    asyncio.run(two_steps())
    assert steps == 2


def test_new_tokens_are_decoded_in_the_modes_of_who_asks_for_them() -> None:
    seen: list[Modes] = []

    def noting(state: DecodeState) -> DecodeState:
        seen.append(modes_now())
        return evolve(state, tokens=(*state.tokens, 1))

    async def both() -> list[Modes]:
        mine = []
        for mode in (torch.autocast("cpu"), torch.no_grad(), torch.inference_mode()):
            with mode:
                mine.append(modes_now())
                assert [tokens async for tokens in new_tokens(noting, start(PROMPT, 1).unwrap())] == [(1,)]
        assert [tokens async for tokens in new_tokens(noting, start(PROMPT, 1).unwrap())] == [(1,)]
        return [*mine, modes_now()]

    assert asyncio.run(both()) == seen
    assert len({*seen}) == 4


def test_text_streamers_print_and_iterate(smollm2: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = smollm2.chat("Say hello.")
    target = CachedPredictor(smollm2.model)
    step = autoregressive_step(target, GreedyProcessor(), Dice())
    state = start(prompt, 6, smollm2.stop).unwrap()
    finished = stream(step, state, TextStreamer(smollm2.tokenizer, skip_prompt=True))
    text = smollm2.tokenizer.decode(finished.state.output)
    assert capsys.readouterr().out == text + "\n"

    async def pieces() -> list[str]:
        streamer = AsyncTextIteratorStreamer(smollm2.tokenizer, skip_prompt=True)
        running = asyncio.create_task(asyncio.to_thread(stream, step, state, streamer))
        found = [piece async for piece in streamer]
        await running
        return found

    assert "".join(asyncio.run(pieces())) == text
    ids = torch.tensor([prompt])
    behind = smollm2.model.generate(ids, custom_generate=Generate(), max_new_tokens=6, do_sample=False)
    assert tuple(behind[0].tolist()) == finished.state.tokens


def test_a_spread_drafter_and_a_stateful_target_agree_on_lengths() -> None:
    drafter = LLMDrafter(CachedPredictor(disturbed(LLAMA, 1, 0.05)), MultinomialProcessor(1.0), Dice())
    processor = ProcessorList(LogitsProcessorList([Witness()]), sampled)
    step = speculative_step(drafter, CachedPredictor(LLAMA), processor, Dice(), Fixed(3))
    text = run(step, start(PROMPT, NEW).unwrap()).state.tokens
    (after,) = processor._states[len(text)]
    assert isinstance(after, Witness)
    assert after.seen == prefixes(text)
