"""Processors whose state is anywhere: asked in order as `generate` asks them, copied soundly, or refused by name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import process_time
from typing import Any

import pytest
import torch
from attrs import define
from returns.pipeline import flow
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)
from typing_extensions import override

from specflow import (
    CachedPredictor,
    DecodeError,
    DecodeState,
    Dice,
    Finished,
    Fixed,
    LLMDrafter,
    MultinomialProcessor,
    PointMass,
    Proposal,
    Tokens,
    chain,
    run,
    speculative_step,
    start,
)
from specflow.errors import DeadEndError
from specflow.interop import Generate, InOrder, ProcessorList, Stateless, most_likely, sampled
from specflow.models import Loaded
from specflow.stages import Adjust, Block, Draft, Verify, advance, commit
from tests.test_interop import forked
from tests.toys import disturbed, tiny_llama

PROMPT, NEW = (5, 9, 5, 9, 7, 3, 5, 9, 7, 3, 5), 20
LLAMA = tiny_llama()
Function = Callable[[Tensor, Tensor], Tensor]
ROW = torch.arange(64.0)[None]


def every_third(count: int, scores: Tensor) -> Tensor:
    """At every third call, the likeliest token is banned."""
    if count % 3 == 0:
        scores[:, scores.argmax(dim=-1)] = -torch.inf
    return scores


def in_a_closure() -> Function:
    count = 0

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return every_third(count, scores)

    return processor


def in_a_helpers_closure() -> Function:
    count = 0

    def up() -> int:
        nonlocal count
        count += 1
        return count

    return lambda ids, scores: every_third(up(), scores)


def in_a_list_of_a_closure() -> Function:
    calls: list[int] = []

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(1)
        return every_third(len(calls), scores)

    return processor


def in_a_default() -> Function:
    def processor(ids: Tensor, scores: Tensor, calls: list[int] = []) -> Tensor:  # noqa: B006 - the fault to be found
        calls.append(1)
        return every_third(len(calls), scores)

    return processor


def in_an_attribute_of_the_function() -> Function:
    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        vars(processor)["count"] = count = vars(processor).get("count", 0) + 1
        return every_third(count, scores)

    return processor


CALLS: list[int] = []
COUNT = 0


def in_a_global_list() -> Function:
    CALLS.clear()

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        CALLS.append(1)
        return every_third(len(CALLS), scores)

    return processor


def in_a_global() -> Function:
    global COUNT  # noqa: PLW0603 - the fault to be found
    COUNT = 0

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        global COUNT  # noqa: PLW0603 - the same
        COUNT += 1
        return every_third(COUNT, scores)

    return processor


def in_a_generator() -> Function:
    class Generated:
        def __init__(self) -> None:
            self.numbers = (number for number in range(1, 1000))

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            return every_third(next(self.numbers), scores)

    return Generated()


def on_the_class() -> Function:
    class Counted:
        count = 0

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            type(self).count += 1
            return every_third(self.count, scores)

    return Counted()


def in_a_list_of_the_class() -> Function:
    class Counted:
        calls: list[int] = []  # noqa: RUF012 - the fault to be found

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            self.calls.append(1)
            return every_third(len(self.calls), scores)

    return Counted()


def in_a_function_that_is_an_attribute() -> Function:
    class Holding:
        def __init__(self) -> None:
            self.inner = in_a_closure()

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            return self.inner(ids, scores)

    return Holding()


def in_a_method_of_a_list() -> Function:
    class Appending:
        def __init__(self) -> None:
            self.calls: list[int] = []
            self.note = self.calls.append

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            self.note(1)
            return every_third(len(self.calls), scores)

    return Appending()


def beside_a_lock() -> Function:
    class Locked:
        def __init__(self) -> None:
            self.lock, self.count = threading.Lock(), 0

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            with self.lock:
                self.count += 1
            return every_third(self.count, scores)

    return Locked()


def in_a_partial() -> Function:
    def processor(kept: Function, ids: Tensor, scores: Tensor) -> Tensor:
        return kept(ids, scores)

    return partial(processor, in_a_list_of_a_closure())


def in_a_buffer_of_a_module() -> Function:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        @override
        def forward(self, ids: Tensor, scores: Tensor) -> Tensor:
            self.count += 1
            return every_third(self.count, scores)

    class Holding:
        def __init__(self) -> None:
            self.module = Counting()

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            return Tensor(self.module(ids, scores))

    return Holding()


UNSOUND = [
    in_a_closure,
    in_a_helpers_closure,
    in_a_list_of_a_closure,
    in_a_default,
    in_an_attribute_of_the_function,
    in_a_global_list,
    in_a_global,
    in_a_generator,
    on_the_class,
    in_a_list_of_the_class,
    in_a_function_that_is_an_attribute,
    in_a_method_of_a_list,
    beside_a_lock,
    in_a_partial,
    in_a_buffer_of_a_module,
]


def in_attributes() -> Function:
    class Counted:
        def __init__(self) -> None:
            self.state = {"calls": [0]}

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            self.state["calls"].append(1)
            return every_third(sum(self.state["calls"]), scores)

    return Counted()


@define
class Slotted:
    """attrs writes __slots__."""

    count: int = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.count += 1
        return every_third(self.count, scores)


@dataclass(slots=True)
class SlottedData:
    """So do dataclasses."""

    count: int = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.count += 1
        return every_third(self.count, scores)


class Bare:
    """No __dict__, and a state in a tensor of which it also keeps a view."""

    __slots__ = ("count", "view")

    def __init__(self) -> None:
        self.count = torch.zeros(1)
        self.view = self.count[:]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.view += 1
        return every_third(int(self.count), scores)


class Listed(list[int]):
    """Its own items are the state."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.append(1)
        return every_third(len(self), scores)


def a_bound_method() -> Function:
    return Slotted().__call__


SOUND: list[Callable[[], Function]] = [in_attributes, Slotted, SlottedData, Bare, Listed, a_bound_method]


def generated(processor: Function, **settings: object) -> Tokens:
    ids = LLAMA.generate(
        torch.tensor([PROMPT]),
        logits_processor=LogitsProcessorList([processor]),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    return tuple(ids[0].tolist())


def drafts_of(text: Tokens, wrong: int) -> Callable[[Tokens], Iterator[Proposal[PointMass]]]:
    def draft(tokens: Tokens) -> Iterator[Proposal[PointMass]]:
        for i in range(len(tokens), len(text)):
            token = (text[i] + 1) % 64 if i % wrong == 0 else text[i]
            yield Proposal(token)

    return draft


@pytest.mark.parametrize("make", UNSOUND + SOUND)
def test_a_single_text_is_generates_wherever_the_state_is(make: Callable[[], Function]) -> None:
    expected = generated(make())
    assert generated(make(), custom_generate=Generate(drafts_of(expected, 4))) == expected
    assert generated(make(), custom_generate=Generate(forked(expected), Fixed(7))) == expected
    assert generated(lambda ids, scores: scores) != expected


@pytest.mark.parametrize("make", UNSOUND)
def test_a_state_that_no_copy_reaches_is_refused_where_something_goes_back(make: Callable[[], Function]) -> None:
    with pytest.raises(DecodeError, match="InOrder") as caught:
        ProcessorList([make()]).laws(PROMPT, ROW)[0]  # at the latest with the first law, before its token
    assert caught.value.parameter == "processors"


@pytest.mark.parametrize("make", UNSOUND)
def test_a_state_that_no_copy_reaches_is_refused_in_a_batch(make: Callable[[], Function]) -> None:
    with pytest.raises(DecodeError, match="generate one text"):
        LLAMA.generate(
            torch.tensor([PROMPT, PROMPT]),
            logits_processor=LogitsProcessorList([make()]),
            max_new_tokens=5,
            do_sample=False,
            custom_generate=Generate(),
        )


@pytest.mark.parametrize("make", SOUND)
def test_a_state_that_is_copied_goes_back(make: Callable[[], Function]) -> None:
    expected = generated(make())
    target, processor = CachedPredictor(LLAMA), ProcessorList([make()])
    step = speculative_step(drafts_of(expected, 3), target, processor, Dice(), Fixed(5))
    state = start(PROMPT, NEW).unwrap()
    first = step(state)
    assert step(state) == first  # stepped again from where it was
    assert run(step, state).state.tokens == expected


@pytest.mark.parametrize("make", SOUND)
def test_each_row_of_a_batch_has_a_state_of_its_own(make: Callable[[], Function]) -> None:
    given = make()
    ids = LLAMA.generate(
        torch.tensor([PROMPT, PROMPT]),
        logits_processor=LogitsProcessorList([given]),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        custom_generate=Generate(),
    )
    assert [tuple(row) for row in ids.tolist()] == [generated(make())] * 2


def test_block_verification_looks_at_laws_of_drafts_that_fall_and_the_text_keeps_its_law() -> None:
    expected = generated(Slotted())
    processor = ProcessorList([Slotted()])
    draft, verify = Draft(drafts_of(expected, 3)), Verify(CachedPredictor(LLAMA), processor, Block(Dice()))
    adjust = Adjust(Dice())

    def step(state: DecodeState) -> DecodeState | Finished:
        return flow(state, draft, verify, adjust, commit, advance)

    assert run(step, start(PROMPT, NEW).unwrap()).state.tokens == expected


def test_a_drafter_with_a_state_leaves_out_prefixes_and_the_text_is_the_targets() -> None:
    expected = generated(Slotted())
    drafter = LLMDrafter(CachedPredictor(disturbed(LLAMA, 1, 0.05)), ProcessorList([Slotted()]), Dice())
    step = speculative_step(drafter, CachedPredictor(LLAMA), InOrder([Slotted()]), Dice(), Fixed(3))
    assert run(step, start(PROMPT, NEW).unwrap()).state.tokens == expected


def test_a_copy_shares_what_is_held(smollm2: Loaded) -> None:
    class Holding:
        def __init__(self) -> None:
            self.model, self.tokenizer, self.count = LLAMA, smollm2.tokenizer, [0]

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            self.count.append(1)
            return scores

    given = Holding()
    processor = ProcessorList([given])
    processor.laws(PROMPT, ROW)[0]
    (copy,) = processor._states[len(PROMPT) + 1]
    assert isinstance(copy, Holding)
    assert (copy.model, copy.tokenizer) == (given.model, given.tokenizer)
    assert copy.count == [0, 1]
    assert given.count == [0]


def test_a_single_text_asks_the_given_processor_about_each_committed_prefix_once() -> None:
    seen: list[Tokens] = []

    def witness(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(tuple(ids[0].tolist()))
        return scores

    text = generated(witness)
    assert seen == [text[:end] for end in range(len(PROMPT), len(text))]
    seen.clear()
    assert generated(witness, custom_generate=Generate(drafts_of(text, 3))) == text
    assert seen == [text[:end] for end in range(len(PROMPT), len(text))]


@pytest.mark.parametrize("then", [PROMPT, PROMPT[:-1], (*PROMPT, 1, 2), (*PROMPT[:-1], 60, 61)], ids=len)
def test_in_order_refuses_to_go_back_to_fork_and_to_leave_out(then: Tokens) -> None:
    processor = InOrder([Slotted()])
    processor.laws(PROMPT, ROW)[0]
    with pytest.raises(DecodeError, match="ProcessorList"):
        processor.laws(then, ROW)[0]
    processor.laws((*PROMPT, 1), ROW)[0]


def test_functions_of_the_prefix_go_anywhere() -> None:
    parts: list[Function] = [
        RepetitionPenaltyLogitsProcessor(2.0),
        NoRepeatNGramLogitsProcessor(2),
        Stateless(lambda ids, scores: scores),
    ]
    for processor in (InOrder(parts), ProcessorList(parts)):
        for end in (9, 3, 7):
            assert processor.laws(PROMPT[:end], ROW)[0] == PointMass(63)


def test_a_subclass_of_transformers_is_the_users() -> None:
    class Counting(RepetitionPenaltyLogitsProcessor):
        def __init__(self) -> None:
            super().__init__(1.3)
            self.count = 0

        @override
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.count += 1
            return every_third(self.count, super().__call__(input_ids, scores))

    given = Counting()
    processor = ProcessorList([given])
    processor.laws(PROMPT, ROW)[0]
    assert given.count == 0
    (copy,) = processor._states[len(PROMPT) + 1]
    assert isinstance(copy, Counting)
    assert copy.count == 1


def test_only_what_leaves_a_law_behind_any_text_is_processed_at_once() -> None:
    rows = ROW.repeat(3, 1)
    assert isinstance(InOrder([TemperatureLogitsWarper(0.5)]).laws(PROMPT, rows), tuple)
    assert not isinstance(InOrder([SuppressTokensLogitsProcessor([1])]).laws(PROMPT, rows), tuple)
    table = {5: [1, 2]}
    declared = PrefixConstrainedLogitsProcessor(Stateless(lambda batch, ids: table[int(ids[-1])]), 1)
    assert ProcessorList([declared]).laws(PROMPT, ROW)[0] == PointMass(2)
    with pytest.raises(DecodeError, match="table in the closure of <lambda> is a dict"):
        ProcessorList([PrefixConstrainedLogitsProcessor(lambda batch, ids: table[int(ids[-1])], 1)])


def test_a_law_that_is_none_is_refused_naming_position_and_processors() -> None:
    everything = SuppressTokensLogitsProcessor(list(range(64)))

    def nothing(ids: Tensor, scores: Tensor) -> Any:  # noqa: ANN401 - the fault to be found
        return None

    for choose in (most_likely, sampled):
        for kind in (InOrder, ProcessorList):
            with pytest.raises(DecodeError, match=r"\(SuppressTokensLogitsProcessor\) is none: .* position 10"):
                kind([everything], choose).laws(PROMPT, ROW)[0]
            with pytest.raises(DecodeError, match="is none"):
                kind([lambda ids, scores: scores * torch.nan], choose).laws(PROMPT, ROW)[0]
            with pytest.raises(DecodeError, match="no scores of shape"):
                kind([lambda ids, scores: scores[:, 1:]], choose).laws(PROMPT, ROW)[0]
            with pytest.raises(DecodeError, match="no scores of shape"):
                kind([nothing], choose).laws(PROMPT, ROW)[0]
    with pytest.raises(DeadEndError, match="no token has a chance"):
        most_likely(torch.full((3,), -torch.inf))
    with pytest.raises(DecodeError, match="no token has a chance") as caught:
        most_likely(torch.full((3,), torch.nan))
    assert type(caught.value) is DecodeError


def over_at_7(ids: Tensor, scores: Tensor) -> Tensor:
    return torch.full_like(scores, -torch.inf) if int(ids[0, -1]) == 7 else scores


@pytest.mark.parametrize("kind", [InOrder, ProcessorList])
def test_a_draft_after_which_nothing_is_left_stands_and_the_next_step_says_so(
    kind: type[InOrder] | type[ProcessorList],
) -> None:
    row = torch.zeros(9).index_fill(0, torch.tensor(7), 1.0)
    step = speculative_step(
        lambda tokens: iter(chain((7, 8))),
        lambda tokens, drafts: row.expand(len(drafts) + 1, -1),
        kind([over_at_7]),
        Dice(),
    )
    outcome = step(start((5,), 9).unwrap())
    assert isinstance(outcome, DecodeState)
    assert outcome.output == (7,)
    with pytest.raises(DeadEndError, match=r"after the processors \(over_at_7\) is none: .* position 1"):
        step(outcome)


@pytest.mark.parametrize("wrong", [None, 3, "processors", torch.zeros(3), [3], [None], PointMass(1)], ids=str)
def test_processors_of_wrong_types_are_refused(wrong: object) -> None:
    for kind in (InOrder, ProcessorList):
        with pytest.raises(DecodeError):
            kind(wrong)  # type: ignore[arg-type]
        with pytest.raises(DecodeError):
            kind([], wrong)  # type: ignore[arg-type]
        with pytest.raises(DecodeError):
            kind([]).laws(PROMPT, wrong)  # type: ignore[arg-type]
    for function in (most_likely, sampled, Stateless):
        with pytest.raises(DecodeError):
            function(None)  # type: ignore[arg-type]


def test_a_sampled_drafter_and_a_target_in_order_agree() -> None:
    drafter = LLMDrafter(CachedPredictor(disturbed(LLAMA, 1, 0.05)), MultinomialProcessor(1.0), Dice())
    step = speculative_step(drafter, CachedPredictor(LLAMA), InOrder([Slotted()], sampled), Dice(), Fixed(3))
    assert len(run(step, start(PROMPT, NEW).unwrap()).state.output) == NEW


def test_a_processor_that_holds_much_costs_what_it_costs_in_generate(smollm2: Loaded) -> None:
    class Heavy:
        def __init__(self) -> None:
            self.model, self.tokenizer, self.count = smollm2.model, smollm2.tokenizer, 0
            self.table = {i: [i] for i in range(300_000)}

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            self.count += 1
            return scores

    ids = torch.tensor([smollm2.chat("Hello.")])

    def seconds(**how: object) -> float:
        before = process_time()
        smollm2.model.generate(
            ids,
            logits_processor=LogitsProcessorList([Heavy()]),
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
            **how,
        )
        return process_time() - before

    seconds()
    assert min(seconds(custom_generate=Generate()) for _ in range(2)) < 2 * min(seconds() for _ in range(2))
