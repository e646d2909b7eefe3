"""Data modules: one file for each kind of data."""

from lora_lightning.data.instruction_data import InstructionData
from lora_lightning.data.text_classification import TextClassificationData

__all__ = ["InstructionData", "TextClassificationData"]
