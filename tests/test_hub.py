"""A batch of decodes is each decode alone: who waits for whom, in which order, and how they end changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import combinations, count
from threading import Thread, current_thread
from typing import cast
from weakref import ref

import pytest
import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor

from specflow import (
    DecodeError,
    Finished,
    Fixed,
    GreedyProcessor,
    MultinomialProcessor,
    SharedNoise,
    SuffixDrafter,
    run,
    seed_coupled_step,
    start,
)
from specflow.batch import Asked, Failed, Reads, Reply, Shared, together
from specflow.testing import TableModel

TABLE = TableModel(5, seed=3)


def alone(asked: Sequence[Asked]) -> list[Reply]:
    """A reading of several texts that is each text's own."""
    return [TABLE(each.tokens, each.drafts) for each in asked]


def counted(sizes: list[int]) -> Reads:
    def read(asked: Sequence[Asked]) -> list[Reply]:
        sizes.append(len(asked))
        return alone(asked)

    return read


def text(read: Reads, number: int, length: int = 8) -> Callable[[], Finished]:
    """A decode of a text of its own, with drafts, by a seed of its own."""

    def decode() -> Finished:
        noise = SharedNoise(number)
        step = seed_coupled_step(SuffixDrafter(), Shared(read), MultinomialProcessor(1.0), noise, Fixed(3))
        return run(step, start([number % 5, (number + 1) % 5], length, [4]).unwrap())

    return decode


@pytest.mark.parametrize("slots", [1, 2, 7, 100])
def test_every_text_is_the_text_that_it_is_alone(slots: int) -> None:
    sizes: list[int] = []
    read = counted(sizes)
    ends = dict(together((text(read, i) for i in range(20)), slots))
    assert ends == {i: text(alone, i)() for i in range(20)}
    assert max(sizes) == min(slots, 20)


def test_two_decodes_in_every_order() -> None:
    """The hub adds nothing: whoever is answered first, the texts are the same."""
    expected = [text(alone, i)() for i in (1, 2)]
    orders = [[int(turn in first) for turn in range(10)] for first in combinations(range(10), 5)]
    for order in orders:
        turns = iter(order)

        def read(asked: Sequence[Asked], turns: Iterator[int] = turns) -> list[Reply]:
            turn = next(turns, 0) % len(asked)
            return [rows if i == turn else None for i, rows in enumerate(alone(asked))]

        assert dict(together([text(read, 1), text(read, 2)], 2)) == dict(enumerate(expected))


def test_a_place_that_becomes_free_is_taken_and_no_more_are_asked_for() -> None:
    begun: list[int] = []

    def decode(i: int) -> int:
        for _ in range(i % 3 + 1):
            Shared(alone)((0,), ())
        return i

    def decodes() -> Iterator[Callable[[], int]]:
        for i in count():
            begun.append(i)
            yield partial(decode, i)

    ends = together(decodes(), 3)
    seen = [next(ends)[0] for _ in range(30)]
    assert len(begun) <= 30 + 3
    assert sorted(seen) == sorted({*seen})
    ends.close()


class Coming:
    """Decodes that come one by one: it ends, and goes on where another has come meanwhile."""

    def __init__(self, *first: Callable[[], Finished]) -> None:
        self.waiting = [*first]

    def __iter__(self) -> Coming:
        return self

    def __next__(self) -> Callable[[], Finished]:
        if not self.waiting:
            raise StopIteration
        return self.waiting.pop(0)


def test_a_decode_that_comes_while_others_run_joins_them() -> None:
    sizes: list[int] = []

    def read(asked: Sequence[Asked]) -> list[Reply]:
        sizes.append(len(asked))
        if len(sizes) == 2:
            coming.waiting.append(text(read, 1))
        return alone(asked)

    coming = Coming(text(read, 3))
    assert dict(together(coming, 2)) == {0: text(alone, 3)(), 1: text(alone, 1)()}
    assert sizes[:3] == [1, 1, 2]


def test_what_one_decode_raises_ends_that_one_alone() -> None:
    def failing() -> Finished:
        Shared(alone)((0,), ())
        raise ZeroDivisionError("mine")

    ends = dict(together([text(alone, 0), failing, text(alone, 2)], 3))
    failed = ends.pop(1)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ZeroDivisionError)
    assert ends == {0: text(alone, 0)(), 2: text(alone, 2)()}


def test_an_error_that_is_an_answer_is_raised_where_it_was_asked_for() -> None:
    def read(asked: Sequence[Asked]) -> list[Reply]:
        return [LookupError("no") if each.tokens == (1,) else TABLE(each.tokens, ()) for each in asked]

    def decode(token: int) -> bool:
        try:
            Shared(read)((token,), ())
        except LookupError:
            return False
        return True

    assert dict(together([partial(decode, i) for i in range(3)], 3)) == {0: True, 1: False, 2: True}
    with pytest.raises(LookupError):
        Shared(read)((1,), ())


@pytest.mark.parametrize("where", ["decode", "pass", "source"])
def test_ctrl_c_ends_all_and_unwinds_each(where: str) -> None:
    unwound: list[int] = []
    passes: list[int] = []

    def read(asked: Sequence[Asked]) -> list[Reply]:
        passes.append(len(asked))
        if where == "pass" and len(passes) == 3:
            raise KeyboardInterrupt
        return alone(asked)

    def decode(i: int) -> int:
        try:
            for k in range(9):
                Shared(read)((i,), ())
                if where == "decode" and (i, k) == (1, 3):
                    raise KeyboardInterrupt
        finally:
            unwound.append(i)
        return i

    def decodes() -> Iterator[Callable[[], int]]:
        for i in range(3):
            yield partial(decode, i)
        if where == "source":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(together(decodes(), 3 + (where == "source")))
    assert sorted(unwound) == [0, 1, 2]


def test_decodes_that_are_abandoned_unwind_and_leave_nothing() -> None:
    said: list[str] = []
    held: list[ref[Tensor]] = []

    def decode(i: int) -> int:
        rows = torch.zeros(3)
        held.append(ref(rows))
        try:
            while True:
                Shared(alone)((i,), ())
                if i == 0:
                    return 0
        except GreenletExit:
            said.append(f"{i} unwinds, and may still read: {list(Shared(alone)((i,), ()).shape)}")
            raise

    ends = together([partial(decode, i) for i in range(3)], 3)
    assert next(ends) == (0, 0)
    ends.close()
    gc.collect()
    assert sorted(said) == [f"{i} unwinds, and may still read: [1, 5]" for i in (1, 2)]
    assert [kept() for kept in held] == [None] * 3


def test_one_that_raises_while_it_unwinds_does_not_keep_the_others_from_it() -> None:
    unwound: list[int] = []

    def decode(i: int) -> int:
        try:
            while True:
                Shared(alone)((i,), ())
        finally:
            unwound.append(i)
            if i == 1:
                raise ValueError("in the cleaning")

    decodes: list[Callable[[], int]] = [*[partial(decode, i) for i in range(3)], lambda: 0]
    ends = together(decodes, 4)
    next(ends)
    with pytest.raises(ValueError, match="in the cleaning"):
        ends.close()
    assert sorted(unwound) == [0, 1, 2]


def modes() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *[(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda", "mps", "xpu")],
        torch.is_autocast_cache_enabled(),
    )


MODES: dict[str, Callable[[], ExitStack]] = {}


@contextmanager
def casting(kind: str, dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast` on a kind of device, which may be none of this machine: there torch's own leaves it off."""
    was = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    torch.set_autocast_enabled(kind, True)
    torch.set_autocast_dtype(kind, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, was[0])
        torch.set_autocast_dtype(kind, was[1])


def entered(*contexts: Callable[[], object]) -> Callable[[], ExitStack]:
    def enter() -> ExitStack:
        stack = ExitStack()
        for make in contexts:
            stack.enter_context(make())  # type: ignore[arg-type] # all of them are contexts
        return stack

    return enter


MODES = {
    "as the caller": entered(),
    "no gradients": entered(torch.no_grad),
    "gradients": entered(torch.enable_grad),
    "inference": entered(torch.inference_mode),
    "autocast": entered(lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast to half": entered(lambda: torch.autocast("cpu", torch.float16, cache_enabled=False)),
    "inference, autocast": entered(torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast on Intel's": entered(lambda: casting("xpu", torch.float16)),
    "autocast on Apple's": entered(lambda: casting("mps", torch.bfloat16)),
}


@pytest.mark.parametrize("outside", MODES)
def test_each_decode_keeps_torchs_modes_as_it_sets_them(outside: str) -> None:
    """Across switches, as they begin and end at different passes; those in other modes are not read in one pass."""
    seen: list[set[tuple[object, ...]]] = []
    own: dict[int, tuple[object, ...]] = {}

    def read(asked: Sequence[Asked]) -> list[Reply]:
        seen.append({own[each.tokens[0]] for each in asked} | {modes()})
        return alone(asked)

    def decode(i: int, name: str) -> int:
        for _ in range(i % 3):
            own[i] = modes()
            Shared(read)((i, 0), ())
        with MODES[name]():
            own[i] = modes()
            for _ in range(3):
                Shared(read)((i, 0), ())
                assert modes() == own[i]
        own[i] = modes()
        Shared(read)((i, 0), ())
        assert modes() == began
        return i

    with MODES[outside]():
        began = modes()
        decodes = [partial(decode, i, name) for i, name in enumerate(2 * list(MODES))]
        assert {number for number, end in together(decodes, 5) if end == number} == {*range(len(decodes))}
        assert modes() == began
    assert all(len(both) == 1 for both in seen)


def test_modes_that_the_caller_sets_between_two_texts_reach_no_decode() -> None:
    def decode() -> tuple[object, ...]:
        before = modes()
        for _ in range(5):
            Shared(alone)((0,), ())
            assert modes() == before
        return before

    began = modes()
    ends = together([lambda: began, decode, decode, modes, decode], 3)
    told = [next(ends)[1]]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = modes()
        told.append(next(ends)[1])
        assert modes() == inside
    told += [end for _, end in ends]
    assert told == [began] * 5


VARIABLE: ContextVar[int] = ContextVar("VARIABLE", default=-1)


def test_each_decode_keeps_its_context_variables() -> None:
    def decode(i: int) -> tuple[int, int]:
        before = VARIABLE.get()
        VARIABLE.set(i)
        for _ in range(3):
            Shared(alone)((i,), ())
        return before, VARIABLE.get()

    VARIABLE.set(77)
    assert dict(together([partial(decode, i) for i in range(3)], 2)) == {i: (77, i) for i in range(3)}
    assert VARIABLE.get() == 77


def test_a_decode_may_run_a_batch_of_its_own() -> None:
    sizes: list[int] = []
    read = counted(sizes)
    inner = [text(read, i) for i in range(3)]
    outer = [lambda: sorted(together(inner, 2)), text(read, 7), lambda: sorted(together(inner, 3))]
    ends = dict(together(outer, 3))
    expected = [(i, text(alone, i)()) for i in range(3)]
    assert (ends[0], ends[1], ends[2]) == (expected, text(alone, 7)(), expected)


def test_greenlets_of_somebody_else_are_no_decodes() -> None:
    """Inside of one, a batch runs as ever; and what a decode runs in one reads alone."""
    sizes: list[int] = []
    read = counted(sizes)

    def within_a_decode() -> Finished:
        end: Finished = greenlet(text(read, 3)).switch()
        return end

    def outer() -> dict[int, Finished | Failed]:
        return dict(together([within_a_decode, text(read, 1)], 2))

    ends = greenlet(outer).switch()
    assert ends == {0: text(alone, 3)(), 1: text(alone, 1)()}
    assert {*sizes} == {1}


def test_an_iterator_may_be_gone_on_with_in_another_greenlet() -> None:
    ends = together([text(alone, i) for i in range(6)], 2)
    got = [next(ends)]
    got += greenlet(lambda: [next(ends) for _ in range(3)]).switch()
    got += [*ends]
    assert dict(got) == {i: text(alone, i)() for i in range(6)}


def in_a_thread(ask: Callable[[], object]) -> list[object]:
    """What it returned or raised there."""
    found: list[object] = []

    def asking() -> None:
        try:
            found.append(ask())
        except Exception as error:
            found.append(error)

    thread = Thread(target=asking)
    thread.start()
    thread.join()
    return found


@pytest.mark.parametrize("slots", [1, 3])
def test_another_thread_is_refused_and_the_batch_goes_on_in_its_own(slots: int) -> None:
    ends = together([text(alone, i) for i in range(6)], slots)
    got = [next(ends)]
    for ask in (partial(next, ends), ends.close, partial(ends.throw, KeyError("theirs"))):
        (error,) = in_a_thread(ask)
        assert isinstance(error, DecodeError)
        assert "a batch is gone on with in another thread" in str(error)
        got.append(next(ends))
    assert dict([*got, *ends]) == {i: text(alone, i)() for i in range(6)}
    assert in_a_thread(lambda: list(ends)) == [[]]
    assert in_a_thread(ends.close) == [None]


def test_a_batch_that_nobody_began_may_begin_in_another_thread() -> None:
    ends = together([text(alone, i) for i in range(3)], 2)
    assert in_a_thread(lambda: dict(ends)) == [{i: text(alone, i)() for i in range(3)}]
    assert in_a_thread(together([text(alone, 1)]).close) == [None]


def test_decodes_that_are_abandoned_in_another_thread_unwind_in_their_own() -> None:
    unwound: list[tuple[int, Thread, int]] = []

    def decode(i: int) -> int:
        try:
            while True:
                Shared(alone)((i,), ())
                if i == 0:
                    return 0
        finally:
            unwound.append((i, current_thread(), len(Shared(alone)((i,), ()))))

    held = [together([partial(decode, i) for i in range(3)], 3)]
    assert next(held[0]) == (0, 0)
    assert in_a_thread(held.clear) == [None]
    gc.collect()
    assert dict(together([text(alone, 1)])) == {0: text(alone, 1)()}
    assert sorted(unwound, key=lambda each: each[0]) == [(i, current_thread(), 1) for i in range(3)]


def test_a_batch_whose_thread_has_ended_can_be_closed() -> None:
    batches = [together([text(alone, i) for i in range(6)], 3) for _ in range(3)]
    assert in_a_thread(lambda: len([next(ends) for ends in batches])) == [3]
    with pytest.raises(DecodeError, match="another thread: received MainThread; close it, as the thread that began it"):
        next(batches[0])
    with pytest.raises(KeyError, match="mine"), closing(batches[1]):
        raise KeyError("mine")
    batches[2].close()
    batches[0].close()
    assert [*map(list, batches)] == [[], [], []]


def test_what_is_thrown_at_a_batch_ends_it() -> None:
    ends = together([text(alone, i) for i in range(6)], 2)
    next(ends)
    with pytest.raises(KeyError, match="mine"):
        ends.throw(KeyError("mine"))
    assert [*ends] == []


def test_two_hubs_in_two_threads_do_not_meet() -> None:
    ends: dict[int, dict[int, Finished | Failed]] = {}
    sizes: list[int] = []
    read = counted(sizes)

    def one(k: int) -> None:
        ends[k] = dict(together([text(read, i) for i in range(8)], 2 + k))

    threads = [Thread(target=one, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {i: text(alone, i)() for i in range(8)}
    assert ends == dict.fromkeys(range(3), expected)
    assert max(sizes) <= 4


def test_nobody_waits_for_ever() -> None:
    """One text asks another model than the seven others do, who never stop."""
    passes: list[str] = []

    def of(name: str) -> Reads:
        def read(asked: Sequence[Asked]) -> list[Reply]:
            passes.append(name)
            return alone(asked)

        return read

    common, rare = of("common"), of("rare")

    def endless() -> int:
        while True:
            Shared(common)((0,), ())

    def seldom() -> int:
        for _ in range(5):
            Shared(rare)((0,), ())
        return 1

    ends = together([*[endless] * 7, seldom], 8)
    assert next(ends) == (7, 1)
    ends.close()
    assert passes.count("rare") == 5
    assert len(passes) <= 5 * 10


def test_of_several_models_the_one_with_the_most_askers_goes_first() -> None:
    order: list[tuple[str, int]] = []

    def of(name: str) -> Reads:
        def read(asked: Sequence[Asked]) -> list[Reply]:
            order.append((name, len(asked)))
            return alone(asked)

        return read

    few, many = of("few"), of("many")
    list(together([partial(Shared(read), (0,), ()) for read in (few, many, many, few, many)], 5))
    assert order == [("many", 3), ("few", 2)]


@pytest.mark.parametrize("slots", [0, -1, 1.5, True, "2", None])
def test_slots_that_are_no_number_are_refused_at_once(slots: int) -> None:
    with pytest.raises(DecodeError, match="slots"):
        together([], slots)


@pytest.mark.parametrize("decodes", [None, 3, text(alone, 1)])
def test_what_is_not_several_is_refused_at_once(decodes: list[Callable[[], int]]) -> None:
    with pytest.raises(DecodeError, match="decodes are not several"):
        together(decodes, 2)


def test_what_is_no_decode_fails_alone() -> None:
    decodes = cast("list[Callable[[], int]]", [3, lambda: 5])
    ends = dict(together(decodes, 2))
    assert ends.pop(1) == 5
    assert isinstance(failed := ends[0], Failed)
    assert isinstance(failed.error, DecodeError)


def test_no_decodes_are_a_batch() -> None:
    assert list(together([], 3)) == []


def test_shared_reads_at_once_outside_and_refuses_what_is_no_reading() -> None:
    assert torch.equal(Shared(alone)((1, 2), ()), TABLE((1, 2), ()))
    with pytest.raises(DecodeError, match="read"):
        Shared(3)  # type: ignore[arg-type] # what is tested
    step = seed_coupled_step(SuffixDrafter(), Shared(alone), GreedyProcessor(), SharedNoise(1))
    assert run(step, start([1], 4).unwrap()).state.output
