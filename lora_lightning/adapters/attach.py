"""Hang adapters on a model, take them off again, and iterate over them; `adapters/host.py` does it to one host."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import nn

from lora_lightning.adapters.base import (
    Adapter,
    AttentionAdapter,
    ForwardAdapter,
    Method,
    Role,
)
from lora_lightning.adapters.calls import (
    called_adapters,
    end_watch,
    left_out,
    read_past_message,
    refuse_idle,
    watch_first_calls,
)
from lora_lightning.adapters.frozen import NormStatistics, base_norms, freeze_norms, release_modes
from lora_lightning.adapters.head import HeadAdapter
from lora_lightning.adapters.host import hang, no_op_hook, unhang
from lora_lightning.adapters.selection.checkpointing import follow_selection, unfollow_selection
from lora_lightning.adapters.selection.compiling import watch
from lora_lightning.adapters.selection.state import Selector, synchronize
from lora_lightning.adapters.sharded import is_sharded
from lora_lightning.adapters.targets import find_modules, is_within, weights_read_past
from lora_lightning.adapters.view import ModelView, PlainView
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.errors import ConfigError, TargetError

__all__ = ["detach"]

_RECORD = "_lora_lightning_attachment"
COPIES = "modules_to_save"
"""The name by which a selection chooses the trained copies of modules."""

A = TypeVar("A", bound=Adapter)


@dataclass(frozen=True)
class AttachReport:
    """What adapters a model has.

    Args:
        num_trainable: Elements of all trainable adapter parameters.
        num_total: Elements of the base model's parameters (packed ones as stored) plus the adapters'.
        hosts: Paths of the adapted modules, in the model's order.
    """

    num_trainable: int
    num_total: int
    hosts: tuple[str, ...]

    @property
    def trainable_share(self) -> float:
        """Share of trainable elements among all, between 0 and 1."""
        return self.num_trainable / max(self.num_total, 1)


@dataclass
class _Attachment:
    """What `detach` needs to undo an `attach`, and what others ask about it; plain data, kept on the model."""

    methods: tuple[Method, ...]
    was_trainable: list[str] = field(default_factory=list)
    nested_encoders: list[str] = field(default_factory=list)
    unroute: Callable[[nn.Module], None] | None = None


def attach(
    model: nn.Module,
    method: Method | Sequence[Method],
    view: ModelView | None = None,
    *,
    modules_to_save: Sequence[str] = (),
    train_norm_statistics: bool = False,
) -> AttachReport:
    """Freeze a model and hang the adapters of one or several methods on it.

    Everything is checked and built before the first change, so an error leaves the model as it was. Adapter
    parameters are float32 (float64 on a float64 host). The base parameters keep their names: `model.state_dict()`
    without adapter keys is the base model's. Norms with running statistics compute with the stored ones in training
    mode too, so that neither parameters nor persistent buffers of the base move.

    The first training batch is watched: an adapter that it does not call raises AdapterNotCalled, a weight that is read
    without its module a TargetError.

    Args:
        model: Any module; changed in place.
        method: The method, or a list of methods, to attach.
        view: What methods may ask of the model; None for a plain torch module.
        modules_to_save: Names (path suffixes) of modules to train as full copies, beside the methods' own.
        train_norm_statistics: Compute with batch statistics in training mode, and let the running ones move: in copies
            that belong to the adapters' state, so that `disabled` and `detach` give the base's.

    Returns:
        How many parameters train, and on which hosts.

    Raises:
        TargetError: The model has adapters already, nothing fits, or two methods want the same host's forward.
        ConfigError: A setting does not fit this model, such as a rank larger than a layer allows, or two methods
            exclude each other.

    Example:
        >>> from lora_lightning.methods import LoRA
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> attach(model, LoRA(r=2, target_modules=["0"])).num_trainable
        32
    """
    methods = (method,) if isinstance(method, Method) else tuple(method)
    _refuse_reattach(model, methods)
    _check_combination(methods)
    view = view or PlainView(model)
    placed: list[tuple[str, str, Adapter]] = []
    saved = list(dict.fromkeys([*modules_to_save, *(name for one in methods for name in one.modules_to_save or [])]))
    if saved:
        placed += [(path, "head", HeadAdapter(model.get_submodule(path))) for path in _saved_paths(view, saved)]
    if train_norm_statistics:
        placed += _norm_statistics(model, placed)
    for _, _, copied in placed:
        copied.selected_as = COPIES
    # After the copies, so that merging a delta adds to what a copy leaves.
    for one, selected_as in zip(methods, _selection_names(methods), strict=True):
        informed = replace(one, modules_to_save=saved or None)  # all-linear leaves out what anybody copies
        for path, adapter in informed.adapters(view):
            adapter.method, adapter.selected_as = one, selected_as
            placed.append((path, one.name, adapter))
    _check_placement(model, placed)

    named = model.named_parameters(remove_duplicate=False)  # each name of a tied weight, which merging may untie
    record = _Attachment(methods, [name for name, parameter in named if parameter.requires_grad])
    model.requires_grad_(requires_grad=False)
    selector = Selector()
    for path, name, adapter in placed:
        hang(model.get_submodule(path), name, adapter, selector, path)
    follow_selection(model)
    watch(synchronize)
    _turn_off_fast_paths(model, [path for path, _, _ in placed], record)
    if any(isinstance(adapter, AttentionAdapter) for _, _, adapter in placed):
        record.unroute = view.route_attention()
    setattr(model, _RECORD, record)
    try:
        freeze_norms(model)  # last, so that their class lies above the adapters'
    except TargetError:
        detach(model)
        raise
    watch_first_calls(model)
    return report_of(model)


def report_of(model: nn.Module) -> AttachReport:
    """Return how many parameters of an adapted model train, and on which hosts, as it is now.

    Methods that look at data, or load a state, may have changed what `attach` made.
    """
    own = [parameter for _, parameter, _ in iter_roles(model)]
    return AttachReport(
        num_trainable=sum(parameter.numel() for parameter in own if parameter.requires_grad),
        num_total=sum(parameter.numel() for parameter in model.parameters()),
        hosts=tuple(path for path, _ in iter_hosts(model)),
    )


def detach(model: nn.Module) -> None:
    """Take all adapters off a model, which is then exactly as before `attach`, `requires_grad` included.

    Raises:
        TargetError: The model is sharded.
    """
    refuse_sharded(model, "detach")
    release_modes(unwrap(model))
    for _, host in list(iter_hosts(model)):
        unhang(host)
    unfollow_selection(unwrap(model))
    for module in unwrap(model).modules():  # adapters may have been attached to a part of the model
        record: _Attachment | None = module.__dict__.pop(_RECORD, None)
        if record is None:
            continue
        end_watch(module)
        if record.unroute is not None:
            record.unroute(module)
        for name in record.was_trainable:
            module.get_parameter(name).requires_grad_()
        for path in record.nested_encoders:
            module.get_submodule(path).use_nested_tensor = True  # type: ignore[assignment]  # an nn.TransformerEncoder


def is_attached(model: nn.Module) -> bool:
    """Tell whether a model has adapters."""
    return any(True for _ in iter_hosts(model))


def was_attached_to(model: nn.Module) -> bool:
    """Return whether `attach` was called with this very module, and its adapters are there."""
    return _RECORD in model.__dict__


def attached_methods(model: nn.Module) -> tuple[Method, ...]:
    """Return the methods that were attached to a model, in order; empty where there are none."""
    record: _Attachment | None = getattr(unwrap(model), _RECORD, None)
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


@contextmanager
def require_calls(model: nn.Module, *, of_all: bool = True) -> Iterator[None]:
    """Check that every adapter is called at least once inside the `with` block.

    Args:
        model: A model with adapters.
        of_all: False excepts layers that a model in training drops at random (LayerDrop).

    Raises:
        AdapterNotCalled: Some were not; the message names their hosts.
    """
    adapters = [(path, adapter) for path, _, adapter in iter_adapters(model) if not adapter.may_rest]
    with called_adapters([adapter for _, adapter in adapters]) as called:
        yield
    idle = [path for path, adapter in adapters if id(adapter) not in called]
    if not of_all:
        excepted = left_out(unwrap(model), idle, {path for path, adapter in adapters if id(adapter) in called})
        idle = [path for path in idle if path not in excepted]
    refuse_idle(idle, len(adapters))


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


def _refuse_reattach(model: nn.Module, methods: tuple[Method, ...]) -> None:
    if not methods or not all(isinstance(method, Method) for method in methods):
        raise TargetError(f"attach takes a method, such as LoRA(r=8), or a list of methods; got {methods!r}.")
    if hasattr(model, "_orig_mod"):
        raise TargetError("This model is compiled already; attach the adapters first, then call torch.compile.")
    if is_attached(model):
        names = ", ".join(type(method).__name__ for method in attached_methods(model))
        raise TargetError(f"This model already has adapters ({names}); detach or merge them first.")
    refuse_sharded(model, "attach")


def _check_combination(methods: Sequence[Method]) -> None:
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


def _selection_names(methods: Sequence[Method]) -> list[str]:
    """Return a name for each method, which is its own unless an earlier one has it."""
    num_seen: Counter[str] = Counter()
    names = []
    for method in methods:
        num_seen[method.name] += 1
        number = num_seen[method.name]
        names.append(method.name if number == 1 else f"{method.name} {number}")
    return names


def _saved_paths(view: ModelView, names: Sequence[str]) -> list[str]:
    """Return the paths of the modules to copy, without those that lie inside another one."""
    paths = find_modules(view.model, names, "modules_to_save")
    read_past = weights_read_past(view)
    for path in paths:
        if path in read_past:
            raise TargetError(read_past_message(path, read_past[path], "modules_to_save"))
    return [path for path in paths if not is_within(path, [other for other in paths if other != path])]


def _norm_statistics(model: nn.Module, placed: Sequence[tuple[str, str, Adapter]]) -> list[tuple[str, str, Adapter]]:
    """Return statistics to train for each norm that is not copied as a whole."""
    copied = [path for path, _, adapter in placed if isinstance(adapter, HeadAdapter)]
    norms = [(path, norm) for path, norm in base_norms(model) if not is_within(path, copied)]
    if not norms:
        warnings.warn("train_norm_statistics: this model has no norm with running statistics.", stacklevel=3)
    return [(path, "norm_statistics", NormStatistics(norm)) for path, norm in norms]


def _check_placement(model: nn.Module, placed: Sequence[tuple[str, str, Adapter]]) -> None:
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


def _turn_off_fast_paths(model: nn.Module, paths: Sequence[str], record: _Attachment) -> None:
    """Make torch's own transformer layers call their linear layers in eval mode too.

    `nn.TransformerEncoderLayer` reads `linear1.weight` directly unless a module inside it has a hook;
    `nn.TransformerEncoder` packs padded batches into nested tensors, which only that fast path understands.
    """
    for path, module in model.named_modules():
        inside = [host for host in paths if is_within(host, [path]) or not path]
        if isinstance(module, nn.TransformerEncoderLayer):
            for host in inside:
                model.get_submodule(host).register_forward_pre_hook(no_op_hook)
        if isinstance(module, nn.TransformerEncoder) and inside and module.use_nested_tensor:
            module.use_nested_tensor = False
            record.nested_encoders.append(path)
