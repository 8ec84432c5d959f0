"""A corpus on many machines: a callable class for Ray Data's `map_batches`. Ray itself is not imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final, TypeAlias, cast, final

import numpy
from numpy.typing import ArrayLike, NDArray

from specflow.batch import Failed, together
from specflow.errors import DecodeError, said
from specflow.guards.checks import a, calls, whole
from specflow.guards.ids import ids_of
from specflow.state import Finished, Tokens

Columns: TypeAlias = Mapping[str, NDArray[numpy.generic]]
"""A batch of rows as Ray Data gives it, `batch_format="numpy"`."""

DecodeRow: TypeAlias = Callable[[object, Tokens], Finished]
"""(the row's id, the ids of its prompt) → its finished text."""


@final
class Decode:
    """Decodes the rows of a dataset, each actor with a model of its own, `slots` texts at a time.

    `build()` is called once in an actor, and returns what decodes a row: it loads the model and composes the step.
    Where it reads through a `BatchPredictor`, the rows of a batch share its passes. To a row's columns come `output`,
    the new ids; `reason`, why it ended; `steps`, `drafted` and `accepted`. A row that fails has `reason` "error" and
    its error in `error`, and the others go on. Prompts and new ids are lists, which any reader of Parquet knows.

    Ray repeats the rows of an actor that dies. A row has the same text again where its randomness comes from its id,
    `SharedNoise(seed_of(seed, id))`, whatever drafts it and wherever it runs; greedy text anyway. `DecodeError` for
    what is not a function or a number, and for rows without these columns.

    >>> from specflow import Dice, GreedyProcessor, along_paths, autoregressive_step, run, start
    >>> import torch
    >>> def build():
    ...     step = autoregressive_step(along_paths(lambda text: torch.eye(9)[text[-1] + 1]), GreedyProcessor(), Dice())
    ...     return lambda name, prompt: run(step, start(prompt, 3).unwrap())
    >>> rows = {"id": numpy.array(["a", "b"]), "prompt": numpy.array([[1], [4]])}
    >>> Decode(build)(rows)["output"].tolist()
    [[2, 3, 4], [5, 6, 7]]
    """

    def __init__(
        self, build: Callable[[], DecodeRow], slots: int = 8, prompt: str = "prompt", name: str = "id"
    ) -> None:
        calls("what builds a decoder", "give a function that returns one of (id, prompt)")("build", build)
        whole(1, "decode one row at a time at least")("slots", slots)
        a(str, "give the name of a column")("prompt", prompt)
        a(str, "give the name of a column")("name", name)
        self._slots, self._prompt, self._name = int(slots), prompt, name
        self._decode = build()
        calls("a decoder", "return a function of (id, prompt)")("build", self._decode)

    def __call__(self, rows: Columns, /) -> dict[str, NDArray[numpy.generic]]:
        """The rows with their texts."""
        a(Mapping, "give columns by their names, batch_format='numpy'")("rows", rows)
        for column in (self._prompt, self._name):
            if column not in rows:
                happened, remedy = f"the rows have no column {column!r}", "name the columns they have"
                raise DecodeError("rows", happened, ", ".join(rows), remedy)
        names = rows[self._name].tolist()
        decodes = [partial(self._row, *row) for row in zip(names, rows[self._prompt], strict=True)]
        ends = dict(together(decodes, self._slots))
        told = [_told(ends[number]) for number in range(len(decodes))]
        others = enumerate(OTHERS.items(), 1)
        return {
            **rows,
            self._prompt: _lists(rows[self._prompt]),
            "output": _lists([list(output) for output, *_ in told]),
            **{name: numpy.array([row[i] for row in told], kind) for i, (name, kind) in others},
        }

    def _row(self, name: object, prompt: object) -> Finished:
        return self._decode(name, ids_of("prompt", prompt))


OTHERS: Final = {"reason": str, "steps": int, "drafted": int, "accepted": int, "error": str}
"""What a row is given beside its text."""


def _lists(texts: Iterable[object]) -> NDArray[numpy.generic]:
    """A column of lists. Of arrays Ray would make tensors, of one kind where all are of one length and else of another,
    and files of both kinds cannot be read together."""
    several = [*texts]
    column: NDArray[numpy.generic] = numpy.empty(len(several), dtype=object)
    for i, text in enumerate(several):
        column[i] = cast(ArrayLike, text.tolist() if isinstance(text, numpy.ndarray) else text)
    return column


def _told(end: Finished | Failed) -> tuple[Tokens, str, int, int, int, str]:
    if isinstance(end, Failed):
        return (), "error", 0, 0, 0, said(end.error)
    tally = end.state.tally
    return end.state.output, end.reason.value, tally.steps, tally.drafted, tally.accepted, ""
