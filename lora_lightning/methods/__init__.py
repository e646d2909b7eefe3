"""The methods of the literature, one file each."""

from lora_lightning.methods.dora import DoRA
from lora_lightning.methods.lora import LoRA

__all__ = ["DoRA", "LoRA"]
