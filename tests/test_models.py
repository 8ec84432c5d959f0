"""What can be loaded is loaded whole; anything else is a failure with one sentence, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specflow import DecodeError, models
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


def test_a_package_without_weights_names_the_install_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Package:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Package)
    assert models.INSTALL in str(load().failure())
