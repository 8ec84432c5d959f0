# The few names of pyarrow that the tests use: it comes with Ray Data.
from collections.abc import Mapping, Sequence
from typing import Any

class Table:
    @staticmethod
    def from_pylist(mapping: Sequence[Mapping[str, object]]) -> Table: ...
    # A row may hold anything.
    def to_pylist(self) -> list[dict[str, Any]]: ...
