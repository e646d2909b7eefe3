"""The public `attach` and `merge`: like those of `adapters`, and they know transformers models."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

import lora_lightning.backbones.storage.codecs  # noqa: F401 - registers how transformers' and bitsandbytes' layers are read
from lora_lightning import adapters
from lora_lightning.adapters import AttachReport, Method
from lora_lightning.adapters.attaching.placing import methods_of
from lora_lightning.backbones.storage.loftq import start_at_quantization_error
from lora_lightning.backbones.storage.quantized import settle
from lora_lightning.backbones.view import view_of
from lora_lightning.errors import BackboneError

__all__ = ["attach", "merge"]

_MARK = "_warns_of_adapters"


def attach(
    model: nn.Module,
    method: Method | Sequence[Method],
    *,
    name: str | None = None,
    modules_to_save: Sequence[str] = (),
    train_norm_statistics: bool = False,
) -> AttachReport:
    """Freeze a model and hang the adapters of one or several methods on it.

    Works on any torch module; on a transformers model the method also knows the architecture's usual targets and its
    output head, and `init="loftq"` reads the weights from before quantizing (a BackboneError where it cannot). See
    `lora_lightning.adapters.attach` for arguments, result and errors.

    Example:
        >>> from lora_lightning import LoRA
        >>> attach(nn.Sequential(nn.Linear(8, 8)), LoRA(r=2)).hosts
        ('0',)
    """
    methods = methods_of(model, method)
    settle(model)
    if hasattr(model, "save_pretrained"):
        _warn_where_adapters_are_saved()
    is_first = not adapters.is_attached(model)
    with nullcontext() if is_first else adapters.disabled(model):  # trial calls of the model are to show the base
        report = adapters.attach(
            model,
            methods,
            view_of(model),
            name=name,
            modules_to_save=modules_to_save,
            train_norm_statistics=train_norm_statistics,
        )
    try:
        start_at_quantization_error(model, name)
    except BackboneError:
        adapters.detach(model, name)
        raise
    return report


def merge(model: nn.Module, name: str | Sequence[str] | None = None) -> None:
    """Fold adapters into their hosts' weights; see `lora_lightning.adapters.merge`."""
    adapters.merge(model, view_of(model), name=name)


def _warn_where_adapters_are_saved() -> None:
    """Have transformers' `save_pretrained` say that a model loaded from its folder answers as the base does.

    The method of the class is wrapped, once, and not that of one model: copies, pickles and `detach` then need no care.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.save_pretrained
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - transformers' own signature
        if adapters.is_attached(self):
            warnings.warn(
                "save_pretrained writes the base model; its adapters go under names that from_pretrained leaves out, "
                "so what is loaded from the folder answers as the base does. Merge the adapters first "
                "(lora_lightning.merge), or write them with lora_lightning.export_peft.",
                stacklevel=2,
            )
        return original(self, *args, **kwargs)

    setattr(save_pretrained, _MARK, True)
    PreTrainedModel.save_pretrained = save_pretrained
