"""transformers' own decoders, run as their users run them, and watched through a streamer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Final, final
from weakref import WeakKeyDictionary

import torch
from attrs import define, field
from torch import Tensor
from torch.nn import Module
from transformers import GenerationConfig, PreTrainedModel

from specflow.bench.context import Context, Emit, Prepare, Session
from specflow.predictors.copying import copy_sharing_weights
from specflow.processors import GreedyProcessor, LogitsProcessor
from specflow.stages.commit import UNDRAFTED
from specflow.state import DecodeState, Tally, Tokens


def generate(**options: object) -> Prepare:
    """`model.generate(ids, **options)`."""
    return lambda context: _generation(context, options)


def padded(model: Module, states: Sequence[DecodeState], processor: LogitsProcessor, slots: int) -> list[Tokens]:
    """The new tokens of each text by `model.generate`, `slots` texts at a time, padded on the left."""
    assert isinstance(model, PreTrainedModel)
    outputs: list[Tokens] = []
    for begin in range(0, len(states), slots):
        some = states[begin : begin + slots]
        longest = max(len(state.tokens) for state in some)
        ids = torch.tensor([[0] * (longest - len(state.tokens)) + list(state.tokens) for state in some])
        mask = torch.tensor([[0] * (longest - len(state.tokens)) + [1] * len(state.tokens) for state in some])
        with configured(model, _chosen(some[0], processor)):
            ends = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))
        outputs += [_until_stop(end[longest:].tolist(), state) for end, state in zip(ends, some, strict=True)]
    return outputs


def _until_stop(tokens: Sequence[int], state: DecodeState) -> Tokens:
    """The tokens up to the first stop token: after it `generate` goes on with padding."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in state.request.stop), len(tokens))
    return tuple(tokens[:end])


def assistant(gamma: int | None = None) -> Prepare:
    """`model.generate(ids, assistant_model=…)`: as it comes, or with `gamma` tokens in each draft.

    With an assistant of another tokenizer it is given both tokenizers.
    """

    def prepare(context: Context) -> Session:
        helper = context.assistant
        assert isinstance(helper, PreTrainedModel)
        tokenizers: dict[str, object] = {}
        if context.shared is not None:
            helper = _copied(helper)
            tokenizers = {"tokenizer": context.tokenizer, "assistant_tokenizer": context.assistant_tokenizer}
        inner = generate(assistant_model=helper, **tokenizers)(context)
        config = _paced(helper.generation_config, gamma)

        def session(state: DecodeState, emit: Emit) -> None:
            with context.stopwatch.watching_assistant(helper), configured(helper, config):
                inner(state, emit)

        return session

    return prepare


_COPIES: Final[WeakKeyDictionary[Module, PreTrainedModel]] = WeakKeyDictionary()


def _copied(helper: PreTrainedModel) -> PreTrainedModel:
    """A copy, the same one each time: transformers replaces the head of such an assistant, and remembers that it did.

    The weights are shared.
    """
    if helper not in _COPIES:
        _COPIES[helper] = copy_sharing_weights(helper)
    return _COPIES[helper]


@final
@define(eq=False)
class _Stream:
    """A streamer, as `generate` understands it: the prompt comes first, then the tokens of each step."""

    emit: Emit
    counted: Tally | None
    """Of the text so far; None where passes tell what was drafted."""
    _seen_prompt: bool = field(init=False, default=False)

    def put(self, value: Tensor) -> None:
        if self._seen_prompt:
            if self.counted is not None:
                self.counted += UNDRAFTED
            self.emit(tuple(value.flatten().tolist()), self.counted)
        self._seen_prompt = True

    def end(self) -> None:
        """Nothing is held back."""


def _generation(context: Context, options: dict[str, object]) -> Session:
    model = context.model
    assert isinstance(model, PreTrainedModel)

    def session(state: DecodeState, emit: Emit) -> None:
        ids = torch.tensor([state.tokens], device=model.device)
        # What drafts nothing says so: on mps its tokens come a pass late, so that passes do not tell.
        stream = _Stream(emit, None if options else state.tally)
        with configured(model, _chosen(state, context.processor)):
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=stream, **options)

    return session


def _chosen(state: DecodeState, processor: LogitsProcessor) -> GenerationConfig:
    """How `generate` is told to decode as we do: by this alone, and nothing that the checkpoint would add."""
    sampling: dict[str, object] = {}
    if not isinstance(processor, GreedyProcessor):
        sampling = {"do_sample": True, "temperature": processor.temperature, "top_k": 0}
    stop = sorted(state.request.stop) or None
    return GenerationConfig(max_new_tokens=state.room, eos_token_id=stop, pad_token_id=0, **sampling)


def _paced(config: GenerationConfig, gamma: int | None) -> GenerationConfig:
    """A copy of an assistant's generation config, from which `generate` reads how much to draft."""
    paced = deepcopy(config)
    if gamma is not None:
        paced.num_assistant_tokens, paced.num_assistant_tokens_schedule = gamma, "constant"
        paced.assistant_confidence_threshold = 0.0
    return paced


@contextmanager
def configured(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`generate` of the model reads this config in the block, where a call alone would go on from the model's own."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before
