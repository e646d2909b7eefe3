"""Callbacks, one a file."""

from lora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from lora_lightning.callbacks.adapter_summary import AdapterSummary
from lora_lightning.callbacks.merge_at_end import MergeAtEnd
from lora_lightning.callbacks.metric_curve import MetricCurve
from lora_lightning.callbacks.sample_generations import SampleGenerations
from lora_lightning.callbacks.throughput import Throughput
from lora_lightning.resume import ExactResume

__all__ = [
    "AdapterCheckpoint",
    "AdapterSummary",
    "ExactResume",
    "MergeAtEnd",
    "MetricCurve",
    "SampleGenerations",
    "Throughput",
]
