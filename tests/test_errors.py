"""Bad input is refused in one sentence, before any model runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
from returns.result import Failure

from specflow import (
    DecodeError,
    Fixed,
    GreedyProcessor,
    MultinomialProcessor,
    NucleusProcessor,
    SuffixDrafter,
    TopKNucleusProcessor,
    TopKProcessor,
    autoregressive_generate,
    speculative_generate,
    start,
)
from specflow.errors import DeadEndError
from specflow.heads.eagle import Norms
from specflow.policies import SVIP
from specflow.protocols import Limits
from specflow.stages.rows import Rows
from specflow.vocabulary import shared_vocabulary
from tests.toys import Unrunnable, tiny_llama

TARGET = Unrunnable(tiny_llama(context=32))
OTHER = Unrunnable(tiny_llama(vocab_size=100))

REFUSED: list[tuple[dict[str, object], str]] = [
    ({"inputs": []}, "the prompt is empty: received no tokens; give at least one token"),
    ({"inputs": [3, 64]}, "a token id is outside the vocabulary of 64: received 64; use the tokenizer"),
    ({"inputs": [3, -1]}, "a token id is outside the vocabulary of 64: received -1;"),
    ({"inputs": [3, 1.0]}, "a token id is not an int: received 1.0; give plain ints"),
    ({"inputs": [3, True]}, "a token id is not an int: received True;"),
    ({"inputs": ["a"]}, "a token id is not an int: received 'a';"),
    ({"inputs": [3] * 33}, "the prompt is longer than the target's context of 32: received 33 tokens; shorten"),
    ({"max_gen_len": -1}, "the number of new tokens is negative: received -1; give 0 or more"),
    (
        {"eos_tokens_id": 64},
        "a token id is outside the vocabulary of 64: received 64; use the tokenizer that belongs to the target, "
        "or give [] for a text that no token ends.",
    ),
    ({"eos_tokens_id": [1, -2]}, "a token id is outside the vocabulary of 64: received -2;"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_refused_before_a_model_runs(arguments: dict[str, object], sentence: str) -> None:
    call: dict[str, object] = {"inputs": [3, 4], **arguments}
    with pytest.raises(DecodeError) as caught:
        autoregressive_generate(model=TARGET, **call)  # type: ignore[arg-type]
    assert sentence in str(caught.value)
    with pytest.raises(DecodeError) as caught:
        speculative_generate(drafter=TARGET, target=TARGET, **call)  # type: ignore[arg-type]
    assert sentence in str(caught.value)
    assert str(caught.value).count(".") >= 1
    assert "\n" not in str(caught.value)


def test_gamma_below_one() -> None:
    with pytest.raises(DecodeError, match="gamma is below 1: received 0; draft at least one token"):
        speculative_generate([3], TARGET, TARGET, gamma=0)
    with pytest.raises(DecodeError):
        Fixed(-1)


def test_different_vocabularies() -> None:
    with pytest.raises(
        DecodeError, match=r"different vocabularies: received 100 and 64; use a drafter with the target's"
    ):
        speculative_generate([3], OTHER, TARGET)


@pytest.mark.parametrize(
    ("target", "drafter", "fits"),
    [
        (151936, 152064, True),
        (152064, 151936, True),
        (32000, 32000, True),
        (32000, 32064, True),
        (64, 80, True),
        (64, 81, False),
        (32000, 32768, False),
        (64, 128, False),
        (49152, 32000, False),
        (50257, 50304, True),
        (None, 7, True),
    ],
)
def test_which_vocabularies_are_one(target: int | None, drafter: int | None, fits: bool) -> None:
    assert isinstance(shared_vocabulary(Limits(target), Limits(drafter)), Failure) is not fits


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_temperature(temperature: float) -> None:
    for build in (GreedyProcessor, MultinomialProcessor):
        with pytest.raises(
            DecodeError, match=r"temperature is not a positive number: received .*; use GreedyProcessor"
        ):
            build(temperature)


def test_top_k_and_top_p() -> None:
    with pytest.raises(DecodeError, match="top_k is below 1: received 0; keep at least one token"):
        TopKProcessor(1.0, 0)
    with pytest.raises(DecodeError, match="top_k"):
        TopKNucleusProcessor(1.0, -1, 0.5)
    for top_p in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(DecodeError, match=r"top_p is outside \(0, 1\]"):
            NucleusProcessor(1.0, top_p)
        with pytest.raises(DecodeError, match=r"top_p is outside \(0, 1\]"):
            TopKNucleusProcessor(1.0, 3, top_p)


@pytest.mark.parametrize(
    ("make", "held"),
    [
        (lambda: Fixed(numpy.uint8(3)).gamma, 3),  # type: ignore[arg-type]
        (lambda: SuffixDrafter(shortest=numpy.int8(2)).shortest, 2),  # type: ignore[arg-type]
        (lambda: SVIP(h=numpy.float32(0.5)).h, 0.5),  # type: ignore[arg-type]
        (lambda: SVIP(temperature=numpy.float16(2)).temperature, 2.0),  # type: ignore[arg-type]
        (lambda: Norms(each=numpy.True_).each, True),  # type: ignore[arg-type]
        (lambda: Rows(2, along=numpy.True_).along, True),  # type: ignore[arg-type]
    ],
)
def test_numbers_of_numpy_are_held_as_pythons_own(make: Callable[[], object], held: object) -> None:
    """Theirs wrap around: 200 + 100 is 44 in 8 bits."""
    assert (type(make()), make()) == (type(held), held)


def test_an_error_is_a_value_where_a_decode_is_started() -> None:
    refused = start([], 5)
    assert isinstance(refused, Failure)
    assert refused.failure().parameter == "prompt"
    assert isinstance(refused.failure(), ValueError)


def test_an_error_that_is_renamed_is_of_the_same_kind() -> None:
    error = DeadEndError("prompt", "the text is over", 3, "end it").renamed({"prompt": "inputs"})
    assert (type(error), error.parameter) == (DeadEndError, "inputs")
