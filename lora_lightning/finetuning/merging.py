"""A checkpoint of a fine-tuned LightningModule with the adapters merged, which the module's own class loads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lora_lightning.adapters.frozen.copies import copied
from lora_lightning.adapters.merge import check_mergeable
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.backbones.attach import merge
from lora_lightning.checkpoint.files import make_parents, write_atomically
from lora_lightning.errors import CheckpointError, ConfigError, NotMergeable, trouble_of_disk
from lora_lightning.finetuning.loading import build_finetuned, read_finetuned
from lora_lightning.finetuning.module_class import Finetuned
from lora_lightning.finetuning.record import ENTRY, attached_parts, prefix_of
from lora_lightning.finetuning.state import expanded

__all__ = ["merge_finetuned"]

_LEFT_OUT = (ENTRY, "optimizer_states", "lr_schedulers", "callbacks", "loops", "exact_resume", "current_model_state")
"""What of a checkpoint belongs to the training of the adapters."""


def merge_finetuned(
    cls: type[L.LightningModule],
    path: str | Path,
    output: str | Path,
    *,
    weights_only: bool | None = None,
    **settings: Any,  # noqa: ANN401 - arguments of any type
) -> Path:
    """Merge the adapters of a checkpoint that was written with `AdapterFinetuning` into the module's weights.

    Args:
        cls: The class of the module.
        path: The `.ckpt` file.
        output: The `.ckpt` file to write, which `cls.load_from_checkpoint` loads without this library.
        weights_only: See `load_finetuned`.
        **settings: See `load_finetuned`.

    Returns:
        The file written.

    Raises:
        CheckpointError: The checkpoint cannot be used, or the file to write exists.
        NotMergeable: An adapter cannot be folded into weights.
    """
    output = Path(output)
    refuse_taken_file(output)
    content = read_finetuned(Path(path), "cpu", weights_only=weights_only is not False)
    module = build_finetuned(cls, content, **settings)
    _write(output, {**content, "state_dict": merged_state(module, content["state_dict"])})
    return output


def write_merged(module: L.LightningModule, output: Path, path: Path | None) -> None:
    """Write a merged checkpoint of a module that was trained.

    Args:
        module: The module; it stays as it is.
        output: The file to write.
        path: The checkpoint whose weights to take; None takes the present ones.
    """
    content = module.trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    if path is not None:
        content = module.trainer.strategy.checkpoint_io.load_checkpoint(path, map_location="cpu")
    _write(output, {**content, "state_dict": merged_state(module, content["state_dict"])})


def merged_state(module: L.LightningModule, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the `state_dict` that the module's own class has, with the adapters of `state` merged.

    Args:
        module: The module with adapters; it stays as it is.
        state: What a checkpoint holds.
    """
    whole = expanded(module, state)
    merged = {name: value for name, value in whole.items() if RESERVED not in name.split(".")}
    for part, submodule in attached_parts(module):
        prefix = prefix_of(module, part)
        start = f"{prefix}." if prefix else ""
        plain = _plain_copy(submodule)
        inside = {name.removeprefix(start): value for name, value in whole.items() if name.startswith(start)}
        plain.load_state_dict(inside, strict=False)  # quantized layers write more than they read
        merge(plain)
        merged |= {start + name: value for name, value in plain.state_dict().items()}
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in merged.items()}


def refuse_unmergeable(module: L.LightningModule) -> None:
    """Refuse adapters that cannot be merged before any training is done.

    Raises:
        ConfigError: There are some.
    """
    for part, submodule in attached_parts(module):
        try:
            check_mergeable(submodule)
        except NotMergeable as error:
            raise ConfigError(f"The adapters of {part.name} cannot be merged; leave merge_to out: {error}") from error


def refuse_taken_file(output: Path) -> None:
    """Raise CheckpointError if a file to write exists."""
    if output.exists():
        raise CheckpointError(f"{output} exists already. Name another file, or remove it.")


def _plain_copy(submodule: nn.Module) -> nn.Module:
    """Return a copy on the CPU whose loading and saving is plain torch's."""
    plain: Any = copied(submodule)  # right after training, so that some weights have a history
    if issubclass(type(plain), Finetuned):
        plain.__class__ = plain._lora_lightning_class
    on_cpu: nn.Module = plain.cpu()
    return on_cpu


def _write(output: Path, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save({name: value for name, value in content.items() if name not in _LEFT_OUT}, buffer)
    try:
        make_parents(output.parent)
        write_atomically(output, buffer.getvalue())
    except OSError as error:
        raise CheckpointError(
            f"{output} could not be written: {trouble_of_disk(error) or error.strerror or error}."
        ) from error
