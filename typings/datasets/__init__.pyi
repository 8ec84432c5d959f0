# The one name of datasets that the tests of lm-eval use.
from collections.abc import Mapping, Sequence

class Dataset:
    @classmethod
    def from_list(cls, mapping: Sequence[Mapping[str, object]]) -> Dataset: ...
