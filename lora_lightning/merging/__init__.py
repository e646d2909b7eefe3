"""Merging of a checkpoint into its base, and the loss of the merge."""

from lora_lightning.merging.merge import merge_checkpoint
from lora_lightning.merging.report import LogitMove, MergeLoss, MergeReport, UpdateLost

__all__ = ["LogitMove", "MergeLoss", "MergeReport", "UpdateLost", "merge_checkpoint"]
