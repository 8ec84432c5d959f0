"""What `generate` was asked: honoured, refused by name, or harmless; and the arguments that it keeps to itself."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sized
from functools import partial
from types import CodeType, FrameType, MappingProxyType
from typing import Final, final

import torch
from torch import Tensor
from torch.nn import Module
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from typing_extensions import override

from specflow.caches import is_empty
from specflow.errors import DecodeError
from specflow.guards.checks import does, or_none, shown
from specflow.guards.finite import checked
from specflow.interop.streaming import Streamer
from specflow.predictors.reader import Reader, config_of, ropes_of
from specflow.predictors.trial import error_bound, error_of
from specflow.predictors.watch import Findings
from specflow.state import Tokens

HONOURED: Final = frozenset(
    """
    bad_words_ids begin_suppress_tokens bos_token_id do_sample encoder_no_repeat_ngram_size encoder_repetition_penalty
    eos_token_id epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    max_length max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size num_return_sequences
    pad_token_id remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate sequence_bias
    stop_strings suppress_tokens temperature token_healing top_h top_k top_p typical_p use_cache watermarking_config
    """.split()  # noqa: SIM905 - 36 names read best as a paragraph
)
"""Fields of a `GenerationConfig` that are done by `generate` before we are called, or by us."""

REFUSED: Final[Mapping[str, tuple[object, ...]]] = MappingProxyType(
    {
        "assistant_ensemble_weight": (),
        "constraints": (),
        "dola_layers": (),
        "force_words_ids": (),
        "guidance_scale": (1,),
        "is_assistant": (False,),
        "num_beams": (1,),
        "penalty_alpha": (0,),
    }
)
"""Fields that make another text, and what they may be besides None."""

OUTPUTS: Final = frozenset({"output_attentions", "output_hidden_states", "output_logits", "output_scores"})
"""Fields that ask for more than the text; they do with `return_dict_in_generate` only."""

HINTS: Final = frozenset(
    """
    assistant_early_exit cache_implementation compile_config prefill_chunk_size prompt_lookup_num_tokens use_mtp
    """.split()  # noqa: SIM905 - the same
)
"""Fields that say how fast and not what: refused when they are asked for, harmless where the checkpoint has them."""

HARMLESS: Final = frozenset(
    """
    assistant_confidence_threshold assistant_lookbehind cache_config continuous_batching_config decoder_start_token_id
    disable_compile diversity_penalty early_stopping length_penalty low_memory max_cache_len max_matching_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups speculation_type target_lookbehind
    transformers_version
    """.split()  # noqa: SIM905 - the same
)
"""Fields that do nothing but qualify others which are refused."""


def refuse_settings(config: GenerationConfig, carried: GenerationConfig) -> None:
    """`DecodeError` for a setting that would not be honoured; `carried` is what the checkpoint brings along.

    What is no field of transformers' own, `generate` does not read either.
    """
    fields, values = vars(GenerationConfig()), config.to_dict()
    for name in fields.keys() & values.keys() - HONOURED - HARMLESS:
        value = values[name]
        if name in OUTPUTS:
            is_right = not (value and config.return_dict_in_generate)
        elif name in HINTS:
            is_right = value is False or (value == getattr(carried, name, None) and value != "quantized")
        else:
            is_right = name.startswith("_") or value in REFUSED.get(name, ())
        if value is not None and not is_right:
            raise _refusal(name, value)


def real_tokens(input_ids: Tensor, model_kwargs: Mapping[str, object]) -> Tensor:
    """Which of the ids [B, n] are text: those that the attention mask does not hide, all of them without a mask.

    `DecodeError` for arguments of the model that say more than that.
    """
    settled = OUTPUTS | {"logits_to_keep", "use_cache"}  # by the config, or by how we read
    given = {name: value for name, value in model_kwargs.items() if name not in settled}
    if given.pop("inputs_embeds", None) is not None:
        happened = "inputs_embeds cannot be decoded, as the ids are the text"
        raise DecodeError("inputs_embeds", happened, "embeddings", "give input_ids, or a PEFT model for a soft prompt")
    mask, positions, cache = (given.pop(name, None) for name in ("attention_mask", "position_ids", "cache"))
    real = mask.bool() if isinstance(mask, Tensor) else torch.ones_like(input_ids, dtype=torch.bool)
    if real.shape != input_ids.shape or (real[:, :-1] & ~real[:, 1:]).any():
        raise DecodeError("attention_mask", "the mask is not that of left padding", shown(mask), "pad on the left")
    if isinstance(positions, Tensor) and not _count_from_0(positions, real):
        remedy = "leave position_ids out"
        raise DecodeError("position_ids", "the positions do not count from 0", shown(positions), remedy)
    if cache is not None and (getattr(cache, "_is_user_defined", False) or not is_empty(cache)):
        happened = "a cache of the caller's cannot be filled, or gone on from"
        raise DecodeError("cache", happened, type(cache).__name__, "leave cache out, and give the whole text as ids")
    for name, value in given.items():
        says_text = name.endswith("token_type_ids") and isinstance(value, Tensor) and not value.any()
        if not (says_text or _is_nothing(value)):
            raise _refusal(name, value)
    return real


def _count_from_0(positions: Tensor, real: Tensor) -> bool:
    """Whether positions [..., B, n] count the real tokens; they may be longer than a prompt that was healed."""
    shared = min(positions.shape[-1], real.shape[-1])
    expected = real.cumsum(dim=-1) - 1
    return bool(((positions[..., :shared] == expected[..., :shared]) | ~real[..., :shared]).all())


def _is_nothing(value: object) -> bool:
    """Whether an argument is one that nobody gave: nothing, or an empty thing of nothings."""
    if isinstance(value, Tensor):
        return value.numel() == 0
    if isinstance(value, Mapping):
        return all(map(_is_nothing, value.values()))
    return value is None or value is False or (isinstance(value, Sized) and len(value) == 0)


def refuse_model(model: PreTrainedModel, length: int) -> None:
    """`DecodeError` for a model whose text is not that of its passes over the ids; `length` is the longest text."""
    edge = _dynamic_edge(model)
    if edge is not None and length > edge:
        happened = f'with a rope of type "dynamic", `generate` makes no function of the text beyond {edge} tokens'
        raise DecodeError("max_length", happened, length, f"generate up to {edge} tokens, or scale the rope otherwise")
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, partial) and hook.func.__module__.startswith("peft."):
                for name in hook.keywords:
                    raise _refusal(name, hook.keywords[name])


def _dynamic_edge(model: PreTrainedModel) -> int | None:
    """The longest text that is read with the frequencies of the training; beyond, they depend on the longest yet."""
    ropes = [rope for rope in ropes_of(model) if rope.get("rope_type") == "dynamic"]
    edges = [rope.get("original_max_position_embeddings") for rope in ropes]
    if ropes:
        edges.append(getattr(config_of(model), "max_position_embeddings", None))
    return min([edge for edge in edges if isinstance(edge, int)], default=None)


def reads(model: PreTrainedModel) -> Module:
    """The module whose passes make the text: the model, or the PEFT model that puts a soft prompt before its inputs."""
    prepare = vars(model).get("prepare_inputs_for_generation")
    owner = model if prepare is None else getattr(prepare, "__self__", None)
    if owner is model:
        return model
    if isinstance(owner, Module) and getattr(owner, "base_model", None) is model:
        return owner
    happened = "the model's inputs are prepared in a way of their own"
    raise DecodeError("prepare_inputs_for_generation", happened, shown(prepare), "leave the model's own in its place")


_FITS: Final = Findings[bool](lambda _: False)  # numbers decide: token types of zeros fit until they are trained

SHORT: Final = 8
"""How many tokens the trial of `refuse_other_inputs` reads."""


def refuse_other_inputs(
    model: PreTrainedModel, tokens: Tokens, padding: Tokens, model_kwargs: Mapping[str, object]
) -> None:
    """`DecodeError` if the model, fed as `generate` feeds it, says something else than over the tokens alone.

    Positions that a model counts from elsewhere, token types that it embeds and padding that it sees are such inputs.
    Two short passes, once for each model object, set of arguments and beginning of the padding, and again when the
    model has changed.
    """
    given = {
        name: value
        for name, value in model_kwargs.items()
        if name.endswith(("token_type_ids", "position_ids", "attention_mask")) and isinstance(value, Tensor)
    }
    if not given:
        return
    before, reader = padding[:2] if "attention_mask" in given else (), Reader.of(model)
    shapes = frozenset([(name, value.shape[:-2]) for name, value in given.items()])
    with reader.guard:
        look = reader.watch.look()
        key = (shapes, before, reader.dtype, reader.device.type, *look.kind)
        fits = _FITS.of(model, key, look, lambda: _fits(reader, model, given, before, tokens[:SHORT]))
    if not fits:
        names = " and ".join(sorted(given))
        happened = f"the model over the {names} of `generate` is not the model over its ids alone"
        remedy = "leave them out; where you gave none, its text in `generate` is not that of its own passes"
        raise DecodeError(min(given), happened, type(model).__name__, remedy)


def _fits(reader: Reader, model: PreTrainedModel, given: Mapping[str, Tensor], before: Tokens, short: Tokens) -> bool:
    """Whether what is said after a short text is said, too, with such arguments, and padding before it."""
    real = torch.tensor([[False] * len(before) + [True] * len(short)], device=model.device)
    counted = (real.cumsum(dim=1) - 1).clamp(min=0)
    inputs: dict[str, object] = {
        name: real.long()
        if name == "attention_mask"
        else torch.zeros_like(counted)
        if name.endswith("token_type_ids")
        else counted.expand(*value.shape[:-2], 1, -1)
        for name, value in given.items()
    }
    fed = Reader.of(_Fed(model, inputs)).read_afresh(before + short, 1)
    alone = checked(reader.read_afresh(short, 1), len(short))
    return error_of(fed, alone) <= error_bound(reader.rounding)


class _Fed(Module):
    """A model that is fed as `generate` feeds it."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, object]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    @override
    def forward(self, input_ids: Tensor) -> object:
        inputs = self.model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=True, use_cache=False, **self.inputs
        )
        return self.model(inputs.pop("input_ids"), **inputs)


def kept() -> tuple[Streamer | None, object, object]:
    """The `streamer`, `assistant_model` and `synced_gpus` that `generate`, if it is running, keeps from a callable."""
    frame = _frame_of(_GENERATE)
    if frame is None:
        return None, None, None
    try:
        streamer, *others = (frame.f_locals[name] for name in ("streamer", "assistant_model", "synced_gpus"))
    except KeyError as error:
        happened, remedy = "this version of transformers calls its `streamer` otherwise", "use another version"
        raise DecodeError("streamer", happened, f"no {error}", remedy) from error
    or_none(does("a streamer", "give one with put and end", "put", "end"))("streamer", streamer)
    return streamer, others[0], others[1]


def refuse_kept(streamer: Streamer | None, assistant: object, synced_gpus: object, rows: int) -> None:
    """`DecodeError` for what of these cannot be honoured."""
    if assistant is not None:
        remedy = "give Generate(LLMDrafter.fitting(CachedPredictor(assistant), …)) instead"
        raise DecodeError("assistant_model", "an assistant is a drafter here", type(assistant).__name__, remedy)
    if synced_gpus:
        raise _refusal("synced_gpus", synced_gpus)
    if streamer is not None and rows > 1:
        raise DecodeError("streamer", "a batch cannot be streamed", f"{rows} texts", "generate one text")


@final
class Asked:
    """The signature of an instance, as `generate` asks for it; the class itself keeps its own.

    `generate` hands to a callable the arguments that its signature names. But it takes the tokenizer out of them
    before it asks, and then has none for stop strings and token healing: here it is put back. No other way is left to
    a callable, which is why this looks into the frame that asks.
    """

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is None:
            raise AttributeError("__signature__")
        frame = _frame_of(_EXTRACT)
        if frame is not None:
            own, handed_on = (frame.f_locals.get(name) for name in ("generation_mode_kwargs", "kwargs"))
            if isinstance(own, dict) and isinstance(handed_on, dict) and "tokenizer" in own:
                handed_on["tokenizer"] = own["tokenizer"]
        return inspect.signature(owner.__call__.__get__(instance))


_GENERATE: Final[CodeType] = inspect.unwrap(GenerationMixin.generate).__code__
_EXTRACT: Final[CodeType] = inspect.unwrap(GenerationMixin._extract_generation_mode_kwargs).__code__


def _frame_of(code: CodeType) -> FrameType | None:
    """The innermost call of this code that is going on."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def _refusal(name: str, value: object) -> DecodeError:
    return DecodeError(name, f"{name} cannot be honoured by a speculative decoder", shown(value), f"leave {name} out")
