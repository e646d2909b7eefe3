"""State of a task outside its model, such as a projection or a counter: it is saved and exported with the adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

from lora_lightning.trust import LIBRARY

OWN_STATE_NAME = "task.safetensors"
MODEL = "model."
"""Prefix of the names of a task's adapted model."""


def own_entries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a task's state outside its model: its own parameters and buffers.

    Args:
        state: The `state_dict` of a task or of its checkpoint.
    """
    return {name: tensor for name, tensor in state.items() if not name.startswith(MODEL)}


def own_file(own: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the file for a task's own entries, by its name; an empty mapping without such entries."""
    if not own:
        return {}
    return {OWN_STATE_NAME: save({name: one.detach().cpu().contiguous().clone() for name, one in own.items()})}


def warn_of_own_file(task: object, own: Mapping[str, Tensor], folder: object) -> None:
    """Warn that tools which read a folder do not know the state of a user's task outside its model."""
    if own and type(task).__module__.split(".")[0] != LIBRARY:
        warnings.warn(
            f"The task holds {', '.join(own)} beside its model. {folder} has them in {OWN_STATE_NAME}; tools that load "
            "the model do not read them.",
            stacklevel=3,
        )
