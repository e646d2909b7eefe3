"""Write and safely read the results of training: checkpoints, adapter folders, manifests, PEFT's folders."""

from __future__ import annotations

import importlib
from typing import Any

from lora_lightning.checkpoint.fingerprint import fingerprint
from lora_lightning.checkpoint.folder import RunFacts, load_adapter, read_adapter_folder, write_adapter_folder
from lora_lightning.checkpoint.manifest import Manifest, read_manifest
from lora_lightning.checkpoint.peft_folder import export_peft, load_peft

__all__ = [
    "Manifest",
    "RunFacts",
    "export_peft",
    "fingerprint",
    "load_adapter",
    "load_peft",
    "read_adapter_folder",
    "read_manifest",
    "write_adapter_folder",
]

# Names that this module had in version 0.1, and where they are now.
_MOVED = {
    "LogitMove": "merging",
    "MergeLoss": "merging",
    "MergeReport": "merging",
    "UpdateLost": "merging",
    "merge_checkpoint": "merging",
    "preflight": "peft_format.preflight",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Find a public name where it is now."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"lora_lightning.{_MOVED[name]}"), name)
