"""The spec's functions: each reads its flags once, at the boundary, and runs a composition of public stages."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import torch
from torch.nn import Module

from specflow.drafters.block import GreedyBlockDrafter, SampledBlockDrafter
from specflow.drafters.combine import propose_nothing
from specflow.drafters.llm import LLMDrafter
from specflow.drafters.ngrams.drafter import GuessingNGramDrafter, NGramDrafter
from specflow.drafters.ngrams.storage import INgramStorage
from specflow.errors import DecodeError, unwrap
from specflow.guards.checks import a, calls, does, drafts, flag, or_none, shown, temperature
from specflow.guards.finite import is_near
from specflow.guards.ids import ids_of, stops_of
from specflow.loop import SPEC_NAMES, once, run, start
from specflow.lossy import accept_loss
from specflow.policies import EGAG, Fixed
from specflow.policies.egag import is_coefficient
from specflow.predictors import CachedPredictor, UncachedPredictor, limits_of
from specflow.predictors.reader import refuse_weightless
from specflow.processors import GreedyProcessor, LogitsProcessor, MultinomialProcessor
from specflow.protocols import Limits
from specflow.randomness import Dice
from specflow.stages.ngram import UpdateNgram
from specflow.stages.observe import Observer, Show, Tokenizer, unobserved
from specflow.state import DecodeState, Drafter, GammaPolicy
from specflow.steps import autoregressive_step, lossy_unadjusted_step, ngram_step, speculative_step
from specflow.vocabulary import shared_vocabulary


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
    """The model's own text after `inputs`, one token at a time: the new tokens, the eos that ended them included.

    Sampling follows torch's default generator.

    inputs: the prompt's ids, at least one: a sequence of whole numbers, or a tensor or numpy array, [n] or [1, n].
    model: a causal language model, its weights on a device.
    max_gen_len: the most new tokens, 0 or more; the model's context may end the text before.
    logits_processor: which law tokens are drawn from, and how; ours, or any `Processor`.
    eos_tokens_id: the id that ends the text, or several in any order; [] for none.
    pad_token_id: has no effect, whatever it is: nothing is padded.
    use_cache: keep keys and values, and feed the model only what is new; else it reads the whole text for each token.
    debug: print each step.

    `DecodeError` (a `ValueError`) for anything else, before the model runs: ids that are not whole numbers or outside
    the vocabulary, a prompt longer than the context, a model without a decoder or without weights (meta).

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    >>> len(autoregressive_generate([3, 4], model, max_gen_len=6, eos_tokens_id=[]))
    6
    """
    _check({"model": model}, logits_processor, None, use_cache=use_cache, debug=debug)
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
    *,
    policy: GammaPolicy | None = None,
) -> tuple[list[int], float]:
    """Speculative decoding with a model as drafter: the new tokens, and accepted / drafted.

    Greedy text equals `autoregressive_generate`'s token for token (fp32, fp64); sampled text has the target's law.
    A fixed `gamma` is paid for at every step: where drafts are rejected, it is slower than decoding without them.
    `use_cache=True, policy=CostAware(meter_of(target))` drafts only what pays.
    On a device, with `use_cache`, the drafter drafts by blocks, so that each draft is copied to the host once.
    Sampling follows torch's default generator.

    inputs, max_gen_len, logits_processor, eos_tokens_id, pad_token_id, use_cache: as in `autoregressive_generate`.
    drafter, target: causal language models of one vocabulary, but for padding; the text is the target's.
    tokenizer: what `debug` decodes tokens with, by its `decode`; None prints ids alone.
    gamma: how many tokens to draft a step, 1 or more; fewer where the text has no room for them.
    use_egag: draft between `gamma_min` and `gamma_max` tokens, as `EGAG` has it, instead of `gamma`.
    gamma_min, gamma_max: 1 or more, gamma_min ≤ gamma_max; None is `gamma`. Used by EGAG alone.
    egag_ema_beta: how much of the last draft length is kept, in [0, 1); 0: nothing. Used by EGAG alone.
    skip_sample_adjustment: lossy: draw from p where the residual is due.
    first_target: decode the first token without a draft.
    debug: print each step, and what becomes of each draft.
    policy: how many tokens to draft, instead of `gamma` and EGAG: any `GammaPolicy`. `CostAware` hears what passes take
        from the target's own meter, `policies.meter_of(target)`, which hears of passes with `use_cache` alone.

    `DecodeError` (a `ValueError`) for anything else, before a model runs.
    Source: Leviathan et al. 2211.17192; Chen et al. 2302.01318.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> drafter, target = (LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).double() for _ in range(2))
    >>> text, rate = speculative_generate([3, 4], drafter, target, max_gen_len=6, eos_tokens_id=[])
    >>> text == autoregressive_generate([3, 4], target, max_gen_len=6, eos_tokens_id=[])
    True
    """
    _check(
        {"target": target, "drafter": drafter},
        logits_processor,
        tokenizer,
        use_cache=use_cache,
        debug=debug,
        use_egag=use_egag,
        skip_sample_adjustment=skip_sample_adjustment,
        first_target=first_target,
    )
    drafts("gamma_min", gamma_min)
    or_none(drafts)("gamma_max", gamma_max)
    is_coefficient("egag_ema_beta", egag_ema_beta)
    paced = _paced(policy, gamma)
    if use_egag:
        if policy is not None:
            raise DecodeError("policy", "a policy and EGAG are both given", shown(policy), "give one of them")
        processor: object = logits_processor  # who knows no more than the protocol has no temperature
        heat = processor.temperature if isinstance(processor, LogitsProcessor) else 1.0
        paced = EGAG(gamma_min, gamma if gamma_max is None else gamma_max, egag_ema_beta, heat)
    vocab_size = unwrap(shared_vocabulary(limits_of(target), limits_of(drafter)))
    state = _started(inputs, target, max_gen_len, eos_tokens_id)

    rng, observe = Dice(), _observer(debug, tokenizer)
    target_predictor, drafter_predictor = _predictor(target, use_cache), _predictor(drafter, use_cache)
    is_fixed = policy is None and not use_egag
    ahead = min(gamma, max(1, state.room - 1)) if is_fixed else None
    draft = _model_drafter(drafter_predictor, logits_processor, rng, vocab_size, ahead)
    memos = (drafter_predictor, target_predictor)
    parts = (draft, target_predictor, logits_processor, rng, paced, memos, observe)
    step = accept_loss(lossy_unadjusted_step(*parts)) if skip_sample_adjustment else speculative_step(*parts)
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
    *,
    policy: GammaPolicy | None = None,
) -> tuple[list[int], float]:
    """NASD, speculative decoding with an n-gram storage as drafter: the new tokens, and accepted / drafted.

    Greedy text equals `autoregressive_generate`'s token for token (fp32, fp64); sampled text has the target's law.
    A fixed `gamma` is paid for at every step, and after an unknown context it drafts random tokens: where drafts are
    rejected, it is slower than decoding without them. `use_cache=True, stop_if_unknown=True,
    policy=CostAware(meter_of(target))` drafts only what pays.
    Sampling follows torch's default generator.

    inputs, max_gen_len, logits_processor, eos_tokens_id, pad_token_id, use_cache: as in `autoregressive_generate`.
    ngramstorage: learns the prompt, by `initialize`, then what is emitted and what the target almost said. A prompt
        that it has seen before is counted again. Its vocabulary is the target's, but for padding.
    target: a causal language model.
    tokenizer: what `debug` decodes tokens with, by its `decode`; None prints ids alone.
    gamma: how many tokens to draft a step, 1 or more; fewer where the text has no room for them.
    filler_top_k: how many of the target's likeliest tokens are learned at each new position, 1 or more (`UpdateNgram`);
        1: only what is emitted.
    first_target: decode the first token without a draft.
    stop_if_unknown: end a draft at an unknown context; else it goes on with random tokens.
    debug: print each step, and what becomes of each draft.
    policy: how many tokens to draft, instead of `gamma`, as in `speculative_generate`.

    `DecodeError` (a `ValueError`) for anything else, before the model runs and anything is learned.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> target = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).double()
    >>> from specflow import NGramStorage
    >>> storage = NGramStorage(n=3, vocab_size=16)
    >>> text, rate = ngram_assisted_speculative_generate([3, 4], storage, target, max_gen_len=6, eos_tokens_id=[])
    >>> text == autoregressive_generate([3, 4], target, max_gen_len=6, eos_tokens_id=[])
    True
    """
    flags = {"use_cache": use_cache, "debug": debug, "first_target": first_target, "stop_if_unknown": stop_if_unknown}
    _check({"target": target}, logits_processor, tokenizer, **flags)
    does("an n-gram storage", "give an NGramStorage", "initialize", "continuation", "known", "learn")(
        "ngramstorage", ngramstorage
    )
    paced, update = _paced(policy, gamma), UpdateNgram(ngramstorage, filler_top_k)
    state = _started(inputs, target, max_gen_len, eos_tokens_id)
    known = Limits(vocab_size=getattr(ngramstorage, "vocab_size", None))
    happened, remedy = "the storage and the target have different vocabularies", "make it with the target's vocab_size"
    shared = shared_vocabulary(limits_of(target), known)
    vocab_size = unwrap(shared.alt(lambda error: DecodeError("ngramstorage", happened, error.received, remedy)))
    rng, observe, predictor = Dice(), _observer(debug, tokenizer), _predictor(target, use_cache)
    drafter = (NGramDrafter if stop_if_unknown else GuessingNGramDrafter)(ngramstorage, vocab_size)

    ngramstorage.initialize(torch.tensor([state.tokens], device="cpu"))
    step = ngram_step(drafter, predictor, logits_processor, rng, update, paced, (predictor,), observe)
    if first_target:
        step = once(ngram_step(propose_nothing, predictor, logits_processor, rng, update, observe=observe), step)
    end = run(step, state).state
    return list(end.output), end.tally.acceptance_rate


def _check(models: Mapping[str, Module], processor: object, tokenizer: object, **flags: bool) -> None:
    """`DecodeError` for flags, processors, tokenizers and models of the wrong kind.

    The spec's processors divide by their temperature.
    """
    for name, value in flags.items():
        flag(name, value)
    remedy = "give a LogitsProcessor such as GreedyProcessor(), or transformers' in an interop.ProcessorList"
    does("a logits processor", remedy, "laws")("logits_processor", processor)
    if isinstance(processor, LogitsProcessor):
        temperature("temperature", getattr(processor, "temperature", None))
    or_none(does("a tokenizer", "give something that can `decode` ids, or None", "decode"))("tokenizer", tokenizer)
    for name, model in models.items():
        a(Module, "give a model, such as AutoModelForCausalLM.from_pretrained makes")(name, model)
        refuse_weightless(name, model)


def _paced(policy: GammaPolicy | None, gamma: int) -> GammaPolicy:
    """The policy that was given, or γ at each step."""
    fixed = Fixed(gamma)
    remedy = "give one, such as CostAware(meter_of(target)), or None"
    or_none(calls("a gamma policy", remedy))("policy", policy)
    if isinstance(policy, LogitsProcessor):  # they can be called, too
        raise DecodeError("policy", "a logits processor is no gamma policy", shown(policy), remedy)
    return fixed if policy is None else policy


def _started(inputs: object, target: Module, max_gen_len: int, eos_tokens_id: object) -> DecodeState:
    tokens, stop = ids_of("inputs", inputs), stops_of("eos_tokens_id", eos_tokens_id)
    started = start(tokens, max_gen_len, stop, limits_of(target))
    return unwrap(started.alt(lambda error: error.renamed(SPEC_NAMES)))


def _predictor(model: Module, use_cache: bool) -> CachedPredictor | UncachedPredictor:
    return CachedPredictor(model) if use_cache else UncachedPredictor(model)


def _model_drafter(
    predictor: CachedPredictor | UncachedPredictor,
    processor: LogitsProcessor,
    rng: Dice,
    vocab_size: int | None,
    ahead: int | None,
) -> Drafter:
    """A model as drafter: token by token, or on a device, where each copy to the host would wait for it, by blocks of
    `ahead` tokens, where it is known how many are taken."""
    known = limits_of(predictor.model)
    other = None if known.vocab_size == vocab_size else vocab_size
    is_far = any(not is_near(parameter) for parameter in islice(predictor.model.parameters(), 1))
    is_ours = isinstance(processor, LogitsProcessor)
    if is_far and is_ours and ahead is not None and isinstance(predictor, CachedPredictor):
        if type(processor) is GreedyProcessor:
            return GreedyBlockDrafter(predictor, ahead, other)
        if type(processor).sample is MultinomialProcessor.sample:
            return SampledBlockDrafter(predictor, processor, rng, ahead, other)
    return LLMDrafter.fitting(predictor, known, Limits(vocab_size), processor, rng)


def _observer(debug: bool, tokenizer: Tokenizer | None) -> Observer:
    return Show(tokenizer) if debug else unobserved
