"""An adapter as PEFT stores it, and as this library attaches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_lightning.adapters import Method


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter as PEFT stores it.

    Args:
        config: Content of `adapter_config.json`.
        state: Tensors by PEFT's key names.
        reads_back: Whether our names can be restored from config and tensors (`from_peft`), without the model.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    reads_back: bool = True


@dataclass(frozen=True, kw_only=True)
class FittedAdapter:
    """An adapter in PEFT's format, converted for one model.

    Args:
        methods: The methods to attach; the first names copies to train in `modules_to_save`.
        state: The tensors by the names of `adapter_state_dict`.
    """

    methods: tuple[Method, ...]
    state: dict[str, Tensor]
