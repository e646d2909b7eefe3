"""Walk over the adapters of a model: its hosts, their adapters, parameters and roles, and what was attached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from lora_lightning.adapters.base import Adapter, Method, Role
from lora_lightning.adapters.selection.state import Selector
from lora_lightning.adapters.sharded import is_sharded
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.paths import nearest

__all__ = ["adapter_names"]

RECORD = "_lora_lightning_attachment"
COPIES = "modules_to_save"
"""The name by which a selection chooses the trained copies of modules."""

A = TypeVar("A", bound=Adapter)


@dataclass
class Attachment:
    """What `detach` needs to undo every `attach` to a model, and what others ask about them; kept on the model.

    Args:
        methods: The methods by the name that they were attached under, in the order of attaching.
        selector: Which all hosts hold.
        was_trainable: Parameters of the base that trained before the first `attach`.
        nested_encoders: Encoders that may pack padded batches again when no adapter is left.
        unroute: Gives the model its own attention back.
        sees_rows: For hosts that were looked at, whether they see the rows of a batch in their first dimension.
    """

    methods: dict[str, tuple[Method, ...]]
    selector: Selector
    was_trainable: list[str] = field(default_factory=list)
    nested_encoders: list[str] = field(default_factory=list)
    unroute: Callable[[nn.Module], None] | None = None
    sees_rows: dict[str, bool] = field(default_factory=dict)


_LOOKED_AT: ContextVar[str | None] = ContextVar("lora_lightning_name", default=None)


@contextmanager
def only(model: nn.Module, name: str | None) -> Iterator[None]:
    """Let functions that walk over adapters see those of one name alone, inside the block.

    A method's training hooks act on the adapters that they see: with several names on a model, call them in here.

    Args:
        model: A model with adapters.
        name: The name; None for the only one that the model has.

    Raises:
        ConfigError: No adapter has this name, or the model has several and none was given.

    Example:
        >>> from lora_lightning.adapters import attach
        >>> from lora_lightning.methods import LoRA
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> for name in ("de", "fr"):
        ...     report = attach(model, LoRA(r=1), name=name)
        >>> with only(model, "de"):
        ...     [adapter.name for _, _, adapter in iter_adapters(model)]
        ['de']
    """
    names = adapter_names(model)
    if name is None and len(names) > 1:
        raise ConfigError(f"This model has the adapters {', '.join(names)}; say which one is meant with name=.")
    if name is not None:
        check_names(model, [name])
    before = _LOOKED_AT.set(name if len(names) > 1 else _LOOKED_AT.get())
    try:
        yield
    finally:
        _LOOKED_AT.reset(before)


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's adapters, in the order of attaching; `default` for an unnamed one.

    Args:
        model: A model with adapters, or a module around or inside one.
    """
    inner = unwrap(model)
    around = [inner] if was_attached_to(inner) else inner.modules()
    names = [name for module in around if was_attached_to(module) for name in module.__dict__[RECORD].methods]
    if not names:  # a part of the model that they were attached to
        names = [adapter.name for _, _, adapter in iter_adapters(model)]
    looked_at = _LOOKED_AT.get()
    return tuple(dict.fromkeys(name for name in names if looked_at in (None, name)))


def check_names(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ConfigError where a model has no adapter of a name."""
    known = adapter_names(model)
    for name in names:
        if name not in known:
            near = nearest(str(name), known)
            found = f"its adapters are {', '.join(known)}." if known else "it has none; attach one first."
            found = f"did you mean `{near[0]}`?" if near else found
            raise ConfigError(f"This model has no adapter named {name!r}; {found}")


def is_attached(model: nn.Module) -> bool:
    """Return whether a model has adapters."""
    return any(True for _ in iter_hosts(model))


def was_attached_to(model: nn.Module) -> bool:
    """Return whether `attach` was called with this very module, and its adapters are there."""
    return RECORD in model.__dict__


def attached_methods(model: nn.Module, name: str | None = None) -> tuple[Method, ...]:
    """Return the methods that were attached to a model, in order; empty where there are none.

    Args:
        model: The model that `attach` was called with.
        name: The adapter's name; None for the methods of all.
    """
    record: Attachment | None = getattr(unwrap(model), RECORD, None)
    wanted = _LOOKED_AT.get() if name is None else name
    named = {} if record is None else record.methods
    return tuple(method for own, methods in named.items() if wanted in (None, own) for method in methods)


def iter_hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over `(path, host)` of every module that has adapters, in the model's order."""
    for path, module in unwrap(model).named_modules():
        if RESERVED in module._modules and RESERVED not in path.split(".") and _adapters_on(module):
            yield path, module


def iter_adapters(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Iterate over `(host path, host, adapter)`, in the model's order.

    Args:
        model: A model with adapters.
        name: The name of those to see; None for all.
    """
    for path, host in iter_hosts(model):
        for adapter in _adapters_on(host):
            if name in (None, adapter.name):
                yield path, host, adapter


def _adapters_on(host: nn.Module) -> list[Adapter]:
    """Return the adapters of one host that are looked at."""
    stack: Any = host._modules[RESERVED]
    looked_at = _LOOKED_AT.get()
    return [adapter for adapter in stack.of_kind(Adapter) if looked_at in (None, adapter.name)]


def adapters_of(model: nn.Module, method: Method, kind: type[A]) -> list[tuple[str, nn.Module, A]]:
    """Return `(host path, host, adapter)` of one method's adapters of one kind, in the model's order.

    What a method does during training goes to its own adapters: another one of its kind may stand in the same list.

    Raises:
        ConfigError: This method was not attached to the model, or under several names.
    """
    found = [(path, host, adapter) for path, host, adapter in iter_adapters(model) if adapter.method == method]
    names = dict.fromkeys(adapter.name for _, _, adapter in found)
    if len(names) > 1:
        raise ConfigError(
            f"This {type(method).__name__} was attached under the names {', '.join(names)}; call it inside "
            "only(model, name), which says for which of them it shall act."
        )
    if not found:
        attached = ", ".join(type(one).__name__ for one in attached_methods(model)) or "none"
        raise ConfigError(
            f"This {type(method).__name__} was not attached to the model, whose methods are: {attached}; use the very "
            "one that was attached, with all its settings."
        )
    return [(path, host, adapter) for path, host, adapter in found if isinstance(adapter, kind)]


def iter_roles(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, nn.Parameter, Role]]:
    """Iterate over `(name, parameter, role)` of all adapter parameters; names as in `adapter_state_dict`.

    Args:
        model: A model with adapters.
        name: The name of the adapters to see; None for all.
    """
    seen: set[int] = set()
    for path, _, adapter in iter_adapters(model, name):
        for own, parameter, role in adapter.named_roles():
            if id(parameter) not in seen:  # what several adapters share counts once
                seen.add(id(parameter))
                yield join(path, adapter.public_name(own)), parameter, role


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
