"""transformers' own decoders, run as their users run them, and watched through a streamer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import final

import torch
from attrs import define, field
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from specflow.bench.context import Context, Emit, Prepare, Session
from specflow.processors import GreedyProcessor
from specflow.state import DecodeState


def generate(**options: object) -> Prepare:
    """`model.generate(ids, **options)`."""
    return lambda context: _generation(context, options)


def assistant(gamma: int | None = None) -> Prepare:
    """`model.generate(ids, assistant_model=…)`: as it comes, or with `gamma` tokens in each draft."""

    def prepare(context: Context) -> Session:
        helper = context.assistant
        assert isinstance(helper, PreTrainedModel)
        inner, config = generate(assistant_model=helper)(context), _paced(helper.generation_config, gamma)

        def session(state: DecodeState, emit: Emit) -> None:
            with context.stopwatch.watching_assistant(helper), _configured(helper, config):
                inner(state, emit)

        return session

    return prepare


@final
@define(eq=False)
class _Stream:
    """A streamer, as `generate` understands it: the prompt comes first, then the tokens of each step."""

    emit: Emit
    _seen_prompt: bool = field(init=False, default=False)

    def put(self, value: Tensor) -> None:
        if self._seen_prompt:
            self.emit(tuple(value.flatten().tolist()), None)
        self._seen_prompt = True

    def end(self) -> None:
        """Nothing is held back."""


def _generation(context: Context, options: dict[str, object]) -> Session:
    model = context.model
    assert isinstance(model, PreTrainedModel)
    chosen: dict[str, object] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if not isinstance(context.processor, GreedyProcessor):
        chosen |= {"do_sample": True, "temperature": context.processor.temperature, "top_k": 0}

    def session(state: DecodeState, emit: Emit) -> None:
        ids = torch.tensor([state.tokens], device=model.device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=state.room,
            eos_token_id=sorted(state.request.stop) or None,
            pad_token_id=0,
            streamer=_Stream(emit),
            **chosen,
            **options,
        )

    return session


def _paced(config: GenerationConfig, gamma: int | None) -> GenerationConfig:
    """A copy of an assistant's generation config, from which `generate` reads how much to draft."""
    paced = deepcopy(config)
    if gamma is not None:
        paced.num_assistant_tokens, paced.num_assistant_tokens_schedule = gamma, "constant"
        paced.assistant_confidence_threshold = 0.0
    return paced


@contextmanager
def _configured(helper: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """The assistant has this config in the block."""
    before = helper.generation_config
    helper.generation_config = config
    try:
        yield
    finally:
        helper.generation_config = before
