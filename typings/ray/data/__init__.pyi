from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy import generic
from numpy.typing import NDArray
from ray.data.checkpoint import CheckpointConfig
from ray.data.expressions import Expr

class ActorPoolStrategy:
    def __init__(self, *, size: int) -> None: ...

class DataContext:
    checkpoint_config: CheckpointConfig | None
    enable_progress_bars: bool
    @staticmethod
    def get_current() -> DataContext: ...

class Dataset:
    def map_batches(
        self,
        fn: Callable[..., Callable[[Mapping[str, NDArray[generic]]], Mapping[str, NDArray[generic]]]],
        *,
        batch_size: int,
        compute: ActorPoolStrategy,
        fn_constructor_args: Sequence[object],
    ) -> Dataset: ...
    def repartition(self, *, target_num_rows_per_block: int) -> Dataset: ...
    def filter(self, *, expr: Expr) -> Dataset: ...
    # A row may hold anything.
    def take_all(self) -> list[dict[str, Any]]: ...
    def write_parquet(self, path: str) -> None: ...

def from_items(items: Sequence[Mapping[str, object]], *, override_num_blocks: int | None = None) -> Dataset: ...
def read_parquet(paths: str) -> Dataset: ...
