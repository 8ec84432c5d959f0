"""Recording: texts are decoded once, token by token, and what the target said and took is kept."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, islice
from statistics import fmean, median_low
from time import perf_counter
from typing import Final, final

from attrs import define, evolve, field
from torch import Tensor

from specflow.batch.many import Prompt, seed_of, states_of
from specflow.errors import DecodeError
from specflow.guards.checks import MOST, a, are_facts, calls, each, or_none, shown, whole
from specflow.loop import unfold
from specflow.origin import law_of, refuse_other
from specflow.policies import CostMeter
from specflow.policies.meter import Clock, wait_for
from specflow.processors import GreedyProcessor, LogitsProcessor
from specflow.protocols import Limits, checked_limits
from specflow.randomness import Dice, SharedNoise
from specflow.replay.recording import Costs, RecordedText, Recording
from specflow.replay.rows import Row, names_of, rows_kept
from specflow.state import TEXT, Committed, DecodeState, Finished, Predictor, Proposal, Tokens, chain
from specflow.steps import autoregressive_step

KEPT: Final = 24
"""How many tokens of a row are kept."""

LENGTHS: Final = (1, 2, 3, 5, 9, 17, 33)
"""Of how many tokens the passes are that are timed."""

ROUNDS: Final = 3
"""How often each is timed in a text."""


def _unheard(recording: Recording) -> None:
    """No progress is told."""


def record(
    target: Predictor,
    prompts: Iterable[Prompt],
    max_new_tokens: int = 128,
    stop: Iterable[int] = (),
    limits: Limits = Limits(),
    processor: LogitsProcessor = GreedyProcessor(),
    seed: int | None = None,
    kept: int = KEPT,
    lengths: Sequence[int] = LENGTHS,
    onto: Recording | None = None,
    facts: Mapping[str, str] = {},
    progress: Callable[[Recording], object] = _unheard,
    clock: Clock = perf_counter,
    origin: Mapping[str, str] = {},
) -> Recording:
    """What the target writes after each prompt, the `kept` most probable tokens of each row, and what passes take.

    Texts are decoded token by token, each with the noise of `seed` and its number where there is a seed. After each
    text passes over so many new tokens as `lengths` says are timed, spread over the text; all are scaled so that one
    over one token takes what it took on average in the text. `progress` hears of the recording as it grows; `onto` is
    one to go on with: what it holds is not decoded again. `origin` says what the texts come of beside the processor,
    such as `{"model": weights_of(model)}`. `DecodeError` for what `start` refuses, before anything runs, and for a
    recording to go on with that comes of another origin or processor, or kept other rows.

    >>> from specflow.testing import TableModel
    >>> record(TableModel(5), [[1, 2], [3]], max_new_tokens=4).texts[1].output
    (3, 2, 2, 0)
    """
    calls("a predictor", "give one, such as a CachedPredictor")("target", target)
    a(LogitsProcessor, "give one, such as GreedyProcessor()")("processor", processor)
    or_none(whole(-sys.maxsize, "give a whole number, or None"))("seed", seed)
    whole(1, "keep one token of a row at least", MOST)("kept", kept)
    each(whole(1, "give numbers of tokens", MOST))("lengths", lengths)
    kept, lengths = int(kept), tuple(map(int, lengths))
    if 1 not in lengths:
        raise DecodeError("lengths", "passes over one token are not timed", shown(lengths), "time them, too")
    or_none(a(Recording, "give what was recorded, or None"))("onto", onto)
    are_facts("facts", facts)
    are_facts("origin", origin)
    calls("a listener", "give a function of a Recording")("progress", progress)
    now = CostMeter(clock).now
    limits = checked_limits(limits, "limits")
    states = states_of(prompts, max_new_tokens, stop, limits)
    for number, state in enumerate(states):
        if state.room == 0:
            happened = f"there is no room for a token after prompt {number}"
            received = f"{len(state.tokens)} tokens of {state.request.limit}"
            raise DecodeError("max_new_tokens", happened, received, "give a shorter prompt, or allow new tokens")
    temperature = None if isinstance(processor, GreedyProcessor) else processor.temperature
    origin = {**origin, "processor": law_of(processor)}
    if onto is not None:
        refuse_other("onto", onto.origin, origin, "record anew")
        if onto.kept != min(kept, onto.vocab_size):
            raise DecodeError("onto", "the recording kept other rows", f"{onto.kept} tokens of a row", "record anew")
    # A prompt that is there twice has two texts, where no seed says which.
    known = Counter([] if onto is None else [(text.prompt, text.limit, text.stop, text.seed) for text in onto.texts])
    told, recording = dict(facts), onto
    begun = False
    for number, state in enumerate(states):
        own = None if seed is None else seed_of(seed, number)
        request = state.request
        asked = request.prompt, request.limit, request.stop, own
        if known[asked]:
            known[asked] -= 1
            continue
        if not begun:  # how a model can be fed is tried at its first reading, and at its first tree
            target(request.prompt[:2], (Proposal(request.prompt[0]), Proposal(request.prompt[-1], parent=TEXT)))
            begun = True
        timed = _Timed(target, kept, now)
        output, own_seconds = timed.decoded(state, processor, own)
        costs = _costs(target, request.prompt, output, sorted(set(lengths)), limits, now)
        costs = evolve(_as_decoded(costs, timed.passes[1:]), prompt=timed.passes[0], own=own_seconds)
        text = RecordedText(request.prompt, output, request.limit, request.stop, own, costs)
        vocab_size = timed.vocab_size
        if recording is None:
            recording = Recording((), vocab_size, temperature, min(kept, vocab_size), facts=told, origin=origin)
        recording = evolve(recording, texts=(*recording.texts, text)).knowing(timed.rows)
        progress(recording)
    if recording is None:
        raise DecodeError("prompts", "there is nothing to record", "no prompts", "give one at least")
    return recording


@final
@define(eq=False)
class _Timed:
    """A target that is timed and listened to while it decodes one text."""

    target: Predictor
    kept: int
    clock: Clock
    vocab_size: int = field(init=False, default=1)
    passes: list[float] = field(init=False, factory=list)
    rows: dict[bytes, Row] = field(init=False, factory=dict)
    _listening: float = field(init=False, default=0.0)

    def __call__(self, tokens: Tokens, drafts: Sequence[Proposal], /) -> Tensor:
        began = self.clock()
        logits = self.target(tokens, drafts)
        wait_for(logits)
        self.passes.append(max(0.0, self.clock() - began))
        return logits

    def decoded(self, state: DecodeState, processor: LogitsProcessor, seed: int | None) -> tuple[Tokens, float]:
        """The output, and the seconds that a step took beside its pass."""
        rng = Dice() if seed is None else SharedNoise(seed)
        step = autoregressive_step(self, processor, rng, observe=self._listen)
        began, after = self.clock(), state
        for outcome in unfold(step, state):
            after = outcome.state if isinstance(outcome, Finished) else outcome
        other = self.clock() - began - sum(self.passes) - self._listening
        return after.output, max(0.0, other) / len(self.passes)

    def _listen(self, committed: Committed, /) -> None:
        began = self.clock()
        logits = committed.adjusted.verified.scored.logits
        self.vocab_size = logits.shape[1]
        row = rows_kept(logits, min(self.kept, self.vocab_size))
        self.rows |= zip(names_of(committed.before.tokens, ()), row, strict=True)
        self._listening += self.clock() - began


def _costs(
    target: Predictor, prompt: Tokens, output: Tokens, lengths: Sequence[int], limits: Limits, clock: Clock
) -> Costs:
    """What passes over so many new tokens take, the lower median of `ROUNDS` at places that are spread over the text.

    Each follows a text that is one token longer than the one before, as in a decode whose drafts are rejected.
    """
    room = MOST if limits.context is None else limits.context
    lengths = [k for k in lengths if k == 1 or k + len(lengths) + 1 <= room]
    widest = len(lengths) + lengths[-1]
    tokens = tuple(islice(cycle(prompt + output), min(room, len(prompt) + len(output) + 2 * widest)))
    seconds: dict[int, list[float]] = {k: [] for k in lengths}
    for turn in range(ROUNDS):
        here = len(prompt) + turn * len(output) // ROUNDS
        here = max(1, min(here, len(tokens) - widest))
        target(tokens[:here], ())
        for k in lengths:
            here += 1
            began = clock()
            wait_for(target(tokens[:here], chain(tokens[: k - 1])))
            seconds[k].append(max(0.0, clock() - began))
    return Costs(tuple(lengths), tuple([median_low(seconds[k]) for k in lengths]))


def _as_decoded(costs: Costs, passes: Sequence[float]) -> Costs:
    """The costs, scaled so that a pass over one token takes what `passes` over one took on average."""
    # Medians of a few passes leave out what is slow now and then, and what else the machine did while it decoded.
    if not passes or costs.seconds[0] == 0:
        return costs
    scale = fmean(passes) / costs.seconds[0]
    return evolve(costs, seconds=tuple([scale * seconds for seconds in costs.seconds]))
