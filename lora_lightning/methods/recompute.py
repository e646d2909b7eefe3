"""Backward computes the inputs of adapted layers again instead of keeping them."""

from __future__ import annotations

from torch import nn

from lora_lightning.adapters.walk import iter_adapters
from lora_lightning.errors import ConfigError
from lora_lightning.methods.low_rank import LowRankAdapter

__all__ = ["recompute_activations"]


def recompute_activations(model: nn.Module) -> None:
    """Free the inputs of adapted linear layers that came out of an activation or a product; backward makes them again.

    In a transformer that is the input of each down projection, the widest tensor of its block: on MiniLM a quarter of
    what backward keeps, for a few percent of the time. It concerns LoRA and its relatives on dense linear layers, in
    eager mode: `torch.compile` finds such trades by itself.

    Args:
        model: A model with adapters; changed in place.

    Raises:
        ConfigError: It has no adapter that can do so.
    """
    able = [adapter for _, _, adapter in iter_adapters(model) if isinstance(adapter, LowRankAdapter)]
    if not able:
        raise ConfigError(
            "No adapter of this model can compute its input again, only LoRA and its relatives do: "
            "set gradient_checkpointing to true instead of activations."
        )
    for adapter in able:
        adapter.recomputes_input = True
