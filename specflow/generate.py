"""The spec's functions: each reads its flags once, at the boundary, and runs a composition of public stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from returns.result import Result
from torch.nn import Module

from specflow.drafters.block import GreedyBlockDrafter, SampledBlockDrafter
from specflow.drafters.combine import propose_nothing
from specflow.drafters.llm import LLMDrafter
from specflow.drafters.ngram import GuessingNGramDrafter, NGramDrafter
from specflow.drafters.storage import INgramStorage
from specflow.errors import DecodeError, unwrap
from specflow.finite import is_near
from specflow.gamma import EGAG, Fixed
from specflow.loop import once, run, shared_vocabulary, start
from specflow.lossy import accept_loss
from specflow.predictor import CachedPredictor, Limits, UncachedPredictor, fitted, limits_of
from specflow.processors import GreedyProcessor, LogitsProcessor, MultinomialProcessor
from specflow.random import Dice
from specflow.stages.ngram import UpdateNgram
from specflow.stages.observe import Observer, Show, Tokenizer, unobserved
from specflow.state import DecodeState, Drafter, GammaPolicy
from specflow.steps import autoregressive_step, lossy_unadjusted_step, ngram_step, speculative_step


@torch.no_grad()
def autoregressive_generate(
    inputs: list[int],
    model: Module,
    max_gen_len: int = 40,
    logits_processor: LogitsProcessor = GreedyProcessor(),
    eos_tokens_id: int | list[int] = 1,
    pad_token_id: int = 0,
    use_cache: bool = False,
    debug: bool = False,
) -> list[int]:
    """The model's own text behind `inputs`, one token at a time: the new tokens, the eos that ended them included.

    Sampling follows torch's default generator. Nothing is padded, so `pad_token_id` has no effect.
    `DecodeError` (a `ValueError`) for input that cannot be decoded, before the model runs.
    """
    state = _started(inputs, model, max_gen_len, eos_tokens_id)
    step = autoregressive_step(_predictor(model, use_cache), logits_processor, Dice(), _observer(debug, None))
    return list(run(step, state).state.output)


@torch.no_grad()
def speculative_generate(
    inputs: list[int],
    drafter: Module,
    target: Module,
    tokenizer: Tokenizer | None = None,
    gamma: int = 5,
    use_egag: bool = False,
    gamma_min: int = 1,
    gamma_max: int | None = None,
    egag_ema_beta: float = 0.0,
    logits_processor: LogitsProcessor = GreedyProcessor(),
    max_gen_len: int = 40,
    eos_tokens_id: int | list[int] = 1,
    pad_token_id: int = 0,
    use_cache: bool = False,
    skip_sample_adjustment: bool = False,
    first_target: bool = True,
    debug: bool = False,
) -> tuple[list[int], float]:
    """Speculative decoding with a model as drafter: the new tokens, and accepted / drafted.

    Greedy text equals `autoregressive_generate`'s token for token (fp32, fp64); sampled text has the target's law.
    `skip_sample_adjustment=True` is lossy: it draws from p where the residual is due.
    On a device, with `use_cache`, the drafter drafts by blocks, so that each draft is copied to the host once.
    `use_egag` drafts between `gamma_min` and `gamma_max` tokens (`gamma` where that is None), as `EGAG` has it.
    `first_target` decodes the first token without a draft. `tokenizer` gives `debug` its texts.
    Sampling follows torch's default generator. Nothing is padded, so `pad_token_id` has no effect.
    `DecodeError` (a `ValueError`) for input that cannot be decoded, before a model runs.
    Source: Leviathan et al. 2211.17192; Chen et al. 2302.01318.
    """
    most = gamma
    policy: GammaPolicy = Fixed(gamma)
    if use_egag:
        most = gamma if gamma_max is None else gamma_max
        policy = EGAG(gamma_min, most, egag_ema_beta, logits_processor.temperature)
    vocab_size = unwrap(shared_vocabulary(limits_of(target), limits_of(drafter)))
    state = _started(inputs, target, max_gen_len, eos_tokens_id)

    rng, observe = Dice(), _observer(debug, tokenizer)
    target_predictor, drafter_predictor = _predictor(target, use_cache), _predictor(drafter, use_cache)
    draft = _model_drafter(drafter_predictor, logits_processor, rng, vocab_size, most)
    memos = (drafter_predictor, target_predictor)
    if skip_sample_adjustment:
        step = accept_loss(
            lossy_unadjusted_step(draft, target_predictor, logits_processor, rng, policy, memos, observe)
        )
    else:
        step = speculative_step(draft, target_predictor, logits_processor, rng, policy, memos, observe)
    if first_target:
        step = once(autoregressive_step(target_predictor, logits_processor, rng, observe), step)
    end = run(step, state).state
    return list(end.output), end.tally.acceptance_rate


@torch.no_grad()
def ngram_assisted_speculative_generate(
    inputs: list[int],
    ngramstorage: INgramStorage,
    target: Module,
    tokenizer: Tokenizer | None = None,
    gamma: int = 5,
    filler_top_k: int = 3,
    logits_processor: LogitsProcessor = GreedyProcessor(),
    max_gen_len: int = 40,
    eos_tokens_id: int | list[int] = 1,
    pad_token_id: int = 0,
    use_cache: bool = False,
    first_target: bool = True,
    stop_if_unknown: bool = False,
    debug: bool = False,
) -> tuple[list[int], float]:
    """NASD, speculative decoding with an n-gram storage as drafter: the new tokens, and accepted / drafted.

    Greedy text equals `autoregressive_generate`'s token for token (fp32, fp64); sampled text has the target's law.
    `ngramstorage` learns the prompt, by `initialize`, then what is emitted and the target's `filler_top_k` tokens
    beside it (`UpdateNgram`; 1: only what is emitted). A prompt that it has seen before is counted again.
    A draft ends at an unknown context if `stop_if_unknown`, and else goes on with random tokens.
    `first_target` decodes the first token without a draft. `tokenizer` gives `debug` its texts.
    Sampling follows torch's default generator. Nothing is padded, so `pad_token_id` has no effect.
    `DecodeError` (a `ValueError`) for input that cannot be decoded, before the model runs and anything is learned.
    """
    policy, update = Fixed(gamma), UpdateNgram(ngramstorage, filler_top_k)
    state = _started(inputs, target, max_gen_len, eos_tokens_id)
    vocab_size = unwrap(_storage_vocabulary(target, ngramstorage))
    ngramstorage.initialize(torch.tensor([inputs]))

    rng, observe, predictor = Dice(), _observer(debug, tokenizer), _predictor(target, use_cache)
    drafter = (NGramDrafter if stop_if_unknown else GuessingNGramDrafter)(ngramstorage, vocab_size)
    step = ngram_step(drafter, predictor, logits_processor, rng, update, policy, (predictor,), observe)
    if first_target:
        step = once(ngram_step(propose_nothing, predictor, logits_processor, rng, update, observe=observe), step)
    end = run(step, state).state
    return list(end.output), end.tally.acceptance_rate


def _storage_vocabulary(target: Module, storage: INgramStorage) -> Result[int | None, DecodeError]:
    """The target's vocabulary; refused if the storage's, where it tells one, is another and not just padding."""
    known = Limits(vocab_size=getattr(storage, "vocab_size", None))
    return shared_vocabulary(limits_of(target), known).alt(
        lambda error: DecodeError(
            "ngramstorage",
            "the storage and the target have different vocabularies",
            error.received,
            "make the storage with the target's vocab_size",
        )
    )


def _started(inputs: Sequence[int], target: Module, max_gen_len: int, eos_tokens_id: int | list[int]) -> DecodeState:
    stop = [eos_tokens_id] if isinstance(eos_tokens_id, int) else eos_tokens_id
    return unwrap(start(inputs, max_gen_len, stop, limits_of(target)))


def _predictor(model: Module, use_cache: bool) -> CachedPredictor | UncachedPredictor:
    return CachedPredictor(model) if use_cache else UncachedPredictor(model)


def _model_drafter(
    predictor: CachedPredictor | UncachedPredictor,
    processor: LogitsProcessor,
    rng: Dice,
    vocab_size: int | None,
    ahead: int,
) -> Drafter:
    """A model as drafter: by blocks on a device, where each copy to the host would wait for it, else token by token."""
    known = limits_of(predictor.model)
    other = None if known.vocab_size == vocab_size else vocab_size
    parameter = next(predictor.model.parameters(), None)
    if isinstance(predictor, CachedPredictor) and parameter is not None and not is_near(parameter):
        if type(processor) is GreedyProcessor:
            return GreedyBlockDrafter(predictor, ahead, other)
        if type(processor).sample is MultinomialProcessor.sample:
            return SampledBlockDrafter(predictor, processor, rng, ahead, other)
    return LLMDrafter(
        predictor if vocab_size is None else fitted(predictor, vocab_size),
        processor,
        rng,
        known.context,
        None if other is None else known.vocab_size,
    )


def _observer(debug: bool, tokenizer: Tokenizer | None) -> Observer:
    return Show(tokenizer) if debug else unobserved
