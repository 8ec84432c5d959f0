# The few names of Ray that the tests use: it is an optional extra.
from ray import data as data

class Context:
    @property
    def address_info(self) -> dict[str, str]: ...

def init(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    object_store_memory: int | None = None,
    include_dashboard: bool | None = None,
    log_to_driver: bool = True,
    runtime_env: dict[str, dict[str, str]] | None = None,
    _memory: int = ...,
) -> Context: ...
def shutdown() -> None: ...
