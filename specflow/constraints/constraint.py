"""A grammar that one text obeys from the end of its prompt on."""

from __future__ import annotations

from threading import Lock
from typing import cast, final

import numpy
import torch
from attrs import define, field
from torch import Tensor

from specflow.constraints.matcher import Matcher
from specflow.errors import DeadEndError, DecodeError
from specflow.guards.checks import described, does, is_id, named, shown, valid, whole
from specflow.guards.ids import ids_of, stops_of
from specflow.prefix import begins, common_prefix
from specflow.state import DecodeState, Tokens, a_state


def _prompt(tokens: object) -> Tokens:
    return ids_of("prompt", tokens)


def ends_of(ids: object) -> frozenset[int]:
    """The ids that end a text, 0 or more each."""
    stop = stops_of("stop", ids)
    if min(stop, default=0) < 0:
        raise DecodeError("stop", "a stop token is not an id", shown(sorted(stop)), "give ids of 0 or more")
    return stop


_is_matcher = does("a matcher", "give a Matcher, such as grammar.start()", "mask", "after", "forced", "may_end")


@final
@define(eq=False)
class Constraint:
    """A grammar for one text and its branches: what may follow `prompt`, and what may follow that. `grammar.after`.

    A pure function of the text; what it remembers is the matchers along the text that it was asked about last. The
    tokens of `stop` may come where the text is complete, and nowhere else. Threads may share it.

    `DecodeError` for a text that does not begin with the prompt, and a `DeadEndError` after one that goes on behind a
    stop token, does not obey, or cannot go on.
    """

    start: Matcher = field(validator=valid(_is_matcher))
    prompt: Tokens = field(converter=_prompt)
    stop: frozenset[int] = field(converter=ends_of)
    _before: list[int] = field(init=False, repr=False)
    _tokens: list[int] = field(init=False, factory=list, repr=False)
    _matchers: list[Matcher] = field(init=False, repr=False)
    _lock: Lock = field(init=False, factory=Lock, repr=False)

    def __attrs_post_init__(self) -> None:
        self._before, self._matchers = list(self.prompt), [self.start]

    def find(self, tokens: Tokens, /) -> Matcher | None:
        """The matcher at the end of a text; None where the text is over, or does not obey the grammar."""
        output = self._output(tokens)
        with self._lock:
            common = common_prefix(self._tokens, output)
            del self._tokens[common:], self._matchers[common + 1 :]
            for token in output[common:]:
                following = self.following(self._matchers[-1], token)
                if following is None:
                    return None
                self._matchers.append(following)
                self._tokens.append(token)
            return self._matchers[-1]

    def at(self, tokens: Tokens, /) -> Matcher:
        """The matcher at the end of a text."""
        matcher = self.find(tokens)
        if matcher is not None:
            return matcher
        output = self._output(tokens)
        wrong = next(end for end in range(len(output)) if self.find(self.prompt + output[: end + 1]) is None)
        where = f"token {output[wrong]} at position {len(self.prompt) + wrong}"
        if output[wrong] in self.stop:
            remedy = "give `start` the stop tokens of the grammar"
            raise DeadEndError("tokens", "the text goes on behind its end, or ends incomplete", where, remedy)
        remedy = "begin the grammar after the whole prompt: grammar.after(prompt)"
        raise DeadEndError("tokens", "the text does not obey its grammar", where, remedy)

    def allowed(self, tokens: Tokens, vocab_size: int) -> Tensor:
        """Which tokens may follow a text, as bools [V] on the host; `DeadEndError` where none may."""
        whole(1, "give the size of the vocabulary")("vocab_size", vocab_size)
        vocab_size = int(vocab_size)
        matcher = self.at(tokens)
        mask, allowed = _mask_of(matcher), torch.zeros(vocab_size, dtype=torch.bool, device="cpu")
        shared = min(len(mask), vocab_size)
        allowed[:shared] = mask[:shared]
        ends = [token for token in self.stop if token < vocab_size]
        allowed[ends] = may_end(matcher)
        if not allowed.any():
            happened = "the grammar leaves no token that could follow"
            remedy = "use a grammar that the tokenizer can write, and give it the model's stop tokens"
            raise DeadEndError("grammar", happened, f"nothing after position {len(tokens) - 1}", remedy)
        return allowed

    def is_complete(self, state: DecodeState, /) -> bool:
        """Whether the text as it is obeys the grammar to the end, with or without a stop token behind it."""
        matcher = self.find(self._without_end(state))
        return matcher is not None and may_end(matcher)

    def is_over(self, state: DecodeState, /) -> bool:
        """Whether the text is complete and nothing can follow but its end: a condition to stop at (`ending(until)`)."""
        matcher = self.find(self._without_end(state))
        return matcher is not None and self.is_last(matcher)

    def is_last(self, matcher: Matcher) -> bool:
        """Whether the text is complete at a matcher and nothing can follow but its end."""
        _is_matcher("matcher", matcher)
        if not may_end(matcher):
            return False
        mask = _mask_of(matcher)
        mask[[token for token in self.stop if token < len(mask)]] = False
        return not mask.any()

    def following(self, matcher: Matcher, token: int) -> Matcher | None:
        """The matcher after one more token; None where the text is over, or does not obey the grammar."""
        _is_matcher("matcher", matcher)
        if not is_id(token):
            raise DecodeError("token", "a token is not an id", shown(token), "give whole numbers of 0 or more")
        place: object = None if token in self.stop else matcher.after(token)
        if place is not None:
            _is_matcher(f"after({token})", place)
        return cast("Matcher | None", place)

    def _output(self, tokens: object) -> Tokens:
        """The tokens after the prompt."""
        text = ids_of("tokens", tokens)
        if not begins(self._before, text):
            received = f"{len(text)} tokens, after a prompt of {len(self.prompt)}"
            remedy = "give each text a constraint of its own: grammar.after(prompt)"
            raise DecodeError("tokens", "the text does not begin with the prompt of its grammar", received, remedy)
        return text[len(self.prompt) :]

    def _without_end(self, state: DecodeState) -> Tokens:
        a_state("state", state)
        return state.tokens[:-1] if state.output and state.tokens[-1] in self.stop else state.tokens


def may_end(matcher: Matcher) -> bool:
    """Whether the text may end, as a matcher has it."""
    said: object = matcher.may_end()
    if isinstance(said, bool | numpy.bool_):
        return bool(said)
    happened = f"the matcher {named(matcher)} does not say whether the text may end"
    raise DecodeError("grammar", happened, shown(said), "return True or False")


def _mask_of(matcher: Matcher) -> Tensor:
    """What a matcher answers, a copy that may be written to."""
    mask: object = matcher.mask()
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 1 or mask.device.type != "cpu":
        happened = f"the matcher {named(matcher)} gives no mask"
        raise DecodeError("grammar", happened, described(mask), "return bools [V] on the host")
    return mask.clone()
