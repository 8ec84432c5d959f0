"""The command for devices carries out all of its parts here, on a CPU with tiny models; no device has run it yet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn import Module
from transformers import PreTrainedModel

from benchmarks.accelerate import Decode, plain
from benchmarks.device import needs, parts
from benchmarks.device.attention import may_use_cudnn
from benchmarks.device.command import main
from benchmarks.device.decoders import GREEDY, Told, costing, drafting
from benchmarks.device.found import ATTENTION, MADE_UP, Cell, Failure, Found, Table, attempted, page
from benchmarks.device.models import (
    GEMMA,
    LLAMA_1B,
    LLAMA_8B,
    MAMBA,
    QWEN,
    NoFirstLayers,
    NotCaptured,
    Setup,
    Shape,
    first_layers,
    versions,
    vocabulary_of,
)
from benchmarks.device.parts import (
    COPIES,
    LAUNCHES,
    UNSEEN,
    _batch,
    _saw,
    attention,
    compared,
    copies,
    each_step,
    times,
    where,
)
from benchmarks.device.processes import UNENDED, carried_out, processes_for
from specflow import CachedPredictor, Dice, LLMDrafter, Proposal, Tokens, autoregressive_step, run, start
from specflow.accelerate.captured import PASSES
from specflow.batch import BatchPredictor, predictor, together
from specflow.predictors.trial import error_bound
from specflow.state import Tally
from tests.test_captured import captured

ROOT = Path(__file__).parent.parent


def test_every_part_is_carried_out_and_texts_with_drafts_are_the_plain_ones(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--device", "cpu", "--tiny"]) == 0
    found = json.loads((tmp_path / "device.json").read_text("utf-8"))
    assert [part["part"] for part in found["parts"] if part["error"] or not part["tables"]] == []
    page = (tmp_path / "device.md").read_text("utf-8")
    assert [part["part"] for part in found["parts"] if part["part"] not in page] == []
    assert MADE_UP in page
    conforming = next(part for part in found["parts"] if part["part"].startswith("Conformance"))
    for dtype, shapes in (("float32", 4), ("bfloat16", 5)):
        assert len({table["title"] for table in conforming["tables"] if dtype in table["title"]}) == shapes
    for table in conforming["tables"]:
        for row in table["rows"]:
            told = dict(zip(table["columns"], row, strict=True))
            assert told["holds"] is True, told
            assert {told[name] for name in ("drafts", "tree", "first layers", "fresh")} == {"same"}, told
    rows = [
        dict(zip(table["columns"], row, strict=True))
        for part in found["parts"]
        for table in part["tables"]
        for row in table["rows"]
    ]
    texts = [row["text"] for row in rows if "text" in row]
    assert texts == ["same"] * len(texts)
    batches = [row for row in rows if "same text" in row]
    assert {row["same text"] for row in batches} == {"1/1", "2/2"}
    assert all(row["passes, plain"] <= _setup().new + 1 for row in batches), batches
    accepted = [row["accepted"] for row in rows if row.get("accepted") is not None]
    assert len(accepted) >= 20
    assert min(accepted) > 0.2, accepted


def _setup() -> Setup:
    return Setup(torch.device("cpu"), tiny=True)


def _failing(setup: Setup) -> Iterator[Found]:
    yield Table("begun", ("a",), ((1,),))
    raise ValueError("no such thing")


def _dying(setup: Setup) -> Iterator[Found]:
    yield Table("begun", ("a",), ((1,),))
    os._exit(7)


def _hanging(setup: Setup) -> Iterator[Found]:
    yield Table("begun", ("a",), ((1,),))
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # as in a driver, where no signal is heard
    time.sleep(600.0)


def test_what_ends_a_part_is_told_with_what_it_found_and_the_next_part_runs() -> None:
    parts = (("Wrong", _failing, 0.5), ("Dead", _dying, 0.5), ("Hung", _hanging, 0.02), ("Where", where, 0.5))
    told = list(carried_out(_setup(), 100.0, parts))
    ends = {result.part: result for result in told}
    assert list(ends) == ["Wrong", "Dead", "Hung", "Where"]
    assert ends["Where"].error is None
    assert ends["Where"].tables
    for name, error in (("Wrong", "no such thing"), ("Dead", "ended with 7"), ("Hung", "it was ended after")):
        assert error in (ends[name].error or "")
        assert [table.title for table in ends[name].tables] == ["begun"]
    assert next(result.error for result in told if result.part == "Hung") == UNENDED


def _hooked(setup: Setup) -> Iterator[Found]:
    model = setup.model(LLAMA_1B, torch.float32)
    model.register_forward_hook(lambda *_: None)
    yield Table("what ran", ("model",), tuple([(name,) for name in versions(setup, model)]))


def _one_by_one(setup: Setup) -> Iterator[Found]:
    model = setup.model(MAMBA, torch.float32)
    target = BatchPredictor(model, 2)
    steps = [autoregressive_step(target, GREEDY, Dice())] * 2
    prompts = [setup.prompt(model, number) for number in range(2)]
    work = [partial(run, step, start(prompt, 2).unwrap()) for step, prompt in zip(steps, prompts, strict=True)]
    yield Table("ended", ("texts",), ((len(dict(together(work, 2))),),))


def test_why_a_model_is_not_accelerated_is_told_and_no_row_claims_it() -> None:
    parts = (("Hooked", _hooked, 1.0), ("Batch", _one_by_one, 1.0))
    results = {result.part: result for result in carried_out(_setup(), 100.0, parts)}
    hooked, batch = results["Hooked"], results["Batch"]
    assert hooked.tables[0].rows == (("given",),)
    assert len(hooked.notes) == 1
    assert "NotAccelerated" in hooked.notes[0]
    assert "hooks" in hooked.notes[0]
    assert any("read one by one" in note for note in batch.notes), batch
    assert hooked.notes[0] in page([hooked], _setup())


def test_on_cuda_it_is_noted_where_no_passes_are_captured() -> None:
    model = _setup().model(LLAMA_1B, torch.float32)
    with pytest.warns(NotCaptured, match="not captured"):
        assert list(versions(Setup(torch.device("cuda"), tiny=True), model)) == ["given", "fast"]


def _told_of_attention(setup: Setup) -> Iterator[Found]:
    yield Table("by cuDNN", ("",), ((may_use_cudnn(),),))
    yield from attention(setup)
    yield Table("by cuDNN", ("",), ((may_use_cudnn(),),))


def test_parts_run_without_attention_by_cudnn_and_one_part_has_both() -> None:
    *_, told = carried_out(_setup(), 100.0, (("Attention", _told_of_attention, 1.0),))
    before, without, first, after = told.tables
    assert before.rows == after.rows == ((False,),)
    for kind, table in (("not allowed", without), ("first", first)):
        assert table.title.endswith(f"cuDNN {kind}")
        assert [row[0] for row in table.rows] == ["plain", "drafts"]
        assert {row[-1] for row in table.rows} == {"flash_attention_for_cpu"}
    assert ATTENTION in page([told], _setup())


def test_what_is_timed_of_a_step_is_no_prompt_and_no_trial() -> None:
    tables = [found for found in times(_setup()) if isinstance(found, Table)]
    rows = [dict(zip(table.columns, row, strict=True)) for table in tables for row in table.rows]
    assert len(rows) == 6
    for told in rows:
        assert told["passes"] == told["steps"], told
        assert isinstance(told["tokens read"], int)
        assert isinstance(told["steps"], int)
        assert told["tokens read"] <= 9 * told["steps"], told


def test_what_comes_in_a_step_is_the_difference_of_two_texts_less_often_included() -> None:
    few = Counter({"cudaLaunchKernel": 10, "Memcpy HtoD (Pageable -> Device)": 3, "Memcpy HtoD (Pinned -> Device)": 1})
    many = Counter(
        {"cudaLaunchKernelExC": 6, "cudaLaunchKernel": 14, "cuLaunchKernelEx": 4, "cudaDeviceSynchronize": 2}
    )
    many["Memcpy HtoD (Pinned -> Device)"] = 5
    found = dict(zip(COPIES, each_step(COPIES, few, many, 2), strict=True))
    assert found["cudaLaunchKernel"] == 5.0
    assert found["cuLaunchKernel"] == 2.0
    assert found["cudaDeviceSynchronize"] == 1.0
    assert found["Memcpy HtoD"] == 0.5
    assert found["cudaGraphLaunch"] == 0.0


def _told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler that traces nothing."""

    def counted(_: Setup, decode: Decode, prompt: Tokens, new: int) -> tuple[Counter[str], Tally]:
        return Counter({"aten::mm": 9}), decode(prompt, new)[1]

    monkeypatch.setattr(parts, "_counted", counted)


def test_of_a_profiler_that_sees_nothing_no_row_of_zeros_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    _told_nothing(monkeypatch)
    found = list(copies(_setup()))
    assert len(found) == 8
    assert {str(each).partition(": ")[2] for each in found if isinstance(each, Failure)} == {UNSEEN}
    assert not any(isinstance(each, Table) for each in found)
    launched = Counter({"cudaLaunchKernelExC": 6, "Memcpy HtoD (Pageable -> Device)": 3})
    assert _saw(LAUNCHES, launched)
    assert not _saw(LAUNCHES, Counter({"Memcpy HtoD (Pageable -> Device)": 3, "cudaDeviceSynchronize": 2}))


def test_where_the_profiler_sees_no_attention_the_times_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _told_nothing(monkeypatch)
    found = list(attention(_setup()))
    assert sum(isinstance(each, Failure) and "no attention" in each.error for each in found) == 4
    rows = [row for each in found if isinstance(each, Table) for row in each.rows]
    assert len(rows) == 4
    assert {row[-1] for row in rows} == {None}


def test_what_first_layers_cost_is_measured_with_drafts_that_are_as_often_right_as_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their own are all right in a sure model, so their row would tell that leaving out layers pays."""
    monkeypatch.setattr(Setup, "new", 32)  # in a text of eight tokens all that is told may be right
    tables = [found for found in parts._drafts(_setup(), LLAMA_1B) if isinstance(found, Table)]
    assert len(tables) == 2
    for table in tables:
        told, costly = [dict(zip(table.columns, table.rows[i], strict=True)) for i in (1, 4)]
        assert costly["decoder"] == f"{told['decoder']}, at the cost of the first 1 of 2 layers"
        assert costly["accepted"] == told["accepted"] != 1.0


def test_told_drafts_are_those_told_and_each_costs_one_of_the_other_drafter() -> None:
    made: list[int] = []

    def costly(tokens: Tokens) -> Iterator[Proposal]:
        for i in range(9):
            made.append(i)
            yield Proposal(0)

    told = Told((0, 1), tuple(range(5, 45)), 1000)
    drafts = list(islice(costing(lambda: told, lambda: costly)()((0, 1)), 4))
    assert [draft.token for draft in drafts] == [draft.token for draft in islice(told((0, 1)), 4)]
    assert made == [0, 1, 2, 3]


def test_captured_passes_are_told_up_to_the_longest_and_the_same_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(_: Setup, model: Module) -> dict[str, Module]:
        assert isinstance(model, PreTrainedModel)
        return {"given": model, "captured": captured(model)}

    monkeypatch.setattr(parts, "versions", both)
    found = list(parts._passes(_setup(), LLAMA_1B, (1, max(PASSES), max(PASSES) + 1)))
    assert [table.columns[1] for table in found if isinstance(table, Table)] == [
        "given",
        "captured",
        "captured, but eager",
    ]
    read = [[row[0] for row in table.rows] for table in found if isinstance(table, Table)]
    assert read == [[1, 32, 33], [1, 32], [1, 32, 33]]


@pytest.mark.parametrize("missing", [0, 1])
def test_where_only_one_of_two_models_is_accelerated_what_the_other_has_is_empty(
    monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    asked: list[Module] = []

    def some(_: Setup, model: Module) -> dict[str, Module]:
        asked.append(model)
        return {"given": model} if len(asked) == missing + 1 else {"given": model, "captured": model}

    monkeypatch.setattr(parts, "versions", some)
    tables = [found for found in parts._conforms(_setup(), "", LLAMA_8B, torch.bfloat16) if isinstance(found, Table)]
    (given,), (other,) = (table.rows for table in tables)
    assert None not in given
    assert other[0] == "captured"
    assert [cell is None for cell in other[1:]] == [missing == 0] * 3 + [missing == 1] * 4


def test_first_layers_draft_by_one_model_or_not_at_all() -> None:
    model = _setup().model(LLAMA_1B, torch.float32)
    make = first_layers(model)
    assert make is not None
    one, other = make(), make()
    assert isinstance(one, LLMDrafter)
    assert isinstance(other, LLMDrafter)
    assert isinstance(one.predictor, CachedPredictor)
    assert isinstance(other.predictor, CachedPredictor)
    assert one.predictor is not other.predictor
    assert one.predictor.model is other.predictor.model
    assert one.predictor.model is not model
    with pytest.warns(NoFirstLayers, match="Linear"):
        assert first_layers(torch.nn.Linear(2, 2)) is None


def _without_a_shape(setup: Setup) -> Iterator[Found]:
    unknown = Shape("unknown", "no such kind", {}, {"num_hidden_layers": 1})
    for shape in (unknown, LLAMA_1B):
        yield from attempted(shape.name, partial(_compared, setup, shape))


def _compared(setup: Setup, shape: Shape) -> Iterator[Found]:
    model = setup.model(shape, torch.float32)

    def broken(prompt: Tokens, new: int) -> tuple[Tokens, Tally]:
        raise ValueError("a broken decoder")

    decoders = {"broken": broken, "plain": plain(model)}
    yield from compared(setup, "decoders", model, decoders, setup.prompt(model))


def test_what_is_measured_beside_a_failure_is_kept_and_the_failure_is_told() -> None:
    *_, told = carried_out(_setup(), 100.0, (("Part", _without_a_shape, 1.0),))
    assert told.ended
    assert "unknown: " in (told.error or "")
    assert "decoders: broken: ValueError: a broken decoder" in (told.error or "")
    (table,) = told.tables
    assert [row[0] for row in table.rows] == ["plain"]


def test_processes_are_forked_where_a_forked_one_reaches_the_device() -> None:
    assert processes_for(torch.device("cpu")).get_start_method() == "forkserver"
    if not torch.cuda.is_available():
        assert processes_for(torch.device("cuda")).get_start_method() == "spawn"


def test_no_part_begins_once_the_budget_is_used_up() -> None:
    (none,) = carried_out(_setup(), 0.0, (("Where", where, 1.0),))
    assert none.error == "no time was left for it"


def _draws(told: Told, seen: int, gamma: int) -> list[bool]:
    """Whether the first drafts after so many tokens of the text are right by their own place."""
    text = told.prompt + told.truth
    drafts = list(islice(told(text[:seen]), gamma))
    return [draft.token == text[seen + place] for place, draft in enumerate(drafts)]


def test_told_drafts_do_not_tell_by_their_number_whether_they_are_right() -> None:
    told = [Told((i, 1), tuple(range(40)), 1000) for i in range(200)]
    drawn = [_draws(each, seen, 4) for each in told for seen in range(2, 36)]
    assert {len(each) for each in drawn} == {4}
    for place in range(4):
        assert sum(each[place] for each in drawn) / len(drawn) == pytest.approx(0.8, abs=0.02)
    # Nor are all texts of a batch wrong at the same places.
    assert len({tuple(_draws(each, 2, 30)) for each in told}) > 190


def test_a_told_tree_may_be_wrong_at_any_level() -> None:
    prompt, truth = (0, 1), tuple(range(5, 45))
    levels = []
    for i in range(200):
        drafts = list(islice(Told((i, *prompt), truth, 1000, branches=2)((i, *prompt)), 8))
        parents = [draft.parent for draft in drafts]
        assert all(parents[k] == parents[k + 1] for k in (0, 2, 4, 6))
        levels += [truth[k // 2] in (drafts[k].token, drafts[k + 1].token) for k in (0, 2, 4, 6)]
        assert all(drafts[k].token != drafts[k + 1].token for k in (0, 2, 4, 6))
    assert sum(levels) / len(levels) == pytest.approx(0.96, abs=0.02)


@pytest.mark.parametrize("shape", [LLAMA_1B, LLAMA_8B, QWEN, GEMMA, MAMBA], ids=lambda shape: shape.name)
def test_in_16_bits_no_two_tokens_tie(shape: Shape) -> None:
    """With as many tokens and layers as the shape has; of mamba as wide, too, with as many layers as are read of it."""
    smaller = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 8}
    known = {} if shape is MAMBA else {name: size for name, size in smaller.items() if name in shape.config}
    most = 4 if shape is MAMBA else 32
    setup = Setup(torch.device("cpu"), tiny=False)
    model = setup.sure(Shape(shape.name, shape.kind, {**shape.config, **known}, {}), torch.bfloat16, most)
    prompt = setup.prompt(model)[:16]
    truth, _ = plain(model)(prompt, 16)
    size = vocabulary_of(model)
    assert truth == tuple([(prompt[-1] + i) % size for i in range(1, 17)])
    text, tally = drafting(model, partial(Told, prompt, truth, size))(prompt, 16)
    assert text == truth
    assert tally.acceptance_rate > 0.4
    top = CachedPredictor(model)(prompt + truth, ())[-1].float().topk(2).values
    assert float(top[0] - top[1]) > 0.2 * float(top[0])


@pytest.mark.parametrize("shape", [LLAMA_1B, LLAMA_8B, QWEN, GEMMA, MAMBA], ids=lambda shape: shape.name)
def test_rows_that_are_read_for_conformance_hang_on_what_comes_before(
    monkeypatch: pytest.MonkeyPatch, shape: Shape
) -> None:
    """Else a cache of another text would conform."""
    models: list[Module] = []

    def read(_: Setup, model: Module) -> tuple[Cell, ...]:
        models.append(model)
        return ()

    monkeypatch.setattr(parts, "_read", read)
    monkeypatch.setattr(parts, "_written", lambda *_: [])
    setup = _setup()
    assert list(parts._conforms(setup, "", shape, torch.bfloat16))
    for model in models:
        prompt, other = setup.prompt(model), setup.prompt(model, 1)
        rows = [CachedPredictor(model)(text, ())[-1].float() for text in (prompt, (*other[:-1], prompt[-1]))]
        assert float((rows[0] - rows[1]).abs().max()) > 2 * error_bound(torch.bfloat16) * float(rows[0].abs().max())


def test_each_turn_of_a_batch_reads_its_prompts() -> None:
    """The one that is timed, too: not what a warm-up has left."""
    setup = _setup()
    model = setup.model(LLAMA_1B, torch.bfloat16)
    fed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: fed.append(ids[0].shape[-1]))
    _batch(setup, model, 2)  # it is tried
    fed.clear()
    told = _batch(setup, model, 2)
    assert sum(length >= setup.before // 2 for length in fed) >= 6
    assert told[-1] == "2/2"


def test_texts_of_a_batch_that_are_read_one_by_one_are_told_by_their_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = _setup()
    model = setup.sure(LLAMA_1B, torch.bfloat16)
    _, _, plain_passes, _, passes, *_ = _batch(setup, model, 2)
    assert plain_passes == setup.new

    def broken(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(predictor, "read_together", broken)
    with pytest.warns(UserWarning, match="read one by one: a pass over 2 of them failed"):
        _, _, plain_alone, _, alone, *_ = _batch(setup, model, 2)
    assert plain_alone == 2 * setup.new
    assert isinstance(passes, int)
    assert isinstance(alone, int)
    assert passes < setup.new
    assert alone > passes


def test_the_first_second_tells_what_is_not_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-m", "benchmarks.device", "--out", str(tmp_path / "out")]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 1
    (line,) = told.stderr.splitlines()
    assert "transformers 5.24 or newer (none is there)" in line
    assert "pip install" in line
    assert "'greenlet>=3.5'" in line
    assert not (tmp_path / "out").exists()


def test_what_is_too_old_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs.lacking() is None
    older = {"transformers": "5.17.0", "torch": "2.11.0+cu128", "numpy": "2.0.0rc1"}
    monkeypatch.setattr(needs, "version", lambda name: older.get(name) or version(name))
    asked = "benchmarks.device needs transformers 5.24 or newer (5.17.0 is there)"
    assert needs.lacking() == f"{asked}: pip install 'transformers>=5.24'"
