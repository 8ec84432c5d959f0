"""From runs to numbers: medians, paired ratios with bootstrap intervals, acceptance, identity."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import TypeAlias, TypeVar, final

import torch
from attrs import frozen

from specflow.bench.measure import Round, Run
from specflow.prefix import common_prefix
from specflow.state import Tally, Tokens
from specflow.usage import Details, Usage

K = TypeVar("K")

Rate: TypeAlias = Callable[[Run], float | None]
"""Tokens per second of a run, or None where it has none."""


@final
@frozen
class Interval:
    """A median over prompts with its bootstrap interval, and the worst of them."""

    median: float
    low: float
    high: float
    worst: float
    worst_prompt: int
    prompts: int


@final
@frozen
class Comparison:
    """How much faster `decoder` is than `baseline`, prompt by prompt: 1.2 is 1.2 times its tokens per second."""

    decoder: str
    baseline: str
    decode: Interval
    total: Interval
    ratios: Mapping[int, float]
    """Prompt → how much faster it decodes."""


@final
@frozen
class Difference:
    """Where a text leaves the baseline's, and the gap between the two best logits there. Small gaps are rounding."""

    question_id: int
    position: int
    margin: float


@final
@frozen
class Identity:
    """How many texts were compared with the baseline's, how many are equal, and how the others differ."""

    compared: int
    equal: int
    differences: tuple[Difference, ...]


@final
@frozen
class Split:
    """Shares of the decoding time (prefill excluded), and specflow's own microseconds per step."""

    target: float
    drafting: float
    own: float
    own_microseconds: float


@final
@frozen
class Summary:
    """One decoder over all prompts.

    Rates are medians over prompts; `tokens_per_pass` is all tokens by all target passes. `achieved` is the decoding
    time predicted from the passes (their median cost for the prompt and the tokens fed) by the time it took.
    """

    decoder: str
    decode_rate: float | None
    total_rate: float
    first_round_seconds: float
    tokens_per_pass: float
    tally: Tally
    usage: Usage
    split: Split | None
    achieved: float | None
    categories: tuple[tuple[str, float], ...]


Costs: TypeAlias = Mapping[tuple[str, int, int], float]
"""(model, prompt, tokens fed) → median seconds of a target pass after the prefill."""


def bootstrap(ratios: Mapping[int, float], resamples: int = 4000, level: float = 0.95) -> Interval:
    """The median of `ratios` by prompt, and the percentile interval of the medians of resampled prompts.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13. The same numbers give the same interval.

    >>> interval = bootstrap({1: 1.0, 2: 1.2, 3: 1.4})
    >>> round(interval.median, 2), interval.worst_prompt, interval.prompts
    (1.2, 1, 3)
    """
    prompts, values = list(ratios), torch.tensor(list(ratios.values()), dtype=torch.float64)
    drawn = torch.randint(len(prompts), (resamples, len(prompts)), generator=torch.Generator().manual_seed(0))
    medians = values[drawn].quantile(0.5, dim=1)
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = medians.quantile(edges).tolist()
    worst = int(values.argmin())
    return Interval(median(values.tolist()), low, high, float(values[worst]), prompts[worst], len(prompts))


def compare(runs: Sequence[Run], decoder: str, baseline: str) -> Comparison | None:
    """`decoder` against `baseline`, paired by prompt; None where no prompt has both."""
    decode, total = (_ratios(runs, decoder, baseline, rate) for rate in (Run.decode_rate, Run.rate))
    return Comparison(decoder, baseline, bootstrap(decode), bootstrap(total), decode) if decode and total else None


def summarise(runs: Sequence[Run], decoder: str, model: str, costs: Costs) -> Summary:
    """The summary of one decoder's runs, of which there must be some."""
    mine = [run for run in runs if run.decoder == decoder]
    later = [one for run in mine for one in run.rounds[1:]]
    every = [one for run in mine for one in run.rounds]
    tally = sum([one.tally for one in every], Tally())
    decode_rates = _by_prompt(mine, decoder, Run.decode_rate).values()
    return Summary(
        decoder,
        median(decode_rates) if decode_rates else None,
        median(_by_prompt(mine, decoder, Run.rate).values()),
        median(run.rounds[0].seconds for run in mine),
        sum(len(run.output) for run in mine) / max(1, sum(len(one.passes) for one in every)),
        tally,
        _usage(mine, tally),
        _split(later),
        _achieved(mine, model, costs),
        tuple(sorted(_tokens_per_pass_by_category(mine).items())),
    )


def _usage(runs: Sequence[Run], tally: Tally) -> Usage:
    """Of all texts together; what a decoder of someone else drafted is known by what its passes were fed."""
    prompt, new = sum(run.prompt_tokens for run in runs), sum(len(run.output) for run in runs)
    return Usage(prompt, new, prompt + new, Details(tally.accepted, tally.drafted - tally.accepted))


def pass_costs(runs: Sequence[Run], models: Mapping[str, str]) -> Costs:
    """What passes cost: the median over all runs of the decoders that share a model, by prompt and tokens fed."""
    return _medians(
        ((models[run.decoder], run.question_id, each.fed), each.seconds)
        for run in runs
        for one in run.rounds[1:]
        for each in one.passes
    )


def costs_by_size(costs: Costs, model: str) -> dict[int, float]:
    """Tokens fed → median over prompts of what a pass costs, in seconds."""
    sizes = _medians((fed, seconds) for (name, _, fed), seconds in costs.items() if name == model)
    return dict(sorted(sizes.items()))


def identity(runs: Sequence[Run], decoder: str, baseline: str, margin: Callable[[int, Tokens], float]) -> Identity:
    """The decoder's texts against the baseline's of the same prompt and repeat.

    `margin(question_id, output)` is the gap between the two best logits after `output`.
    """
    texts = {(run.question_id, run.repeat): run.output for run in runs if run.decoder == baseline}
    compared, differences = 0, []
    for run in runs:
        if run.decoder == decoder and (run.question_id, run.repeat) in texts:
            compared += 1
            text = texts[run.question_id, run.repeat]
            if text != run.output:
                shared = common_prefix(text, run.output)
                differences.append(Difference(run.question_id, shared, margin(run.question_id, text[:shared])))
    return Identity(compared, compared - len(differences), tuple(differences))


def _by_prompt(runs: Iterable[Run], decoder: str, rate: Rate) -> dict[int, float]:
    """Prompt → the median rate over the repeats."""
    rates = [(run.question_id, rate(run)) for run in runs if run.decoder == decoder]
    return _medians((prompt, value) for prompt, value in rates if value is not None)


def _ratios(runs: Sequence[Run], decoder: str, baseline: str, rate: Rate) -> dict[int, float]:
    ours, theirs = _by_prompt(runs, decoder, rate), _by_prompt(runs, baseline, rate)
    return {prompt: ours[prompt] / theirs[prompt] for prompt in ours if prompt in theirs}


def _medians(pairs: Iterable[tuple[K, float]]) -> dict[K, float]:
    """Key → the median of its values."""
    values = defaultdict(list)
    for key, value in pairs:
        values[key].append(value)
    return {key: median(several) for key, several in values.items()}


def _split(rounds: Sequence[Round]) -> Split | None:
    whole = sum(one.seconds for one in rounds)
    if not whole:
        return None
    target, drafting, own = (
        sum(seconds) for seconds in zip(*[(one.target, one.drafting, one.own) for one in rounds], strict=True)
    )
    return Split(target / whole, drafting / whole, own / whole, 1e6 * own / len(rounds))


def _achieved(runs: Iterable[Run], model: str, costs: Costs) -> float | None:
    predicted = taken = 0.0
    for run in runs:
        for one in run.rounds[1:]:
            predicted += sum(costs[model, run.question_id, each.fed] for each in one.passes)
            taken += one.seconds
    return predicted / taken if taken else None


def _tokens_per_pass_by_category(runs: Iterable[Run]) -> dict[str, float]:
    tokens: Counter[str] = Counter()
    passes: Counter[str] = Counter()
    for run in runs:
        tokens[run.category] += len(run.output)
        passes[run.category] += sum(len(one.passes) for one in run.rounds)
    return {category: tokens[category] / passes[category] for category in tokens if passes[category]}
