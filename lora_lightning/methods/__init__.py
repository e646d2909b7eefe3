"""The methods of the literature, one file each."""

from lora_lightning.methods.adalora import AdaLoRA
from lora_lightning.methods.dora import DoRA
from lora_lightning.methods.lora import LoRA
from lora_lightning.methods.lora_drop import LoRADrop

__all__ = ["AdaLoRA", "DoRA", "LoRA", "LoRADrop"]
