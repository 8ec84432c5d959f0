"""Our decoders behind `model.generate(…, custom_generate=…)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, final

import torch
from attrs import frozen
from returns.pipeline import flow
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from specflow.caching import is_empty
from specflow.errors import DecodeError, unwrap
from specflow.gamma import Fixed
from specflow.interop.processors import ProcessorList, most_likely, sampled
from specflow.interop.streaming import Streamer, stops, stream
from specflow.loop import run, start
from specflow.predictor import CachedPredictor, UncachedPredictor
from specflow.random import Dice, Randomness
from specflow.stages import Adjust, Draft, RejectTokens, StopWhen, advance, commit, draft_nothing
from specflow.state import DecodeState, Drafted, Drafter, Finished, GammaPolicy, Predictor, Step

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

INDIFFERENT: Final = frozenset(
    """
    assistant_confidence_threshold assistant_lookbehind cache_config decoder_start_token_id disable_compile
    early_stopping length_penalty max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule
    target_lookbehind transformers_version
    """.split()  # noqa: SIM905 - the same
)
"""Fields that qualify others which are refused when set, or say how fast and not what."""

NEUTRAL: Final = {"num_beams": 1, "num_beam_groups": 1, "guidance_scale": 1.0}
"""What fields that are refused may be, besides None and False."""


@final
@frozen
class Generate:
    """Speculative decoding for `model.generate(ids, custom_generate=Generate(drafter))`: the text it would have given.

    Logits processors, stopping criteria and the `GenerationConfig` are `generate`'s own, prepared by it; sampling
    draws from `rng`. A batch, left-padded as `generate` wants it, is decoded row by row. `gamma` and the drafter are
    specflow's. `generate` keeps its `streamer` argument to itself: give the streamer here.

    `DecodeError`, before a model runs, for what cannot be honoured, by name: beams, scores and states in the output,
    guidance by a model, inputs other than ids, caches that were filled before.
    """

    drafter: Drafter | None = None
    gamma: GammaPolicy = Fixed()
    rng: Randomness = Dice()
    streamer: Streamer | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: object,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        _refuse_settings(generation_config)
        real = _real(input_ids, model_kwargs)
        if self.streamer is not None and len(input_ids) > 1:
            raise DecodeError("streamer", "a batch cannot be streamed", f"{len(input_ids)} texts", "generate one text")
        choose = sampled if generation_config.do_sample else most_likely
        target = CachedPredictor(model) if generation_config.use_cache else UncachedPredictor(model)
        assert generation_config.max_length is not None  # `generate` has computed it
        new = generation_config.max_length - input_ids.shape[1]
        rows = []
        for row, (ids, here) in enumerate(zip(input_ids, real, strict=True)):
            padding = tuple(ids[~here].tolist())
            processor = ProcessorList(logits_processor, choose, padding, len(input_ids), row)
            state = unwrap(start(ids[here].tolist(), new))
            finished = self._run(self._step(target, processor, StopWhen(stops(stopping_criteria, padding))), state)
            rows.append(torch.tensor(padding + finished.state.tokens, device=input_ids.device))
        pad = generation_config.pad_token_id
        sequences = pad_sequence(rows, batch_first=True, padding_value=0 if pad is None else pad)
        return (
            GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences
        )

    def _step(self, target: Predictor, processor: ProcessorList, stop: StopWhen) -> Step:
        draft: Callable[[DecodeState], Drafted] = (
            draft_nothing if self.drafter is None else Draft(self.drafter, self.gamma)
        )
        verify, adjust = RejectTokens(target, processor, self.rng), Adjust(self.rng)
        return lambda state: flow(state, draft, verify, adjust, stop, commit, advance)

    def _run(self, step: Step, state: DecodeState) -> Finished:
        return run(step, state) if self.streamer is None else stream(step, state, self.streamer)


def _refuse_settings(config: GenerationConfig) -> None:
    for name, value in config.to_dict().items():
        known = name in HONOURED or name in INDIFFERENT or name.startswith("_")
        if not known and value and value != NEUTRAL.get(name):
            raise DecodeError(name, f"{name} cannot be honoured by a speculative decoder", value, f"leave {name} out")


def _real(input_ids: Tensor, model_kwargs: Mapping[str, object]) -> Tensor:
    """Which of the ids [B, n] are text: those that the attention mask does not hide, all of them without a mask."""
    given = {name: value for name, value in model_kwargs.items() if name not in ("logits_to_keep", "use_cache")}
    mask, positions = given.pop("attention_mask", None), given.pop("position_ids", None)
    real = mask.bool() if isinstance(mask, Tensor) else torch.ones_like(input_ids, dtype=torch.bool)
    if real.shape != input_ids.shape or (real[:, :-1] & ~real[:, 1:]).any():
        raise DecodeError("attention_mask", "the mask is not that of left padding", mask, "pad on the left")
    if isinstance(positions, Tensor) and not torch.equal(positions * real, (real.cumsum(dim=1) - 1) * real):
        raise DecodeError("position_ids", "the positions do not count from 0", positions, "leave position_ids out")
    if not is_empty(given.pop("cache", None)):
        raise DecodeError("cache", "the cache was filled before", "a cache with tokens", "give the whole text as ids")
    for name, value in given.items():
        if value is not None and value is not False:
            raise DecodeError(name, f"{name} cannot be honoured by a speculative decoder", value, f"leave {name} out")
    return real
