"""The methods of the literature, one file each."""

from lora_lightning.methods.delta_lora import DeltaLoRA
from lora_lightning.methods.dora import DoRA
from lora_lightning.methods.lora import LoRA
from lora_lightning.methods.lora_fa import LoRAFA
from lora_lightning.methods.vera import VeRA

__all__ = ["DeltaLoRA", "DoRA", "LoRA", "LoRAFA", "VeRA"]
