"""Trainer settings that a quantized base does not allow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_lightning.backbones.skeleton import is_without_weights
from lora_lightning.backbones.storage.quantized import is_quantized
from lora_lightning.errors import ConfigError
from lora_lightning.strategies.facts import facts_of

if TYPE_CHECKING:
    import lightning as L
    from torch import nn

    from lora_lightning.backbones.quantization import Quantization

_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def refuse_unfit_trainer(trainer: L.Trainer) -> None:
    """Refuse strategies and precisions that would shard, move or cast a quantized base.

    Raises:
        ConfigError: The Trainer has one of them.
    """
    _refuse_strategy(trainer)
    plugin = type(trainer.precision_plugin).__name__
    if plugin == "BitsandbytesPrecision":
        raise ConfigError(
            f"{plugin} quantizes the model itself, heads and adapters included; leave it out, since the base is "
            "quantized already."
        )
    if trainer.precision not in _PRECISIONS:
        raise ConfigError(
            f"precision={trainer.precision!r} casts the whole model, and a quantized base must not be cast: its "
            "adapters would lose their precision, its packed weights their meaning. Use 32-true or bf16-mixed; "
            "quantization.compute_dtype says in which dtype the quantized layers multiply."
        )


def _refuse_strategy(trainer: L.Trainer) -> None:
    facts = facts_of(trainer)
    if facts.shards or facts.flattens:
        raise ConfigError(
            f"A quantized base cannot be sharded by {facts.name} (FSDP): the packed bytes of a weight and "
            "the constants that give them meaning would end up on different ranks. Use strategy=ddp, where each rank "
            "holds the whole quantized base, or leave quantization out."
        )
    if facts.partitions or not facts.is_known:
        raise ConfigError(
            f"A quantized base runs on one device or with strategy=ddp; {facts.name} moves weights in "
            "ways that quantized ones do not survive. Use strategy=ddp, or leave quantization out."
        )


def check_quantization(model: nn.Module, quantization: Quantization | None, trainer: L.Trainer | None) -> None:
    """Refuse a Trainer that a quantized model does not support, and a setting that had no effect.

    Raises:
        ConfigError: It is one of them.
    """
    if is_quantized(model):
        if trainer is not None:
            refuse_unfit_trainer(trainer)
    elif quantization is not None and not is_without_weights():
        raise ConfigError(
            "quantization is set, and configure_backbone returned a model without quantized layers; quantize it "
            "there, or leave the setting out."
        )
