"""What a task holds beside its model, such as a projection or a counter of its own: trained, saved, and taken along."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

from lora_lightning.trust import LIBRARY

OWN_STATE_NAME = "task.safetensors"
MODEL = "model."
"""What the names of a task's adapted model begin with."""


def own_entries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a task's state that belong to no adapter: parameters and buffers of its own.

    Args:
        state: The `state_dict` of a task or of its checkpoint.
    """
    return {name: tensor for name, tensor in state.items() if not name.startswith(MODEL)}


def own_file(own: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the file that takes a task's own entries along, by its name; nothing where there are none."""
    if not own:
        return {}
    return {OWN_STATE_NAME: save({name: one.detach().cpu().contiguous().clone() for name, one in own.items()})}


def warn_of_own_file(task: object, own: Mapping[str, Tensor], folder: object) -> None:
    """Say that the tools which read a folder do not know what a task of the user's own holds beside its model."""
    if own and type(task).__module__.split(".")[0] != LIBRARY:
        warnings.warn(
            f"The task holds {', '.join(own)} beside its model. {folder} has them in {OWN_STATE_NAME}; tools that load "
            "the model do not read them.",
            stacklevel=3,
        )
