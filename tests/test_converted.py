"""A GGUF file is the model that it holds, whatever lies beside it and whatever happens to its converted copy."""

from __future__ import annotations

import resource
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from gguf import MODEL_ARCH
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)
from transformers.utils import logging

from specflow import DecodeError, converted, models
from specflow.converted import copy_of
from specflow.errors import said
from specflow.models import DType, load
from tests.gguf_files import END, TOKENS, llama, write_gguf, write_hybrid, write_named


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in a file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies are kept: an empty folder."""
    monkeypatch.setattr(converted, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "specflow" / "gguf"


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


@pytest.mark.parametrize(("dtype", "kept"), [("float32", 0.0), ("float64", 1e-4), ("bfloat16", 1.0)])
def test_it_is_the_model_that_was_written(dtype: DType, kept: float, whole: Path, cache: Path) -> None:
    loaded, ids = load(whole, dtype).unwrap(), torch.tensor([[1, 2, 3, 250, 7]])
    assert str(loaded.model.dtype) == f"torch.{dtype}"
    assert (loaded.model(ids).logits.float() - llama()(ids).logits).abs().max() <= kept
    assert not loaded.model.training
    assert loaded.stop == {END}


def test_its_tokenizer_and_its_chat_template_are_those_of_the_file(whole: Path, cache: Path) -> None:
    loaded = load(whole).unwrap()
    assert [TOKENS[i] for i in loaded.ids("hello wé")] == ["hell", "o", "Ġw", "Ã", "©"]
    assert loaded.tokenizer.decode(loaded.chat("hé")) == "<|user|>hé<|end|><|model|>"


def test_it_is_converted_once_wherever_it_lies_and_whatever_it_is_called(
    whole: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = copy_of(whole)
    monkeypatch.setattr(converted, "_convert", None)
    shutil.copy(whole, tmp_path / "renamed")  # which it is known for by what it begins with
    assert load(tmp_path / "renamed").unwrap().stop == {END}
    assert load(str(whole)).unwrap().stop == {END}
    assert folders(cache) == [first.name]


def test_another_file_of_the_same_name_is_another_model(cache: Path, tmp_path: Path) -> None:
    path, ids = tmp_path / "model.gguf", torch.tensor([[1, 2, 3]])
    for seed in (0, 1):
        write_gguf(path, llama(seed))
        assert torch.equal(load(path).unwrap().model(ids).logits, llama(seed)(ids).logits)
    assert len(folders(cache)) == 2


def test_what_lies_beside_the_file_is_not_read(whole: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copy(whole, tmp_path / "model.gguf")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "h"}')
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "no/such"}')
    assert load(tmp_path / "model.gguf").unwrap().stop == {END}


def test_smollm2_is_a_file_like_any_other(whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        submodule_search_locations = (str(whole.parent),)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Package)
    assert load().unwrap().stop == {END}
    assert folders(cache) == [copy_of(whole).name]


@pytest.mark.parametrize("shows", [True, False])
def test_progress_is_shown_and_the_setting_stays(
    shows: bool, whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, was, read = [], logging.is_progress_bar_enabled(), AutoTokenizer.from_pretrained

    def watched(folder: Path, gguf_file: str) -> object:
        seen.append(logging.is_progress_bar_enabled())
        return read(folder, gguf_file=gguf_file)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", watched)
    try:
        set_shown(shows)
        copy_of(whole)
        assert (seen, logging.is_progress_bar_enabled()) == ([True], shows)
    finally:
        set_shown(was)


def set_shown(shows: bool) -> None:
    (logging.enable_progress_bar if shows else logging.disable_progress_bar)()


# What is no model.


def cut(path: Path, to: int) -> None:
    path.write_bytes(path.read_bytes()[:to])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: path.unlink(), "the file cannot be read"),
        (lambda path: cut(path, 0), "this is no GGUF file"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(500)), "this is no GGUF file"),
        (lambda path: cut(path, 4), "the GGUF file is truncated or damaged"),
        (lambda path: cut(path, 300), "the GGUF file is truncated or damaged"),
        (lambda path: cut(path, path.stat().st_size // 2), "the GGUF file is truncated or damaged"),
        (lambda path: cut(path, path.stat().st_size - 40), "the GGUF file is truncated or damaged"),
        (lambda path: write_gguf(path, llama(), arch="no-such-arch"), "architecture no-such-arch is not supported"),
        (lambda path: write_gguf(path, llama(), arch="t5"), "transformers cannot read the GGUF file"),
        (lambda path: write_gguf(path, llama(), llama_rope_scaling_type="yarn"), "does not read its rotary freq"),
        (
            lambda path: write_gguf(path, llama(), more={"rope_freqs.weight": torch.tensor([1.0, 1.0, 4.0, 8.0])}),
            "does not read its rotary frequencies, rope_freqs.weight",
        ),
        (
            lambda path: write_gguf(path, llama(), more={"blk.0.attn_q.bias": torch.ones(32)}),
            "transformers leaves out 32 of its",
        ),
        (lambda path: write_gguf(path, llama(), without=("blk.1.ffn_up.weight",)), "1 of its weights are missing"),
        (
            lambda path: write_gguf(path, llama(), numbers={"attention.sliding_window": 4}),
            "transformers does not read its attention.sliding_window, 4",
        ),
        (
            lambda path: write_named(path, starcoder(), MODEL_ARCH.STARCODER2, {**EPSILON, "rope.dimension_count": 4}),
            "does not read its rope.dimension_count, 4",
        ),
        (
            lambda path: write_named(path, starcoder(), MODEL_ARCH.STARCODER2, {**EPSILON, "rope.scaling.factor": 4.0}),
            "does not read its rope.scaling.factor, 4.0",
        ),
        (
            lambda path: write_named(path, starcoder(), MODEL_ARCH.STARCODER2, {**EPSILON, "unheard_of": 3}),
            "does not read its unheard_of, 3",
        ),
        (lambda path: write_gemma(path, gemma(), {"attn_logit_softcapping": 20.0}), "its attn_logit_softcapping, 20.0"),
    ],
)
def test_what_is_no_model_is_one_sentence_and_leaves_nothing(
    spoil: Callable[[Path], object], sentence: str, whole: Path, cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "spoiled.gguf"
    shutil.copy(whole, path)
    spoil(path)
    error = load(path).failure()
    assert error.parameter == "model"
    assert sentence in str(error)
    assert "\n" not in str(error)
    assert not cache.exists() or folders(cache) == []


@pytest.mark.parametrize(
    ("numbers", "changed"),
    [
        ({"rope.freq_base": 1e6}, {"rope_theta": 1e6}),
        ({"attention.sliding_window": 4}, {"sliding_window": 4}),
        ({"attention.layer_norm_epsilon": 1e-2}, {"norm_epsilon": 1e-2}),
        ({"attention.sliding_window": 4096, "pooling_type": 1, "rope.dimension_count": 8}, {}),
    ],
)
def test_what_transformers_does_not_read_of_a_file_is_in_the_copy_nevertheless(
    numbers: Mapping[str, float], changed: Mapping[str, float], cache: Path, tmp_path: Path
) -> None:
    model, ids = starcoder(**changed), torch.arange(40)[None]
    path = write_named(tmp_path / "a.gguf", model, MODEL_ARCH.STARCODER2, {**EPSILON, **numbers})
    assert torch.equal(load(path).unwrap().model(ids).logits, model(ids).logits)


def test_a_gemma_scales_attention_as_llama_cpp_does(cache: Path, tmp_path: Path) -> None:
    """Its files do not say how: by the width of a head, and not by the 256 of transformers."""
    ids = torch.arange(40)[None]
    loaded = load(write_gemma(tmp_path / "a.gguf", gemma(), {})).unwrap()
    assert (loaded.model(ids).logits - gemma()(ids).logits).abs().max() < 1e-4


EPSILON: dict[str, float] = {"attention.layer_norm_epsilon": 1e-5}
SIZES: dict[str, int] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def starcoder(**changed: float) -> PreTrainedModel:
    torch.manual_seed(0)
    model = Starcoder2ForCausalLM(Starcoder2Config(**SIZES, initializer_range=0.3, **changed))
    return model.eval()


def gemma() -> PreTrainedModel:
    torch.manual_seed(0)
    scale = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, **scale, initializer_range=0.3))
    return model.eval()


def write_gemma(path: Path, model: PreTrainedModel, numbers: Mapping[str, float]) -> Path:
    for name, weight in model.state_dict().items():
        if "norm" in name:
            weight.add_(1)  # a file has them so
    sizes = {"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 8}
    return write_named(path, model, MODEL_ARCH.GEMMA2, {**sizes, "attention.layer_norm_rms_epsilon": 1e-6, **numbers})


def test_rotary_factors_that_change_nothing_are_taken(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "a.gguf", llama(), more={"rope_freqs.weight": torch.ones(4)}, llama_rope_scaling_type="none"
    )
    load(path).unwrap()


@pytest.mark.parametrize("heads", [0, 1])
def test_a_block_that_drafts_is_no_part_of_the_model(heads: int, cache: Path, tmp_path: Path) -> None:
    model = load(write_hybrid(tmp_path / "a.gguf", heads)).unwrap().model
    assert model.config.num_hidden_layers == 2


def test_a_file_that_grows_meanwhile_is_refused(
    whole: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, convert = tmp_path / "growing.gguf", converted._convert
    shutil.copy(whole, path)

    def meanwhile(file: Path, folder: Path) -> None:
        convert(file, folder)
        path.write_bytes(path.read_bytes() + b"more")

    monkeypatch.setattr(converted, "_convert", meanwhile)
    assert "the file changes while it is read" in str(load(path).failure())
    assert folders(cache) == []


# What happens to copies.


def instead(folder: Path) -> None:
    """A conversion that takes no time."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("bad"), KeyboardInterrupt()])
def test_a_conversion_that_fails_leaves_nothing(
    failure: BaseException, whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(file: Path, folder: Path) -> None:
        instead(folder)
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(converted, "_convert", half)
        with pytest.raises(DecodeError if isinstance(failure, Exception) else KeyboardInterrupt) as raised:
            copy_of(whole)
    if isinstance(failure, Exception):
        assert said(failure) in str(raised.value)
    assert folders(cache) == []
    load(whole).unwrap()


def test_a_full_disk_is_told_as_one(whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert "the converted copy cannot be kept ([Errno 28] No space left on device)" in str(load(whole).failure())
    assert folders(cache) == []


def test_a_disk_that_is_full_while_the_weights_are_written_is_told_as_one(whole: Path, cache: Path) -> None:
    """The process may write no file of more than 20 kB, which stands for a disk without room."""
    was, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, was[1]))
    try:
        error = load(whole).failure()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
        signal.signal(signal.SIGXFSZ, handler)
    assert "the converted copy cannot be kept" in str(error)
    assert "File too large" in str(error)
    assert folders(cache) == []


def test_what_a_killed_process_left_is_made_anew(whole: Path, cache: Path) -> None:
    left = cache / f"{converted._digest(whole)}.new" / "copy"
    instead(left)
    load(whole).unwrap()
    assert folders(cache) == [converted._digest(whole)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda home: (home / "model.safetensors").unlink(),
        lambda home: (home / converted.SEAL).unlink(),
        lambda home: (home / converted.SEAL).write_text('{"transformers": "4.0", "crc32": {}}'),
        lambda home: (home / "config.json").write_text("{}"),
        lambda home: (home / "adapter_config.json").write_text("{}"),
        lambda home: cut(home / "model.safetensors", 5000),
        lambda home: flip(home / "model.safetensors"),
    ],
)
def test_a_damaged_copy_is_made_anew(damage: Callable[[Path], object], whole: Path, cache: Path) -> None:
    home, ids = copy_of(whole), torch.tensor([[1, 2, 3]])
    damage(home)
    assert torch.equal(load(whole).unwrap().model(ids).logits, llama()(ids).logits)
    assert folders(cache) == [home.name]


def flip(path: Path) -> None:
    """One bit of a weight is another."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_cache_that_cannot_be_written_is_a_failure(whole: Path, cache: Path) -> None:
    cache.parent.parent.mkdir()
    cache.parent.write_bytes(b"a file where a folder should be")
    assert "the converted copy cannot be kept" in str(load(whole).failure())
    assert cache.parent.read_bytes() == b"a file where a folder should be"


def test_of_two_at_once_one_converts_and_the_other_waits(
    whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, late, both = threading.Event(), threading.Event(), []

    def convert(file: Path, folder: Path) -> None:
        both.append(folder)
        begun.set()
        instead(folder)
        late.wait(0.5)  # the other would be here by now, did it not wait

    monkeypatch.setattr(converted, "_convert", convert)
    found: list[Path] = []
    first, second = [threading.Thread(target=lambda: found.append(copy_of(whole))) for _ in range(2)]
    first.start()
    assert begun.wait(30)
    second.start()
    for thread in (first, second):
        thread.join()
    assert found == [cache / converted._digest(whole)] * 2
    assert len(both) == 1


def test_a_model_that_is_no_file_is_as_before(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    assert not converted.is_gguf(tmp_path / "folder.gguf")
    assert "the model cannot be loaded" in str(load(tmp_path / "folder.gguf").failure())
    assert not converted.is_gguf(tmp_path / "none")
    assert not converted.is_gguf(tmp_path / ("a" * 300))
    assert "the file cannot be read" in str(load("a" * 300 + ".gguf").failure())
    assert models.SMOLLM2 == "smollm2"
