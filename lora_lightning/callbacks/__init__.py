"""Callbacks, one a file."""

from lora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from lora_lightning.callbacks.adapter_summary import AdapterSummary
from lora_lightning.callbacks.merge_at_end import MergeAtEnd
from lora_lightning.callbacks.metric_curve import MetricCurve
from lora_lightning.callbacks.rank_watch import RankWatch
from lora_lightning.callbacks.sample_generations import SampleGenerations
from lora_lightning.callbacks.throughput import Throughput

__all__ = [
    "AdapterCheckpoint",
    "AdapterSummary",
    "MergeAtEnd",
    "MetricCurve",
    "RankWatch",
    "SampleGenerations",
    "Throughput",
]
