"""How the adapters of one host are entered, through a class of its own or hooks; nothing else changes a host module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from torch import nn

from lora_lightning.adapters.arguments import argument_names, by_position
from lora_lightning.adapters.base import DEFAULT_NAME, Adapter, ForwardAdapter, InputAdapter, OutputAdapter
from lora_lightning.adapters.selection.mixing import mixed_forward, mixed_input, mixed_output, sum_forward
from lora_lightning.adapters.selection.state import Names, Selector
from lora_lightning.adapters.weights import RESERVED

A = TypeVar("A", bound=Adapter)

_ADAPTED_CLASSES: dict[type[Any], type[Any]] = {}


def stack_key(name: str, method: str) -> str:
    """Return the key of an adapter on its host: the method's name for an unnamed one, else both names.

    Example:
        >>> stack_key("default", "lora"), stack_key("de", "lora")
        ('lora', 'de:lora')
    """
    return method if name == DEFAULT_NAME else f"{name}:{method}"


class AdapterStack(nn.ModuleDict):
    """The adapters of one host, by `stack_key`.

    Args:
        host_class: Class of the host before it was adapted.
        selector: Tells which adapters act; all hosts of one attachment share it.
        path: The host's path in the model when its adapters were attached.
    """

    def __init__(self, host_class: type[nn.Module], selector: Selector, path: str) -> None:
        super().__init__()
        self.host_class, self.selector, self.path = host_class, selector, path
        selector.num_hosts += 1

    def forward(self, x: Any) -> Any:  # noqa: ANN401 - whatever the host's children hand on
        """Return the input: a host that is an `nn.Sequential` calls each of its children in turn, this one too."""
        return x

    def of_kind(self, kind: type[A]) -> list[A]:
        """Return the adapters of one kind, in the order of attaching."""
        return [adapter for adapter in self._modules.values() if isinstance(adapter, kind)]

    def acting(self, kind: type[A]) -> list[A]:
        """Return those of one kind that act in the running thread or task, in the order of attaching."""
        names, _ = self.selector.at(self.path)
        return self.chosen(kind, names)

    def chosen(self, kind: type[A], names: Names) -> list[A]:
        """Return those of one kind that a selection chooses, in the order of attaching."""
        if names is None:
            return self.of_kind(kind)
        return [adapter for adapter in self.of_kind(kind) if _is_among(adapter, names)]


def _is_among(adapter: Adapter, names: tuple[str, ...]) -> bool:
    """Return whether a selection chooses an adapter: by its name, by its method within that, or because it always acts.

    Args:
        adapter: The adapter.
        names: What is selected.
    """
    return not adapter.selected_as or adapter.selected_by_name in names or adapter.selected_as in names


class _Adapted:
    """Mixed into a host's class, whose forward then goes to the host's adapter (see `_entrance`)."""

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401 - object's own signature
        """Pickle and copy through the host's class, since an adapted class has no importable name."""
        return _new_adapted, (self._modules[RESERVED].host_class,), self.__dict__  # type: ignore[attr-defined]  # mixed in


def _adapted_class(host_class: type[nn.Module]) -> type[nn.Module]:
    """Return the one class of adapted hosts of `host_class`, under the names by which transformers looks classes up."""
    if host_class not in _ADAPTED_CLASSES:
        alike = {"__module__": host_class.__module__, "__qualname__": host_class.__qualname__}
        members = {**alike, "forward": _entrance(host_class)}
        _ADAPTED_CLASSES[host_class] = type(f"Adapted{host_class.__name__}", (_Adapted, host_class), members)
    return _ADAPTED_CLASSES[host_class]


def _entrance(host_class: type[nn.Module]) -> Callable[..., Any]:
    """Return a forward that hands over to the host's adapter, with the signature of the host's: callers inspect it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the host's own signature
        """Compute the host's forward with its adapter, or without it where that does not act."""
        stack: AdapterStack = self._modules[RESERVED]
        names, rows = stack.selector.at(stack.path)
        acting = stack.chosen(ForwardAdapter, names)
        if not acting:
            return stack.host_class.forward(self, *args, **kwargs)
        adapter = acting[0]
        if rows is not None:
            return mixed_forward(self, stack, rows, acting, (args, kwargs))
        if len(acting) > 1:
            return sum_forward(self, acting, args, kwargs)
        if kwargs and not adapter.takes_names:
            args, kwargs = by_position(adapter.argument_names, args, kwargs)
        return adapter(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(host_class.forward)  # type: ignore[attr-defined]  # what inspect asks for
    return forward


def _new_adapted(host_class: type[Any]) -> nn.Module:
    cls = _adapted_class(host_class)
    return cls.__new__(cls)


def _input_hook(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    stack: Any = host._modules[RESERVED]
    names, rows = stack.selector.at(stack.path)
    acting = stack.chosen(InputAdapter, names)
    if acting and rows is not None:
        return mixed_input(host, stack, rows, acting, (args, kwargs))
    for adapter in acting:
        args, kwargs = adapter(host, args, kwargs)
    return args, kwargs


def _output_hook(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ANN401 - what the host returns
    stack: Any = host._modules[RESERVED]
    names, rows = stack.selector.at(stack.path)
    acting = stack.chosen(OutputAdapter, names)
    if acting and rows is not None:
        return mixed_output(host, stack, rows, acting, (args, kwargs), output)
    for adapter in acting:
        output = adapter(host, args, kwargs, output)
    return output


def no_op_hook(host: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing: its presence turns off the fast path of `nn.TransformerEncoderLayer`, which skips its layers."""


_HOOKS: dict[type[Adapter], Callable[..., Any]] = {InputAdapter: _input_hook, OutputAdapter: _output_hook}


def hang(host: nn.Module, key: str, adapter: Adapter, selector: Selector, path: str) -> None:
    """Make an adapter a child of its host and have it called where it is selected.

    Args:
        host: The module.
        key: The adapter's key there, see `stack_key`.
        adapter: The adapter.
        selector: Of the attachment.
        path: The host's path in the model.
    """
    stack = host._modules.get(RESERVED)
    if stack is None:
        stack = AdapterStack(type(host), selector, path)
        host.add_module(RESERVED, stack)
    assert isinstance(stack, AdapterStack)
    adapter.host_class = stack.host_class
    adapter.argument_names = argument_names(stack.host_class)
    adapter.train(host.training)
    stack[key] = adapter
    if isinstance(adapter, ForwardAdapter):
        host.__class__ = _adapted_class(stack.host_class)
    elif isinstance(adapter, InputAdapter) and _input_hook not in host._forward_pre_hooks.values():
        host.register_forward_pre_hook(_input_hook, with_kwargs=True)
    elif isinstance(adapter, OutputAdapter) and _output_hook not in host._forward_hooks.values():
        host.register_forward_hook(_output_hook, with_kwargs=True)


def unhang(host: nn.Module, keys: Collection[str] | None = None) -> None:
    """Take adapters off a host; it is then as it was before they came.

    Args:
        host: The module.
        keys: Keys of the adapters; None for all.
    """
    stack = host._modules[RESERVED]
    assert isinstance(stack, AdapterStack)
    for key in list(stack) if keys is None else keys:
        del stack[key]
    if isinstance(host, _Adapted) and not stack.of_kind(ForwardAdapter):
        host.__class__ = stack.host_class  # type: ignore[assignment]  # the class it had before
    unused = {_HOOKS[kind] for kind in _HOOKS if not stack.of_kind(kind)}
    if not len(stack):
        host._modules.pop(RESERVED)
        stack.selector.num_hosts -= 1
        unused.add(no_op_hook)
    # By identity, not by handle: handles do not survive deepcopy and pickle, these module-level functions do.
    for hooks, flags in (
        (host._forward_pre_hooks, host._forward_pre_hooks_with_kwargs),
        (host._forward_hooks, host._forward_hooks_with_kwargs),
    ):
        for handle in [handle for handle, hook in hooks.items() if hook in unused]:
            del hooks[handle]
            flags.pop(handle, None)
