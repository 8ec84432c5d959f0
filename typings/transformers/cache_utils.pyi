from torch import Tensor
from transformers import PreTrainedConfig

class CacheLayerMixin:
    keys: Tensor | None
    values: Tensor | None
    is_initialized: bool
    is_sliding: bool
    @property
    def is_croppable(self) -> bool: ...
    def get_seq_length(self) -> int: ...
    def get_max_length(self) -> int: ...
    def crop(self, tokens_to_remove: int) -> None: ...
    def reset(self) -> None: ...

class LinearAttentionCacheLayerMixin:
    has_previous_state: dict[int, bool]
    def crop(self, tokens_to_remove: int) -> None: ...

class DummyLayer:
    is_initialized: bool
    keys: None
    values: None
    def crop(self, tokens_to_remove: int) -> None: ...

class DynamicLayer(CacheLayerMixin):
    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: object, **named: object
    ) -> tuple[Tensor, Tensor]: ...

class DynamicIndexedLayer(DynamicLayer): ...

class DynamicSlidingWindowLayer(DynamicLayer):
    sliding_window: int
    record_past: bool
    def __init__(self, sliding_window: int) -> None: ...

class StaticLayer(CacheLayerMixin):
    max_cache_len: int

class StaticIndexedLayer(StaticLayer): ...
class StaticSlidingWindowLayer(StaticLayer): ...
class QuantoQuantizedLayer(DynamicLayer): ...
class HQQQuantizedLayer(DynamicLayer): ...
class Fp8QuantizedLayer(DynamicLayer): ...

class Cache:
    offloading: bool
    layers: list[CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer]
    def get_seq_length(self, layer_idx: int = 0) -> int: ...
    def reorder_cache(self, beam_idx: Tensor) -> None: ...

class DynamicCache(Cache):
    def __init__(self, *, config: PreTrainedConfig | None = None, offloading: bool = False) -> None: ...

class StaticCache(Cache):
    def __init__(self, config: PreTrainedConfig, max_cache_len: int, offloading: bool = False) -> None: ...

class EncoderDecoderCache(Cache):
    def __init__(self, *caches: Cache) -> None: ...

class QuantizedCache(Cache):
    def __init__(
        self,
        backend: str,
        config: PreTrainedConfig,
        *,
        q_group_size: int | None = None,
        residual_length: int | None = None,
    ) -> None: ...
