"""Norms with running statistics: frozen with the base, or trained as an adapter's own copy of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import nn

from lora_lightning.adapters.base import ForwardAdapter, Role
from lora_lightning.adapters.frozen.copies import copied
from lora_lightning.adapters.host import _Adapted, _adapted_class, unhang
from lora_lightning.adapters.weights import RESERVED, original_class
from lora_lightning.errors import TargetError

_MODE = "_lora_lightning_mode"
_FROZEN_CLASSES: dict[type[Any], type[Any]] = {}


def has_statistics(module: nn.Module) -> bool:
    """Return whether a module keeps running statistics, which its forward moves in training.

    By its buffers, not its class: torch's batch and instance norms, `SyncBatchNorm`, timm's norms with an activation,
    and hand-written ones share `running_mean` and `running_var`.

    Example:
        >>> has_statistics(nn.BatchNorm2d(4)), has_statistics(nn.InstanceNorm2d(4)), has_statistics(nn.LayerNorm(4))
        (True, False, False)
    """
    buffers = module._buffers
    return buffers.get("running_mean") is not None and buffers.get("running_var") is not None


def base_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over `(path, module)` of the norms with statistics that belong to the base model."""
    for path, module in model.named_modules():
        if RESERVED not in path.split(".") and has_statistics(module):
            yield path, module


def freeze_norms(model: nn.Module) -> None:
    """Make the base's norms compute with their stored statistics in training mode too, and leave these alone."""
    for path, module in list(base_norms(model)):
        keep_evaluating(path, module)


def keep_evaluating(path: str, module: nn.Module) -> None:
    """Hold one module in evaluation mode, whatever mode the model around it is put in; its children follow the model.

    Raises:
        TargetError: The module's class cannot be replaced.
    """
    if isinstance(module, _Frozen):
        return
    mode = module.training
    try:
        module.__class__ = _frozen_class(type(module))
    except TypeError as error:
        raise TargetError(
            f"The statistics of {path!r} cannot be frozen: its class, {type(module).__name__}, allows no subclass. "
            "Replace it by a norm of torch, or call it in evaluation mode yourself."
        ) from error
    module.__dict__[_MODE] = mode
    module.training = False


def release_modes(model: nn.Module) -> None:
    """Undo `keep_evaluating` in a whole model: its modules are in the mode that the model was put in last."""
    for module in model.modules():
        if isinstance(module, _Frozen):
            module.training = module.__dict__.pop(_MODE)
            module.__class__ = module.released_class


def bare_copy(host: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a module without the adapters on it and in it, and with norms that follow its mode.

    Args:
        host: The module, which stays as it is.
        memo: What the copy shares, by `id`, as `copy.deepcopy` takes it.
    """
    bare = copied(host, memo)
    release_modes(bare)
    for module in list(bare.modules()):
        if RESERVED in module._modules:
            unhang(module)
    return bare


def stays_evaluating(module: nn.Module) -> bool:
    """Return whether `keep_evaluating` holds a module."""
    return isinstance(module, _Frozen)


class _Frozen:
    """Mixed into the class of a module that stays in evaluation mode."""

    released_class: type[Any]
    """The class without this."""

    def train(self: Any, mode: bool = True) -> Any:  # noqa: ANN401 - the module itself, mixed in
        """Put the children in a mode, and remember it for `release_modes`."""
        super().train(mode)  # type: ignore[misc]  # nn.Module's, mixed in
        self.__dict__[_MODE] = mode
        self.training = False
        return self

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: ANN401 - object's own signature
        """Pickle and copy through the original class, since this one has no importable name."""
        del protocol
        is_adapted = isinstance(self, _Adapted)
        cls = original_class(self) if is_adapted else self.released_class
        return _new_frozen, (cls, is_adapted), self.__dict__


def _frozen_class(cls: type[Any]) -> type[Any]:
    """Return the one class of frozen modules of `cls`, under the names by which transformers looks classes up."""
    if cls not in _FROZEN_CLASSES:
        members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "released_class": cls}
        _FROZEN_CLASSES[cls] = type(f"Frozen{cls.__name__}", (_Frozen, cls), members)
    return _FROZEN_CLASSES[cls]


def _new_frozen(cls: type[Any], is_adapted: bool) -> Any:  # noqa: ANN401 - a module of that class
    frozen: Any = _frozen_class(_adapted_class(cls) if is_adapted else cls)
    return frozen.__new__(frozen)


class NormStatistics(ForwardAdapter):
    """Statistics of one norm that move in training, in place of the frozen ones.

    Weight and bias stay the base's: the copy reads them from its host.

    Args:
        host: The norm.

    Attributes:
        module: The norm as it is called, with buffers of its own and no parameters.
    """

    takes_names: ClassVar[bool] = True

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        shared = {id(parameter): parameter for parameter in host.parameters()}
        self.module = bare_copy(host, memo=dict(shared))  # copies buffers alone
        self.lent = [(path, name) for path, inner in self.module.named_modules() for name in inner._parameters]
        self.borrow(host)

    def borrow(self, host: nn.Module) -> None:
        """Let the copy read its host's parameters, as plain attributes: they are neither its state nor its own."""
        for path, name in self.lent:
            own, parameter = self.module.get_submodule(path), host.get_submodule(path)._parameters[name]
            own._parameters.pop(name, None)
            if name not in own.__dict__ or own.__dict__[name] is not parameter:
                own.__dict__[name] = parameter

    def named_roles(self) -> Iterator[tuple[str, nn.Parameter, Role]]:
        """Iterate over nothing: the parameters are the base's."""
        return iter(())

    def public_name(self, name: str) -> str:
        """Return the name of a buffer as the host itself has it."""
        return name.removeprefix("module.")

    def why_not_mixed(self, host: nn.Module) -> str:
        """Refuse in training mode, in which the norm looks at all rows of a batch."""
        del host
        return "a norm computes with the statistics of the whole batch" if self.training else ""

    def check_mergeable(self, host: nn.Module) -> None:
        """Accept any norm: its statistics are simply replaced."""
        del host

    def merge_into(self, host: nn.Module) -> None:
        """Write the statistics into the host's buffers."""
        for name, tensor in self.module.state_dict().items():
            host.get_buffer(name).copy_(tensor)

    def forward(self, host: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the host's own signature
        """Call the copy with the host's parameters."""
        self.borrow(host)
        return self.module(*args, **kwargs)


def trains_statistics(model: nn.Module) -> bool:
    """Return whether a model was attached to with `train_norm_statistics`."""
    return any(isinstance(module, NormStatistics) for module in model.modules())


def restore_after_conversion(model: nn.Module) -> None:
    """Freeze and adapt norms again that were replaced after `attach`, as `convert_sync_batchnorm` does.

    Such a conversion builds new modules with the same children, the reserved one included, so that adapters are there
    and not called.
    """
    for _, module in list(base_norms(model)):
        stack: Any = module._modules.get(RESERVED)
        if stack is not None and stack.of_kind(ForwardAdapter) and not isinstance(module, _Adapted):
            stack.host_class = type(module)
            for adapter in stack.of_kind(ForwardAdapter):
                adapter.host_class = type(module)
            module.__class__ = _adapted_class(type(module))
    freeze_norms(model)
