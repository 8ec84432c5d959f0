# The few names of matplotlib that specflow uses, typed exactly: it is an optional extra.
from contextlib import AbstractContextManager

def rc_context(rc: dict[str, object]) -> AbstractContextManager[None]: ...
