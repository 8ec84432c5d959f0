"""Our decoders in `model.generate(…, custom_generate=…)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeAlias, final

import torch
import transformers as tf
from attrs import evolve, field, frozen
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.generation import GenerateDecoderOnlyOutput

from specflow.errors import DecodeError, unwrap
from specflow.guards.checks import a, calls, does, or_none, valid
from specflow.interop.arguments import (
    Asked,
    kept,
    reads,
    real_tokens,
    refuse_kept,
    refuse_model,
    refuse_other_inputs,
    refuse_settings,
)
from specflow.interop.copying import Common, copies_of
from specflow.interop.processors import (
    InOrder,
    InRow,
    Processing,
    Stateless,
    fresh,
    is_of_the_prefix,
    most_likely,
    parts_of,
    sampled,
)
from specflow.interop.streaming import condition, ended, put_through
from specflow.loop import grow, run, start
from specflow.policies import Fixed
from specflow.predictors import CachedPredictor, UncachedPredictor, limits_of
from specflow.protocols import Limits
from specflow.randomness import Dice, Randomness
from specflow.stages import Adjust, Draft, Reject, Verify, draft_nothing, ending
from specflow.stages.stop import Condition
from specflow.state import Adjusted, DecodeState, Drafted, Drafter, Finished, GammaPolicy, Step, Tokens

Criterion: TypeAlias = Callable[[Tensor, None], object]

ONE_TEXT = "generate one text at a time, or name it Stateless where it is a function of the prefix"
"""The remedy where rows of a batch would share the state of a processor or a criterion."""


@final
@frozen
class Generate:
    """Speculative decoding for `model.generate(ids, custom_generate=Generate(drafter))`: the text it would have given.

    Logits processors, stopping criteria and the `GenerationConfig` are `generate`'s own, prepared by it; a streamer
    gets what it gets there, and is ended after errors too. Processors and criteria of a single text are the given ones,
    asked about each prefix of the text once and in order, whatever state they keep. A batch, left-padded as `generate`
    wants it, is decoded row by row, each with a copy of their state. Sampling draws from `rng`.

    `DecodeError`, before a token, for what cannot be honoured, by name: beams, scores and states in the output,
    guidance by a model, assistants, inputs other than ids, caches of the caller's, in a batch also processors and
    criteria of which there is no sound copy.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).double().eval()
    >>> from specflow import SuffixDrafter
    >>> ids, asked = torch.tensor([[3, 4]]), dict(max_new_tokens=6, do_sample=False)
    >>> ours = model.generate(ids, custom_generate=Generate(SuffixDrafter()), **asked)
    >>> torch.equal(ours, model.generate(ids, **asked))
    True
    """

    drafter: Drafter | None = field(
        default=None, validator=valid(or_none(calls("a drafter", "give a drafter, or None to draft nothing")))
    )
    gamma: GammaPolicy = field(default=Fixed(), validator=valid(calls("a policy", "give a policy, such as Fixed(5)")))
    rng: Randomness = field(default=Dice(), validator=valid(does("a source of randomness", "give Dice()", "draw")))

    __signature__ = Asked()

    def __call__(
        self,
        model: tf.PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Sequence[Processing],
        stopping_criteria: Sequence[Criterion],
        generation_config: tf.GenerationConfig,
        tokenizer: object = None,
        **model_kwargs: object,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        streamer, assistant, synced_gpus = kept()
        with ended(streamer):
            new = _room(model, input_ids, generation_config)
            refuse_kept(streamer, assistant, synced_gpus, len(input_ids))
            refuse_settings(generation_config, model.generation_config)
            real = real_tokens(input_ids, model_kwargs)
            refuse_model(model, int(real.sum(dim=1).max()) + new)
            module = reads(model)
            prompts = [tuple(ids[here].tolist()) for ids, here in zip(input_ids, real, strict=True)]
            padding = [tuple(ids[~here].tolist()) for ids, here in zip(input_ids, real, strict=True)]
            rows = _rows(logits_processor, stopping_criteria, padding, input_ids.device)
            vocab_size = limits_of(model).vocab_size
            stop = _eos(stopping_criteria, vocab_size)
            states = [unwrap(start(prompt, new, stop, Limits(vocab_size))) for prompt in prompts]
            if module is model:
                refuse_other_inputs(model, prompts[0], next(filter(None, padding), ()), model_kwargs)
            target = CachedPredictor(module) if generation_config.use_cache else UncachedPredictor(module)
            choose = sampled if generation_config.do_sample else most_likely
            go_on = _go_on(stopping_criteria, len(rows))
            drafts = [self._draft(row.processors, go_on=go_on) for row in rows]
            untils = [
                partial(self._until, draft, Verify(target, InOrder(row.processors, choose), Reject(self.rng)))
                for draft, row in zip(drafts, rows, strict=True)
            ]
            texts = []
            for row, until, state in zip(rows, untils, states, strict=True):
                step = until(ending(row.condition))
                end = run(step, state) if streamer is None else put_through(grow(step, state), streamer)
                texts.append(end.state)
                for common in row.shared:
                    common.refuse_changes("a processor keeps a state that the rows of a batch would share", ONE_TEXT)
            if go_on:
                most = max(len(before) + len(text.tokens) for before, text in zip(padding, texts, strict=True))
                longer = [
                    evolve(text, request=evolve(text.request, limit=most - len(before)))
                    for before, text in zip(padding, texts, strict=True)
                ]
                texts = [run(until(ending()), text).state for until, text in zip(untils, longer, strict=True)]
        ids = [
            torch.tensor(before + text.tokens, device=input_ids.device)
            for before, text in zip(padding, texts, strict=True)
        ]
        pad = getattr(generation_config, "_pad_token_tensor", None)
        padded = pad_sequence(ids, batch_first=True, padding_value=0 if pad is None else int(pad))
        return GenerateDecoderOnlyOutput(sequences=padded) if generation_config.return_dict_in_generate else padded

    def _draft(self, processors: Sequence[Processing], *, go_on: bool) -> Callable[[DecodeState], Drafted]:
        """Nothing where a row may end within its drafts and go on: processors with a state cannot be taken back."""
        if self.drafter is None or (go_on and not all(map(is_of_the_prefix, processors))):
            return draft_nothing
        return Draft(self.drafter, self.gamma)

    def _until(
        self,
        draft: Callable[[DecodeState], Drafted],
        verify: Verify[Randomness],
        end: Callable[[Adjusted], DecodeState | Finished],
    ) -> Step:
        """The step of a text that ends as `end` has it."""
        adjust = Adjust(self.rng)
        return lambda state: state.then(draft).then(verify).then(adjust).then(end)


def _room(model: tf.PreTrainedModel, input_ids: Tensor, config: tf.GenerationConfig) -> int:
    """How many new tokens were asked for."""
    a(tf.PreTrainedModel, "call it through model.generate(ids, custom_generate=…)")("model", model)
    a(Tensor, "give ids [batch, tokens]")("input_ids", input_ids)
    a(tf.GenerationConfig, "call it through model.generate(ids, custom_generate=…)")("generation_config", config)
    if getattr(model.config, "is_encoder_decoder", False):
        name, remedy = type(model).__name__, "give a decoder, such as AutoModelForCausalLM loads"
        raise DecodeError("model", "an encoder-decoder model cannot be decoded", name, remedy)
    if input_ids.dim() != 2 or 0 in input_ids.shape or input_ids.is_floating_point() or input_ids.is_meta:
        received = f"{input_ids.dtype} of shape {tuple(input_ids.shape)} on {input_ids.device}"
        raise DecodeError("input_ids", "the prompt is not ids [batch, tokens]", received, "give at least one token")
    if config.max_length is None:
        raise DecodeError("max_length", "no length was asked for", None, "give max_new_tokens")
    return config.max_length - input_ids.shape[1]


def _go_on(criteria: Sequence[object], batch: int) -> bool:
    """Whether rows may end before others and go on until all have: without an eos they do in `generate`."""
    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    return batch > 1 and not has_eos and any(type(criterion) is not tf.MaxLengthCriteria for criterion in criteria)


def _eos(criteria: Sequence[object], vocab_size: int | None) -> frozenset[int]:
    """The eos ids that the model can say. They are stop tokens too, so that no processor is asked what follows one."""
    given = [criterion.eos_token_id for criterion in criteria if type(criterion) is tf.EosTokenCriteria]
    ids = {token for each in given for token in each.flatten().tolist()}
    return frozenset([token for token in ids if token >= 0 and (vocab_size is None or token < vocab_size)])


@final
@frozen(eq=False)
class _Row:
    """What one row of a batch is asked, and what that has in common with other rows."""

    processors: tuple[Processing, ...]
    condition: Condition
    shared: tuple[Common, ...] = ()


def _rows(
    processors: Sequence[Processing], criteria: Sequence[Criterion], padding: Sequence[Tokens], device: torch.device
) -> list[_Row]:
    """One text asks the processors and criteria themselves, each row of a batch copies of its own."""
    parts, batch = parts_of(processors), len(padding)
    if batch == 1:
        asked = tuple([InRow(part, padding[0], device) for part in parts])
        return [_Row(asked, condition(criteria, padding[0], device))]
    rows = []
    for row, before in enumerate(padding):
        copied, common = fresh(parts, ONE_TEXT)
        asked = tuple([_in_row(part, before, device, batch, row) for part in copied])
        copied_criteria, more = copies_of(criteria, _is_of_the_text, ONE_TEXT)
        rows.append(_Row(asked, condition(copied_criteria, before, device), (common, more)))
    return rows


def _in_row(processor: Processing, before: Tokens, device: torch.device, batch: int, row: int) -> InRow:
    """A constraint is a function of the row's number: it is asked about that one only, as `generate` asks it."""
    if type(processor) is tf.PrefixConstrainedLogitsProcessor:
        allowed, number = processor._prefix_allowed_tokens_fn, row // processor._num_beams

        def its_own(_: int, ids: Tensor) -> object:
            return allowed(number, ids)

        asked = Stateless(its_own) if is_of_the_prefix(processor) else its_own
        return InRow(tf.PrefixConstrainedLogitsProcessor(asked, 1), before, device)
    return InRow(processor, before, device, batch, row)


_OF_THE_TEXT: Final = frozenset({tf.EosTokenCriteria, tf.MaxLengthCriteria, tf.MaxTimeCriteria, tf.StopStringCriteria})


def _is_of_the_text(criterion: object) -> bool:
    return isinstance(criterion, Stateless) or type(criterion) in _OF_THE_TEXT
