"""Which modules a forward pass calls, and which parameters it reads without calling the module that owns them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_lightning.adapters.base import Adapter
from lora_lightning.errors import AdapterNotCalled

_LAYER_DROPS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "layer_drop")
# Asks a parameter for its gradient, and reads none of its values, though it returns a tensor.
_GET_GRADIENT: Any = vars(torch._C.TensorBase)["grad"].__get__


class Calls:
    """What `watch` sees.

    Attributes:
        called: The modules that were called, by identity.
        read_past: Names of the parameters, by the identity of the module that owns them, that were read while no module
            that owns them was running.
    """

    def __init__(self) -> None:
        self.called: set[int] = set()
        self.running: Counter[int] = Counter()
        self.read_past: dict[int, set[str]] = {}


class _Reads(TorchFunctionMode):
    """Notes the parameters that torch's functions get while none of their owners runs.

    Args:
        owners: By the identity of a parameter, the modules that hold it with its name there.
        calls: Where to note it.
    """

    def __init__(self, owners: Mapping[int, list[tuple[int, str]]], calls: Calls) -> None:
        super().__init__()
        self.owners, self.calls = owners, calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's own signature
        """Call the function; a parameter among its arguments is read if a tensor comes out (`weight.dtype` is not)."""
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func != _GET_GRADIENT and _has_tensor(result):
            for value in _flat((*args, *kwargs.values())):
                self._note(value)
        return result

    def _note(self, value: object) -> None:
        owners = self.owners.get(id(value), ())
        if not any(self.calls.running[owner] for owner, _ in owners):
            for owner, name in owners:
                self.calls.read_past.setdefault(owner, set()).add(name)


def _has_tensor(result: object) -> bool:
    return any(isinstance(one, Tensor) for one in _flat([result]))


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Iterate over arguments, and over what stands in lists of tensors, as `torch.cat` takes them."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


@contextmanager
def watch(model: nn.Module, modules: Iterable[nn.Module], *, reads: bool = True) -> Iterator[Calls]:
    """Watch calls of some of a model's modules inside the `with` block, and reads of their parameters past them.

    A call counts by `forward` itself, so that `layer.forward(x)` is one too.

    Args:
        model: The model; in it, modules that share a parameter by a tie all count as its owners.
        modules: The modules to watch.
        reads: Whether to watch reads.

    Yields:
        What was seen so far.
    """
    calls, watched = Calls(), list(dict.fromkeys(modules))
    calls.called.add(id(model))  # the block is its call
    calls.running[id(model)] += 1
    owners: dict[int, list[tuple[int, str]]] = {
        id(parameter): [] for module in watched for parameter in module._parameters.values() if parameter is not None
    }
    holders = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in owners:
                owners[id(parameter)].append((id(module), name))
                holders.append(module)
    with _counted(dict.fromkeys([*watched, *holders]), calls):
        if not reads:
            yield calls
            return
        with _Reads(owners, calls):
            yield calls


@contextmanager
def _counted(modules: Iterable[nn.Module], calls: Calls) -> Iterator[None]:
    """Have each call of the modules counted, by a `forward` of their own for the time being."""
    wrapped: list[tuple[nn.Module, Any]] = []
    try:
        for module in modules:
            if not isinstance(module, torch.jit.ScriptModule):
                wrapped.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = _counting(module.forward, id(module), calls)
        yield
    finally:
        for module, before in wrapped:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def _counting(forward: Callable[..., Any], module: int, calls: Calls) -> Callable[..., Any]:
    @functools.wraps(forward)
    def counting(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the module's own signature
        calls.called.add(module)
        calls.running[module] += 1
        try:
            return forward(*args, **kwargs)
        finally:
            calls.running[module] -= 1

    return counting


@contextmanager
def called_adapters(adapters: Iterable[Adapter]) -> Iterator[set[int]]:
    """Collect the adapters that are called inside the `with` block, by identity."""
    called: set[int] = set()
    handles = [adapter.register_forward_pre_hook(lambda module, _: called.add(id(module))) for adapter in adapters]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def left_out(model: nn.Module, idle: Iterable[str], called: Collection[str]) -> set[str]:
    """Return those of the idle hosts that lie in layers dropped at random, as in BART and wav2vec 2.0.

    Another batch calls them. No such reason is known for anything else that one batch does not call.

    Args:
        model: The model.
        idle: Paths of hosts that were not called.
        called: Paths of hosts that were.
    """
    if not model.training or not any(_drops_layers(module) for module in model.modules()):
        return set()
    return {path for path in idle if any(_skips(model, item, called) for item in _with_ancestors(path))}


def _drops_layers(module: nn.Module) -> bool:
    """Return whether a module, or its config, has a probability of dropping layers."""
    sources = (module, getattr(module, "config", None))
    rates = [getattr(source, name, None) for source in sources for name in _LAYER_DROPS]
    return any(isinstance(rate, float | int) and rate > 0 for rate in rates)


def _skips(model: nn.Module, item: str, called: Collection[str]) -> bool:
    """Return whether a module is an item of a list that called others of its items, and not this one."""
    parent, _, _ = item.rpartition(".")
    if not isinstance(model.get_submodule(parent), nn.ModuleList):
        return False
    siblings = [path for path in called if path.startswith(f"{parent}." if parent else "")]
    return bool(siblings) and not any(f"{path}.".startswith(f"{item}.") for path in siblings)


def _with_ancestors(path: str) -> Iterator[str]:
    parts = path.split(".") if path else []
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])


def refuse_idle(idle: list[str], total: int) -> None:
    """Raise AdapterNotCalled where some of `total` adapters, at the paths `idle`, were not called."""
    if idle:
        raise AdapterNotCalled(idle_message(idle, total))


def idle_message(idle: list[str], total: int) -> str:
    """Say which adapters were not called."""
    return (
        f"{len(idle)} of {total} adapters were not called in a forward pass, the first at "
        f"{', '.join(map(repr, idle[:3]))}: the model does not run these modules, or reads their weights directly. "
        "Leave them out with exclude_modules."
    )


def read_past_message(path: str, name: str, setting: str) -> str:
    """Say that a weight is read without its module."""
    return (
        f"The model reads {name!r} of {path!r} without calling this module, so an adapter there would not act wherever "
        f"the weight is used. Leave it out of {setting}."
    )


def is_container(module: nn.Module) -> bool:
    """Return whether a module has no forward of its own and only holds others, as `nn.ModuleList` does.

    Example:
        >>> is_container(nn.ModuleList()), is_container(nn.Sequential())
        (True, False)
    """
    return type(module).forward is nn.Module.forward and "forward" not in module.__dict__
