from typing import Literal

class DistributedConfig:
    def __init__(self, *, tp_plan: Literal["auto"] | dict[str, str] | None = None) -> None: ...
