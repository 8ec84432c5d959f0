"""The trace of a decode: a value that knows its numbers, and how to show itself."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from os import PathLike
from typing import Self, final

from attrs import field, frozen
from rich.console import Console, ConsoleOptions, RenderResult
from typing_extensions import override

from specflow.errors import DecodeError
from specflow.files import write
from specflow.guards.checks import a, are_facts, is_id, or_none, shown, valid
from specflow.stages.commit import tally_of
from specflow.state import Reason, Tally, Tokens
from specflow.trace import file
from specflow.trace.page import page
from specflow.trace.parts import Origin, StepTrace, plain_ids, tuple_of
from specflow.trace.terminal import rendered


def _are_steps(name: str, steps: object) -> None:
    tuple_of(name, steps, StepTrace)


def _are_words(name: str, words: object) -> None:
    a(Mapping, "give the bytes of each token")(name, words)
    assert isinstance(words, Mapping)
    for pair in words.items():
        if not is_id(pair[0]) or type(pair[1]) is not bytes:
            raise DecodeError(name, "a word is not the bytes of a token", shown(pair), 'give some such as {7: b" the"}')


@final
@frozen
class Trace:
    """What a decode did: the `prompt` that it began with, and its `steps`. A `Recorder` makes it.

    `words` are the bytes of the tokens, `about` what the recorder was told of the decode, `reason` why it ended. It
    prints with colours on rich's consoles, and shows itself in notebooks. `DecodeError` for what is not a trace.

    >>> trace = Trace((1, 2), (StepTrace((3,)), StepTrace((4,))))
    >>> print(trace)
    2 tokens in 2 passes (1.00 a pass), no drafts
    """

    prompt: Tokens = field(repr=False, converter=plain_ids)
    steps: tuple[StepTrace, ...] = field(repr=False, validator=valid(_are_steps))
    words: Mapping[int, bytes] = field(factory=dict, repr=False, validator=valid(_are_words))
    about: Mapping[str, str] = field(factory=dict, validator=valid(are_facts))
    reason: Reason | None = field(default=None, validator=valid(or_none(a(Reason, "give a Reason, or None"))))

    @property
    def output(self) -> Tokens:
        """The tokens after the prompt."""
        return tuple([token for step in self.steps for token in step.tokens])

    @property
    def tokens(self) -> Tokens:
        """The whole text."""
        return self.prompt + self.output

    @property
    def origins(self) -> tuple[Origin, ...]:
        """How each token of the output came to be."""
        return tuple([origin for step in self.steps for origin in step.origins])

    @property
    def tally(self) -> Tally:
        """Steps, and what each source drafted and how much of it was accepted: that of the decode's last state."""
        return sum(map(_tally, self.steps), Tally())

    @property
    def mean_accepted_length(self) -> float:
        """Tokens for each pass of the target, 0 where there was none."""
        return len(self.output) / len(self.steps) if self.steps else 0.0

    @property
    def seconds(self) -> float | None:
        """The time of all steps; None where one was not measured."""
        return _sum([step.seconds for step in self.steps])

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to a JSON file, whole or not at all. `DecodeError` where nothing can be written."""
        write(path, file.to_json(self).encode(errors="backslashreplace"))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what `save` wrote. `DecodeError`, in one sentence, for any other file and for a damaged one."""
        return file.read(path, cls)

    def html(self, beside: Trace | None = None) -> str:
        """One page that needs nothing else: it asks the network for nothing. With a second trace both, side by side."""
        or_none(a(Trace, "give another trace, or None"))("beside", beside)
        return page((self,) if beside is None else (self, beside))

    def save_html(self, path: str | PathLike[str], beside: Trace | None = None) -> None:
        """Write `html` to a file, whole or not at all. `DecodeError` where nothing can be written."""
        write(path, self.html(beside).encode(errors="replace"))

    def _repr_html_(self) -> str:
        source = escape(self.html(), quote=True)
        style = "width:100%;height:46rem;border:1px solid #8888;border-radius:8px"
        return f'<iframe sandbox="allow-scripts" title="trace of a decode" style="{style}" srcdoc="{source}"></iframe>'

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from rendered(self)

    @override
    def __str__(self) -> str:
        tally = self.tally
        drafts = f"{tally.accepted} of {tally.drafted} drafts accepted" if tally.drafted else "no drafts"
        took = "" if self.seconds is None else f", {self.seconds:.2f} s"
        mean = f"{self.mean_accepted_length:.2f} a pass"
        return f"{len(self.output)} tokens in {len(self.steps)} passes ({mean}), {drafts}{took}"


def _tally(step: StepTrace) -> Tally:
    """What `commit` counts."""
    corrected = step.origins[-1:] == (Origin.CORRECTED,)
    return tally_of([draft.source for draft in step.drafts], step.path, len(step.tokens), corrected)


def _sum(times: list[float | None]) -> float | None:
    known = [time for time in times if time is not None]
    return sum(known) if known and len(known) == len(times) else None
