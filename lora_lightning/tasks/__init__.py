"""Tasks: what is learnt, with which head, loss and metrics."""

from lora_lightning.tasks.base import AdapterTask, StepOutput
from lora_lightning.tasks.causal_lm import CausalLM
from lora_lightning.tasks.per_token import PerTokenTask
from lora_lightning.tasks.sequence_classification import SequenceClassification
from lora_lightning.tasks.token_loss import TokenSums

__all__ = ["AdapterTask", "CausalLM", "PerTokenTask", "SequenceClassification", "StepOutput", "TokenSums"]
