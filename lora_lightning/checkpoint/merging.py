"""Merge a checkpoint's adapter into its base, and write the result as a plain model folder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from lora_lightning.adapters import Adapter, attached_methods, is_attached, iter_adapters
from lora_lightning.adapters.base import Role
from lora_lightning.adapters.weights import read_weight
from lora_lightning.backbones.attach import merge
from lora_lightning.backbones.load import load_tokenizer
from lora_lightning.checkpoint.files import atomic_folder
from lora_lightning.checkpoint.fingerprint import fingerprint
from lora_lightning.checkpoint.manifest import FileRecord, Manifest, class_config, write_manifest
from lora_lightning.checkpoint.rebuild import read_checkpoint, rebuild_task
from lora_lightning.errors import BackboneError, CheckpointError

if TYPE_CHECKING:
    import lightning as L

WEIGHTS_NAME = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class LayerMerge:
    """What became of one layer's update when it was cast to the base's dtype.

    Args:
        path: The layer's path in the base model.
        num_changed: Elements of the weight that the update changes in float32.
        num_survived: Those of them that the cast to the base's dtype did not round back.
    """

    path: str
    num_changed: int
    num_survived: int

    @property
    def survived(self) -> float:
        """Share of changed elements that survived, 1.0 where nothing changes."""
        return self.num_survived / self.num_changed if self.num_changed else 1.0


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What `merge_checkpoint` wrote.

    Args:
        output_dir: The folder.
        layers: Every merged layer.
        num_bytes: Bytes of all files in the folder.
        has_tokenizer: Whether a tokenizer is among them.
    """

    output_dir: Path
    layers: tuple[LayerMerge, ...]
    num_bytes: int
    has_tokenizer: bool

    @property
    def survived(self) -> float:
        """Share of all changed elements that survived the cast, 1.0 where nothing changes."""
        changed = sum(layer.num_changed for layer in self.layers)
        return sum(layer.num_survived for layer in self.layers) / changed if changed else 1.0


def merge_checkpoint(
    ckpt_path: str | Path, output_dir: str | Path, task_class: type[L.LightningModule] | str | None = None
) -> MergeReport:
    """Merge a checkpoint into its base and write a model folder that needs nothing of this library.

    The arithmetic is done in float32 with one cast, to the base's own dtype, at the end. A transformers model is
    written with `save_pretrained`, its tokenizer and its label names; any other model as the safetensors of its state
    dict, with a manifest. The folder appears only when it is complete.

    Args:
        ckpt_path: The `.ckpt` file.
        output_dir: The folder to write; it must not exist, or be empty.
        task_class: See `rebuild_task`.

    Returns:
        What was written.

    Raises:
        CheckpointError: The folder is taken or cannot be written, or the checkpoint cannot be used.
        NotMergeable: The adapter cannot be folded into weights.
    """
    ckpt_path, output_dir = Path(ckpt_path), Path(output_dir)
    refuse_taken(output_dir)
    task = rebuild_task(ckpt_path, task_class)
    model = getattr(task, "model", None)
    if not isinstance(model, nn.Module) or not is_attached(model):
        raise CheckpointError(f"{ckpt_path} holds no adapter, so there is nothing to merge.")
    checkpoint = read_checkpoint(ckpt_path)
    manifest = _describe(task, model, checkpoint)
    layers = merge_and_measure(model)
    tokenizer_name = _tokenizer_name(task, checkpoint)
    try:
        with atomic_folder(output_dir) as folder:
            has_tokenizer = _write_model(model, folder, manifest, tokenizer_name)
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise CheckpointError(f"{output_dir} could not be written ({error}); nothing was left there.") from error
    return MergeReport(output_dir=output_dir, layers=layers, num_bytes=num_bytes, has_tokenizer=has_tokenizer)


def refuse_taken(output_dir: Path) -> None:
    """Raise CheckpointError unless a path is free: absent, or an empty folder."""
    if output_dir.is_dir() and not any(output_dir.iterdir()):
        return
    if output_dir.exists() or output_dir.is_symlink():
        raise CheckpointError(f"{output_dir} exists already; name a folder that does not, or remove it.")


@torch.no_grad()
def merge_and_measure(model: nn.Module) -> tuple[LayerMerge, ...]:
    """Merge all adapters of a model in place, and tell what survived the cast in each layer.

    Raises:
        NotMergeable: An adapter cannot be folded; the model is unchanged.
    """
    for _, host, adapter in iter_adapters(model):
        adapter.check_mergeable(host)
    layers = [_measure(path, host, adapter) for path, host, adapter in iter_adapters(model) if not _is_head(adapter)]
    merge(model)
    return tuple(layers)


def _measure(path: str, host: nn.Module, adapter: Adapter) -> LayerMerge:
    """Compare what the update changes in float32 with what it changes in the host's own dtype."""
    weight = read_weight(host)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    merged = adapter.merged_weight(host, wide)
    changed = merged != wide
    survived = changed & (merged.to(weight.dtype) != weight)
    return LayerMerge(path=path, num_changed=int(changed.sum()), num_survived=int(survived.sum()))


def _is_head(adapter: Adapter) -> bool:
    return {role for _, _, role in adapter.named_roles()} == {Role.HEAD}


def _describe(task: L.LightningModule, model: nn.Module, checkpoint: dict[str, Any]) -> Manifest:
    """Build the manifest of the merged folder, before the adapters are gone."""
    backbone, names = getattr(task, "backbone", None), getattr(task, "label_names", None)
    return Manifest(
        adapter_format="merged",
        methods=[class_config(method) for method in attached_methods(model)],
        base=backbone if isinstance(backbone, str) else None,
        base_fingerprint=fingerprint(model),
        task=f"{type(task).__module__}.{type(task).__qualname__}",
        label_names=[str(name) for name in names] if names else None,
        epoch=int(checkpoint.get("epoch", 0)),
        step=int(checkpoint.get("global_step", 0)),
    )


def _write_model(model: nn.Module, folder: Path, manifest: Manifest, tokenizer_name: str | None) -> bool:
    """Write a merged model into a folder; return whether a tokenizer was found for it."""
    if not hasattr(model, "save_pretrained"):
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        files = {WEIGHTS_NAME: FileRecord.of(folder / WEIGHTS_NAME)}
        write_manifest(folder, replace(manifest, files=files))
        return False
    config: Any = getattr(model, "config", None)
    names = manifest.label_names
    if names and getattr(config, "num_labels", None) == len(names):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
    has_tokenizer = tokenizer_name is not None and _write_tokenizer(tokenizer_name, folder, config)
    model.save_pretrained(folder)  # type: ignore[operator]  # nn.Module.__getattr__
    return has_tokenizer


def _write_tokenizer(name: str, folder: Path, config: Any) -> bool:  # noqa: ANN401 - transformers' config
    try:
        tokenizer = load_tokenizer(name)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # as our data modules pad
        config.pad_token_id = tokenizer.pad_token_id  # heads of decoders look for the last token that does not pad
        tokenizer.save_pretrained(folder)
    except BackboneError as error:
        warnings.warn(f"The merged folder gets no tokenizer: {error}", stacklevel=2)
        return False
    return True


def _tokenizer_name(task: L.LightningModule, checkpoint: dict[str, Any]) -> str | None:
    """Return the tokenizer that the data was made with: the data module's own, else the backbone's."""
    settings = checkpoint.get("datamodule_hyper_parameters")
    name = settings.get("tokenizer") if isinstance(settings, dict) else None
    name = name or getattr(task, "backbone", None)
    return name if isinstance(name, str) else None
