"""What the parts find, and the page that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias, final

from attrs import frozen
from typing_extensions import override

from benchmarks.device.models import Setup
from specflow.errors import said

Cell: TypeAlias = str | int | float | bool | None


@final
@frozen
class Table:
    """Some rows of numbers, and what they are."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @override
    def __str__(self) -> str:
        lines = [self.columns, ("---",) * len(self.columns), *[tuple(map(_shown, row)) for row in self.rows]]
        return "\n".join([f"{self.title}\n", *["| " + " | ".join(line) + " |" for line in lines]])


@final
@frozen
class Failure:
    """What failed, and how: what goes on after it may tell something."""

    what: str
    error: str

    @override
    def __str__(self) -> str:
        return f"{self.what}: {self.error}"


Found: TypeAlias = Table | Failure


def attempted(what: str, work: Callable[[], Iterator[Found]]) -> Iterator[Found]:
    """What some work finds, and that it failed, if it did."""
    try:
        yield from work()
    except Exception as error:  # whatever it is, it is told
        yield Failure(what, said(error))


@final
@frozen
class Result:
    """What came of a part: its tables, how long it took, and what ended it early, if anything did."""

    part: str
    seconds: float
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    """What specflow and torch warned of meanwhile, such as why a model is not accelerated."""
    error: str | None
    ended: bool


ATTENTION: Final = (
    "Attention is torch's without cuDNN's, which plans anew for each number of keys; "
    "the part on attention has both for the given model."
)


MADE_UP: Final = (
    "Where texts are timed, drafts are made up, as often right as a row says: told is what they cost, "
    "not how good a drafter is."
)


def page(results: Sequence[Result], setup: Setup) -> str:
    """All that was found, to read."""
    kind = "tiny models: the numbers mean nothing" if setup.tiny else "random weights in published shapes"
    parts = [f"# specflow on {setup.device}\n\n`python -m benchmarks.device`, {kind}. {ATTENTION} {MADE_UP}"]
    for result in results:
        parts.append(f"## {result.part}\n\n{result.seconds:.1f} s" + (f"; **{result.error}**" if result.error else ""))
        parts += [f"Note: {note}" for note in result.notes]
        parts += map(str, result.tables)
    return "\n\n".join(parts) + "\n"


def _shown(cell: Cell) -> str:
    match cell:
        case None:
            return ""
        case bool():
            return "yes" if cell else "**no**"
        case float():
            return f"{cell:.3g}"
    return str(cell)
