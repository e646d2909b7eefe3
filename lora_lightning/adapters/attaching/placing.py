"""Which adapters go where, and what is refused before anything is changed."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

from torch import nn

from lora_lightning.adapters.base import Adapter, ForwardAdapter, Method
from lora_lightning.adapters.calls import read_past_message
from lora_lightning.adapters.frozen import NormStatistics, base_norms
from lora_lightning.adapters.head import HeadAdapter
from lora_lightning.adapters.targets import find_modules, is_within, weights_read_past
from lora_lightning.adapters.view import ModelView
from lora_lightning.adapters.walk import attached_methods, is_attached, refuse_sharded
from lora_lightning.errors import ConfigError, TargetError


def refuse_reattach(model: nn.Module, methods: tuple[Method, ...]) -> None:
    """Refuse what is no method, a compiled or sharded model, and one that has adapters."""
    if not methods or not all(isinstance(method, Method) for method in methods):
        raise TargetError(f"attach takes a method, such as LoRA(r=8), or a list of methods; got {methods!r}.")
    if hasattr(model, "_orig_mod"):
        raise TargetError("This model is compiled already; attach the adapters first, then call torch.compile.")
    if is_attached(model):
        names = ", ".join(type(method).__name__ for method in attached_methods(model))
        raise TargetError(f"This model already has adapters ({names}); detach or merge them first.")
    refuse_sharded(model, "attach")


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


def selection_names(methods: Sequence[Method]) -> list[str]:
    """Return a name for each method, which is its own unless an earlier one has it."""
    num_seen: Counter[str] = Counter()
    names = []
    for method in methods:
        num_seen[method.name] += 1
        number = num_seen[method.name]
        names.append(method.name if number == 1 else f"{method.name} {number}")
    return names


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
