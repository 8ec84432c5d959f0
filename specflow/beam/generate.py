"""The spec's `beam_search_generate`, and what it prints."""

from __future__ import annotations

from typing import final

import torch
from attrs import field, frozen
from rich.console import Console
from rich.text import Text
from torch.nn import Module

from specflow.beam.cached import CachedBeamPredictor
from specflow.beam.search import (
    Beam,
    Beams,
    LengthPenalty,
    Selected,
    beam_step,
    has_ended,
    refuse_beyond,
    unobserved_beams,
)
from specflow.errors import unwrap
from specflow.guards.checks import a, does, flag, or_none, valid
from specflow.guards.ids import ids_of, stops_of
from specflow.loop import SPEC_NAMES, start
from specflow.predictors import limits_of
from specflow.predictors.reader import refuse_weightless
from specflow.stages.observe import Tokenizer, decoded
from specflow.state import Finished

_is_tokenizer = or_none(does("a tokenizer", "give something that can `decode` ids, or None", "decode"))


@final
@frozen
class ShowBeams:
    """Prints a round: the position, then each branch with its verdict, last token, log-probability and text.

    Branches that go on are green, the best one that ended is cyan, the others are dim; colours only on a terminal.
    Law: observing is the identity, so a search with and without it finds the same text.
    """

    tokenizer: Tokenizer | None = field(default=None, validator=valid(_is_tokenizer))
    console: Console = field(
        factory=Console, eq=False, repr=False, validator=valid(a(Console, "give a rich.console.Console"))
    )

    def __call__(self, selected: Selected, /) -> None:
        branches, beams = selected.expanded.branches, selected.beams
        position = len(beams.request.prompt) + len(branches[0].output) - 1
        over = "  search over" if selected.is_over else ""
        heading = f"position {position}  branches {len(branches)}  live {len(beams.live)}{over}"
        self.console.print(Text(heading, style="bold"), soft_wrap=True)
        for branch in branches:
            verdict, style = _verdict(branch, beams)
            text = decoded(self.tokenizer, branch.output)
            said = "" if text is None else f"  {text!r}"
            line = f"  {verdict:<8}{branch.output[-1]}  log P {branch.log_prob:.4g}{said}"
            self.console.print(Text(line, style=style), soft_wrap=True)


def _verdict(branch: Beam, beams: Beams) -> tuple[str, str]:
    if branch == beams.ended:
        return "best", "cyan"
    if branch in beams.live:
        return "live", "green"
    return ("ended" if has_ended(branch, beams.request) else "dropped"), "dim"


@torch.no_grad()
def beam_search_generate(
    inputs: list[int],
    model: Module,
    max_gen_len: int = 40,
    num_beams: int = 4,
    top_k: int = 3,
    min_length: float = 5.0,
    alpha: float = 1.2,
    eos_tokens_id: int | list[int] = 1,
    pad_token_id: int = 0,
    debug: bool = False,
    tokenizer: Tokenizer | None = None,
) -> list[int]:
    """The text after `inputs` with the highest score that beam search finds: its tokens, its eos included.

    The score is `LengthPenalty`'s, log P(Y) / ((min_length + |Y|) / (min_length + 1))^alpha; `Select` says which
    branches count and when the search is over. With `num_beams=1` and `top_k=1` it is greedy decoding.
    A KV cache is used where the model has one.

    inputs, model, max_gen_len, eos_tokens_id, pad_token_id: as in `autoregressive_generate`.
    num_beams: how many texts are kept at each length, 1 or more.
    top_k: how many tokens may follow each of them, the most probable ones, 1 ≤ top_k ≤ V; 3 are all where V is less.
    min_length: above -1 and finite. The larger, the less the length of a text counts.
    alpha: finite. How much longer texts are favoured; 0 ranks by log P(Y) alone, less than 0 favours shorter ones.
    debug: print each round, and what becomes of each branch.
    tokenizer: what `debug` decodes texts with, by its `decode`; None prints ids alone.

    `DecodeError` (a `ValueError`) for anything else, before the model runs.
    Source: Wu et al. 1609.08144, section 7.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).double()
    >>> from specflow import autoregressive_generate
    >>> greedy = autoregressive_generate([3, 4], model, max_gen_len=6, eos_tokens_id=[])
    >>> beam_search_generate([3, 4], model, max_gen_len=6, num_beams=1, top_k=1, eos_tokens_id=[]) == greedy
    True
    """
    flag("debug", debug)
    _is_tokenizer("tokenizer", tokenizer)
    a(Module, "give a model, such as AutoModelForCausalLM.from_pretrained makes")("model", model)
    refuse_weightless("model", model)
    penalty, observe, limits = LengthPenalty(min_length, alpha), unobserved_beams, limits_of(model)
    step = beam_step(CachedBeamPredictor(model), num_beams, top_k, penalty, ShowBeams(tokenizer) if debug else observe)
    if limits.vocab_size is not None:
        refuse_beyond(top_k, limits.vocab_size)
    started = start(ids_of("inputs", inputs), max_gen_len, stops_of("eos_tokens_id", eos_tokens_id), limits)
    state = unwrap(started.alt(lambda error: error.renamed(SPEC_NAMES)))
    if state.room == 0:
        return []
    penalty.of(state.room)  # refused here rather than when the longest text is scored
    outcome: Beams | Finished = Beams(state.request)
    while isinstance(outcome, Beams):
        outcome = step(outcome)
    return list(outcome.state.output)
