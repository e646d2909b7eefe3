"""Adapter files: their format, their manifest, PEFT's folders both ways, and merging them into the base."""

from lora_lightning.checkpoint.fingerprint import fingerprint
from lora_lightning.checkpoint.folder import RunFacts, load_adapter, read_adapter_folder, write_adapter_folder
from lora_lightning.checkpoint.manifest import Manifest, read_manifest
from lora_lightning.checkpoint.merge_report import LogitMove, MergeLoss, MergeReport, UpdateLost
from lora_lightning.checkpoint.merging import merge_checkpoint
from lora_lightning.checkpoint.peft_export import export_peft
from lora_lightning.checkpoint.peft_import import load_peft
from lora_lightning.checkpoint.peft_preflight import preflight

__all__ = [
    "LogitMove",
    "Manifest",
    "MergeLoss",
    "MergeReport",
    "RunFacts",
    "UpdateLost",
    "export_peft",
    "fingerprint",
    "load_adapter",
    "load_peft",
    "merge_checkpoint",
    "preflight",
    "read_adapter_folder",
    "read_manifest",
    "write_adapter_folder",
]
