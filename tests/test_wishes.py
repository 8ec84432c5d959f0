"""Plain wishes are transformers' own, token for token, and exact under drafts."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, Final

import pytest
import torch
import transformers
from torch import Tensor

from specflow import DecodeError, Fixed, LLMDrafter, MultinomialProcessor, Processor, Step, speculative_step
from specflow.constraints import (
    BannedWords,
    FrequencyPenalty,
    LogitBias,
    MinLength,
    MinPProcessor,
    NoRepeatNGram,
    PresencePenalty,
    RepetitionPenalty,
    RequiredWords,
)
from specflow.distribution import BlackBox
from specflow.interop import ProcessorList, sampled
from specflow.laws import Laws
from specflow.testing import Case, World, certify

tf: Any = transformers  # the stubs know these classes, and not what they take
V: Final = 6
STOP: Final = 5
WORDS: Final = [[1, 2], [3], [4, 4, 0]]
SAMPLED: Final = MultinomialProcessor(1.0)


def chances(laws: Laws, row: int, size: int) -> list[float]:
    """The probabilities of the first tokens."""
    law = laws[row]
    assert not isinstance(law, BlackBox)
    return [law.of(token) for token in range(size)]


THEIRS: Final[dict[str, tuple[Processor, list[Callable[[Tensor, Tensor], Tensor]]]]] = {
    "bias": (
        LogitBias(SAMPLED, {1: -1.5, 3: 2.0}),
        [tf.SequenceBiasLogitsProcessor({(1,): -1.5, (3,): 2.0})],
    ),
    "banned": (BannedWords(SAMPLED, WORDS), [tf.NoBadWordsLogitsProcessor(WORDS)]),
    "length": (MinLength(SAMPLED, 7, stop=(STOP,)), [tf.MinLengthLogitsProcessor(7, [STOP])]),
    "new length": (
        MinLength(SAMPLED, 4, stop=(STOP,), begins=3),
        [tf.MinNewTokensLengthLogitsProcessor(3, 4, [STOP])],
    ),
    "min-p": (MinPProcessor(0.7, 0.3), [tf.TemperatureLogitsWarper(0.7), tf.MinPLogitsWarper(0.3)]),
    "repetition": (RepetitionPenalty(SAMPLED, 1.3), [tf.RepetitionPenaltyLogitsProcessor(1.3)]),
    "repetition after": (
        RepetitionPenalty(SAMPLED, 0.7, begins=3),
        [tf.RepetitionPenaltyLogitsProcessor(0.7, prompt_ignore_length=3)],
    ),
    "n-gram": (NoRepeatNGram(SAMPLED, 2), [tf.NoRepeatNGramLogitsProcessor(2)]),
    "unigram": (NoRepeatNGram(SAMPLED, 1), [tf.NoRepeatNGramLogitsProcessor(1)]),
    "long n-gram": (NoRepeatNGram(SAMPLED, 4), [tf.NoRepeatNGramLogitsProcessor(4)]),
    "several": (
        BannedWords(RepetitionPenalty(MinLength(SAMPLED, 5, stop=(STOP,)), 1.3), WORDS),
        [
            tf.NoBadWordsLogitsProcessor(WORDS),
            tf.RepetitionPenaltyLogitsProcessor(1.3),
            tf.MinLengthLogitsProcessor(5, [STOP]),
        ],
    ),
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_they_are_transformers_own(name: str, rows: int, dtype: torch.dtype) -> None:
    """All rows at once say what transformers' class says of each prefix, which `generate` gives logits in fp32."""
    ours, theirs = THEIRS[name]
    dice = torch.Generator().manual_seed(rows)
    for _ in range(30):
        text = tuple(torch.randint(V - 1, (8,), generator=dice).tolist())
        logits = torch.randn(rows, V, generator=dice).to(dtype)
        before = logits.clone()
        laws = ours.laws(text, logits)
        assert torch.equal(logits, before)
        for row in range(rows):
            ids = torch.tensor([text[: len(text) - rows + 1 + row]])
            scores = logits[row : row + 1].to(torch.float32, copy=True)
            for part in theirs:
                scores = part(ids, scores)
            if float(scores.max()) > -inf:
                torch.testing.assert_close(chances(laws, row, V), scores[0].softmax(-1).tolist())


def test_frequency_and_presence_count_what_was_said() -> None:
    text, logits = (9, 1, 2, 1, 1), torch.zeros(3, 4, dtype=torch.float64)
    frequency = FrequencyPenalty(SAMPLED, 0.5, begins=1).laws(text, logits)
    presence = PresencePenalty(SAMPLED, 0.5, begins=2).laws(text, logits)
    for row, (often, there) in enumerate([((1, 1), (0, 1)), ((2, 1), (1, 1)), ((3, 1), (1, 1))]):
        for laws, (ones, twos) in ((frequency, often), (presence, there)):
            expected = torch.tensor([0.0, -0.5 * ones, -0.5 * twos, 0.0], dtype=torch.float64).softmax(-1)
            assert chances(laws, row, 4) == pytest.approx(expected.tolist())


def test_a_text_ends_once_all_words_have_come() -> None:
    required = RequiredWords(SAMPLED, [(1, 2), (3,)], stop=(0,), begins=2)
    laws = required.laws((1, 2, 3, 1, 2, 0), torch.zeros(5, 4))
    assert [chances(laws, row, 1)[0] > 0 for row in range(5)] == [False, False, False, True, True]


WISHES: Final[dict[str, Callable[[], Processor]]] = {
    "bias": lambda: LogitBias(SAMPLED, {0: -inf, 1: 0.7}),
    "banned": lambda: BannedWords(SAMPLED, [(0, 1), (1, 0, 0)]),
    "required": lambda: RequiredWords(SAMPLED, [(1,)], stop=(2,), begins=1),
    "length": lambda: MinLength(SAMPLED, 2, stop=(2,), begins=1),
    "min-p": lambda: MinPProcessor(0.8, 0.4),
    "repetition": lambda: RepetitionPenalty(SAMPLED, 1.4),
    "frequency": lambda: FrequencyPenalty(SAMPLED, 0.6),
    "presence": lambda: PresencePenalty(SAMPLED, 0.6, begins=1),
    "n-gram": lambda: NoRepeatNGram(SAMPLED, 2),
}


@pytest.mark.parametrize("name", WISHES)
def test_they_are_exact_under_drafts(name: str) -> None:
    def drafting(world: World) -> Step:
        drafter = LLMDrafter(world.drafter, SAMPLED, world.rng, widths=(2,))
        return speculative_step(drafter, world.target, world.processor, world.rng, Fixed(3))

    certify(drafting, cases=[Case(3, (0,), 3, frozenset({2}), lambda rng: WISHES[name](), 31)])


def test_a_wish_around_transformers_own_list() -> None:
    inner = ProcessorList([tf.TemperatureLogitsWarper(0.5)], sampled)
    assert chances(LogitBias(inner, {0: -inf}).laws((1,), torch.zeros(1, 3)), 0, 3) == pytest.approx([0.0, 0.5, 0.5])


@pytest.mark.parametrize("name", WISHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_a_law_does_not_depend_on_how_many_rows_are_read(name: str, dtype: torch.dtype) -> None:
    """With drafts the rows are read together, and without them one by one; a long text has more than 16 bits count."""
    text, wish = (1,) * 3000, WISHES[name]()
    for most in (300, 3000):
        logits = (torch.tensor([2.0, 0.6 * most, 1.0]) + torch.randn(8, 3, generator=torch.Generator())).to(dtype)
        together = wish.laws(text[:most], logits)
        for row in range(8):
            alone = wish.laws(text[: most - 7 + row], logits[row : row + 1])
            assert chances(alone, 0, 3) == chances(together, row, 3)


BEYOND: Final[dict[str, Callable[[float], Processor]]] = {
    "bias": lambda number: LogitBias(SAMPLED, {0: number}),
    "repetition": lambda number: RepetitionPenalty(SAMPLED, number),
    "frequency": lambda number: FrequencyPenalty(SAMPLED, number),
    "presence": lambda number: PresencePenalty(SAMPLED, number),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_logits_cannot_hold_is_refused_and_the_model_is_not_blamed(name: str) -> None:
    logits = torch.tensor([[20.0, -20.0, 0.0]])
    for number in (1e39, inf, float("nan")) + ((1e-46, 0.0, -1.0) if name == "repetition" else ()):
        with pytest.raises(DecodeError, match=r"(penalty|bias) is not a number (between|up to) "):
            BEYOND[name](number)
    for number in (1e30, 1e-30, *[-1e30] * (name != "repetition")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            laws = BEYOND[name](number).laws((0, 1, 1), logits.to(dtype))
            assert sum(chances(laws, 0, 3)) == pytest.approx(1.0)
