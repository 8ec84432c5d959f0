"""The spec's own top-level import paths, for programs that were written against it. Nothing else imports this."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Final

from specflow.errors import DecodeError

PATHS: Final[tuple[str, ...]] = (
    "ngram_assisted",
    "sampling",
    "sampling.speculative_decoding",
    "utils",
    "utils.caching",
    "utils.logits_processor",
)


def install_spec_paths() -> None:
    """Let `from sampling import …`, `from ngram_assisted import …` and `from utils.… import …` resolve to specflow.

    Call it once, before such imports. Under `specflow.` all of these modules exist without it. `DecodeError`, and
    nothing is changed, where a module of one of these names exists already: it would no longer be found.
    For mypy, add specflow's `typings` directory to `mypy_path`.
    """
    ours = {name: import_module(f"specflow.{name}") for name in PATHS}
    for name in (path for path in PATHS if "." not in path):
        if sys.modules.get(name) is not ours[name] and (name in sys.modules or find_spec(name) is not None):
            happened, remedy = f"a module named {name} exists already", f"import from specflow.{name} instead"
            raise DecodeError(name, happened, _origin(name), remedy)
    sys.modules.update(ours)


def _origin(name: str) -> str:
    """Where the module of that name is, for whoever has to find it."""
    spec = sys.modules[name].__spec__ if name in sys.modules else find_spec(name)
    return name if spec is None else spec.origin or ", ".join(spec.submodule_search_locations or [name])
