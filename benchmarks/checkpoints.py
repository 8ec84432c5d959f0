"""What a checkpoint costs: a way back for caches that cannot be cropped, beside the passes that it saves.

    python -m benchmarks.checkpoints

For each kind of cache: the KiB and the milliseconds of one checkpoint, of one pass over a single token and over eight,
and how long it took to find out how the model can be fed, which happens once. Random models of a middling size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Final

import torch
from attrs import frozen
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache
from transformers.utils import logging

from specflow import CachedPredictor
from specflow.predictors import last_rows

_COMMON: Final[dict[str, object]] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "head_dim": 64,
}
_DELTA: Final[dict[str, object]] = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}


@frozen
class Row:
    """A kind of model and, where it is not the model's own, the cache that it is read over."""

    kind: str
    config: Mapping[str, object]
    static: bool = False

    def build(self) -> PreTrainedModel:
        """A random model."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(self.kind, **self.config))
        model.eval()
        return model


ROWS: Final = (
    Row("llama", _COMMON),
    Row("mistral", {**_COMMON, "sliding_window": 256}),
    Row("mistral", {**_COMMON, "sliding_window": 256}, static=True),
    Row("qwen3_5_text", {**_COMMON, **_DELTA, "layer_types": 2 * (["linear_attention"] * 3 + ["full_attention"])}),
    Row(
        "mamba2",
        {"vocab_size": 1024, "hidden_size": 512, "num_hidden_layers": 8, "state_size": 64, "num_heads": 16}
        | {"head_dim": 64, "n_groups": 1},
    ),
    Row("mamba", {"vocab_size": 1024, "hidden_size": 512, "num_hidden_layers": 8, "state_size": 16}),
)


def milliseconds(deed: Callable[[], object], times: int = 15) -> float:
    """The median time of a deed."""
    taken = []
    for _ in range(times):
        begun = perf_counter()
        deed()
        taken.append(perf_counter() - begun)
    return 1e3 * median(taken)


def kibibytes(layer: object) -> float:
    """What the tensors of a copied layer hold."""
    values = list(vars(layer).values())
    values += [part for value in values if isinstance(value, dict) for part in value.values()]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor)) / 1024


def measured(row: Row) -> str:
    """A line of the table."""
    model = row.build()
    text = tuple(torch.randint(0, 1024, (600,), generator=torch.Generator().manual_seed(1)).tolist())
    make = (lambda: StaticCache(model.config, max_cache_len=1024)) if row.static else None
    predictor = CachedPredictor(model, make)
    begun = perf_counter()
    predictor(text[:500], ())
    first = 1e3 * (perf_counter() - begun)
    begun = perf_counter()
    predictor(text[:500][::-1], ())
    found = max(0.0, first - 1e3 * (perf_counter() - begun))
    predictor(text[:500], ())
    past = predictor._memos._kept[0].past
    mark = milliseconds(past.mark) if past.needs_marks else 0.0
    size = sum(kibibytes(layer) for layer in past._marks.get(past.length, ()) if layer is not None)
    ones, eights = iter(range(501, 540)), iter(range(520, 600, 5))
    one = milliseconds(lambda: predictor(text[: next(ones)], ()))
    eight = milliseconds(lambda: last_rows(predictor, text[: next(eights)], 8), 10)
    name = row.kind + (", static" if row.static else "")
    fed = predictor.feeding.name
    return f"{name:20}{size:16.0f}{mark:16.2f}{one:10.2f}{eight:10.2f}{found:10.0f}  {fed}"


def main() -> None:
    """Prints a table."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    print(f"{'':20}{'checkpoint, KiB':>16}{'checkpoint, ms':>16}{'1 token':>10}{'8 tokens':>10}{'found out':>10}  fed")
    for row in ROWS:
        print(measured(row))


if __name__ == "__main__":
    main()
