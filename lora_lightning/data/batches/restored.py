"""Undo what Lightning leaves on torch's loader classes when the making of a loader fails."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities import data
from torch.utils.data import BatchSampler, DataLoader

_LIGHTNING = data.__file__
_PATCHED = ("__init__", "__setattr__", "__delattr__")


def restore_loader_classes() -> None:
    """Give `DataLoader`, `BatchSampler` and their subclasses their own methods back.

    Lightning records the arguments of loaders by wrapping these methods while it asks for a loader, and leaves the
    wrappers on if that raises an error (`_replace_dunder_methods` of Lightning 2.6). In a notebook the next run would
    then fail with `got multiple values for argument 'batch_size'`.
    """
    waiting: list[type] = [DataLoader, BatchSampler]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        for name in _PATCHED:
            if f"__old{name}" in cls.__dict__:
                delattr(cls, f"__old{name}")
            own = cls.__dict__.get(name)
            if own is not _without_wrappers(own):
                setattr(cls, name, _without_wrappers(own))


def _without_wrappers(method: Any) -> Any:  # noqa: ANN401 - a method of any signature
    """Return what Lightning has wrapped, once or in several runs that failed."""
    while hasattr(method, "__wrapped__") and method.__code__.co_filename == _LIGHTNING:
        method = method.__wrapped__
    return method
