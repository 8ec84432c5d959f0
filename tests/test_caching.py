"""`prune_cache`, and the layers that a memo writes in place."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import cast

import numpy
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from specflow import DecodeError
from specflow.caches import BLOCK, Past, Roomy, Row, Shelves, prune_cache
from tests.architectures import ARCHITECTURES
from tests.toys import tiny_llama

MODEL = tiny_llama()
TEXT = torch.tensor([[3, 4, 5, 6, 7, 8]])


def filled() -> DynamicCache:
    cache = DynamicCache(config=MODEL.config)
    MODEL(TEXT, cache=cache, use_cache=True)
    return cache


def rows(cache: DynamicCache) -> list[Tensor]:
    parts = [part for layer in cache.layers if isinstance(layer, DynamicLayer) for part in (layer.keys, layer.values)]
    return [part for part in parts if part is not None]


def test_a_pruned_dynamic_cache_decodes_like_a_shorter_text() -> None:
    pruned = prune_cache(filled(), 2)
    assert pruned.get_seq_length() == 4
    logits = MODEL(torch.tensor([[9]]), cache=pruned, use_cache=True).logits
    torch.testing.assert_close(logits[0, -1], MODEL(torch.tensor([[3, 4, 5, 6, 9]])).logits[0, -1])


def test_the_given_cache_stays_as_it_was() -> None:
    cache = filled()
    before = [row.clone() for row in rows(cache)]
    pruned = prune_cache(cache, 2)
    MODEL(torch.tensor([[9, 9, 9]]), cache=pruned, use_cache=True)
    assert cache.get_seq_length() == 6
    assert all(torch.equal(a, b) for a, b in zip(before, rows(cache), strict=True))


def test_tuple_caches() -> None:
    keys, values = torch.arange(24.0).reshape(1, 2, 6, 2), torch.arange(24.0, 48.0).reshape(1, 2, 6, 2)
    ((k, v),) = prune_cache(((keys, values),), 4)
    assert torch.equal(k, keys[:, :, :2])
    assert torch.equal(v, values[:, :, :2])


def test_discarding_nothing_is_a_no_op() -> None:
    cache = filled()
    assert all(torch.equal(a, b) for a, b in zip(rows(cache), rows(prune_cache(cache, 0)), strict=True))
    keys = torch.ones(1, 2, 6, 2)
    assert torch.equal(prune_cache(((keys, keys),), 0)[0][0], keys)


def test_discarding_everything_leaves_an_empty_cache() -> None:
    assert prune_cache(filled(), 6).get_seq_length() == 0


@pytest.mark.parametrize("discard", [7, 100])
def test_more_tokens_than_there_are(discard: int) -> None:
    for cache in (filled(), ((torch.ones(1, 2, 6, 2),) * 2,)):
        with pytest.raises(DecodeError, match=f"holds only 6 tokens: received {discard}; discard at most 6"):
            prune_cache(cache, discard)


def test_a_negative_number() -> None:
    with pytest.raises(DecodeError, match="negative number of tokens cannot be discarded: received -1"):
        prune_cache(filled(), -1)


def test_a_cache_that_cannot_go_back_is_refused() -> None:
    cache = StaticCache(MODEL.config, max_cache_len=16)
    MODEL(TEXT, cache=cache, use_cache=True)
    with pytest.raises(
        DecodeError, match="cannot go back and stay as it was: received StaticCache; read the text again"
    ):
        prune_cache(cache, 2)  # type: ignore[call-overload]


def roomy() -> DynamicCache:
    """One that a memo has grown: its next rows are written in place."""
    cache = DynamicCache(config=MODEL.config)
    MODEL(TEXT[:, :5], cache=cache, use_cache=True)
    Past(cache, 0).extend(cache, 5)
    MODEL(TEXT[:, 5:], cache=cache, use_cache=True)
    return cache


def static() -> StaticCache:
    cache = StaticCache(MODEL.config, max_cache_len=16)
    MODEL(TEXT, cache=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("make", [filled, roomy, static])
def test_caches_that_part_where_nothing_is_discarded_are_each_its_own(make: Callable[[], DynamicCache]) -> None:
    cache = make()
    pruned = prune_cache(cache, 0)
    for ours, theirs in (((9,), (10,)), ((9, 11), (10, 12))):
        for held, text in ((cache, ours), (pruned, theirs)):
            logits = MODEL(torch.tensor([text[-1:]]), cache=held, use_cache=True).logits
            plain = MODEL(torch.cat([TEXT, torch.tensor([text])], dim=1)).logits
            torch.testing.assert_close(logits[0, -1], plain[0, -1])


def recurrent() -> DynamicCache:
    model = next(architecture for architecture in ARCHITECTURES if architecture.kind == "mamba").build()
    cache = DynamicCache(config=model.config)
    model(TEXT, cache=cache, use_cache=True)
    return cache


def test_a_recurrent_state_is_copied_where_nothing_is_discarded() -> None:
    cache = recurrent()
    pruned = prune_cache(cache, 0)
    for layer, other in zip(cache.layers, pruned.layers, strict=True):
        states, others = layer.recurrent_states, other.recurrent_states  # type: ignore[union-attr]
        assert torch.equal(states[0], others[0])
        assert states[0].data_ptr() != others[0].data_ptr()


def test_what_hangs_on_a_graph_cannot_be_copied() -> None:
    cache = static()
    for layer in cache.layers:
        layer.keys = layer.keys.clone().requires_grad_() * 2  # type: ignore[union-attr]
    with pytest.raises(DecodeError, match=r"cannot be copied .* read the text under torch.no_grad()"):
        prune_cache(cache, 0)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (recurrent, "LinearAttentionLayer"),
        (lambda: EncoderDecoderCache(filled(), DynamicCache()), "EncoderDecoderCache"),
    ],
)
def test_what_cannot_go_back_is_refused_whatever_it_does_not_know(make: Callable[[], Cache], kind: str) -> None:
    with pytest.raises(DecodeError, match=f"cannot go back and stay as it was: received {kind}"):
        prune_cache(make(), 1)  # type: ignore[call-overload]
    assert type(prune_cache(make(), 0)) is type(make())  # type: ignore[call-overload]


@pytest.mark.parametrize("used", [0, 1])
def test_layers_that_are_never_used_have_nothing_to_forget(used: int) -> None:
    """One of two does not attend, or reads the keys of the other."""
    kinds = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model("mistral", num_hidden_layers=2, sliding_window=9, layer_types=kinds)
    cache = DynamicCache(config=config)
    keys = torch.arange(12.0).reshape(1, 1, 6, 2)
    layer = cache.layers[used]
    assert isinstance(layer, DynamicLayer)
    layer.update(keys, keys)
    assert torch.equal(rows(prune_cache(cache, 2))[0], keys[:, :, :4])
    with pytest.raises(DecodeError, match="holds only 6 tokens"):
        prune_cache(cache, 7)


def test_a_cache_that_holds_nothing_can_forget_nothing() -> None:
    assert prune_cache((), 0) == ()
    for cache in ((), DynamicCache(), DynamicCache(config=MODEL.config)):
        with pytest.raises(DecodeError, match="holds only 0 tokens"):
            prune_cache(cache, 1)


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 9, 4), (1, 2, 9, 4)],  # of an encoder, too
        [(2, 4, 6), (2, 6, 4)],  # keys on their side
    ],
)
def test_tensors_of_several_lengths_are_no_keys_and_values(shapes: list[tuple[int, ...]]) -> None:
    layer = tuple([torch.ones(shape) for shape in shapes])
    for cache in ((layer,), tuple([(part, part) for part in layer])):
        with pytest.raises(DecodeError, match="several lengths"):
            prune_cache(cache, 1)


def test_a_small_number_of_numpy_is_that_number() -> None:
    assert prune_cache(filled(), numpy.uint8(2)).get_seq_length() == 4  # type: ignore[call-overload]
    keys = torch.ones(1, 2, 300, 2)
    assert prune_cache(((keys, keys),), numpy.uint8(2))[0][0].shape[-2] == 298  # type: ignore[call-overload]


def over(cache: DynamicCache, length: int, *, read: int) -> Tensor:
    """Logits behind `length` tokens of which the last `read` are new to the cache."""
    ids = torch.arange(length)[None, -read:] % 60
    logits: Tensor = MODEL(ids, cache=cache, use_cache=True).logits
    return logits[0, -1]


def test_a_past_writes_new_rows_in_place_and_computes_the_same_bits() -> None:
    plain, cache = DynamicCache(config=MODEL.config), DynamicCache(config=MODEL.config)
    past = Past(cache, 0)
    places = set()
    for length, read, back in ((10, 10, 0), (11, 1, 3), (12, 4, 0), (100, 88, 99), (5, 4, 0), (6, 1, 0)):
        assert torch.equal(over(plain, length, read=read), over(cache, length, read=read))
        past.extend(cache, length)
        places.add(rows(cache)[0].data_ptr())
        for layer in plain.layers:
            layer.crop(-back)
        assert past.go_back(length - back)
    assert all(type(layer) is Roomy for layer in cache.layers)
    assert len(places) == 2  # the tensor that the model made, and the buffer
    assert all(torch.equal(a, b) for a, b in zip(rows(cache), rows(plain), strict=True))


def test_a_mark_that_was_made_in_inference_mode_can_be_written_outside_of_it() -> None:
    past = Past([torch.zeros(2)], 1)
    with torch.inference_mode():
        past.mark()
    past.extend([torch.ones(2)], 3)
    assert past.go_back(1)
    (state,) = cast("list[Tensor]", past.cache)
    assert state.add_(1).tolist() == [1, 1]


def test_a_buffer_that_is_full_doubles() -> None:
    layer = DynamicLayer()
    states = torch.arange(5.0).expand(1, 2, 5, 5).mT
    layer.update(states, states)
    roomy = Roomy.of(layer)
    keys = values = states
    for _ in range(BLOCK):
        keys, values = roomy.update(states, -states)
    expected = torch.cat([states] * (BLOCK + 1), dim=-2)
    assert torch.equal(keys, expected)
    assert torch.equal(values[..., 5:, :], -expected[..., 5:, :])
    assert roomy.room[0].shape[-2] == 8 * BLOCK
    roomy.reset()
    assert roomy.update(states, states)[0].shape == states.shape


def test_a_cache_that_is_written_in_place_is_not_pruned_by_sharing() -> None:
    cache = filled()
    Past(cache, 0).extend(cache, 6)
    with pytest.raises(DecodeError, match="received Roomy"):
        prune_cache(cache, 1)


# Rows of a shelf.


def written(row: Row, states: Tensor) -> None:
    """States [heads, k, size] after what the row holds, in two layers: keys, and values of the other sign."""
    end = row.length + states.shape[1]
    row.reserve(end)
    for i in range(2):
        for held, new in zip(row.shelf.layer(i, (states[None], states[None])), (states, -states), strict=True):
            held[row.number, :, row.length : end] = new + i
    row.length = end


def read(row: Row) -> list[Tensor]:
    like = torch.zeros(1, 2, 0, 3), torch.zeros(1, 2, 0, 3)
    pairs = [row.shelf.layer(i, like) for i in range(2)]
    return [sign * (held[row.number, :, : row.length] - i) for i, pair in enumerate(pairs)
            for sign, held in zip((1, -1), pair, strict=True)]  # fmt: skip


def test_texts_on_a_shelf_are_each_what_was_written_to_them() -> None:
    """However they grow, go back, keep a path, are copied, outgrow their shelf, and give their rows back."""
    shelves, numbers = Shelves(), torch.Generator().manual_seed(1)
    rows, held = [Row.on(shelves, 2) for _ in range(5)], [torch.zeros(2, 0, 3) for _ in range(5)]
    for turn in range(60):
        i, what = turn % 5, turn % 7
        if what < 4:
            k = [1, 3, 40, 2 * BLOCK // 3][what]
            new = torch.rand(2, k, 3, generator=numbers)
            written(rows[i], new)
            held[i] = torch.cat((held[i], new), 1)
        elif what == 4:
            rows[i].rollback(len(held[i][0]) // 2)
            held[i] = held[i][:, : len(held[i][0]) // 2]
        elif what == 5 and rows[i].length > 4:
            rows[i].keep(start := rows[i].length - 4, [1, 3])
            held[i] = torch.cat((held[i][:, :start], held[i][:, [start + 1, start + 3]]), 1)
        else:
            rows[(i + 1) % 5], held[(i + 1) % 5] = deepcopy(rows[i]), held[i]
        for row, states in zip(rows, held, strict=True):
            assert row.length == states.shape[1]
            if row.length:
                torch.testing.assert_close(read(row), [states] * 4)
    assert max(row.shelf.capacity for row in rows) > BLOCK


def test_a_row_that_is_taken_again_hides_nothing_that_was_left_in_it() -> None:
    shelves = Shelves()
    rows = [Row.on(shelves, 2) for _ in range(2)]
    for row in rows:
        written(row, torch.full((2, 3, 3), torch.nan))
    shelf, number = rows[0].shelf, rows[0].number
    rows[0] = row = Row.on(shelves, 2)
    row.reserve(1)
    assert (row.shelf, row.number) == (shelf, number)
    assert all(held[number].count_nonzero() == 0 for i in range(2) for held in shelf.layer(i, (held_of(row),) * 2))
    assert [*shelves] == [BLOCK]
    del row, rows
    assert [*shelves] == [BLOCK]  # this function's own name for it
    del shelf
    assert [*shelves] == []


@pytest.mark.parametrize("others", [0, 1])
def test_a_shelf_that_was_made_in_inference_mode_can_be_written_outside_of_it(others: int) -> None:
    shelves = Shelves()
    with torch.inference_mode():
        written(one := Row.on(shelves, 2), torch.ones(2, 3, 3))
        for _ in range(others):
            written(Row.on(shelves, 2), torch.ones(2, 3, 3))
    written(one, torch.zeros(2, 1, 3))
    written(other := deepcopy(one), torch.ones(2, 2, 3))
    assert [held.sum() for held in read(other)] == [30] * 4


def held_of(row: Row) -> Tensor:
    return torch.zeros(1, 2, row.shelf.capacity, 3)


def test_all_layers_of_a_text_are_told_once_which_rows_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a device each list is copied, and waited for."""
    row = Row.on(Shelves(), 3)
    row.reserve(5)
    like = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)
    for i in range(3):
        for held in row.shelf.layer(i, like):
            held[row.number, :, :5] = torch.arange(5.0)[:, None]
    row.length, told = 5, list[object]()
    make = torch.tensor

    def telling(data: object, *, device: torch.device) -> Tensor:
        told.append(data)
        return make(data, device=device)

    monkeypatch.setattr(torch, "tensor", telling)
    row.keep(2, [0, 2])
    assert told == [[2, 4]]
    for i in range(3):
        for held in row.shelf.layer(i, like):
            assert held[row.number, 0, : row.length, 0].tolist() == [0.0, 1.0, 2.0, 4.0]
