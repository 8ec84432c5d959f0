"""The error of specflow, and one kind of it: what happened, what was received, and the remedy, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, final

from returns.primitives.exceptions import UnwrapFailedError
from returns.result import Failure, Result
from typing_extensions import override

T = TypeVar("T")


class DecodeError(ValueError):
    """A request that cannot be decoded, or a model that broke its promise.

    It is a value where a decode is started (`Result[..., DecodeError]`) and an exception in the spec-named functions.

    >>> print(DecodeError("gamma", "gamma is below 1", 0, "draft at least one token"))
    gamma is below 1: received 0; draft at least one token.
    """

    def __init__(self, parameter: str, happened: str, received: object, remedy: str) -> None:
        super().__init__(parameter, happened, received, remedy)
        self.parameter = parameter
        self.happened = happened
        self.received = received
        self.remedy = remedy

    def renamed(self, names: Mapping[str, str]) -> DecodeError:
        """The same error of a caller's own parameter, where `names` has one for it; `DecodeError` for no mapping.

        >>> error = DecodeError("prompt", "the prompt is empty", "no tokens", "give one")
        >>> error.renamed({"prompt": "inputs"}).parameter
        'inputs'
        """
        given: object = names
        if not isinstance(given, Mapping):
            kind = f"a {type(given).__name__}"
            raise DecodeError("names", "names are not a mapping", kind, 'give one, such as {"prompt": "inputs"}')
        return type(self)(names.get(self.parameter, self.parameter), self.happened, self.received, self.remedy)

    @override
    def __str__(self) -> str:
        return f"{self.happened}: received {self.received}; {self.remedy}."


@final
class DeadEndError(DecodeError):
    """No token can follow a text: it is over, it is none that could be, or nothing that may follow has a chance.

    A processor that has no law there raises it. The draft of a drafter that asked ends; the target's text fails by it,
    unless a condition ends the text there.

    >>> issubclass(DeadEndError, DecodeError)
    True
    """


def unwrap(result: Result[T, DecodeError]) -> T:
    """The value of a success; raises the `DecodeError` of a failure itself, not wrapped in another exception.

    >>> from returns.result import Success
    >>> unwrap(Success(3))
    3
    """
    match result:
        case Failure(DecodeError() as error):
            raise error
        case Result():
            return result.unwrap()
    raise DecodeError("result", "this is not a result", f"a {type(result).__name__}", "give what `start` returns")


def said(error: BaseException) -> str:
    """What an error says: ours its sentence, also where `unwrap` of a `Result` hides it; any other on one line.

    >>> said(KeyError("role")), said(ValueError())
    ("KeyError: 'role'", 'ValueError')
    """
    match error:
        case UnwrapFailedError(halted_container=Failure() as failed) if isinstance(failed.failure(), BaseException):
            return said(failed.failure())
        case DecodeError():
            return str(error)
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = line.rstrip(".:") if len(line) <= 200 else line[:197] + "..."
    name = type(error).__name__
    return line if line and isinstance(error, OSError) else f"{name}: {line}" if line else name
