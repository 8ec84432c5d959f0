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
from specflow.guards.checks import a, calls, does, or_none, shown, valid
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
from specflow.interop.processors import InOrder, Processing, Stateless, fresh, most_likely, parts_of, sampled
from specflow.interop.streaming import condition, ended, put_through
from specflow.loop import grow, run, start
from specflow.policies import Fixed
from specflow.predictors import CachedPredictor, UncachedPredictor, limits_of
from specflow.protocols import Limits
from specflow.randomness import Dice, Randomness
from specflow.stages import Adjust, Draft, Reject, Verify, draft_nothing, ending
from specflow.stages.stop import Condition
from specflow.state import Adjusted, DecodeState, Drafted, Drafter, Finished, GammaPolicy, Predictor, Step, Tokens

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
            untils = [partial(self._until, target, InOrder(row.processors, choose)) for row in rows]
            texts = []
            for row, until, state in zip(rows, untils, states, strict=True):
                step = until(ending(row.condition))
                end = run(step, state) if streamer is None else put_through(grow(step, state), streamer)
                texts.append(end.state)
                for common in row.shared:
                    common.refuse_changes("a processor keeps a state that the rows of a batch would share", ONE_TEXT)
            if not any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria):
                # Without an eos, rows that have ended go on in `generate` until all have.
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

    def _until(self, target: Predictor, processor: InOrder, end: Callable[[Adjusted], DecodeState | Finished]) -> Step:
        """The step of a text that ends as `end` has it."""
        draft: Callable[[DecodeState], Drafted] = (
            draft_nothing if self.drafter is None else Draft(self.drafter, self.gamma)
        )
        verify, adjust = Verify(target, processor, Reject(self.rng)), Adjust(self.rng)
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
        asked = tuple([_InRow(part, padding[0], device) for part in parts])
        return [_Row(asked, condition(criteria, padding[0], device))]
    rows = []
    for row, before in enumerate(padding):
        copied, common = fresh(parts, ONE_TEXT)
        asked = tuple([_in_row(part, before, device, batch, row) for part in copied])
        copied_criteria, more = copies_of(criteria, _is_of_the_text, ONE_TEXT)
        rows.append(_Row(asked, condition(copied_criteria, before, device), (common, more)))
    return rows


@final
@frozen(eq=False)
class _InRow:
    """A processor of a batch, asked about one of its rows: that row stands in all of them, with the padding before."""

    processor: Processing
    before: Tokens
    device: torch.device
    batch: int = 1
    row: int = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        ids, scores = ids.to(self.device), scores.to(self.device)
        if self.before:
            ids = torch.cat([torch.tensor([self.before], device=self.device), ids], dim=1)
        if self.batch == 1:
            return self.processor(ids, scores)
        said: object = self.processor(ids.repeat(self.batch, 1), scores.repeat(self.batch, 1))
        if not isinstance(said, Tensor):
            happened = "a processor gave no scores"
            raise DecodeError("processors", happened, shown(said), "return scores [batch, vocabulary]")
        return said[self.row : self.row + 1]


def _in_row(processor: Processing, before: Tokens, device: torch.device, batch: int, row: int) -> _InRow:
    """A constraint is a function of the row's number: it is asked about that one only, as `generate` asks it."""
    if type(processor) is tf.PrefixConstrainedLogitsProcessor:
        allowed, number = processor._prefix_allowed_tokens_fn, row // processor._num_beams
        return _InRow(tf.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(number, ids), 1), before, device)
    return _InRow(processor, before, device, batch, row)


_OF_THE_TEXT: Final = frozenset({tf.EosTokenCriteria, tf.MaxLengthCriteria, tf.MaxTimeCriteria, tf.StopStringCriteria})


def _is_of_the_text(criterion: object) -> bool:
    return isinstance(criterion, Stateless) or type(criterion) in _OF_THE_TEXT
