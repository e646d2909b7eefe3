"""Buffers of the frozen base that its forward moves in training: found by their values, and put back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lightning.adapters.frozen.norms import keep_evaluating, stays_evaluating
from lora_lightning.adapters.weights import RESERVED


class _Kept(NamedTuple):
    """A buffer as it was after the last look at it.

    Args:
        buffer: The tensor itself.
        version: Its version then.
        value: A copy of it.
    """

    buffer: Tensor
    version: int
    value: Tensor


class KeptBuffers:
    """The persistent buffers of a base, but for those of frozen norms, with copies of their values.

    Which of them the forward moves is unknown before it runs: a counter, a codebook, a norm by names of its own. They
    are few and small in most models.

    Args:
        model: The model that `attach` was given.
    """

    def __init__(self, model: nn.Module) -> None:
        self.paths = [path for path, _ in _persistent_buffers(model)]
        self._kept: dict[str, _Kept] = {}
        self._copies: dict[str, Tensor] = {}
        self._told: set[str] = set()
        self._has_looked = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave the copies out: they are made again from the model's own buffers."""
        return {**self.__dict__, "_kept": {}, "_copies": {}}

    @contextmanager
    def still(self, model: nn.Module) -> Iterator[None]:
        """Put the buffers back that move inside the `with` block, which runs the model in training mode."""
        self.paths = [path for path in self.paths if _is_there(model, path)]  # modules may be replaced later
        for path in self.paths:
            buffer, last = _get(model, path), self._kept.get(path)
            if last is None or buffer is not last.buffer or _version(buffer) != last.version:
                self._kept[path] = _Kept(buffer, _version(buffer), buffer.detach().clone())
        try:
            yield
        finally:
            moved = [path for path in self.paths if self._has_moved(model, path)]
            self._has_looked = True
            for path in moved:
                self._put_back(model, path)
            if moved:
                self._tell(moved, _hold(model, moved))

    def _tell(self, moved: list[str], num_held: int) -> None:
        """Warn of buffers that moved for the first time."""
        new = [path for path in moved if path not in self._told]
        self._told |= set(new)
        if new:
            held = f", and {num_held} modules stay in evaluation mode" if num_held else ""
            warnings.warn(
                f"Training moved {len(new)} buffers of the frozen base, such as {new[0]!r}: they were put back{held}.",
                stacklevel=2,
            )

    def keep(self, model: nn.Module) -> None:
        """Copy the buffers, whether they will move or not: for compiled calls, which cannot look at values."""
        for path in self.paths:
            buffer = _get(model, path)
            self._copies[path] = buffer.detach().clone()

    def give_back(self, model: nn.Module) -> None:
        """Write what `keep` copied into the buffers."""
        for path in self.paths:
            _get(model, path).detach().copy_(self._copies[path])

    def _has_moved(self, model: nn.Module, path: str) -> bool:
        """Return whether a buffer holds another value.

        Versions tell it without reading, but know nothing of writes through `.data`: what is new, or has moved before,
        is compared.
        """
        buffer, last = _get(model, path), self._kept[path]
        is_same = buffer is last.buffer and _version(buffer) == last.version
        if buffer.is_meta or (is_same and self._has_looked and path not in self._told):
            return False
        return buffer.shape != last.value.shape or not torch.equal(_comparable(buffer), _comparable(last.value))

    def _put_back(self, model: nn.Module, path: str) -> None:
        """Give the model the copy as its buffer: the moved one may be held for backward, so it is not written to."""
        owner, name = _owner(model, path)
        value = self._kept[path].value
        owner._buffers[name] = value
        self._kept[path] = _Kept(value, _version(value), value.clone())


def _hold(model: nn.Module, moved: list[str]) -> int:
    """Hold the modules whose buffers moved in evaluation mode, where they are leaves; return how many were not yet."""
    owners = {path.rpartition(".")[0]: _owner(model, path)[0] for path in moved}
    new = {path: owner for path, owner in owners.items() if not any(owner.children()) and not stays_evaluating(owner)}
    for path, owner in new.items():
        keep_evaluating(path, owner)
    return len(new)


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if RESERVED in path.split(".") or stays_evaluating(module):
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version


def _is_there(model: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    try:
        return model.get_submodule(parent)._buffers.get(name) is not None
    except AttributeError:
        return False


def _get(model: nn.Module, path: str) -> Tensor:
    owner, name = _owner(model, path)
    buffer = owner._buffers[name]
    assert buffer is not None
    return buffer


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _comparable(tensor: Tensor) -> Tensor:
    """Return a tensor in which NaN equals itself."""
    return tensor.nan_to_num() if tensor.is_floating_point() else tensor
