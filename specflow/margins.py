"""Margins: by how much the target preferred each token, and an audit of a greedy text against single-token passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from attrs import define, field, frozen
from torch.nn import Module
from typing_extensions import override

from specflow.asked import laws_of
from specflow.distribution import PointMass
from specflow.errors import DecodeError, unwrap
from specflow.guards.checks import a, is_id, shown, valid
from specflow.loop import start
from specflow.predictors import CachedPredictor, limits_of
from specflow.predictors.rescore import OneByOne, margins_of
from specflow.processors import GreedyProcessor
from specflow.randomness import Dice
from specflow.state import Committed


@final
@define(eq=False)
class Margins:
    """An observer that records the target's margin at each token that is committed, in logits.

    Where a margin is smaller than the rounding of a pass, a pass of another length may prefer the other token.

    >>> import torch
    >>> from specflow import Dice, GreedyProcessor, autoregressive_step, run, start
    >>> always_one = lambda tokens, drafts: torch.tensor([[0.0, 9.0]])
    >>> recorder = Margins()
    >>> end = run(autoregressive_step(always_one, GreedyProcessor(), Dice(), observe=recorder), start([0], 2).unwrap())
    >>> recorder.recorded
    [9.0, 9.0]
    """

    recorded: list[float] = field(factory=list, validator=valid(a(list, "give a list to record in")))

    def __call__(self, committed: Committed, /) -> None:
        """Record the margins of this step's tokens."""
        a(Committed, "give it to a step as its observer")("committed", committed)
        self.recorded += margins_of(committed.adjusted.verified.logits[: len(committed.tokens)])


@final
@frozen
class Departure:
    """The token at `position` is not the `best` there, which the model prefers to any other by `margin`."""

    position: int
    token: int
    best: int
    margin: float


@final
@frozen
class Audit:
    """What an audit found: how many tokens were looked at, and those that greedy decoding would not have emitted.

    After the first difference greedy decoding has another text; those that follow are differences from what it would
    emit after the text as it is.
    """

    tokens: int
    differences: tuple[Departure, ...]

    @property
    def first(self) -> Departure | None:
        """Where the text leaves the greedy one, if it does."""
        return next(iter(self.differences), None)

    @override
    def __str__(self) -> str:
        if self.first is None:
            return f"all {self.tokens} tokens are greedy"
        return (
            f"{len(self.differences)} of {self.tokens} tokens are not greedy; the first is {self.first.token} at "
            f"position {self.first.position}, where {self.first.best} is best by {self.first.margin:.3g}"
        )


def audit(tokens: Sequence[int], model: Module, prompt: int) -> Audit:
    """Reads a finished greedy text again, one token at a time, and tells where it is not the model's own greedy text.

    The first `prompt` tokens are given, the others are looked at. In bf16 a text that was verified in passes over
    several tokens may leave the greedy one, mostly at a near-tie: the margin tells. `DecodeError` for what cannot be
    decoded, and where `prompt` is not within the text, before the model runs.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from specflow import autoregressive_generate
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=1, n_head=2)).eval()
    >>> text = [3, 4, *autoregressive_generate([3, 4], model, 20, eos_tokens_id=[])]
    >>> print(audit(text, model, prompt=2))
    all 20 tokens are greedy
    """
    a(Module, "give the model itself")("model", model)
    state = unwrap(start(tokens, 0, limits=limits_of(model)))
    if not is_id(prompt) or not 1 <= prompt <= len(state.tokens):
        happened = f"the prompt is not within the text of {len(state.tokens)} tokens"
        raise DecodeError("prompt", happened, shown(prompt), "give the number of tokens that the text began with")
    predict, greedy, differences = OneByOne(CachedPredictor(model), prompt), GreedyProcessor(), []
    for position in range(prompt, len(state.tokens)):
        before, token = state.tokens[:position], state.tokens[position]
        logits = predict(before, ())
        law = laws_of(greedy, before, logits)[0]
        if law != PointMass(token):
            differences.append(Departure(position, token, Dice().draw(law, position), margins_of(logits)[0]))
    return Audit(len(state.tokens) - prompt, tuple(differences))
