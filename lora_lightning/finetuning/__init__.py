"""Adapters for a LightningModule that exists; the callback is `AdapterFinetuning`."""

from lora_lightning.finetuning.attaching import finetune
from lora_lightning.finetuning.loading import load_finetuned
from lora_lightning.finetuning.merging import merge_finetuned
from lora_lightning.finetuning.record import is_finetuned

__all__ = ["finetune", "is_finetuned", "load_finetuned", "merge_finetuned"]
