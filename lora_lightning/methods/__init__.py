"""The methods of the literature, one file each."""

from lora_lightning.methods.dora import DoRA
from lora_lightning.methods.lora import LoRA
from lora_lightning.methods.lora_fa import LoRAFA

__all__ = ["DoRA", "LoRA", "LoRAFA"]
