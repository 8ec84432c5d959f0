"""Stop: end the text where a condition comes true, such as a stop string."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias, final

import numpy
from attrs import evolve, field, frozen

from specflow.errors import DecodeError
from specflow.guards.checks import a, calls, does, each, named, shown, valid
from specflow.prefix import common_prefix
from specflow.stages.observe import Tokenizer
from specflow.stages.order import an_adjustment
from specflow.state import Adjusted, DecodeState, Reason, Tokens

Condition: TypeAlias = Callable[[DecodeState], bool]
"""Whether the text ends here. It must depend on the text alone: it is asked about each token as it would be alone."""

NO_CHARACTER: Final = "\N{REPLACEMENT CHARACTER}"
HALF: Final = 4
"""A character takes at most this many tokens of a byte each; what is no character after them never becomes one."""

_is_condition = calls("a condition", "give a function of a state")


def never(state: DecodeState) -> bool:
    """The condition that never ends a text."""
    return False


def any_of(*conditions: Condition) -> Condition:
    """Ends the text where any of the conditions comes true; `never` is the unit.

    >>> from specflow import start
    >>> full, silent = (lambda state: state.room == 0), (lambda state: not state.output)
    >>> any_of(full, silent)(start([1], 3).unwrap()), any_of() is never
    (True, True)
    """
    each(_is_condition)("conditions", conditions)
    several = [condition for condition in conditions if condition is not never]
    return (lambda state: any(_is_over(condition, state) for condition in several)) if several else never


@final
@frozen
class StopWhen:
    """Ends the text at the first new token after which `condition` holds.

    The condition sees the state as autoregressive decoding would have it after that token, so it finds what crosses
    the borders of tokens and of drafts. A stop token before it, or on it, goes first. Nothing after the end becomes
    text, statistics, n-gram counts or cache. `DecodeError` for a condition that answers anything but True or False.

    >>> from specflow import Dice, GreedyProcessor, autoregressive_step, run, start
    >>> from specflow.testing import TableModel
    >>> twice = lambda state: state.tokens[-2:] == (2, 2)
    >>> end = run(
    ...     autoregressive_step(TableModel(5, seed=1), GreedyProcessor(), Dice(), until=twice), start((0,), 9).unwrap()
    ... )
    >>> end.state.output, end.reason.value
    ((4, 2, 4, 2, 2), 'stop condition')
    """

    condition: Condition = field(validator=valid(_is_condition))

    def __call__(self, adjusted: Adjusted, /) -> Adjusted:
        an_adjustment("adjusted", adjusted)
        if self.condition is never:  # else each new token would copy the whole text for it
            return adjusted
        state, new = adjusted.verified.drafted.state, adjusted.tokens
        for end in range(1, min(len(new), state.room) + 1):
            if _is_over(self.condition, evolve(state, tokens=state.tokens + new[:end])):
                return evolve(adjusted, keep=end, reason=Reason.CONDITION)
            if new[end - 1] in state.request.stop:
                break
        return adjusted


def _is_over(condition: Condition, state: DecodeState) -> bool:
    over: object = condition(state)
    if isinstance(over, bool | numpy.bool_):
        return bool(over)
    happened = f"the condition {named(condition)} does not say whether the text is over"
    raise DecodeError("until", happened, shown(over), "return True or False")


def stop_string(tokenizer: Tokenizer, *strings: str) -> Condition:
    """Ends the text at the token that completes one of `strings`, wherever in that token and across however many.

    Only the output is searched, not the prompt, and only as much of its end as can hold the longest string, so a token
    costs the same however long the text is. The text keeps the string, and what follows it inside the last token. A
    text that is resumed after a stop string ends at the next one. `DecodeError` without a string or with an empty one.

    >>> class Letters:
    ...     def decode(self, ids: list[int]) -> str:
    ...         return "".join("abc\\n"[i] for i in ids)
    >>> from specflow.state import Request
    >>> ended = stop_string(Letters(), "\\n\\n", "ca")
    >>> state = DecodeState(Request((3,), 9), (3, 3, 2, 0))
    >>> ended(state), ended(evolve(state, tokens=(3, 3))), ended(evolve(state, tokens=(3, 3, 2, 0, 1)))
    (True, False, False)
    """
    does("a tokenizer", "give the target's", "decode")("tokenizer", tokenizer)
    each(a(str, "give texts to stop at"))("strings", strings)
    if not strings or not all(strings):
        raise DecodeError("strings", "a stop string is missing or empty", repr(strings), "give at least one character")
    longest = max(len(string.encode()) for string in strings)  # in bytes: no token that has a text is shorter than one

    def ended(state: DecodeState) -> bool:
        befores, text = _tail(tokenizer, state.output, longest)
        # A character that was half there is not the one that it became.
        old = max(common_prefix(before, text) for before in befores)
        return any(string in text[max(0, old - len(string) + 1) :] for string in strings)

    return ended


def _tail(tokenizer: Tokenizer, tokens: Tokens, enough: int) -> tuple[list[str], str]:
    """The end of a text as it was before its last token, of `enough` characters where there are so many, and with it.

    A token is mostly a character or more; where tokens are less, it takes more of them. What is no character yet does
    not count, for a tokenizer may make it of whole characters too: those with byte fallback make it of every byte of a
    run that is no UTF-8, as a run is that begins or ends inside a character. So where the text had such an end, it is
    also given as it was up to three tokens earlier, when its characters stood.
    """
    size = enough
    while _characters(before := _decoded(tokenizer, tokens[-size - 1 : -1])) < enough and size < len(tokens) - 1:
        size *= 2
    befores = [before]
    if before.endswith(NO_CHARACTER):
        befores += [_decoded(tokenizer, tokens[-size - 1 : -back]) for back in range(2, HALF + 1)]
    return befores, _decoded(tokenizer, tokens[-size - 1 :])


def _characters(text: str) -> int:
    return len(text) - text.count(NO_CHARACTER)


def _decoded(tokenizer: Tokenizer, tokens: Tokens) -> str:
    text: object = tokenizer.decode(list(tokens))
    if not isinstance(text, str):
        happened = f"the tokenizer {named(tokenizer)} decodes ids to no text"
        raise DecodeError("tokenizer", happened, shown(text), "return a str")
    return text
