"""Tasks: what is learnt, with which head, loss and metrics."""

from lora_lightning.tasks.base import AdapterTask, StepOutput
from lora_lightning.tasks.sequence_classification import SequenceClassification

__all__ = ["AdapterTask", "SequenceClassification", "StepOutput"]
