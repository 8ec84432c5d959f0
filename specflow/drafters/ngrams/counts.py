"""What followed what, and how often: the counts of an n-gram storage, in plain dicts of ints."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Final, final

from attrs import define, field

BEST: Final = -1  # the key, among the counts of a context, of its most frequent continuation
RANK: Final = -2  # the key, among the counts of a context, of its rank


@final
@define(eq=False)
class Counts:
    """Contexts, each an int of the caller's making, and how often each token followed them.

    Most contexts are seen once and never again: such a context is known by its token alone. Seen again, or with several
    tokens at once, it gets a dict of counts. Of equally frequent continuations the one that reached the count last is
    the best.

    At `max_contexts` a new context takes the place of the one with the lowest rank, among equals of the one that waited
    longest. A context starts with rank `floor` + 1, each further sighting makes it max(rank, floor + 1) + 1, and
    `floor` is the rank of the last one forgotten. So a context seen c times outlives about c · max_contexts newcomers.
    Each waits in the queue of the rank that it had when it was put there, and is put elsewhere when its turn comes;
    a sighting pays for each such move, so learning is O(1) amortised.
    Source: LFU with aging, Arlitt et al. (2000), "Evaluating content management techniques for Web proxy caches", where
    a sighting after a long absence brings all earlier ones back.

    `best` and `has` take no lock: a context is always known by one value, and a dict of counts by its best token.
    """

    max_contexts: int | None = None
    known: dict[int, int | dict[int, int]] = field(factory=dict)
    waiting: defaultdict[int, deque[int]] = field(factory=lambda: defaultdict(deque))
    floor: int = 0

    def __len__(self) -> int:
        return len(self.known)

    def best(self, context: int) -> int | None:
        """The most frequent continuation; None where the context is unknown."""
        seen = self.known.get(context)
        return seen[BEST] if isinstance(seen, dict) else seen

    def has(self, context: int, token: int) -> bool:
        """Whether `token` was seen after `context`."""
        seen = self.known.get(context)
        return token in seen if isinstance(seen, dict) else token == seen

    def learn(self, context: int, tokens: Sequence[int]) -> None:
        """One sighting of `context`: each of `tokens`, of which there is at least one, counts once more after it."""
        seen = self.known.get(context)
        if isinstance(seen, dict):
            seen[RANK] = max(seen[RANK], self.floor + 1) + 1
            count(seen, tokens)
        elif seen is not None:
            self.known[context] = count({BEST: seen, RANK: self.floor + 2, seen: 1}, tokens)
        else:
            self._make_room()
            first, rank = tokens[0], self.floor + 1
            self.waiting[rank].append(context)
            self.known[context] = count({BEST: first, RANK: rank, first: 0}, tokens) if len(tokens) > 1 else first

    def put(self, context: int, rank: int, counted: Mapping[int, int]) -> None:
        """A new context as `rows` told it."""
        self._make_room()
        rank = max(rank, self.floor)
        self.waiting[rank].append(context)
        best = next(iter(counted))
        self.known[context] = best if counted == {best: 1} else {BEST: best, RANK: rank, **counted}

    def rows(self) -> Iterator[tuple[int, int, dict[int, int]]]:
        """(context, rank above the floor, counts with the best first) of each context, next to be forgotten first."""
        ranks = {}
        for placed, queue in sorted(self.waiting.items()):
            for context in queue:
                seen = self.known.get(context)
                if seen is not None:
                    ranks[context] = seen[RANK] if isinstance(seen, dict) else placed
        for context, rank in sorted(ranks.items(), key=itemgetter(1)):
            seen = self.known[context]
            if isinstance(seen, dict):
                best = seen[BEST]
                counted = {best: seen[best]} | {token: times for token, times in seen.items() if token >= 0}
            else:
                counted = {seen: 1}
            yield context, rank - self.floor, counted

    def _make_room(self) -> None:
        """Forgets the context with the lowest rank, if there are `max_contexts`.

        Interrupted anywhere, it leaves a context that waits twice or one that waits and is gone, and both are harmless.
        """
        while self.max_contexts is not None and len(self.known) >= self.max_contexts:
            queue = self.waiting.get(self.floor)
            if not queue:
                self.waiting.pop(self.floor, None)
                self.floor += 1
                continue
            context = queue[0]
            seen = self.known.get(context)
            if isinstance(seen, dict) and seen[RANK] > self.floor:
                self.waiting[seen[RANK]].append(context)
            else:
                self.known.pop(context, None)
            queue.popleft()


def count(seen: dict[int, int], tokens: Sequence[int]) -> dict[int, int]:
    """`seen` itself, where each of `tokens` counts once more."""
    for token in tokens:
        times = seen.get(token, 0) + 1
        seen[token] = times
        if times >= seen[seen[BEST]]:
            seen[BEST] = token
    return seen
