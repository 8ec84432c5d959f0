"""What a text took, in the words of OpenAI's API, for whatever writes JSON."""

from __future__ import annotations

from typing import final

from attrs import field, frozen

from specflow.guards.checks import a, valid, whole
from specflow.state import DecodeState, Tally, a_state

_is_count = valid(whole(0, "give how many there were"))


@final
@frozen
class Details:
    """Drafts that became text, and drafts that did not."""

    accepted_prediction_tokens: int = field(validator=_is_count)
    rejected_prediction_tokens: int = field(validator=_is_count)

    @property
    def judged(self) -> int:
        """All drafts, accepted or not."""
        return self.accepted_prediction_tokens + self.rejected_prediction_tokens


@final
@frozen
class Usage:
    """The `usage` of a completion, field by field. Drafts are its predictions: `rejected` ones never became text.

    Source: OpenAI's API reference, "The chat completion object".
    """

    prompt_tokens: int = field(validator=_is_count)
    completion_tokens: int = field(validator=_is_count)
    total_tokens: int = field(validator=_is_count)
    completion_tokens_details: Details = field(validator=valid(a(Details, "give Details(accepted, rejected)")))

    @classmethod
    def of(cls, state: DecodeState) -> Usage:
        """That of a text so far. `DecodeError` for what is no state.

        >>> from specflow.state import Count, Request
        >>> state = DecodeState(Request((5, 6), 9), (5, 6, 7), tally=Tally(1, (("llm", Count(3, 1)),)))
        >>> Usage.of(state).completion_tokens_details
        Details(accepted_prediction_tokens=1, rejected_prediction_tokens=2)
        """
        a_state("state", state)
        prompt, whole_text, tally = len(state.request.prompt), len(state.tokens), state.tally
        return cls(prompt, whole_text - prompt, whole_text, Details(tally.accepted, tally.drafted - tally.accepted))


@final
@frozen
class Positions:
    """How many drafts were judged at each position of a step, the first draft's first, and how many accepted."""

    judged: tuple[int, ...]
    accepted: tuple[int, ...]

    @classmethod
    def of(cls, tally: Tally) -> Positions:
        """Those of a text so far. `DecodeError` for what is no tally.

        >>> Positions.of(Tally(2, judged_at=(2, 1), accepted_at=(1, 0)))
        Positions(judged=(2, 1), accepted=(1, 0))
        """
        a(Tally, "give state.tally")("tally", tally)
        return cls(tally.judged_at, tally.accepted_at)
