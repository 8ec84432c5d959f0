"""Beam search in the shape of the other decoders: Beams → Expanded → Selected → Beams | Finished.

All live texts have one length, so one batched pass reads them, and a KV cache whose rows follow the beams leaves one
token of each to feed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite
from typing import TypeAlias, final

import torch
import torch.nn.functional as F
from attrs import define, field, frozen
from returns.functions import tap
from rich.console import Console
from rich.text import Text
from torch import Tensor
from torch.nn import Module
from transformers import Cache

from specflow.asked import looked_at
from specflow.caches import is_plain
from specflow.errors import DecodeError, unwrap
from specflow.guards.checks import a, calls, does, each, number, or_none, shown, valid, whole
from specflow.guards.finite import finite
from specflow.guards.ids import ids_of, stops_of
from specflow.loop import SPEC_NAMES, start
from specflow.predictors import limits_of, read_afresh
from specflow.predictors.reader import Reader, refuse_weightless
from specflow.predictors.trial import Caches, Trials
from specflow.predictors.watch import Look
from specflow.stages.observe import Tokenizer
from specflow.state import DecodeState, Finished, Reason, Record, Request, Tally, Tokens

BeamPredictor: TypeAlias = Callable[[tuple[Tokens, ...]], Tensor]
"""B texts of one length → logits [B, V] of what follows each. A pure function of tokens."""


@final
@frozen
class Beam:
    """What stands after the prompt, and its log-probability in nats, which is 0 or less."""

    output: Tokens = ()
    log_prob: float = 0.0


_is_beam = a(Beam, "give a Beam, such as Beam()")
_is_request = a(Request, "give the request of a state, such as start(prompt, 32).unwrap().request")
_has_length = whole(1, "give a number of new tokens")


@final
@frozen
class Beams(Record):
    """Between two steps: the live beams, all of one length and best first, and the best text that has ended.

    `Beams(request)` is where a search starts.
    """

    request: Request = field(validator=valid(_is_request))
    live: tuple[Beam, ...] = field(default=(Beam(),), validator=valid(each(_is_beam)))
    ended: Beam | None = field(default=None, validator=valid(or_none(_is_beam)))
    steps: int = field(default=0, validator=valid(whole(0, "give the number of steps so far")))


@final
@frozen
class Expanded(Record):
    """The branches of all live beams, each one token longer than its beam, most probable first."""

    beams: Beams
    branches: tuple[Beam, ...]


@final
@frozen
class Selected(Record):
    """A round as it will stand: the beams after it, and whether the best text that has ended is the result."""

    expanded: Expanded
    beams: Beams
    is_over: bool


BeamStep: TypeAlias = Callable[[Beams], Beams | Finished]
"""One round of beam search: it makes the live texts one token longer."""

BeamObserver: TypeAlias = Callable[[Selected], object]
"""Looks at a round of beam search that is about to stand."""


@final
@frozen
class LengthPenalty:
    """The score of a text Y: log P(Y) / ((min_length + |Y|) / (min_length + 1))^alpha, with |Y| all its new tokens.

    alpha = 0 ranks by log P(Y) alone, alpha > 0 favours longer texts, alpha < 0 shorter ones. min_length > -1 and both
    finite, else `DecodeError`. With min_length = 0 it is the `length_penalty` of transformers.
    Source: Wu et al. 1609.08144, section 7, with min_length = 5.

    >>> score = LengthPenalty(min_length=5.0, alpha=1.0).score
    >>> score(Beam((4,), -1.5)), score(Beam((4, 4, 4, 4, 4, 4, 4), -3.0))
    (-1.5, -1.5)
    """

    min_length: float = field(
        default=5.0,
        validator=valid(
            number(
                "min_length is not a finite number above -1",
                "use 5.0, as the GNMT paper does",
                lambda value: -1 < value < inf,
            )
        ),
    )
    alpha: float = field(
        default=1.2, validator=valid(number("alpha is not finite", "use 0.0 for no length penalty", isfinite))
    )

    def of(self, length: int) -> float:
        """The penalty of `length` ≥ 1 new tokens, 1 for one of them. `DecodeError` where no positive float holds it."""
        _has_length("length", length)
        try:
            penalty = float(((self.min_length + length) / (self.min_length + 1)) ** self.alpha)
        except OverflowError:
            penalty = 0.0
        if penalty == 0.0:
            happened = f"the length penalty of {length} tokens is beyond floats"
            raise DecodeError("alpha", happened, self.alpha, "give an alpha nearer to 0")
        return penalty

    def score(self, beam: Beam) -> float:
        """What beam search maximises."""
        _is_beam("beam", beam)
        return beam.log_prob / self.of(len(beam.output))

    def best(self, beam: Beam, limit: int) -> float:
        """The highest score with which a live beam can still end, one token longer or at `limit` new tokens at most.

        Its log-probability can only fall, and the penalty is monotone in the length, so greatest at one of the ends.
        """
        _is_beam("beam", beam)
        return beam.log_prob / max(self.of(len(beam.output) + 1), self.of(limit))


_at_least_one = valid(whole(1, "use 1 for greedy decoding"))


@final
@frozen
class Expand:
    """Each live beam with each of its `top_k` most probable next tokens: log P(Y·x) = log P(Y) + log p(x | Y).

    Ties go to the better beam, then to the lower token id, as in greedy decoding. Impossible tokens make no branch.
    `DecodeError` where `top_k` is more than the vocabulary.
    """

    predict: BeamPredictor = field(
        validator=valid(calls("a predictor of beams", "give a CachedBeamPredictor of the model"))
    )
    top_k: int = field(validator=_at_least_one)

    def __call__(self, beams: Beams, /) -> Expanded:
        if not beams.live:
            raise DecodeError("live", "there is no live beam", "no beams", "begin with Beams(request)")
        texts = tuple([beams.request.prompt + beam.output for beam in beams.live])
        logits = looked_at(self.predict(texts), len(texts), self.predict, len(texts[0]), "model")
        _refuse_beyond("top_k", self.top_k, logits.shape[-1])
        branches = [
            Beam((*beam.output, token), beam.log_prob + log_prob)
            for beam, row in zip(beams.live, logits, strict=True)
            for token, log_prob in _most_probable(row, self.top_k)
        ]
        return Expanded(beams, tuple(sorted(branches, key=lambda branch: -branch.log_prob)))


@final
@frozen
class Select:
    """Keeps the `num_beams` most probable branches that go on, and of those that ended the one with the best score.

    A branch ends with a stop token or at the limit. It counts if it is among the `num_beams` most probable branches;
    the live ones after it move up. The search is over when no live beam is left, or when none can end with a higher
    score than the best ended text has (`LengthPenalty.best`), so that going on would not change the result.
    """

    num_beams: int = field(validator=_at_least_one)
    penalty: LengthPenalty = field(
        default=LengthPenalty(), validator=valid(a(LengthPenalty, "give LengthPenalty(), or LengthPenalty(alpha=0.0)"))
    )

    def __call__(self, expanded: Expanded, /) -> Selected:
        before, request = expanded.beams, expanded.beams.request
        ended = [] if before.ended is None else [before.ended]
        ended += [branch for branch in expanded.branches[: self.num_beams] if has_ended(branch, request)]
        best = max(ended, key=self.penalty.score, default=None)
        live = tuple([branch for branch in expanded.branches if not has_ended(branch, request)][: self.num_beams])
        beams = Beams(request, live, best, before.steps + 1)
        return Selected(expanded, beams, is_over=best is not None and not self._can_beat(best, beams))

    def _can_beat(self, best: Beam, beams: Beams) -> bool:
        limit = beams.request.limit - len(beams.request.prompt)
        return bool(beams.live) and self.penalty.best(beams.live[0], limit) > self.penalty.score(best)


def has_ended(beam: Beam, request: Request) -> bool:
    """Whether a beam ends with a stop token or at the limit."""
    _is_beam("beam", beam)
    _is_request("request", request)
    return (bool(beam.output) and beam.output[-1] in request.stop) or len(request.prompt) + len(
        beam.output
    ) == request.limit


def advance_beams(selected: Selected) -> Beams | Finished:
    """The next beams, or the best text that ended."""
    beams, request, best = selected.beams, selected.beams.request, selected.beams.ended
    if best is None or not selected.is_over:
        return beams
    state = DecodeState(request, request.prompt + best.output, tally=Tally(beams.steps))
    return Finished(state, Reason.STOP if best.output[-1] in request.stop else Reason.LIMIT)


def unobserved_beams(selected: Selected) -> None:
    """The observer that does not look."""


def _is_tokenizer(name: str, value: object) -> None:
    remedy = "give something that can `decode` ids, or None"
    or_none(does("a tokenizer", remedy, "decode"))(name, value)
    if isinstance(value, bytes | bytearray):  # they decode, but no ids
        raise DecodeError(name, f"{name} is not a tokenizer", shown(value), remedy)


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
            text = "" if self.tokenizer is None else f"  {self.tokenizer.decode(list(branch.output))!r}"
            line = f"  {verdict:<8}{branch.output[-1]}  log P {branch.log_prob:.4g}{text}"
            self.console.print(Text(line, style=style), soft_wrap=True)


def _verdict(branch: Beam, beams: Beams) -> tuple[str, str]:
    if branch == beams.ended:
        return "best", "cyan"
    if branch in beams.live:
        return "live", "green"
    return ("ended" if has_ended(branch, beams.request) else "dropped"), "dim"


def beam_step(
    predict: BeamPredictor,
    num_beams: int = 4,
    top_k: int = 3,
    penalty: LengthPenalty = LengthPenalty(),
    observe: BeamObserver = unobserved_beams,
) -> BeamStep:
    """Expand every live beam, keep the best branches."""
    calls("an observer", "give a function of Selected, such as ShowBeams()")("observe", observe)
    expand, select = Expand(predict, top_k), Select(num_beams, penalty)
    return lambda beams: beams.then(expand).then(select).then(tap(observe)).then(advance_beams)


@final
@define(eq=False)
class CachedBeamPredictor:
    """A model that reads beams in one batch, and feeds of each only the token that its KV cache does not cover.

    `predict(texts)` gives logits [B, V]. Where each text is one of the texts before and one more token, the rows of the
    cache are picked as the texts' parents are; anything else is read from the beginning, one text at a time. So is
    everything by a model whose cache is not keys and values of attention alone, that takes none, or that was found not
    to read rightly over it, one token at a time (`specflow.predictors.trial`).
    Law: the cache never changes a result (exactly in exact arithmetic, within rounding in floats).

    Threads may share it, one pass at a time; searches in turns read their texts again. What was read is forgotten when
    the model has changed, as in `CachedPredictor`.
    """

    model: Module
    _reader: Reader = field(init=False, repr=False)
    _trials: Trials = field(init=False, repr=False)
    _seen: Look | None = field(init=False, default=None, repr=False)
    _rows: dict[Tokens, int] = field(init=False, factory=dict, repr=False)
    _cache: Cache | None = field(init=False, default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        self._reader = Reader.of(self.model)
        self._trials = Trials(Caches(self._reader))

    def __call__(self, texts: tuple[Tokens, ...], /) -> Tensor:
        """Logits [B, V] of what follows each of the texts, which have one length."""
        texts = _texts(texts)
        with self._reader.guard:
            look = self._reader.watch.look()
            if self._seen is None or not self._seen.same(look):
                self._rows, self._seen = {}, look
                self._trials.meet(look)
            parents, cache = [self._rows.get(text[:-1]) for text in texts], self._cache
            # Emptied first: an exception inside the model must not leave a cache that covers who knows what.
            self._rows, self._cache = {}, None
            for text in texts:
                self._reader.refuse_strange(text)
            logits = self._read(texts, [row for row in parents if row is not None], cache)
        for row in logits:
            finite(row[None], len(texts[0]))
        return logits

    def _read(self, texts: tuple[Tokens, ...], parents: list[int], cache: Cache | None) -> Tensor:
        """Logits [B, V] of texts whose parents have these rows in `cache`, if it has them all."""
        reader, trials, length = self._reader, self._trials, len(texts[0])
        stretch = trials.stretch(length)
        told, follows = stretch.feeding.told, stretch.feeding.most > 0 and stretch.feeding.least == 1
        carries = length > 1 and trials.region(length) == trials.region(length - 1)
        if cache is not None and follows and carries and len(parents) == len(texts):
            cache.reorder_cache(torch.tensor(parents))
            logits, after = reader.read(reader.ids([text[-1:] for text in texts]), cache, length - 1, 1, told=told)
            return self._kept(texts, logits[:, 0], after)
        if len(texts) == 1 and follows:
            logits, after = reader.read(reader.ids(texts), None, 0, 1, told=told)
            return self._kept(texts, logits[:, 0], after)
        return torch.cat([read_afresh(reader, text, 1, stretch) for text in texts])

    def _kept(self, texts: tuple[Tokens, ...], logits: Tensor, cache: object | None) -> Tensor:
        """The logits, once the cache is kept for the next texts, if its rows can be picked."""
        if isinstance(cache, Cache) and is_plain(cache):
            self._rows, self._cache = {text: row for row, text in enumerate(texts)}, cache
        return logits


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
    A KV cache is used where the model has one. Nothing is padded, so `pad_token_id` has no effect.
    1 ≤ num_beams, top_k ≤ V; `DecodeError` (a `ValueError`) for input that cannot be decoded, before the model runs.
    Source: Wu et al. 1609.08144, section 7.
    """
    a(bool, "say True or False")("debug", debug)
    _is_tokenizer("tokenizer", tokenizer)
    a(Module, "give a model, such as AutoModelForCausalLM.from_pretrained makes")("model", model)
    refuse_weightless("model", model)
    penalty, observe, limits = LengthPenalty(min_length, alpha), unobserved_beams, limits_of(model)
    step = beam_step(CachedBeamPredictor(model), num_beams, top_k, penalty, ShowBeams(tokenizer) if debug else observe)
    if limits.vocab_size is not None:
        _refuse_beyond("num_beams", num_beams, limits.vocab_size)
        _refuse_beyond("top_k", top_k, limits.vocab_size)
    started = start(ids_of("inputs", inputs), max_gen_len, stops_of("eos_tokens_id", eos_tokens_id), limits)
    state = unwrap(started.alt(lambda error: error.renamed(SPEC_NAMES)))
    if state.room == 0:
        return []
    penalty.of(state.room)  # refused here rather than when the longest text is scored
    outcome: Beams | Finished = Beams(state.request)
    while isinstance(outcome, Beams):
        outcome = step(outcome)
    return list(outcome.state.output)


def _texts(texts: object) -> tuple[Tokens, ...]:
    """Texts of one length, at least one of them and of at least one token."""
    remedy = "give a tuple of texts, all of one length"
    if not isinstance(texts, tuple | list) or not texts:
        raise DecodeError("texts", "texts are no texts", shown(texts), remedy)
    several = tuple([ids_of("texts", text) for text in texts])
    lengths = sorted({len(text) for text in several})
    if lengths[0] == 0 or len(lengths) > 1:
        raise DecodeError("texts", "texts are empty, or of several lengths", f"lengths {lengths}", remedy)
    return several


def _most_probable(logits: Tensor, top_k: int) -> list[tuple[int, float]]:
    """The `top_k` likeliest tokens of `logits` [V] and their log-probabilities, lower ids before equals.

    `torch.topk` alone may take any of several equals, and a log-softmax may make equals of different logits.
    """
    candidates = (logits >= logits.topk(top_k).values[-1]).nonzero().squeeze(-1)
    tokens = candidates[logits[candidates].sort(descending=True, stable=True).indices[:top_k]]
    log_probs = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)[tokens]
    pairs = zip(tokens.tolist(), log_probs.tolist(), strict=True)
    return [(token, log_prob) for token, log_prob in pairs if log_prob > -inf]


def _refuse_beyond(name: str, value: int, vocab_size: int) -> None:
    if value > vocab_size:
        raise DecodeError(name, f"{name} is larger than the vocabulary of {vocab_size}", value, "give a smaller number")
