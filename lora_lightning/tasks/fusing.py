"""Whether a Trainer can step an optimizer with a fused kernel."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.plugins.precision import MixedPrecision

from lora_lightning.strategies.facts import facts_of


def may_fuse(trainer: L.Trainer) -> bool:
    """Return whether a fused optimizer is safe with a Trainer's precision and strategy.

    Lightning's mixed precision refuses to clip the gradients of a fused optimizer, and unscales those of float16 only
    inside its step, after the guards have looked at them. DeepSpeed and FSDP1 pass it their own flat parameters.
    """
    facts = facts_of(trainer)
    is_mixed = isinstance(trainer.precision_plugin, MixedPrecision)
    return not is_mixed and not (facts.partitions or facts.flattens)
