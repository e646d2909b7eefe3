"""The methods of the literature, one file each."""

from lora_lightning.methods.bitfit import BitFit
from lora_lightning.methods.bottleneck import BottleneckAdapter
from lora_lightning.methods.dora import DoRA
from lora_lightning.methods.ia3 import IA3
from lora_lightning.methods.lora import LoRA

__all__ = ["IA3", "BitFit", "BottleneckAdapter", "DoRA", "LoRA"]
