"""Cost-aware trees: as many nodes as promise the most tokens per second on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice, takewhile
from threading import RLock
from typing import Final, NamedTuple, final

from attrs import define, field

from specflow.checks import a, calls, drafts, number, valid
from specflow.gamma import are_numbers
from specflow.gamma_cost import DOUBT, Choice, CostMeter, Durations, identity, untold
from specflow.state import DecodeState, Node, Pace

ADVANCE: Final = 1.5
"""How many passes a text may lose to trees before it has gained anything."""

LOSS: Final = 0.01
"""How much of a pass it may lose beside for each token."""

TRUST: Final = 4.0
"""For how many tokens a drafter's chances are believed before the text has told what they are worth."""


_is_chance = number("a node's chance is not a finite number", "give the guess of a probability")


class _Text(NamedTuple):
    """A text between two steps: the tokens that its trees promised and gave, and the seconds lost to them."""

    promised: float = 0.0
    given: float = 0.0
    lost: float = 0.0

    @property
    def worth(self) -> float:
        """How many tokens came for each that the drafter's chances promised."""
        return (self.given + TRUST) / (self.promised + TRUST)


class CostAwareTreePace(NamedTuple):
    """What `CostAwareTree` carries between steps: what the last one took and promised, the text, and whose it is."""

    length: float
    nodes: float
    drafting: float
    promised: float
    text_promised: float
    text_given: float
    text_lost: float
    policy: float


@final
@define(eq=False)
class CostAwareTree:
    """A tree policy: the first n nodes with n maximising (1 + w Σ chance) / (seconds of a pass over n + 1 tokens).

    Σ is over the n nodes: a node's chance is the probability that one more token is taken. w corrects the drafter's
    chances by what came of them in this text, (given + 4) / (promised + 4) in tokens. `meter` tells what passes take
    here, and must time the target: `meter.timed_tree(target)`. n = 0 is a step of autoregressive decoding. A text may
    lose 1.5 passes, and 1 % of a pass for each token, to trees that were not taken; larger trees than that pays for are
    left alone. What drafting takes is measured and counted too, and ended when a text cannot afford more.

    `most` ≥ 1 nodes, else `DecodeError`. `tell` hears each `Choice`; it promises nothing where the drafter was not
    asked. Lossless like any policy: nodes are certain. Threads may share it: while one drafts, the others wait. A pace
    of another policy, another `CostAwareTree` among them, is a fresh start: its seconds are another meter's.
    Source: Chen et al. 2402.12374 (Sequoia), its hardware-aware tree optimizer, whose one tree for a machine is chosen
    anew here for each text and place.

    >>> from specflow.state import Request
    >>> meter = CostMeter()
    >>> for k, seconds in ((1, 1.0), (1, 1.0), (2, 1.1), (3, 1.2), (4, 2.0)):
    ...     meter.note(k, seconds)
    >>> stream = (Node(token, chance=chance) for token, chance in ((5, 0.5), (6, 0.3), (7, 0.2)))
    >>> [node.token for node in CostAwareTree(meter, most=3)(stream, DecodeState(Request((1,), 9), (1,)))[0]]
    [5, 6]
    """

    meter: CostMeter = field(validator=valid(a(CostMeter, "give the CostMeter that times the target")))
    most: int = field(default=16, validator=valid(drafts))
    tell: Callable[[Choice], object] = field(default=untold, validator=valid(calls("a listener", "give a function")))
    _identity: int = field(init=False, factory=identity, repr=False)
    _drafting: Durations = field(init=False, factory=Durations, repr=False)
    _lock: RLock = field(init=False, factory=RLock, repr=False)

    def __call__(self, stream: Iterator[Node], state: DecodeState, /) -> tuple[tuple[Node, ...], Pace]:
        with self._lock:
            return self._step(stream, state)

    def _step(self, stream: Iterator[Node], state: DecodeState) -> tuple[tuple[Node, ...], Pace]:
        costs = self.meter.seconds(int(self.most) + 1)
        text = self._settled(state, costs)
        credit = 0.0 if costs is None else costs[0] * (ADVANCE + LOSS * len(state.output)) - text.lost
        if costs is None or self._drafting.estimate > credit:
            self.tell(Choice(len(state.tokens), 0, 0, (), (), text.lost))
            return (), CostAwareTreePace(len(state.tokens), 0, 0.0, 0.0, *text, self._identity)
        began = self.meter.now()
        in_time = takewhile(lambda node: self.meter.since(began) <= credit, stream)
        nodes, tokens, seconds, best = self._weighed(in_time, costs, text.worth, credit)
        self._drafting.note((self.meter.since(began)) / max(1, len(nodes)))
        self.tell(Choice(len(state.tokens), len(nodes), best, tuple(tokens), tuple(seconds), text.lost))
        promised = (tokens[best] - 1) / text.worth
        drafting = seconds[len(nodes)] - costs[len(nodes)]
        pace = CostAwareTreePace(len(state.tokens), best, drafting, promised, *text, self._identity)
        return tuple(nodes[:best]), pace

    def _weighed(
        self, stream: Iterator[Node], costs: Sequence[float], worth: float, credit: float
    ) -> tuple[list[Node], list[float], list[float], int]:
        """As many nodes as it takes to tell, what each number of them promises in tokens and seconds, and the best."""
        shortest = list(accumulate(reversed(costs), min))[::-1]
        nodes, tokens, seconds, best = list[Node](), [1.0], [costs[0]], 0
        for node in islice(stream, len(costs) - 1):
            a(Node, "have the drafter yield nodes")("drafter", node)
            _is_chance("chance", node.chance)
            nodes.append(node)
            n = len(nodes)
            tokens.append(tokens[-1] + worth * node.chance)
            seconds.append(costs[n] + n * self._drafting.estimate)
            refused = max(DOUBT, 2 - tokens[1])
            if refused * (seconds[n] - costs[0]) <= credit and tokens[n] / seconds[n] > tokens[best] / seconds[best]:
                best = n
            further = (len(costs) - 1 - n) * worth * node.chance  # the nodes to come are no likelier than this one
            if (tokens[n] + further) / shortest[n] <= tokens[best] / seconds[best]:
                break
        return nodes, tokens, seconds, best

    def _settled(self, state: DecodeState, costs: Sequence[float] | None) -> _Text:
        """The text up to here, once what became of the last step is counted."""
        match state.pace:
            case CostAwareTreePace(length, nodes, drafting, promised, before, given, lost, policy) if (
                policy == self._identity and are_numbers(state.pace)
            ):
                came = len(state.tokens) - length
                took = 0.0 if costs is None else costs[min(int(nodes), len(costs) - 1)] - costs[0] * came
                return _Text(before + promised, given + (came - 1 if nodes else 0), lost + took + drafting)
        return _Text()
