"""Whether a row of a layer depends on the others in its pass: found out by asking the layer.

What quantizes activations by one scale for all rows, or treats a column otherwise where any row has an outlier in it,
says something else of a token when drafts are read beside it. A target of such layers has no law of its own: what it
says of a text depends on how the text is read. In half precision that is no larger than rounding, and the trial of
whole passes does not see it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter

from specflow.errors import DecodeError
from specflow.predictors.reader import Reader

ROWS: Final = 8
"""How many rows a layer is asked for: kernels may do otherwise with one alone."""

LOUD: Final = 64.0
"""How much larger the other rows are, where they are not the same as the first."""


def refuse_company(reader: Reader) -> None:
    """`DecodeError` for a model with a linear layer whose rows depend on each other.

    Asked are all but plain ones, `Linear` with plain weights. One that cannot be asked so tells nothing.
    """
    with reader.at_rest():
        for name, layer in reader.model.named_modules():
            width: object = getattr(layer, "in_features", None)
            if isinstance(width, int) and not _is_plain(layer) and not _keeps_apart(layer, width, reader):
                happened, received = f"a row of {name} depends on the others in its pass", type(layer).__name__
                remedy = "quantize activations row by row, without a threshold for outliers, or weights alone"
                raise DecodeError("model", happened, received, remedy)


def _is_plain(layer: Module) -> bool:
    return type(layer) is nn.Linear and type(layer.weight) is Parameter


def _keeps_apart(layer: Module, width: int, reader: Reader) -> bool:
    """Whether the first of several rows is the same, bit for bit, whatever the others hold."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, ROWS, width, generator=generator, dtype=torch.float32, device="cpu")
    quiet, loud = rows[:, :1].expand_as(rows), torch.cat([rows[:, :1], LOUD * rows[:, 1:]], dim=1)
    quiet, loud = (rows.to(reader.device, reader.dtype) for rows in (quiet, loud))

    def first(rows: Tensor) -> Tensor:
        found: Tensor = layer(rows.clone())
        return found[0, 0]

    try:
        alone = first(quiet)
        # Where it is not the same for the same rows either, it is the kernel that wavers.
        return torch.equal(alone, first(loud)) or not torch.equal(alone, first(quiet))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a layer raises here says that it is asked otherwise in its model
        return True
