"""Averages of weights over training (`WeightAveraging`, `EMAWeightAveraging`, SWA), saved as adapters.

Lightning's callbacks average a copy of the task and write its whole state into checkpoints, including the frozen base.
A task replaces these states with adapter states before a checkpoint is written, and restores the whole states before
the callbacks load them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from lora_lightning.adapters import gathered

if TYPE_CHECKING:
    from lora_lightning.tasks.checkpoint_state import CheckpointState

_CURRENT = "current_model_state"
_SWA_STATE = "average_model_state"


def averaged_task(trainer: L.Trainer | None) -> CheckpointState | None:
    """Return the copy of the task that holds the averaged weights, which validation uses.

    Args:
        trainer: The trainer, or None.

    Returns:
        The copy that `WeightAveraging` keeps during a fit; None without one.
    """
    for callback in _callbacks(trainer):
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            module: Any = callback._average_model.module
            return cast("CheckpointState", module) if hasattr(module, "adapter_state") else None
    return None


def copy_for_averages(task: CheckpointState) -> None:
    """Give SWA the built model to average, since it copied the task before the model was built.

    Args:
        task: The task, with its model.
    """
    for callback in _swa(task._trainer):
        average = callback._average_model
        if average is not None and getattr(average, "model", None) is None:
            callback._average_model = copy.deepcopy(task)


def shrink_averages(task: CheckpointState, checkpoint: dict[str, Any]) -> None:
    """Replace the whole states that the callbacks put into a checkpoint with adapter states, before it is written."""
    checkpoint["state_dict"] = gathered(task.adapter_state())
    averaged = averaged_task(task._trainer)
    if averaged is not None and _CURRENT in checkpoint:
        checkpoint[_CURRENT] = checkpoint["state_dict"]
        checkpoint["state_dict"] = gathered(averaged.adapter_state())
    for callback, state in _swa_states(task, checkpoint):
        average: Any = callback._average_model
        state[_SWA_STATE] = gathered(average.adapter_state())


def complete_averages(task: CheckpointState, checkpoint: dict[str, Any]) -> None:
    """Restore whole states in a loaded checkpoint, since `WeightAveraging` loads only whole states."""
    averaged = averaged_task(task._trainer)
    if averaged is not None and _CURRENT in checkpoint:
        averaged.load_state_dict(checkpoint["state_dict"])
        checkpoint["state_dict"] = averaged.state_dict()


def _swa_states(task: CheckpointState, checkpoint: dict[str, Any]) -> Iterator[tuple[StochasticWeightAveraging, Any]]:
    for callback in _swa(task._trainer):
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if state is not None and state.get(_SWA_STATE) is not None:
            yield callback, state


def _swa(trainer: L.Trainer | None) -> Iterator[StochasticWeightAveraging]:
    return (one for one in _callbacks(trainer) if isinstance(one, StochasticWeightAveraging))


def _callbacks(trainer: L.Trainer | None) -> list[L.Callback]:
    found: list[L.Callback] = getattr(trainer, "callbacks", None) or []
    return found
