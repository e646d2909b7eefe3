"""The methods of the literature, one file each."""

from lora_lightning.methods.dora import DoRA
from lora_lightning.methods.lora import LoRA
from lora_lightning.methods.p_tuning import PTuning
from lora_lightning.methods.p_tuning_v2 import PTuningV2
from lora_lightning.methods.prefix_tuning import PrefixTuning
from lora_lightning.methods.prompt_tuning import PromptTuning

__all__ = ["DoRA", "LoRA", "PTuning", "PTuningV2", "PrefixTuning", "PromptTuning"]
