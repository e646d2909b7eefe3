"""Walk over the adapters of a model: its hosts, their adapters, parameters and roles, and what was attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from lora_lightning.adapters.base import Adapter, Method, Role
from lora_lightning.adapters.sharded import is_sharded
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.errors import ConfigError, TargetError

RECORD = "_lora_lightning_attachment"
COPIES = "modules_to_save"
"""The name by which a selection chooses the trained copies of modules."""

A = TypeVar("A", bound=Adapter)


@dataclass
class Attachment:
    """What `detach` needs to undo an `attach`, and what others ask about it; plain data, kept on the model."""

    methods: tuple[Method, ...]
    was_trainable: list[str] = field(default_factory=list)
    nested_encoders: list[str] = field(default_factory=list)
    unroute: Callable[[nn.Module], None] | None = None


def is_attached(model: nn.Module) -> bool:
    """Tell whether a model has adapters."""
    return any(True for _ in iter_hosts(model))


def was_attached_to(model: nn.Module) -> bool:
    """Return whether `attach` was called with this very module, and its adapters are there."""
    return RECORD in model.__dict__


def attached_methods(model: nn.Module) -> tuple[Method, ...]:
    """Return the methods that were attached to a model, in order; empty where there are none."""
    record: Attachment | None = getattr(unwrap(model), RECORD, None)
    return record.methods if record else ()


def iter_hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over `(path, host)` of every module that has adapters, in the model's order."""
    for path, module in unwrap(model).named_modules():
        if RESERVED in module._modules and RESERVED not in path.split("."):
            yield path, module


def iter_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Iterate over `(host path, host, adapter)`, in the model's order."""
    for path, host in iter_hosts(model):
        for adapter in host._modules[RESERVED].of_kind(Adapter):  # type: ignore[union-attr, operator]  # AdapterStack
            yield path, host, adapter


def adapters_of(model: nn.Module, method: Method, kind: type[A]) -> list[tuple[str, nn.Module, A]]:
    """Return `(host path, host, adapter)` of one method's adapters of one kind, in the model's order.

    What a method does during training goes to its own adapters: another one of its kind may stand in the same list.

    Raises:
        ConfigError: This method was not attached to the model.
    """
    found = [(path, host, adapter) for path, host, adapter in iter_adapters(model) if adapter.method == method]
    if not found:
        attached = ", ".join(type(one).__name__ for one in attached_methods(model)) or "none"
        raise ConfigError(
            f"This {type(method).__name__} was not attached to the model, whose methods are: {attached}; use the very "
            "one that was attached, with all its settings."
        )
    return [(path, host, adapter) for path, host, adapter in found if isinstance(adapter, kind)]


def iter_roles(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Role]]:
    """Iterate over `(name, parameter, role)` of all adapter parameters; names as in `adapter_state_dict`."""
    seen: set[int] = set()
    for path, _, adapter in iter_adapters(model):
        for name, parameter, role in adapter.named_roles():
            if id(parameter) not in seen:  # what several adapters share counts once
                seen.add(id(parameter))
                yield join(path, adapter.public_name(name)), parameter, role


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside a `torch.compile` wrapper, or the module itself."""
    return getattr(model, "_orig_mod", model)


def join(path: str, name: str) -> str:
    """Join a path and a name with a dot; the root's path is empty, and so is a module's own name within itself."""
    return ".".join(part for part in (path, name) if part)


def refuse_sharded(model: nn.Module, action: str) -> None:
    """Raise TargetError where parameters are sharded, since `action` needs them whole."""
    if is_sharded(model):
        raise TargetError(
            f"{action} needs whole parameters, and this model's are sharded over several processes (FSDP); "
            f"save a checkpoint and {action} in one process."
        )
