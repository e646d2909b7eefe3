"""Read a Lightning checkpoint safely, and rebuild the task that wrote it."""

from __future__ import annotations

import importlib
import pickle
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_lightning.checkpoint.complete import check_checkpoint, instead_of
from lora_lightning.errors import CheckpointError
from lora_lightning.trust import LIBRARY, check_import

if TYPE_CHECKING:
    import lightning as L


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a `.ckpt` file onto the CPU without running any code that it might carry.

    Args:
        path: The file.

    Returns:
        Its content; `state_dict` and `hyper_parameters` are in it.

    Raises:
        CheckpointError: The file is missing, damaged, or no checkpoint of a task of this library.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the .ckpt file that stands beside it.")
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}{_nearest(path)}.")
    check_checkpoint(path)
    checkpoint = load_safely(path, map_location="cpu")
    wanted = ("state_dict", "hyper_parameters")
    missing = [key for key in wanted if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), dict)]
    if missing:
        raise CheckpointError(
            f"{path} holds no {' and no '.join(missing)}, so it was not written by a task of lora_lightning; "
            "name a .ckpt file from a run's checkpoints folder."
        )
    if "_instantiator" in checkpoint["hyper_parameters"]:
        raise CheckpointError(
            f"{path} names a function to build its task with, which a task of lora_lightning never needs; it was "
            "changed or written by something else, so it is not loaded."
        )
    return dict(checkpoint)


def tokenizer_fingerprint_in(checkpoint: dict[str, Any]) -> str | None:
    """Return the fingerprint of the tokenizer that a checkpoint was trained with, or None where it does not say."""
    found: str | None = (checkpoint.get("lora_lightning") or {}).get("tokenizer_fingerprint")
    return found


def load_safely(path: Path, map_location: Any = None) -> Any:  # noqa: ANN401 - as torch.load has them
    """Read what `torch.save` wrote, without running any code that the file might carry.

    Raises:
        CheckpointError: It is damaged, holds something else than plain data, or would unpack to more than its size.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is packed, which torch never does")
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises a dozen types, by where the file is damaged
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch recommends to run the code
            reason = "it holds more than numbers, texts and tensors, and to read that could run code"
        raise CheckpointError(
            f"{path} is no checkpoint that can be read safely ({reason:.120}); it is damaged, or another kind of file. "
            f"{instead_of(path)}"
        ) from error


def rebuild_task(
    path: Path,
    task_class: type[L.LightningModule] | str | None = None,
    **changes: Any,  # noqa: ANN401 - settings of any type
) -> L.LightningModule:
    """Build the task that wrote a checkpoint, on its base model, with the checkpoint's adapter loaded.

    Args:
        path: The `.ckpt` file.
        task_class: The task's class or its import path; None takes the one that the checkpoint names, which must be
            part of this library or imported already, because importing a module runs its code.
        **changes: Settings of the task to take instead of the checkpoint's, such as `quantization=None`.

    Returns:
        The task, its model built and adapted, on the CPU.

    Raises:
        CheckpointError: The checkpoint or its class cannot be used, or the base is not the one it was trained on.
    """
    checkpoint = read_checkpoint(path)
    cls = task_class if isinstance(task_class, type) else find_task_class(checkpoint, task_class, path)
    try:
        task = cls.load_from_checkpoint(path, map_location="cpu", weights_only=True, **changes)
    except TypeError as error:
        raise CheckpointError(
            f"The settings in {path} do not fit {cls.__qualname__} ({error}); it was written by another version."
        ) from error
    return task


def find_task_class(checkpoint: dict[str, Any], name: str | None, path: Path) -> type[L.LightningModule]:
    """Return the class of the task that wrote a checkpoint; see `rebuild_task`."""
    import lightning as L

    stored = checkpoint["hyper_parameters"].get("_class_path")
    wanted = name or stored
    if not isinstance(wanted, str) or "." not in wanted:
        raise CheckpointError(f"{path} does not say which task wrote it; name its class, as in my_module.MyTask.")
    check_import(wanted, "--task_class" if name else str(path))
    module_name, _, class_name = wanted.rpartition(".")
    is_trusted = name is not None or module_name in sys.modules or module_name.split(".")[0] == LIBRARY
    if not is_trusted:
        raise CheckpointError(
            f"{path} was written by the task {wanted}, which is not part of lora_lightning, and importing it runs its "
            f"code. If you trust it, say so: --task_class {wanted}"
        )
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"The task {wanted} of {path} cannot be imported ({error}).") from error
    check_import(f"{getattr(cls, '__module__', '')}.{class_name}", str(path))  # a module may import another's class
    if not (isinstance(cls, type) and issubclass(cls, L.LightningModule)):
        raise CheckpointError(f"{wanted} is no LightningModule, so it cannot be the task that wrote {path}.")
    return cls


def _nearest(path: Path) -> str:
    found = sorted(path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
    return f"; in its folder are {', '.join(file.name for file in found[:5])}" if found else ""
