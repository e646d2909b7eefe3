"""Callbacks, one a file."""

from lora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from lora_lightning.callbacks.adapter_summary import AdapterSummary
from lora_lightning.callbacks.guards import Guards
from lora_lightning.callbacks.idle_parameter_guard import IdleParameterGuard
from lora_lightning.callbacks.merge_at_end import MergeAtEnd
from lora_lightning.callbacks.metric_curve import MetricCurve
from lora_lightning.callbacks.non_finite_guard import NonFiniteGuard
from lora_lightning.callbacks.out_of_memory_guard import OutOfMemoryGuard
from lora_lightning.callbacks.paced_progress_bar import PacedProgressBar
from lora_lightning.callbacks.prediction_writer import PredictionWriter
from lora_lightning.callbacks.rank_watch import RankWatch
from lora_lightning.callbacks.sample_generations import SampleGenerations
from lora_lightning.callbacks.signal_guard import SignalGuard
from lora_lightning.callbacks.throughput import Throughput
from lora_lightning.resume import ExactResume

__all__ = [
    "AdapterCheckpoint",
    "AdapterSummary",
    "ExactResume",
    "Guards",
    "IdleParameterGuard",
    "MergeAtEnd",
    "MetricCurve",
    "NonFiniteGuard",
    "OutOfMemoryGuard",
    "PacedProgressBar",
    "PredictionWriter",
    "RankWatch",
    "SampleGenerations",
    "SignalGuard",
    "Throughput",
]
