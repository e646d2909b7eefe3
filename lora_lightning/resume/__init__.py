"""Exact resume from a checkpoint: random state, data position, unfinished steps."""

from lora_lightning.resume.exact_resume import ExactResume
from lora_lightning.resume.position import Layout, Passed, Position, SeekableLoader
from lora_lightning.resume.random_state import RandomState

__all__ = ["ExactResume", "Layout", "Passed", "Position", "RandomState", "SeekableLoader"]
