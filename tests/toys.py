"""Small models to test on, and the slow, honest oracle that every decoder is compared with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from types import SimpleNamespace
from typing import final

import torch
from attrs import field, frozen
from torch.nn import Module
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typing_extensions import override

from specflow import TEXT, CachedPredictor, Proposal, Tokens, chain
from specflow.predictors import UncachedPredictor
from specflow.testing import TableModel

VOCABULARY = 64


def tiny_llama(
    seed: int = 0,
    *,
    vocab_size: int = VOCABULARY,
    layers: int = 2,
    context: int = 128,
    dtype: torch.dtype = torch.float64,
) -> PreTrainedModel:
    """A random llama with spread-out logits, so that different seeds give different texts."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
    )
    return _ready(LlamaForCausalLM(config), dtype)


def tiny_gpt2(seed: int = 0, *, vocab_size: int = VOCABULARY, layers: int = 2, context: int = 128) -> PreTrainedModel:
    """A random GPT-2: learned positions, biases, another block."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=32,
        n_layer=layers,
        n_head=4,
        n_positions=context,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=1,
    )
    return _ready(GPT2LMHeadModel(config), torch.float64)


def disturbed(model: PreTrainedModel, seed: int, amount: float) -> PreTrainedModel:
    """A copy of a llama with noise on its weights: a drafter that is right most of the time."""
    copy = LlamaForCausalLM(LlamaConfig(**model.config.to_dict()))
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(amount * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return _ready(copy, model.dtype)


def oracle(inputs: Sequence[int], model: Module, max_gen_len: int, eos: Collection[int] = ()) -> list[int]:
    """Greedy decoding without a cache, without speculation, without specflow."""
    text = list(inputs)
    with torch.no_grad():
        for _ in range(max_gen_len):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
            if text[-1] in eos:
                break
    return text[len(inputs) :]


@final
@frozen(eq=False)
class Once:
    """A predictor without a memo that is asked once for each text and its drafts: tests decode one text in many ways.

    It may be shared, as what it says is a function of what it is asked.
    """

    predictor: UncachedPredictor
    _rows: dict[object, torch.Tensor] = field(init=False, factory=dict)

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> torch.Tensor:
        """Logits [n + 1, V], as the predictor says them."""
        asked = tokens, tuple([(draft.token, draft.parent) for draft in drafts])
        if asked not in self._rows:
            self._rows[asked] = self.predictor(tokens, drafts)
        return self._rows[asked].clone()

    def prune(self, tokens: Tokens, /) -> None:
        """As the predictor does."""
        self.predictor.prune(tokens)


@cache
def once(model: Module) -> Once:
    """The one of a model that no test changes."""
    return Once(UncachedPredictor(model))


def _ready(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model.to(dtype)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def passes_of(model: Module) -> list[int]:
    """A list that grows with each pass of the model from now on, which has been tried: how many tokens it was fed."""
    fed: list[int] = []
    for predict in (CachedPredictor(model), UncachedPredictor(model)):
        predict((0,), ())
        predict((0, 1), (Proposal(0), Proposal(1, parent=TEXT)))
    model.register_forward_pre_hook(lambda module, arguments: fed.append(arguments[0].shape[-1]))
    return fed


class Table(Module):
    """A model of a few tokens, whose laws are those of a `TableModel`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rows = TableModel(size, seed=5)

    @override
    def forward(self, input_ids: torch.Tensor) -> object:
        """Logits [1, n, V]."""
        tokens = tuple(input_ids[0].tolist())
        return SimpleNamespace(logits=self.rows(tokens[:1], chain(tokens[1:]))[None])


class Unrunnable(Module):
    """A model that must not be run: it has a config and nothing else."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.config = model.config

    @override
    def forward(self, input_ids: torch.Tensor) -> object:
        """Fails the test."""
        raise AssertionError("the model was run")
