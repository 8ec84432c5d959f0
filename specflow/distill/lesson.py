"""What a head learns of one text: to go on by itself from each of its places, as it will when it drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from attrs import frozen
from torch import Tensor

from specflow.caches import KVCache, Past
from specflow.heads.eagle import Eagle3
from specflow.predictors import CachedPredictor, last_rows
from specflow.state import Tokens


@final
@frozen(eq=False)
class Text:
    """A prompt and the target's own greedy answer to it."""

    tokens: Tokens
    prompt: int


@final
@frozen(eq=False)
class Lesson:
    """What the target held and would have said at each place of a text.

    `held` [n, width] are the features. `likely` [n, K] are the K likeliest tokens that can be drafted, by their number
    among those, and `shares` [n, K] their probabilities in the target's law.
    """

    ids: Tensor
    held: Tensor
    likely: Tensor
    shares: Tensor
    prompt: int

    @classmethod
    def of(cls, target: CachedPredictor, text: Text, drafted: Tensor, most: int) -> Lesson:
        """One pass over a text by a target that shows the features; of its laws up to `most` tokens are kept."""
        target.forget()  # the bits of a lesson do not depend on the texts before it
        logits = last_rows(target, text.tokens, len(text.tokens)).float()
        held = target.features(text.tokens, len(text.tokens))
        best, likely = logits[:, drafted].topk(min(most, len(drafted)), dim=-1)
        shares = (best - logits.logsumexp(-1, keepdim=True)).exp()
        return cls(torch.tensor(text.tokens, device=drafted.device), held, likely, shares, text.prompt)


@final
@frozen(eq=False)
class Marks:
    """How a head did on a text: the loss, and of so many `places` how often 1, 2, … drafts in a row were right."""

    loss: Tensor
    right: tuple[int, ...]
    places: int


def unrolled(head: Eagle3, lesson: Lesson, ahead: int) -> Marks:
    """The head's drafts after each place of a text, `ahead` in a row, given the text's own tokens.

    At each place t the head starts from what the target held at the places up to t, and goes on from its own states: it
    sees those places and its own drafts after t, and nothing of the drafts after other places. The loss is

    - Σ p(x) log q(x), over the likeliest of the tokens x that can be drafted, with the target's law p, the head's law q

    averaged over the places and then over the drafts in a row.
    Source: Li et al. 2503.01840, section 3.1 (training-time test).
    """
    ids, n = lesson.ids, len(lesson.ids)
    past = Past(head.begin(), 0)
    places = torch.arange(n - 1, device=ids.device)
    sights = [places]  # of all that was read so far: the place that it stands for, and what sees it
    states = head.enter(lesson.held[:-1])
    losses, hits = [], []
    for step in range(min(ahead, n - 2)):
        bases = places[: n - 1 - step]
        if step:
            states = states[: len(bases)]
            sights.append(bases)
            _apart(past)
        seen = [bases[:, None] >= sights[0], *[bases[:, None] == sight for sight in sights[1:]]]
        states = head.advance(states, ids[1 + step :], bases + step, past, ~torch.cat(seen, dim=1))
        answers = bases[:-1] + step + 2 >= lesson.prompt  # after the last place nobody knows what comes
        said = head.say(states[:-1][answers], ()).float()
        likely, shares = (table[1 + step : n - 1][answers] for table in (lesson.likely, lesson.shares))
        chosen = said.gather(-1, likely) - said.logsumexp(-1, keepdim=True)
        losses.append((shares * -chosen).sum() / max(1, len(said)))
        right = head.vocabulary.named(said.argmax(-1)) == ids[2 + step :][answers]
        hits.append((bases[:-1][answers], right))
    return Marks(torch.stack(losses).mean(), *_in_a_row(hits, n))


def _apart(past: Past) -> None:
    """Goes on in a copy of the cache: the next pass writes into it, and what it holds is needed for the gradient."""
    cache = past.cache
    assert isinstance(cache, KVCache)
    cache.buffer = cache.buffer.clone()


def _in_a_row(hits: Sequence[tuple[Tensor, Tensor]], n: int) -> tuple[tuple[int, ...], int]:
    """How often the first, the first two, … drafts were right, and after how many places the first could be."""
    still = torch.ones(n, dtype=torch.bool, device=hits[0][0].device)
    counts = []
    for bases, right in hits:
        now = torch.zeros_like(still)
        now[bases] = right
        still &= now
        counts.append(int(still.sum()))
    return tuple(counts), len(hits[0][0])
