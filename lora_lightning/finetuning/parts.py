"""Attach the adapters of a LightningModule's parts, once their submodules are there."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_lightning.adapters import attached_methods, is_attached
from lora_lightning.adapters.sharded import is_sharded
from lora_lightning.backbones.attach import attach
from lora_lightning.checkpoint.fingerprint import fingerprint
from lora_lightning.errors import ConfigError
from lora_lightning.finetuning.digests import sample_digest
from lora_lightning.finetuning.names import frozen_parameters, names_of
from lora_lightning.finetuning.record import MARK, Finetuning, Part, prefix_of, record_of

SHARDS_ITSELF = (
    "Call lora_lightning.attach in the module's own configure_model, before it shards the model, instead of using "
    "AdapterFinetuning."
)


def attach_parts(module: nn.Module) -> None:
    """Attach the adapters of all parts that have none.

    Raises:
        ConfigError: A submodule is not there.
    """
    record = record_of(module)
    for part in [] if record is None else record.parts:
        attach_part(module, part)


def attach_part(module: nn.Module, part: Part) -> None:
    """Attach the adapters of one part, unless it has them or had them before they were merged."""
    submodule = part.submodule(module)
    had_adapters = MARK in submodule.__dict__
    if had_adapters and (part.base_fingerprint is not None or not is_attached(submodule)):
        return  # they are there, or were merged
    record = record_of(module)
    assert record is not None
    if is_sharded(submodule):
        raise ConfigError(f"{part.name} of {type(module).__name__} is sharded over several processes. {SHARDS_ITSELF}")
    record.frozen = {**_frozen_outside(module, record), **record.frozen}
    if not (is_attached(submodule) and attached_methods(submodule) == part.methods):
        statistics = part.train_norm_statistics
        attach(submodule, part.methods, modules_to_save=part.modules_to_save, train_norm_statistics=statistics)
    submodule.__dict__[MARK] = True
    part.base_fingerprint = fingerprint(submodule)
    part.frozen_digest = _digest_inside(module, part)


def was_taken_off(module: nn.Module, part: Part) -> bool:
    """Return whether a part had adapters and has none now, because they were merged or detached."""
    return (
        part.exists_in(module) and MARK in part.submodule(module).__dict__ and not is_attached(part.submodule(module))
    )


def _frozen_outside(module: nn.Module, record: Finetuning) -> dict[str, str]:
    """Return digests of the parameters that the module froze itself, outside all parts."""
    outside = frozen_parameters(module, record.parts)
    return {name: sample_digest({name: tensor}) for name, tensor in outside.items()}


def _digest_inside(module: nn.Module, part: Part) -> str:
    """Return a digest of the frozen tensors of a part that act: not of what a trained copy stands for."""
    prefix = prefix_of(module, part)
    names = names_of(module)
    inside = names.inside - set(names.public.values())
    state: dict[str, Any] = module.state_dict()
    tensors = {name.removeprefix(prefix): state[name] for name in inside if name.startswith(prefix)}
    return sample_digest({name: value for name, value in tensors.items() if hasattr(value, "shape")})
