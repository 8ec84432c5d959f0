"""A sample of the random models and scripts: every row is right, or the model is refused with a reason."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from benchmarks.random_models import Outcome, outcome, sample

MODELS = 60
CHUNK = 10


@pytest.mark.filterwarnings("ignore")  # of configs that contradict themselves, in transformers' and peft's many ways
@pytest.mark.parametrize("first", range(0, MODELS, CHUNK))
def test_random_models_and_scripts(first: int) -> None:
    """What is found wrong can be had again by the line that is printed."""
    logging.set_verbosity(logging.CRITICAL)
    found = [outcome(seed) for seed in range(first, first + CHUNK)]
    wrong = [str(one) for one in found if one.kind == "violation"]
    assert not wrong, "\n".join(wrong)
    assert sum(one.kind == "conforming" for one in found) > CHUNK / 2  # refusing everything is no way out
    assert all(one.reason for one in found)


@pytest.mark.filterwarnings("ignore")
def test_a_seed_is_one_model() -> None:
    logging.set_verbosity(logging.CRITICAL)
    once, again = sample(7), sample(7)
    assert once.name == again.name
    weights = zip(once.model.parameters(), again.model.parameters(), strict=True)
    assert all(bool((ours == theirs).all()) for ours, theirs in weights)
    assert len({sample(seed).name for seed in range(12)}) > 9


def test_an_outcome_says_how_to_have_it_again() -> None:
    line = str(Outcome(417, "gpt2", "violation", "1 of 3 rows differ"))
    assert line == "violation --first 417 --models 1: gpt2: 1 of 3 rows differ"
