"""Layers that PEFT mistakes for experts by their names, and names with which it adapts the layers themselves.

PEFT 0.21 rewrites `target_modules` of mixtures: `up_proj` of a dense or shared network, even by its whole path, becomes
the experts' fused parameter. `target_parameters` stay as they are, so that `<path>.weight` means the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lora_lightning.adapters.walk import join
from lora_lightning.adapters.weights import HostKind
from lora_lightning.peft_format.lora.updates import Update

NO_DORA = "PEFT takes the name for that of experts, where it has no DoRA"

_LEAVES: Mapping[str, frozenset[str]] = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
"""The last parts of paths that PEFT rewrites, by the family of the model type."""


def is_named_as_experts(model: nn.Module, path: str) -> bool:
    """Return whether PEFT mistakes a path in `target_modules` for that of experts."""
    return path.rpartition(".")[2] in _LEAVES.get(_family(model) or "", frozenset())


def by_parameter(model: nn.Module, updates: Mapping[str, Update]) -> dict[str, Update]:
    """Return updates with those of layers named as experts under the paths of their weights, as single parameters."""
    renamed: dict[str, Update] = {}
    for path, update in updates.items():
        if update.kind is HostKind.LINEAR and is_named_as_experts(model, path):
            renamed[join(path, "weight")] = replace(update, kind=None)
        else:
            renamed[path] = update
    return renamed


def _family(model: nn.Module) -> str | None:
    """Return the model type whose names PEFT rewrites in this model too; the other types keep theirs."""
    from transformers import conversion_mapping

    model_type = getattr(getattr(model, "config", None), "model_type", None) or ""
    families: Mapping[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return "mixtral" if model_type == "mixtral" else families.get(model_type)
