"""Tasks: what is learnt, with which head, loss and metrics."""

from lora_lightning.strategies import FSDP2Strategy
from lora_lightning.tasks.base import AdapterTask
from lora_lightning.tasks.causal_lm import CausalLM
from lora_lightning.tasks.multiple_choice import MultipleChoice
from lora_lightning.tasks.per_token import PerTokenTask
from lora_lightning.tasks.seq2seq import Seq2SeqLM
from lora_lightning.tasks.sequence_classification import SequenceClassification
from lora_lightning.tasks.step_output import StepOutput
from lora_lightning.tasks.token_classification import TokenClassification
from lora_lightning.tasks.token_loss import TokenSums

__all__ = [
    "AdapterTask",
    "CausalLM",
    "FSDP2Strategy",
    "MultipleChoice",
    "PerTokenTask",
    "Seq2SeqLM",
    "SequenceClassification",
    "StepOutput",
    "TokenClassification",
    "TokenSums",
]
