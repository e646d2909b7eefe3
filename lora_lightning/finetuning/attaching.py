"""Attach adapters to a submodule of a LightningModule that exists, once it is there."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L

from lora_lightning.adapters import AttachReport, Method, report_of
from lora_lightning.errors import ConfigError
from lora_lightning.finetuning.module_class import become_finetuned, own_class_of
from lora_lightning.finetuning.parts import attach_part
from lora_lightning.finetuning.record import RECORD, Finetuning, Part, record_of
from lora_lightning.tasks.settings import methods_from

__all__ = ["finetune"]


def finetune(
    module: L.LightningModule,
    method: Method | Sequence[Method],
    submodule: str | None = None,
    *,
    modules_to_save: Sequence[str] = (),
    train_norm_statistics: bool = False,
) -> AttachReport | None:
    """Attach adapters to a LightningModule that exists, and keep its checkpoints to what trains.

    `AdapterFinetuning` calls this. Call it yourself to have the adapters before a Trainer, such as with
    `strategy="ddp_notebook"`, which starts processes from the module as it is.

    Args:
        module: The LightningModule; changed in place. It stays an instance of its class.
        method: The method, or a list of methods, to attach.
        submodule: Path of the submodule to freeze and adapt, such as `backbone`; None takes the whole LightningModule.
        modules_to_save: Names of modules inside it to train as full copies.
        train_norm_statistics: Let batch norms inside it learn the statistics of the training batches.

    Returns:
        How many parameters train, and on which hosts; None if the submodule is created later, in `setup` or
        `configure_model`: it gets its adapters after that.

    Raises:
        ConfigError: The module has other adapters, or the settings do not fit.
        TargetError: The method finds no module to adapt.

    Example:
        >>> from torch import nn
        >>> from lora_lightning import LoRA
        >>> module = L.LightningModule()
        >>> module.backbone = nn.Sequential(nn.Linear(8, 8))
        >>> finetune(module, LoRA(r=2), "backbone").num_trainable
        32
    """
    part = Part(submodule or "", methods_from(method), tuple(modules_to_save), train_norm_statistics)
    part = prepare(module, part)
    if not part.exists_in(module):
        return None
    attach_part(module, part)
    return report_of(part.submodule(module))


def prepare(module: L.LightningModule, part: Part) -> Part:
    """Have a LightningModule attach a part's adapters at the end of `configure_model`, unless they are there before.

    Returns:
        The part that the module keeps.

    Raises:
        ConfigError: It has a part with other settings at the same path.
    """
    record = record_of(module) or Finetuning()
    same_path = [other for other in record.parts if other.path == part.path]
    if not same_path:
        record.parts.append(part)
    elif same_path[0].settings != part.settings:
        raise ConfigError(
            f"{part.name} of {type(module).__name__} has adapters with other settings already: {same_path[0].methods} "
            f"instead of {part.methods}. Use the same settings, or build the module anew."
        )
    module.__dict__[RECORD] = record
    become_finetuned(module, has_penalty=any(_has_penalty(one) for one in part.methods))
    return same_path[0] if same_path else part


def builds_later(module: L.LightningModule) -> bool:
    """Return whether a module has a `setup` or `configure_model` of its own, which may create or load its weights."""
    cls = own_class_of(module)
    return any(getattr(cls, name) is not getattr(L.LightningModule, name) for name in ("setup", "configure_model"))


def _has_penalty(method: Method) -> bool:
    return type(method).extra_loss is not Method.extra_loss
