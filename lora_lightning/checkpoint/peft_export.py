"""Write the adapters of a model as a folder that PEFT, transformers and other tools read."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lora_lightning.adapters import is_attached
from lora_lightning.checkpoint.folder import RunFacts, write_adapter_folder
from lora_lightning.checkpoint.manifest import Manifest
from lora_lightning.checkpoint.peft_format import to_peft, why_not_peft
from lora_lightning.errors import CheckpointError


def export_peft(
    model: nn.Module, folder: str | Path, facts: RunFacts | None = None, *, base_fingerprint: str | None = None
) -> Manifest:
    """Write the adapters of a model in PEFT's format: `adapter_config.json`, `adapter_model.safetensors`, a manifest.

    `peft.PeftModel.from_pretrained(base, folder)` and transformers' `model.load_adapter(folder)` read it, and so does
    `load_peft`. Trained copies (heads) go in as `modules_to_save`. A relative of LoRA goes in as the LoRA that computes
    the same, from its `factors()`: often of another rank, and no longer to be trained by its own method.

    Args:
        model: A model with adapters of LoRA, DoRA or a relative of theirs.
        folder: Where to; an adapter folder already there is replaced.
        facts: What the manifest shall tell about the run.
        base_fingerprint: The base's fingerprint, where the caller has it already.

    Returns:
        The manifest.

    Raises:
        CheckpointError: PEFT has no words for these adapters (the message says for what), a weight is NaN or
            infinite, or the folder holds something else.
    """
    if not is_attached(model):
        raise CheckpointError("The model has no adapters, so there is nothing to export; attach and train them first.")
    if to_peft(model, as_lora=True) is None:
        raise CheckpointError(
            f"This adapter cannot be written in PEFT's format: {why_not_peft(model)}. Merge it into the base instead "
            "(lora-lightning export --to merged)."
        )
    return write_adapter_folder(Path(folder), model, facts, base_fingerprint=base_fingerprint, as_lora=True)
