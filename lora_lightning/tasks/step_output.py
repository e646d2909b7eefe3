"""What a step of a task returns, and how many rows it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["StepOutput"]


class StepOutput(NamedTuple):
    """What `compute_loss` returns.

    Args:
        loss: Scalar to minimize.
        predictions: What the metrics take as predictions, or None without metrics.
        targets: What the metrics take as targets.
    """

    loss: Tensor
    predictions: Tensor | None = None
    targets: Tensor | None = None


def batch_size_of(batch: Any) -> int:  # noqa: ANN401 - the data module's own type
    """Return the length of the first tensor in a batch, for Lightning's averages."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 1)
