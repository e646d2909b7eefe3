"""Which adapters go where, and what is refused before anything is changed."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence

from torch import nn

from lora_lightning.adapters.base import DEFAULT_NAME, Adapter, ForwardAdapter, Method
from lora_lightning.adapters.calls import read_past_message
from lora_lightning.adapters.frozen import NormStatistics, base_norms
from lora_lightning.adapters.head import HeadAdapter
from lora_lightning.adapters.targets import find_modules, is_within, weights_read_past
from lora_lightning.adapters.view import ModelView
from lora_lightning.adapters.walk import (
    adapter_names,
    attached_methods,
    is_attached,
    refuse_sharded,
    was_attached_to,
)
from lora_lightning.errors import ConfigError, TargetError

_NAME = re.compile(r"[\w-]+")


def methods_of(model: object, method: object) -> tuple[Method, ...]:
    """Return what `attach` was given as a tuple of methods.

    Raises:
        TargetError: The first argument is not a module, or the second neither a method nor a list of methods.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(f"attach takes the model first and then the method; the first one is a {_kind_of(model)}.")
    if isinstance(method, Method):
        return (method,)
    methods = tuple(method) if isinstance(method, (list, tuple)) else ()
    if not methods or not all(isinstance(one, Method) for one in methods):
        raise TargetError(
            f"attach takes a method, such as LoRA(r=8), or a list of methods; got {_kind_of(method)} {method!r:.60}."
        )
    return methods


def _kind_of(given: object) -> str:
    """Return what was given in words; a class of methods wants to be called."""
    if isinstance(given, type) and issubclass(given, Method):
        name: str = given.__name__
        return f"class (write {name}() with its settings)"
    return type(given).__name__


def free_name(model: nn.Module, name: str | None) -> str:
    """Return the name to attach methods under.

    Raises:
        TargetError: The model is compiled or sharded, the name is taken, or it has adapters and no name was given.
        ConfigError: The name has characters that keys of states and file names cannot hold.
    """
    if hasattr(model, "_orig_mod"):
        raise TargetError("This model is compiled already; attach the adapters first, then call torch.compile.")
    refuse_sharded(model, "attach")
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ConfigError(f"An adapter's name consists of letters, digits, - and _, such as name='de'; got {name!r}.")
    if not is_attached(model):
        return DEFAULT_NAME if name is None else name
    names = adapter_names(model)
    if name is None:
        found = ", ".join(type(method).__name__ for method in attached_methods(model))
        raise TargetError(
            f"This model already has adapters ({found}); detach or merge them first, or give these a name "
            "(name=...) of their own beside them."
        )
    if not was_attached_to(model):
        raise TargetError("The adapters of this model were attached to a part of it; attach named ones to that part.")
    if name in names:
        raise TargetError(f"This model already has an adapter named {name!r}; detach it first, or choose another name.")
    return name


def check_combination(methods: Sequence[Method]) -> None:
    """Refuse methods of which only one can be attached."""
    providers: dict[str, Method] = {}
    for method in methods:
        if method.exclusive is None:
            continue
        other = providers.setdefault(method.exclusive, method)
        if other is not method:
            raise ConfigError(
                f"{type(other).__name__} and {type(method).__name__} both provide {method.exclusive}, of which a model "
                "takes one; attach one of them."
            )


def labels(methods: Sequence[Method]) -> list[str]:
    """Return a label for each method, which is its name unless an earlier one has it."""
    num_seen: Counter[str] = Counter()
    found = []
    for method in methods:
        num_seen[method.name] += 1
        number = num_seen[method.name]
        found.append(method.name if number == 1 else f"{method.name} {number}")
    return found


def saved_paths(view: ModelView, names: Sequence[str]) -> list[str]:
    """Return the paths of the modules to copy, without those that lie inside another one."""
    paths = find_modules(view.model, names, "modules_to_save")
    read_past = weights_read_past(view)
    for path in paths:
        if path in read_past:
            raise TargetError(read_past_message(path, read_past[path], "modules_to_save"))
    return [path for path in paths if not is_within(path, [other for other in paths if other != path])]


def norm_statistics(model: nn.Module, placed: Sequence[tuple[str, str, Adapter]]) -> list[tuple[str, str, Adapter]]:
    """Return statistics to train for each norm that is not copied as a whole."""
    copied = [path for path, _, adapter in placed if isinstance(adapter, HeadAdapter)]
    norms = [(path, norm) for path, norm in base_norms(model) if not is_within(path, copied)]
    if not norms:
        warnings.warn("train_norm_statistics: this model has no norm with running statistics.", stacklevel=3)
    return [(path, "norm_statistics", NormStatistics(norm)) for path, norm in norms]


def check_placement(model: nn.Module, placed: Sequence[tuple[str, str, Adapter]]) -> None:
    """Refuse hosts that two methods claim, that lie inside a copied module, or whose forward is not their class's."""
    copied = [path for path, _, adapter in placed if isinstance(adapter, HeadAdapter)]
    claimed: dict[str, str] = {}
    for path, name, adapter in placed:
        host = model.get_submodule(path)
        slot = "the forward" if isinstance(adapter, ForwardAdapter) else name
        other = claimed.setdefault(f"{path}:{slot}", name)
        if other != name:
            raise TargetError(
                f"{other} and {name} both want to compute the forward of {path!r}; give them different targets."
            )
        if is_within(path, [copy for copy in copied if copy != path]):
            raise TargetError(
                f"{path!r} lies inside a module that is trained as a full copy; take it out of the targets."
            )
        if isinstance(adapter, ForwardAdapter) and "forward" in host.__dict__:
            raise TargetError(
                f"The forward of {path!r} was replaced on the instance (offloading with a device_map does that), so an "
                "adapter there would never be called; load the model without it."
            )
    if len(claimed) < len(placed):
        raise TargetError("The same method is given twice for one module; give each its own target_modules.")
