"""Decoding with n-gram storages: exact whatever they propose, and they learn what was committed and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice, product
from threading import Thread
from typing import final

import pytest
import torch
from returns.pipeline import flow
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from specflow import (
    Dice,
    Fixed,
    GreedyProcessor,
    MultinomialProcessor,
    NGramDrafter,
    NGramStorage,
    TopKProcessor,
    autoregressive_step,
    ngram_assisted_speculative_generate,
    ngram_step,
    run,
    start,
)
from specflow.drafters import GuessingNGramDrafter, INgramStorage, OneLevelNGramStorage
from specflow.errors import DecodeError
from specflow.models import Loaded
from specflow.paths import path_by_path
from specflow.predictors import UncachedPredictor
from specflow.processors import LogitsProcessor
from specflow.stages import Adjust, Draft, Reject, StopWhen, UpdateNgram, Verify, advance, commit
from specflow.stages.ngram import top_tokens
from specflow.state import Committed, DecodeState, Finished, Reason, Tokens
from tests.toys import VOCABULARY, oracle, tiny_gpt2, tiny_llama

PROMPT = [5, 9, 5, 9, 20, 5, 9]
MODELS = {"llama": tiny_llama(3), "gpt2": tiny_gpt2(1)}
TEXTS = {name: oracle(PROMPT, model, 24) for name, model in MODELS.items()}


def likely(text: Sequence[int], model: PreTrainedModel) -> list[list[int]]:
    """The model's own top 8 behind each prefix of `text`, best first."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(text)])).logits[0]
    return [list(map(int, row)) for row in logits.topk(8).indices]


def taught_by_hand(storage: NGramStorage, prompt: Sequence[int], output: Sequence[int], top: int, name: str) -> None:
    """What a storage ought to know behind a decode of `output`."""
    text = [*prompt, *output]
    tops = likely(text, MODELS[name])
    storage.initialize(prompt)
    for end in range(len(prompt), len(text)):
        others = [token for token in tops[end - 1][:top] if token != text[end]]
        storage.update(text[:end], [text[end]] if top == 1 else [*others, text[end], text[end]])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gamma", [1, 2, 5])
@pytest.mark.parametrize("top", [1, 3])
def test_greedy_text_is_the_oracles_and_the_storage_learns_just_that(name: str, gamma: int, top: int) -> None:
    model, text = MODELS[name], TEXTS[name]
    stops = [[], [text[-1], text[11]], [63]]
    for eos, (stop_if_unknown, use_cache, first_target) in product(stops, product((False, True), repeat=3)):
        storage, hand = NGramStorage(3, VOCABULARY), NGramStorage(3, VOCABULARY)
        expected = text[: next((i + 1 for i, token in enumerate(text) if token in eos), None)]
        output, rate = ngram_assisted_speculative_generate(
            PROMPT,
            storage,
            model,
            gamma=gamma,
            filler_top_k=top,
            max_gen_len=24,
            eos_tokens_id=eos,
            use_cache=use_cache,
            first_target=first_target,
            stop_if_unknown=stop_if_unknown,
        )
        assert output == expected
        assert 0.0 <= rate <= 1.0
        taught_by_hand(hand, PROMPT, output, top, name)
        assert storage.counts() == hand.counts()


@pytest.mark.parametrize("name", MODELS)
def test_a_storage_that_knows_the_text_makes_drafts_that_stand(name: str) -> None:
    storage = NGramStorage(5, VOCABULARY)
    storage.initialize([*PROMPT, *TEXTS[name]])
    for first_target in (True, False):
        output, rate = ngram_assisted_speculative_generate(
            PROMPT, storage, MODELS[name], max_gen_len=24, eos_tokens_id=[], first_target=first_target
        )
        assert output == TEXTS[name]
        assert rate > 0.5


def test_a_stop_inside_accepted_drafts_ends_text_statistics_and_learning_alike() -> None:
    model, text = MODELS["llama"], TEXTS["llama"]
    end, later = [i for i in range(3, 20) if text[i] not in text[:i]][:2]
    eos = text[end]
    for extra in ([eos], [63, eos], [text[later], eos]):
        storage, hand = NGramStorage(4, VOCABULARY), NGramStorage(4, VOCABULARY)
        for taught in (storage, hand):
            taught.initialize([*PROMPT, *text])
        output, rate = ngram_assisted_speculative_generate(
            PROMPT, storage, model, gamma=9, eos_tokens_id=extra, first_target=False
        )
        assert output == text[: end + 1]
        assert rate == 1.0
        taught_by_hand(hand, PROMPT, output, 3, "llama")
        assert storage.counts() == hand.counts()


def test_the_limit_ends_learning_too() -> None:
    for limit in range(6):
        storage, hand = NGramStorage(4, VOCABULARY), NGramStorage(4, VOCABULARY)
        for taught in (storage, hand):
            taught.initialize([*PROMPT, *TEXTS["llama"]])
        output, rate = ngram_assisted_speculative_generate(
            PROMPT, storage, MODELS["llama"], gamma=9, max_gen_len=limit, eos_tokens_id=[], first_target=False
        )
        assert output == TEXTS["llama"][:limit]
        taught_by_hand(hand, PROMPT, output, 3, "llama")
        assert storage.counts() == hand.counts()
        assert rate == (1.0 if limit > 1 else 0.0)


def test_a_stop_condition_ends_learning_too() -> None:
    model, text = MODELS["llama"], TEXTS["llama"]
    target, rng = UncachedPredictor(model), Dice()
    for length in range(1, 6):
        storage, hand = NGramStorage(4, VOCABULARY), NGramStorage(4, VOCABULARY)
        for taught in (storage, hand):
            taught.initialize([*PROMPT, *text])

        def long_enough(state: DecodeState, length: int = length) -> bool:
            return len(state.output) == length

        draft, verify = Draft(NGramDrafter(storage), Fixed(9)), Verify(target, GreedyProcessor(), Reject(rng))
        stop, update = StopWhen(long_enough), UpdateNgram(storage, 3)
        state = start(PROMPT, 20).unwrap()
        end = flow(state, draft, verify, Adjust(rng), stop, commit, update, advance)
        assert isinstance(end, Finished)
        assert (end.reason, list(end.state.output)) == (Reason.CONDITION, text[:length])
        for at in range(length):
            end_of_context = len(PROMPT) + at
            whole = [*PROMPT, *text]
            others = [token for token in likely(whole, model)[end_of_context - 1][:3] if token != text[at]]
            hand.update(whole[:end_of_context], [*others, text[at], text[at]])
        assert storage.counts() == hand.counts()


def test_the_acceptance_rate_is_0_when_nothing_was_drafted() -> None:
    for limit in (0, 1):
        storage = NGramStorage(3, VOCABULARY)
        assert ngram_assisted_speculative_generate(PROMPT, storage, MODELS["llama"], max_gen_len=limit)[1] == 0.0
    silent = OneLevelNGramStorage(60, VOCABULARY)
    output, rate = ngram_assisted_speculative_generate(
        PROMPT, silent, MODELS["llama"], max_gen_len=24, eos_tokens_id=[], stop_if_unknown=True
    )
    assert (output, rate) == (TEXTS["llama"], 0.0)


@final
class TheirStorage(INgramStorage):
    """Written against the spec alone: bigrams, tensors in, one next token at a time, no `super().__init__`."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.table: dict[int, list[int]] = {}

    @override
    def next_token(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        followers = self.table.get(int(input_ids[0, -1]))
        if not followers:
            return torch.randint(self.vocabulary, (1,)), torch.tensor([False])
        counts = Counter(followers)
        best = max(counts, key=lambda token: (counts[token], len(followers) - followers[::-1].index(token)))
        return torch.tensor([best]), torch.tensor([True])

    @override
    def has_gram(self, ngram: Tensor) -> bool:
        return int(ngram[-1]) in self.table.get(int(ngram[-2]), [])

    @override
    def update(self, input_ids: Tensor, next_tokens: Tensor) -> None:
        self.table.setdefault(int(input_ids[0, -1]), []).append(int(next_tokens))

    @override
    def initialize(self, input_ids: Tensor) -> None:
        for before, after in zip(input_ids[0, :-1].tolist(), input_ids[0, 1:].tolist(), strict=True):
            self.table.setdefault(before, []).append(after)

    @override
    def reset(self) -> None:
        self.table.clear()


@pytest.mark.parametrize("top", [1, 3])
@pytest.mark.parametrize("stop_if_unknown", [False, True])
def test_a_users_storage_drafts_and_learns_as_ours_do(top: int, stop_if_unknown: bool) -> None:
    for model, text in zip(MODELS.values(), TEXTS.values(), strict=True):
        results = []
        ours, theirs = NGramStorage(2, VOCABULARY), TheirStorage(VOCABULARY)
        for storage in (ours, theirs):
            torch.manual_seed(1)
            results.append(
                ngram_assisted_speculative_generate(
                    PROMPT,
                    storage,
                    model,
                    filler_top_k=top,
                    max_gen_len=24,
                    eos_tokens_id=[],
                    stop_if_unknown=stop_if_unknown,
                )
            )
        assert results[0] == results[1]
        assert results[0][0] == text
        assert {(key,): dict(Counter(tokens)) for key, tokens in theirs.table.items()} == ours.counts()


def test_a_guess_goes_on_where_the_storage_knows_nothing_and_the_other_drafter_ends() -> None:
    storage = NGramStorage(2, VOCABULARY)
    storage.initialize([1, 2])
    assert [proposal.token for proposal in islice(NGramDrafter(storage)((1,)), 5)] == [2]
    guesses = [proposal.token for proposal in islice(GuessingNGramDrafter(storage)((1,)), 5)]
    assert len(guesses) == 5
    assert guesses[0] == 2
    proposal = next(GuessingNGramDrafter(storage, source="mine")((1,)))
    assert (proposal.q.token, proposal.source) == (2, "mine")


@pytest.mark.parametrize("kind", [NGramStorage, OneLevelNGramStorage])
def test_only_a_guess_that_is_drafted_is_drawn(kind: type[NGramStorage | OneLevelNGramStorage]) -> None:
    """So `Dice()` on torch's default generator rolls the same, whether drafts end at unknown contexts or not at all."""
    storage, model = kind(2, VOCABULARY), MODELS["llama"]
    storage.initialize([5, 9])
    before = torch.get_rng_state()
    assert [proposal.token for proposal in NGramDrafter(storage)((5,))] == [9]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(list(islice(GuessingNGramDrafter(storage)((5,)), 2))) == 2
    assert not torch.equal(torch.get_rng_state(), before)
    predictor, processor, texts = UncachedPredictor(model), MultinomialProcessor(1.0), []
    for step in (
        autoregressive_step(predictor, processor, Dice()),
        ngram_step(NGramDrafter(storage), predictor, processor, Dice(), UpdateNgram(storage)),
    ):
        torch.manual_seed(1)
        texts.append(run(step, start(PROMPT, 24).unwrap()).state.output)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("sizes", [(60, 64), (64, 60)])
@pytest.mark.parametrize("stop_if_unknown", [False, True])
def test_padded_vocabularies_are_one_vocabulary(sizes: tuple[int, int], stop_if_unknown: bool) -> None:
    storage_size, target_size = sizes
    emitted = set()
    for seed in range(8):
        model = tiny_llama(seed, vocab_size=target_size)
        storage = NGramStorage(3, storage_size)
        storage.initialize([token for token in range(storage_size) for _ in range(2)])
        expected = oracle([5, 9, 5], model, 20)
        emitted |= set(expected)
        output, _ = ngram_assisted_speculative_generate(
            [5, 9, 5], storage, model, max_gen_len=20, eos_tokens_id=[], stop_if_unknown=stop_if_unknown
        )
        assert output == expected
    assert max(emitted) >= 60 or target_size == 60


def test_what_cannot_be_decoded_is_refused_before_the_model_runs_and_nothing_is_learned() -> None:
    model = tiny_llama()
    storage = NGramStorage(3, VOCABULARY)
    storage.initialize([1, 2, 3])
    before = storage.counts()

    def never(*args: object, **kwargs: object) -> None:
        pytest.fail("the model ran")

    model.forward = never
    small = NGramStorage(3, 60)

    def generate(
        inputs: list[int],
        ngramstorage: INgramStorage = storage,
        gamma: int = 5,
        filler_top_k: int = 3,
        max_gen_len: int = 5,
        eos_tokens_id: int | list[int] = 1,
    ) -> None:
        ngram_assisted_speculative_generate(
            inputs,
            ngramstorage,
            model,
            gamma=gamma,
            filler_top_k=filler_top_k,
            max_gen_len=max_gen_len,
            eos_tokens_id=eos_tokens_id,
        )

    deeds: list[tuple[Callable[[], None], str]] = [
        (lambda: generate([]), "inputs"),
        (lambda: generate([VOCABULARY]), "inputs"),
        (lambda: generate([1] * 200), "inputs"),
        (lambda: generate([1], gamma=0), "gamma"),
        (lambda: generate([1], filler_top_k=0), "filler_top_k"),
        (lambda: generate([1], max_gen_len=-1), "max_gen_len"),
        (lambda: generate([1], eos_tokens_id=[1, 99]), "eos_tokens_id"),
        (lambda: generate([1], NGramStorage(3, 32)), "ngramstorage"),
        (lambda: generate([1], NGramStorage(3, 1000)), "ngramstorage"),
        (lambda: generate([1, 62], small), "input_ids"),
    ]
    for deed, parameter in deeds:
        with pytest.raises(DecodeError) as refused:
            deed()
        assert refused.value.parameter == parameter
    assert storage.counts() == before
    assert small.counts() == {}


def test_the_debugger_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for debug in (False, True):
        storage = NGramStorage(3, VOCABULARY)
        outputs.append(
            ngram_assisted_speculative_generate(PROMPT, storage, MODELS["llama"], eos_tokens_id=[], debug=debug)
        )
        assert ("ngram" in capsys.readouterr().out) == debug
    assert outputs[0] == outputs[1]


def test_an_observer_that_raises_keeps_the_storage_from_learning() -> None:
    storage = NGramStorage(3, VOCABULARY)

    def fail(committed: Committed) -> None:
        raise RuntimeError("no")

    target = UncachedPredictor(MODELS["llama"])
    step = ngram_step(NGramDrafter(storage), target, GreedyProcessor(), Dice(), UpdateNgram(storage), observe=fail)
    with pytest.raises(RuntimeError, match="no"):
        step(start(PROMPT, 5).unwrap())
    assert storage.counts() == {}


def test_two_threads_decode_over_one_storage() -> None:
    storage = NGramStorage(4, VOCABULARY)
    outputs: dict[str, list[int]] = {}

    def decode(name: str) -> None:
        outputs[name] = ngram_assisted_speculative_generate(
            PROMPT, storage, MODELS[name], max_gen_len=24, eos_tokens_id=[]
        )[0]

    threads = [Thread(target=decode, args=(name,)) for name in MODELS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == TEXTS
    hand = NGramStorage(4, VOCABULARY)
    for name in MODELS:
        taught_by_hand(hand, PROMPT, TEXTS[name], 3, name)
    assert storage.counts() == hand.counts()


@pytest.mark.parametrize("vocab_size", [3, 255, 256, 257, 2000, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_tokens_are_torchs_top_k(vocab_size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(4, vocab_size).to(dtype)
    for top in (1, 2, 3, 7, 300):
        best = logits.topk(min(top, vocab_size))
        found = top_tokens(logits, top)
        assert [len(set(row)) for row in found] == [min(top, vocab_size)] * 4
        assert [logits[i, row].tolist() for i, row in enumerate(found)] == best.values.tolist()


def test_top_tokens_leave_out_what_cannot_be() -> None:
    logits = torch.full((2, 2000), -torch.inf)
    logits[0, [3, 1999]] = torch.tensor([1.0, 2.0])
    logits[1, 256:] = torch.arange(1744.0)
    assert top_tokens(logits, 4) == [[1999, 3], [1999, 1998, 1997, 1996]]


TABLE = torch.tensor([[0.1, 1.2, 0.4, -1.0], [1.0, 0.0, 2.0, 0.3], [-0.5, 0.9, 0.8, 0.0], [0.3, 0.2, -2.0, 1.0]])


@path_by_path
def table(tokens: Tokens, last: int) -> Tensor:
    """A model that looks at the last token alone."""
    return TABLE[list(tokens[len(tokens) - last :])]


@pytest.mark.parametrize("processor", [MultinomialProcessor(0.7), TopKProcessor(1.3, 2)])
@pytest.mark.parametrize("drafter", [NGramDrafter, GuessingNGramDrafter])
def test_sampled_text_has_the_targets_law(
    processor: LogitsProcessor, drafter: type[NGramDrafter | GuessingNGramDrafter]
) -> None:
    """Chi-square of 4000 texts of three tokens, while the storage goes on learning from them."""
    law: dict[tuple[int, ...], float] = {}
    laws = processor(TABLE).double()
    for a, b, c in product(range(4), repeat=3):
        law[a, b, c] = float(laws[0, a] * laws[a, b] * laws[b, c])
    storage = NGramStorage(3, 4)
    storage.initialize([0, 1, 2])
    step = ngram_step(drafter(storage), table, processor, Dice(), UpdateNgram(storage, 2), Fixed(2))
    state = start([0], 3).unwrap()
    runs = 4000
    counted = Counter(run(step, state).state.output for _ in range(runs))
    assert all(law[text] > 0 for text in counted)
    cells = [(law[text] * runs, counted[text]) for text in law if law[text] * runs >= 5]
    statistic = sum((seen - due) ** 2 / due for due, seen in cells)
    freedom = len(cells) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_the_real_model_decodes_the_same_with_ngrams(smollm2: Loaded) -> None:
    prompt = list(smollm2.chat("Repeat three times: the cat sat on the mat."))
    storage = NGramStorage(3, smollm2.model.config.vocab_size)
    output, rate = ngram_assisted_speculative_generate(
        prompt, storage, smollm2.model, max_gen_len=24, eos_tokens_id=sorted(smollm2.stop), use_cache=True
    )
    assert output == oracle(prompt, smollm2.model, 24, smollm2.stop)
    assert rate > 0.0


def test_a_drafter_and_a_lesson_need_a_storage() -> None:
    storage = NGramStorage(2, VOCABULARY)
    for junk in (None, "x", [1], NGramStorage, 3):
        with pytest.raises(DecodeError, match="an n-gram storage"):
            NGramDrafter(junk)  # type: ignore[arg-type]
        with pytest.raises(DecodeError, match="an n-gram storage"):
            GuessingNGramDrafter(junk)  # type: ignore[arg-type]
        with pytest.raises(DecodeError, match="an n-gram storage"):
            UpdateNgram(junk)  # type: ignore[arg-type]
        with pytest.raises(DecodeError):
            UpdateNgram(storage)(junk)  # type: ignore[arg-type]
        with pytest.raises(DecodeError):
            NGramDrafter(storage)(junk if junk != [1] else None)  # type: ignore[arg-type]
    for top in (0, -1, 1.5, None, "3", True, torch.tensor(3)):
        with pytest.raises(DecodeError) as refused:
            UpdateNgram(storage, top)  # type: ignore[arg-type]
        assert refused.value.parameter == "filler_top_k"
    for size in (0, 1.5, "3", True):
        with pytest.raises(DecodeError) as refused:
            NGramDrafter(storage, size)  # type: ignore[arg-type]
        assert refused.value.parameter == "vocab_size"
