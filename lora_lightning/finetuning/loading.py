"""Load a fine-tuned LightningModule without a Trainer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.core.saving import _load_state

from lora_lightning.checkpoint.reading import read_file
from lora_lightning.errors import CheckpointError, ConfigError
from lora_lightning.finetuning.module_class import finetuned_class
from lora_lightning.finetuning.record import ENTRY

__all__ = ["load_finetuned"]

M = TypeVar("M", bound=L.LightningModule)


def load_finetuned(
    cls: type[M],
    path: str | Path,
    *,
    map_location: Any = None,  # noqa: ANN401 - as torch.load has it
    strict: bool | None = None,
    weights_only: bool | None = None,
    **settings: Any,  # noqa: ANN401 - arguments of any type
) -> M:
    """Load a LightningModule from a checkpoint that was written with `AdapterFinetuning`.

    `cls.load_from_checkpoint` cannot: the module it builds has no adapters. The methods and their settings come from
    the checkpoint. The module builds its base itself, whose weights are compared with those of the training.

    Args:
        cls: The class of the module.
        path: The `.ckpt` file.
        map_location: As `torch.load` takes it.
        strict: As `load_from_checkpoint` takes it.
        weights_only: False also runs code that the file may carry, for hyperparameters that are not plain types.
        **settings: Arguments of `cls` that the checkpoint does not hold, or to use instead of those.

    Returns:
        The module with its trained adapters, in the mode and on the device that `load_from_checkpoint` gives.

    Raises:
        CheckpointError: The file is damaged, holds no adapters, or was trained on another base.
    """
    content = read_finetuned(Path(path), map_location, weights_only=weights_only is not False)
    return build_finetuned(cls, content, strict=strict, **settings)


def read_finetuned(path: Path, map_location: Any = None, *, weights_only: bool = True) -> dict[str, Any]:  # noqa: ANN401 - as torch.load has it
    """Read a checkpoint that was written with `AdapterFinetuning`.

    Raises:
        CheckpointError: It is damaged, or holds no adapters of a module.
    """
    content: Any = read_file(path, map_location or _available, weights_only=weights_only).content
    found = content.get(ENTRY) if isinstance(content, dict) else None
    if not isinstance(found, dict) or "parts" not in found:
        raise CheckpointError(
            f"{path} was not saved with AdapterFinetuning. Load it with the class's own load_from_checkpoint."
        )
    return content


def build_finetuned(cls: type[M], content: dict[str, Any], *, strict: bool | None = None, **settings: Any) -> M:  # noqa: ANN401 - arguments of any type
    """Build a module from what a checkpoint holds.

    Raises:
        ConfigError: `cls` is not the class of a LightningModule.
    """
    given_class: Any = cls  # a user's code may pass anything
    if not (isinstance(given_class, type) and issubclass(given_class, L.LightningModule)):
        got = given_class.__name__ if isinstance(given_class, type) else f"a {type(cls).__name__}"
        raise ConfigError(f"Give the class of the LightningModule, as in load_finetuned(MyModule, path); got {got}.")
    given = dict(content.get("hyper_parameters", {}))
    content = {**content, "hyper_parameters": given}
    own_class = _class_of_cli(cls, given)
    module: Any = _load_state(finetuned_class(own_class), content, strict=strict, **settings)
    tensors = (value for value in content["state_dict"].values() if isinstance(value, torch.Tensor))
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    loaded: M = module.to(device)
    return loaded


def _class_of_cli(cls: type[M], given: dict[str, Any]) -> type[M]:
    """Return the class that a LightningCLI in subclass mode has noted; only one that is imported already is found."""
    stored = given.pop("_class_path", None)
    if stored is None:
        return cls
    module_name, _, name = str(stored).rpartition(".")
    found = getattr(sys.modules.get(module_name), name, None)
    if not (isinstance(found, type) and issubclass(found, cls)):
        raise CheckpointError(
            f"The checkpoint was written by {stored}, which is not {cls.__name__} nor an imported subclass of it. Give "
            "that class."
        )
    return found


def _available(storage: Any, location: str) -> Any:  # noqa: ANN401 - torch's own signature
    """Put what lay on a GPU onto the CPU where there is none."""
    return storage.cpu() if location.startswith("cuda") and not torch.cuda.is_available() else None
