"""The methods of the literature, one file each."""

from lora_lightning.methods.adalora import AdaLoRA
from lora_lightning.methods.bitfit import BitFit
from lora_lightning.methods.bottleneck import BottleneckAdapter
from lora_lightning.methods.delta_lora import DeltaLoRA
from lora_lightning.methods.dora import DoRA
from lora_lightning.methods.ia3 import IA3
from lora_lightning.methods.lora import LoRA
from lora_lightning.methods.lora_drop import LoRADrop
from lora_lightning.methods.lora_fa import LoRAFA
from lora_lightning.methods.p_tuning import PTuning
from lora_lightning.methods.p_tuning_v2 import PTuningV2
from lora_lightning.methods.prefix_tuning import PrefixTuning
from lora_lightning.methods.prompt_tuning import PromptTuning
from lora_lightning.methods.trainable_tokens import TrainableTokens
from lora_lightning.methods.vera import VeRA

__all__ = [
    "IA3",
    "AdaLoRA",
    "BitFit",
    "BottleneckAdapter",
    "DeltaLoRA",
    "DoRA",
    "LoRA",
    "LoRADrop",
    "LoRAFA",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptTuning",
    "TrainableTokens",
    "VeRA",
]
