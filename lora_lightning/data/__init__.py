"""Data modules: one file for each kind of data."""

from lora_lightning.data.instruction_data import InstructionData
from lora_lightning.data.multiple_choice import MultipleChoiceData
from lora_lightning.data.seq2seq import Seq2SeqData
from lora_lightning.data.text_classification import TextClassificationData
from lora_lightning.data.token_classification import TokenClassificationData

__all__ = [
    "InstructionData",
    "MultipleChoiceData",
    "Seq2SeqData",
    "TextClassificationData",
    "TokenClassificationData",
]
