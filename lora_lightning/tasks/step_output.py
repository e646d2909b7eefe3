"""What a step of a task returns, and how many rows it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lora_lightning.errors import ConfigError

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


def require_output(output: Any, task: str, *, trains: bool) -> StepOutput:  # noqa: ANN401 - a user's code returns it
    """Return what `compute_loss` has returned, if it is what it must be.

    Args:
        output: What it returned.
        task: Name of the task's class, for messages.
        trains: Whether the loss is going to be minimized.

    Raises:
        ConfigError: It is not a `StepOutput`, or its loss is not one number, or depends on no parameter that trains.
    """
    where = f"compute_loss of {task}"
    if not isinstance(output, StepOutput):
        raise ConfigError(f"{where} must return a StepOutput, as in `return StepOutput(loss)`; got {_kind(output)}.")
    loss: Any = output.loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConfigError(
            f"{where} must return one number as the loss, such as the mean over the batch; got {_kind(loss)}."
        )
    if trains and not loss.requires_grad:
        raise ConfigError(
            f"The loss that {where} returns depends on no parameter that trains, so nothing would be learned. Compute "
            "it from the output of self.model, without detach(), item() or torch.no_grad()."
        )
    return output


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def batch_size_of(batch: Any) -> int:  # noqa: ANN401 - the data module's own type
    """Return the length of the first tensor in a batch, for Lightning's averages."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 1)
