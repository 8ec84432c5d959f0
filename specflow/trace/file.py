"""A trace as a file: JSON with a version, whose names are those of the attributes."""

from __future__ import annotations

import json
from collections.abc import Callable
from numbers import Integral, Real
from os import PathLike
from typing import TYPE_CHECKING, Final, Never, TypeVar, cast

from attrs import asdict

from specflow.errors import DecodeError, said
from specflow.files import checked_path, no_file
from specflow.stages.fates import Fate
from specflow.state import Reason
from specflow.trace.parts import DraftTrace, StepTrace

if TYPE_CHECKING:
    from specflow.trace.trace import Trace

T = TypeVar("T")

FORMAT: Final = "specflow trace"
VERSION: Final = 2


def to_json(trace: Trace) -> str:
    """The trace, a step a line. A word is a text, or a list of bytes where they are no UTF-8."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "about": dict(trace.about),
        "reason": None if trace.reason is None else trace.reason.value,
        "prompt": trace.prompt,
        "words": {int(token): _word(spelt) for token, spelt in trace.words.items()},
    }
    steps = ",\n".join([json.dumps(_plain(step), ensure_ascii=False) for step in trace.steps])
    return f'{json.dumps(head, ensure_ascii=False)[:-1]},\n"steps": [\n{steps}\n]}}\n'


def _plain(step: StepTrace) -> dict[str, object]:
    return asdict(step, value_serializer=lambda _, __, value: _written(value))


def _written(value: object) -> object:
    """What JSON knows: numbers of numpy are numbers."""
    match value:
        case Fate():
            return value.value
        case Integral():
            return int(value)
        case Real():
            return float(value)
    return value


def _word(spelt: bytes) -> str | list[int]:
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return list(spelt)


def read(path: str | PathLike[str], make: Callable[..., T]) -> T:
    """What `make` makes of the attributes in a file. `DecodeError` for one that cannot be read, or is damaged."""
    remedy = "record the trace again"
    try:
        content = checked_path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise no_file(path, "does not exist", "name one that `save` wrote") from error
    except OSError as error:
        raise no_file(path, f"cannot be read ({error.strerror or error})", "name a file that can be read") from error
    except UnicodeDecodeError as error:
        raise no_file(path, "holds no trace: it is no UTF-8", remedy) from error
    try:
        held = json.loads(content, parse_constant=_no_number)
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            raise no_file(path, "holds no trace", "name one that `save` wrote")
        if held.get("version") != VERSION:
            happened = f"has version {held.get('version')!r} of the format, not {VERSION}"
            raise no_file(path, happened, "use the specflow that wrote it")
        return make(**_attributes(held))
    except DecodeError as error:
        if error.parameter == "path":
            raise
        raise no_file(path, f"is damaged ({error.happened})", remedy) from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise no_file(path, f"is damaged ({said(error)})", remedy) from error


def _attributes(held: dict[str, object]) -> dict[str, object]:
    words = cast(dict[str, object], held["words"])
    steps = cast(list[dict[str, object]], held["steps"])
    return {
        "prompt": tuple(cast(list[int], held["prompt"])),
        "steps": tuple([_step(step) for step in steps]),
        "words": {int(token): _bytes(word) for token, word in words.items()},
        "about": held["about"],
        "reason": None if held["reason"] is None else Reason(held["reason"]),
    }


def _bytes(word: object) -> bytes:
    if not isinstance(word, str | list):
        raise TypeError(f"{word!r} is no word")  # bytes(5) would be five of them
    return word.encode() if isinstance(word, str) else bytes(word)


def _step(held: dict[str, object]) -> StepTrace:
    drafts = [
        DraftTrace(**{**draft, "fate": Fate(draft["fate"])})  # type: ignore[arg-type] # looked at by its validators
        for draft in cast(list[dict[str, object]], held["drafts"])
    ]
    tokens, margins = tuple(cast(list[int], held["tokens"])), tuple(cast(list[float], held["margins"]))
    given = {**held, "tokens": tokens, "margins": margins, "drafts": tuple(drafts)}
    return StepTrace(**given)  # type: ignore[arg-type] # the same


def _no_number(name: str) -> Never:
    raise ValueError(f"{name} is no number of JSON")
