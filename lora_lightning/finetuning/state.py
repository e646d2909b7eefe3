"""What a checkpoint keeps of a fine-tuned LightningModule, and how it becomes a whole state again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters.walk import join
from lora_lightning.checkpoint.folder import check_finite
from lora_lightning.errors import CheckpointError
from lora_lightning.finetuning.digests import checksum
from lora_lightning.finetuning.names import Names, is_of_adapter, names_of
from lora_lightning.finetuning.record import attached_parts, record_of


def reduced(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint keeps of a module's whole state.

    These are the adapters (under the names of `adapter_state_dict`, behind the submodule's path), and everything of the
    module's own: what trains, its buffers, and frozen tensors that its code has changed. A state that is reduced
    already stays as it is.

    Args:
        module: A module with adapted parts.
        state: What its `state_dict` returned, or that of a copy of it.
    """
    names = names_of(module)
    dropped = names.base - _kept(module, names)
    kept: dict[str, Any] = {}
    if not any(map(is_of_adapter, state)):
        return dict(state)
    for name, value in state.items():
        if name in names.public:
            kept.setdefault(names.public[name], value)
        elif name not in dropped:
            kept[name] = value
    return kept


def expanded(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a whole state from one that `reduced` returned: frozen tensors are filled in with the module's own.

    Nothing else is filled in, so that loading stays strict. A whole state stays as it is.

    Args:
        module: A module with adapted parts.
        state: What a checkpoint holds.

    Raises:
        CheckpointError: An adapter tensor is NaN or infinite.
    """
    if any(map(is_of_adapter, state)):
        return dict(state)
    _fit_structure(module, state)
    names = names_of(module)
    shown = set(names.public.values())
    whole = {own: state[public] for own, public in names.public.items() if public in state}
    check_finite(whole, "The checkpoint")
    whole |= {name: value for name, value in state.items() if name not in shown}
    record = record_of(module)
    assert record is not None
    may_fill = names.inside | record.frozen.keys()
    own_state = module.state_dict()
    whole |= {name: value for name, value in own_state.items() if name in may_fill and name not in whole}
    return whole


def own_state(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what a reduced state holds beside the adapters.

    Args:
        module: A module with adapted parts.
        state: What `reduced` returned.
    """
    adapters = set(names_of(module).public.values())
    return {name: value for name, value in state.items() if name not in adapters and isinstance(value, Tensor)}


def note_kept(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Remember which frozen tensors a checkpoint holds: the next checkpoint must hold them too."""
    record = record_of(module)
    if record is None or any(map(is_of_adapter, state)):
        return
    names = names_of(module)
    record.kept |= (names.base & state.keys()) - set(names.public.values())


def note_start(module: nn.Module) -> None:
    """Take checksums of the frozen tensors that training code may change by itself: averaged teachers, counters."""
    record = record_of(module)
    if record is not None and record.at_start is None:
        record.at_start = _checksums(module, names_of(module))


def check_loadable(module: nn.Module, state: Mapping[str, Any], *, strict: bool) -> tuple[list[str], list[str]]:
    """Return which names a whole state lacks and which the module does not know.

    Raises:
        CheckpointError: There are some and `strict` is set, or an adapter tensor has another shape.
    """
    own = module.state_dict()
    shown = names_of(module).public
    missing = [shown.get(name, name) for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    if strict and (missing or unknown):
        raise CheckpointError(
            f"The checkpoint does not fit {type(module).__name__} with its adapters: {len(missing)} tensors are missing"
            f"{_first(missing)} and {len(unknown)} are unknown{_first(unknown)}. Attach the method with the settings "
            "that it was trained with."
        )
    wrong = [
        f"{shown[name]} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in shown
        if name in state and name in own and state[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} adapter tensors of the checkpoint have another shape{_first(wrong)}. Attach the method with "
            "the settings (rank, targets) that it was trained with."
        )
    return missing, unknown


def without_own(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state without the tensors that are the module's own: copying these onto themselves costs time."""
    own = module.state_dict()
    return {name: value for name, value in state.items() if not _is_same(value, own.get(name))}


def _is_same(value: object, own: object) -> bool:
    if value is own:
        return True
    if not isinstance(value, Tensor) or not isinstance(own, Tensor):
        return False
    return value.data_ptr() == own.data_ptr() and value.numel() > 0 and value.shape == own.shape


def _fit_structure(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give the adapters the structure of a state that is about to be loaded, such as a folded prompt's."""
    for part, submodule in attached_parts(module):
        prefix = join(part.path, "")
        prefix = f"{prefix}." if prefix else ""
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for method in part.methods:
            method.fit_to_state(submodule, inside)


def _kept(module: nn.Module, names: Names) -> set[str]:
    """Return the frozen names that a checkpoint also holds."""
    record = record_of(module)
    assert record is not None
    trained = {
        name for name, parameter in module.named_parameters() if name in names.inside and parameter.requires_grad
    }
    changed: set[str] = set()
    if record.at_start is not None:
        now = _checksums(module, names)
        changed = {name for name, digest in now.items() if record.at_start.get(name, digest) != digest}
    record.kept |= changed
    # A trained copy has the name of its frozen original, which does not act.
    return (trained | record.kept) - set(names.public.values())


def _checksums(module: nn.Module, names: Names) -> dict[str, str]:
    """Return checksums of frozen parameters outside the parts and of buffers inside; others change by no usual code."""
    watched = {name for name, _ in module.named_buffers(remove_duplicate=False) if name in names.inside}
    watched |= names.outside
    return {name: checksum(tensor) for name, tensor in module.state_dict().items() if name in watched}


def _first(names: list[str], count: int = 3) -> str:
    return f" ({', '.join(names[:count])}{', …' if len(names) > count else ''})" if names else ""
