"""Adapter files: their format, their manifest, and merging them into the base."""

from lora_lightning.checkpoint.fingerprint import fingerprint
from lora_lightning.checkpoint.folder import RunFacts, load_adapter, read_adapter_folder, write_adapter_folder
from lora_lightning.checkpoint.manifest import Manifest, read_manifest
from lora_lightning.checkpoint.merging import merge_checkpoint

__all__ = [
    "Manifest",
    "RunFacts",
    "fingerprint",
    "load_adapter",
    "merge_checkpoint",
    "read_adapter_folder",
    "read_manifest",
    "write_adapter_folder",
]
