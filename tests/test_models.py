"""What can be loaded is loaded whole; anything else is a failure with one sentence, and leaves nothing behind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specflow import DecodeError, models
from specflow.errors import said
from specflow.models import DType, Loaded, bigrams_of, load
from tests.toys import VOCABULARY, tiny_llama


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(dtype=torch.float32).save_pretrained(tmp_path / "tiny")
    words().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_path_and_its_text_are_one_model(folder: Path) -> None:
    ids = torch.tensor([[5, 6]])
    for dtype, expected in (("float64", torch.float64), ("bfloat16", torch.bfloat16)):
        named: DType = "float64" if dtype == "float64" else "bfloat16"
        both = [load(folder, named).unwrap(), load(str(folder), named).unwrap()]
        assert [one.model.dtype for one in both] == [expected] * 2
        assert torch.equal(both[0].model(ids).logits, both[1].model(ids).logits)
        assert not both[0].model.training


@pytest.mark.parametrize(
    "name", [None, "", 3, True, b"smollm2", ["smollm2"], object(), "a\nb", "a\0b", "no/such/model/at/all", "/dev/null"]
)
def test_a_name_that_is_none_is_a_failure(name: object) -> None:
    error = load(name).failure()  # type: ignore[arg-type]
    assert error.parameter == "model"
    assert "\n" not in str(error)


@pytest.mark.parametrize("dtype", [None, "float16", "__file__", torch.float32, 3, ["float32"]])
def test_a_dtype_that_is_none_is_a_failure(dtype: object, folder: Path) -> None:
    error = load(folder, dtype).failure()  # type: ignore[arg-type]
    assert error.parameter == "dtype"
    assert "use float32, bfloat16, float64" in str(error)


def test_a_pair_is_a_model_and_a_tokenizer() -> None:
    for pair in ((None, words()), (tiny_llama(), None), (torch.nn.Linear(2, 2), words()), (PreTrainedModel, words())):
        with pytest.raises(DecodeError):
            Loaded(*pair)
    with pytest.raises(DecodeError):
        bigrams_of(None, words())  # type: ignore[arg-type]
    with pytest.raises(DecodeError):
        bigrams_of(tiny_llama(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("message", [None, 3, b"w5", ["w5"], "w5 \udce9"])
def test_what_is_no_text_is_refused(message: object) -> None:
    with_template = words()
    with_template.chat_template = "{{ messages[0]['content'] }}"
    for tokenizer in (words(), with_template):
        loaded = Loaded(tiny_llama(), tokenizer)
        assert loaded.chat("w5 w6") == (5, 6)
        with pytest.raises(DecodeError):
            loaded.chat(message)  # type: ignore[arg-type]
        with pytest.raises(DecodeError):
            loaded.ids(message)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("eos", "stop", "never_said"),
    [
        (None, {1}, set()),
        (2, {1, 2}, set()),
        ([2, 3], {1, 2, 3}, set()),
        ([2, 64, -1], {1, 2}, {64, -1}),
        (10**30, {1}, {10**30}),
    ],
)
def test_a_text_ends_with_what_the_model_can_say(eos: object, stop: set[int], never_said: set[int]) -> None:
    model = tiny_llama()
    vars(model.generation_config)["eos_token_id"] = eos
    loaded = Loaded(model, words())
    assert (set(loaded.stop), set(loaded.never_said)) == (stop, never_said)


def test_a_model_that_has_no_generation_config_ends_with_its_tokenizers_eos() -> None:
    model = tiny_llama()
    vars(model)["generation_config"] = None
    assert Loaded(model, words()).stop == {1}


# The converted copy of SmolLM2.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, in which a tiny model stands for the converted one."""

    def convert(weights: Path, building: Path) -> None:
        tiny_llama(dtype=torch.float32).save_pretrained(building)
        words().save_pretrained(building)

    class Package:
        submodule_search_locations = (str(tmp_path / "package"),)

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "smollm2.gguf").write_bytes(b"weights")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: Package)
    monkeypatch.setattr(models, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(models, "_convert_smollm2", convert)
    return tmp_path / "cache" / "specflow"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_converted_once_and_nothing_else_is_left(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().unwrap().model.dtype == torch.float32
    monkeypatch.setattr(models, "_convert_smollm2", None)
    assert load(dtype="float64").unwrap().model.dtype == torch.float64
    assert names(cache) == ["smollm2-135m-instruct-0.1.2"]


@pytest.mark.parametrize("failure", [OSError("no space left"), RuntimeError("bad weights"), KeyboardInterrupt()])
def test_a_conversion_that_fails_leaves_nothing(
    failure: BaseException, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = models._convert_smollm2

    def half(weights: Path, building: Path) -> None:
        building.mkdir()
        (building / "config.json").write_text("{}")
        raise failure

    monkeypatch.setattr(models, "_convert_smollm2", half)
    if isinstance(failure, Exception):
        assert f"SmolLM2 cannot be converted ({said(failure)})" in str(load().failure())
    else:
        with pytest.raises(KeyboardInterrupt):
            load()
    assert names(cache) == []
    monkeypatch.setattr(models, "_convert_smollm2", convert)
    load().unwrap()


def test_a_copy_that_is_half_there_is_made_again(cache: Path) -> None:
    home = cache / "smollm2-135m-instruct-0.1.2"
    home.mkdir(parents=True)
    (home / "config.json").write_text("{}")
    load().unwrap()
    assert names(cache) == [home.name]
    (home / "model.safetensors").write_bytes(b"broken")
    assert "delete the folder, and it is made again" in str(load().failure())


def test_a_cache_that_cannot_be_written_is_a_failure(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_bytes(b"a file where a folder should be")
    assert "the converted copy of SmolLM2 cannot be kept" in str(load().failure())
    assert cache.read_bytes() == b"a file where a folder should be"


def test_two_at_once_keep_one_copy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert, both = models._convert_smollm2, threading.Barrier(2)

    def together(weights: Path, building: Path) -> None:
        convert(weights, building)
        both.wait(30)

    monkeypatch.setattr(models, "_convert_smollm2", together)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(models._converted_smollm2())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / "smollm2-135m-instruct-0.1.2"] * 2
    assert names(cache) == ["smollm2-135m-instruct-0.1.2"]


def test_a_package_without_weights_names_the_install_line(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "package" / "smollm2.gguf").unlink()
    assert models.INSTALL in str(load().failure())
