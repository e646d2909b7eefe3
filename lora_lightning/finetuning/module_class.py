"""The class of a fine-tuned LightningModule: its own, with checkpoints that hold what trains."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from lora_lightning.finetuning import entry
from lora_lightning.finetuning.parts import attach_parts
from lora_lightning.finetuning.record import attached_parts, record_of
from lora_lightning.finetuning.state import check_loadable, expanded, note_kept, reduced, without_own
from lora_lightning.resume.precision import double_before_loading

_CLASSES: dict[tuple[type[Any], bool], type[Any]] = {}
_STATES = ("state_dict", "current_model_state")
"""Where a checkpoint holds states of the module: the second is what Lightning's `WeightAveraging` adds."""


class Finetuned:
    """Mixed into the class of a LightningModule; all that the class defines itself still runs."""

    _lora_lightning_class: type[Any]
    """The class without this."""
    _lora_lightning_has_penalty: bool = False
    """Whether methods add to the loss that `training_step` returns."""

    def configure_model(self: Any) -> None:
        """Attach adapters to what the module creates in `setup` or `configure_model`."""
        super().configure_model()  # type: ignore[misc]  # LightningModule's, mixed in
        attach_parts(self)

    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        """Leave out of a checkpoint what is frozen; the module's own hook sees the whole state before."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]  # LightningModule's, mixed in
        if not any(True for _ in attached_parts(self)):
            return  # merged since: the weights are not the base's any more
        for name in _STATES:
            if name in checkpoint:
                checkpoint[name] = reduced(self, checkpoint[name])
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and isinstance(state.get("average_model_state"), Mapping):
                state["average_model_state"] = reduced(self, state["average_model_state"])
        entry.write(self, checkpoint)

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        """Compare the base, and complete the state; the module's own hook sees the whole state after."""
        entry.read(self, checkpoint)
        double_before_loading(self)
        for name in _STATES:
            if name in checkpoint:
                note_kept(self, checkpoint[name])
                checkpoint[name] = expanded(self, checkpoint[name])
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]  # LightningModule's, mixed in

    def load_state_dict(self: Any, state_dict: Mapping[str, Any], strict: bool = True, **settings: Any) -> Any:  # noqa: ANN401 - torch's own signature
        """Load what a checkpoint holds, or a whole state.

        Raises:
            CheckpointError: It does not fit; nothing is changed.
        """
        if not any(True for _ in attached_parts(self)):
            return super().load_state_dict(state_dict, strict, **settings)  # type: ignore[misc]  # LightningModule's
        note_kept(self, state_dict)
        whole = expanded(self, state_dict)
        missing, unknown = check_loadable(self, whole, strict=strict)
        super().load_state_dict(without_own(self, whole), False, **settings)  # type: ignore[misc]  # LightningModule's
        return _IncompatibleKeys(missing, unknown)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: ANN401 - object's own signature
        """Pickle and copy through the module's own class, since this one has no importable name."""
        del protocol
        has_penalty = self._lora_lightning_has_penalty
        return _new, (self._lora_lightning_class, has_penalty), self.__getstate__()


def become_finetuned(module: L.LightningModule, *, has_penalty: bool) -> None:
    """Give a LightningModule the class that keeps its checkpoints small."""
    own_class = own_class_of(module)
    has_penalty = has_penalty or getattr(module, "_lora_lightning_has_penalty", False)
    module.__class__ = finetuned_class(own_class, has_penalty=has_penalty)


def own_class_of(module: L.LightningModule) -> type[Any]:
    """Return the class that the user has written."""
    cls: Any = type(module)
    own_class: type[Any] = cls._lora_lightning_class if issubclass(cls, Finetuned) else cls
    return own_class


def finetuned_class(own_class: type[Any], *, has_penalty: bool = False) -> type[Any]:
    """Return the one class of fine-tuned modules of `own_class`, under its name.

    Args:
        own_class: A LightningModule.
        has_penalty: Whether methods add to the loss that `training_step` returns.
    """
    key = own_class, has_penalty
    if key not in _CLASSES:
        members: dict[str, Any] = {
            "__module__": own_class.__module__,
            "__qualname__": own_class.__qualname__,
            "_lora_lightning_class": own_class,
        }
        if has_penalty:
            members |= {"training_step": _with_penalty(own_class.training_step), "_lora_lightning_has_penalty": True}
        bases: tuple[type[Any], ...] = (Finetuned, own_class)
        _CLASSES[key] = type(own_class.__name__, bases, members)
    return _CLASSES[key]


def _new(own_class: type[Any], has_penalty: bool) -> Any:  # noqa: ANN401 - a module of that class
    cls: Any = finetuned_class(own_class, has_penalty=has_penalty)
    return cls.__new__(cls)


def _with_penalty(training_step: Any) -> Any:  # noqa: ANN401 - a method of any signature
    """Return a `training_step` whose loss has the methods' penalties; Lightning reads the signature of the original."""

    @functools.wraps(training_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the module's own signature
        output = training_step(self, *args, **kwargs)
        penalty = _penalty(self)
        if penalty is None or output is None:
            return output
        if isinstance(output, Mapping):
            return {**output, "loss": output["loss"] + penalty}
        return output + penalty

    return step


def _penalty(module: Any) -> Tensor | None:  # noqa: ANN401 - a LightningModule
    assert record_of(module) is not None
    found = [method.extra_loss(submodule) for part, submodule in attached_parts(module) for method in part.methods]
    penalties = [penalty for penalty in found if penalty is not None]
    return sum(penalties[1:], penalties[0]) if penalties else None
