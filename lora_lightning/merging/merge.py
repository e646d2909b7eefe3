"""Merge a checkpoint's adapter into its base, and write the result as a plain model folder."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from lora_lightning.adapters import attached_methods, is_attached, iter_adapters
from lora_lightning.adapters.attach import join
from lora_lightning.adapters.merge import check_mergeable, refuse_unmergeable_kinds
from lora_lightning.backbones.attach import merge
from lora_lightning.backbones.load import load_tokenizer
from lora_lightning.backbones.quantized import is_quantized
from lora_lightning.backbones.tokenizer_identity import check_tokenizer
from lora_lightning.checkpoint.files import atomic_folder
from lora_lightning.checkpoint.fingerprint import fingerprint
from lora_lightning.checkpoint.manifest import FileRecord, Manifest, class_config, write_manifest
from lora_lightning.checkpoint.rebuild import read_checkpoint, rebuild_task, tokenizer_fingerprint_in
from lora_lightning.errors import BackboneError, CheckpointError, NotMergeable
from lora_lightning.merging.dense import dequantize as dequantize_base
from lora_lightning.merging.precision import dtype_of, final_dtypes, name_of, narrow, round_to, widen
from lora_lightning.merging.probe import Probe, sample_batch
from lora_lightning.merging.report import THRESHOLD, LayerMerge, MergeLoss, MergeReport, UpdateLost, measure
from lora_lightning.peft_format.copies import is_copy

if TYPE_CHECKING:
    import lightning as L

WEIGHTS_NAME = "model.safetensors"
_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)


def merge_checkpoint(
    ckpt_path: str | Path,
    output_dir: str | Path,
    task_class: type[L.LightningModule] | str | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    dequantize: bool = False,
    force: bool = False,
    threshold: float = THRESHOLD,
    sample: str | None = None,
) -> MergeReport:
    """Merge a checkpoint into its base and write a model folder that needs nothing of this library.

    The arithmetic is done in float32 with one cast at the end, so a base in half precision takes twice its memory. A
    transformers model is written with `save_pretrained`, its tokenizer and its label names; any other model as the
    safetensors of its state dict, with a manifest. The folder appears only when it is complete.

    A run on a quantized base is merged into the dense base, loaded anew from the same files, or with `dequantize`
    into what the quantized weights stand for, which is what the adapter was trained beside.

    Args:
        ckpt_path: The `.ckpt` file.
        output_dir: The folder to write; it must not exist, or be empty.
        task_class: See `rebuild_task`.
        dtype: `float32`, `bfloat16` or `float16`; None keeps the base's own.
        max_shard_size: Largest size of one weight file, such as `5GB` (transformers models).
        dequantize: Merge into the dequantized base of a quantized run.
        force: Write even where too much of the update is lost.
        threshold: Least share of the update, by its squared norm, that must be kept; see `MergeLoss.kept`.
        sample: A text on which the outputs are compared; None takes 64 random tokens.

    Returns:
        What was written, and what was lost.

    Raises:
        CheckpointError: The folder is taken or cannot be written, `max_shard_size` is no size, or the
            checkpoint cannot be used.
        NotMergeable: The adapter cannot be folded into weights.
        UpdateLost: Less than `threshold` of the update would be kept; nothing is written.
    """
    ckpt_path, output_dir, chosen = Path(ckpt_path), Path(output_dir), dtype_of(dtype)
    refuse_taken(output_dir)
    if not _SIZE.fullmatch(max_shard_size):
        raise CheckpointError(f"max_shard_size must be a size such as 5GB or 500MB, got {max_shard_size!r}.")
    checkpoint = read_checkpoint(ckpt_path)
    task, model = _load(ckpt_path, checkpoint, task_class, dequantize=dequantize)
    manifest = _describe(task, model, checkpoint)
    if dequantize and not dequantize_base(model):
        raise CheckpointError(f"{ckpt_path} stands on a base that is not quantized; leave dequantize out.")
    tokenizer_name = _tokenizer_name(task, checkpoint)
    _check_tokenizer(tokenizer_name, checkpoint, ckpt_path)
    loss = _merge(model, chosen, sample, tokenizer_name)
    if loss.kept < threshold and not force:
        raise UpdateLost(loss, threshold)
    try:
        with atomic_folder(output_dir) as folder:
            has_tokenizer = _write_model(model, folder, manifest, tokenizer_name, max_shard_size)
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise CheckpointError(f"{output_dir} could not be written ({error}); nothing was left there.") from error
    return MergeReport(output_dir=output_dir, loss=loss, num_bytes=num_bytes, has_tokenizer=has_tokenizer)


def refuse_taken(output_dir: Path) -> None:
    """Raise CheckpointError unless a path is free: absent, or an empty folder."""
    if output_dir.is_dir() and not any(output_dir.iterdir()):
        return
    if output_dir.exists() or output_dir.is_symlink():
        raise CheckpointError(f"{output_dir} exists already; name a folder that does not, or remove it.")


def _load(
    ckpt_path: Path, checkpoint: dict[str, Any], task_class: type[L.LightningModule] | str | None, *, dequantize: bool
) -> tuple[L.LightningModule, nn.Module]:
    """Rebuild the task and its adapted model; a quantized run on the dense base, unless told to dequantize."""
    is_dense = dequantize or checkpoint["hyper_parameters"].get("quantization") is None
    task = rebuild_task(ckpt_path, task_class, **({} if is_dense else {"quantization": None}))
    model = getattr(task, "model", None)
    if not isinstance(model, nn.Module) or not is_attached(model):
        raise CheckpointError(f"{ckpt_path} holds no adapter, so there is nothing to merge.")
    if is_quantized(model) and not dequantize:
        raise CheckpointError(
            f"{ckpt_path} stands on a base that its task loads quantized by itself, so there is no dense one to merge "
            "into; merge into the dequantized one (--dequantize)."
        )
    try:
        refuse_unmergeable_kinds(model) if dequantize else check_mergeable(model)
    except NotMergeable as error:
        raise NotMergeable(f"{ckpt_path} was not merged: {error}") from error
    return task, model


@torch.no_grad()
def _merge(model: nn.Module, chosen: torch.dtype | None, text: str | None, tokenizer_name: str | None) -> MergeLoss:
    """Merge all adapters of a model in place, in float32 with one cast, and tell what was lost."""
    dtypes = final_dtypes(model, chosen)
    widen(model)
    tokenizer = None if tokenizer_name is None else lambda: load_tokenizer(tokenizer_name)
    batch = sample_batch(model, text, tokenizer)
    probe = None if batch is None else Probe(model, batch)
    layers = merge_and_measure(model, dtypes)
    round_to(model, dtypes)
    move = None if probe is None else probe.compare(model)
    narrow(model, dtypes)
    names = {name: dtype for name, dtype in dtypes.items() if name in dict(model.named_parameters())}
    return MergeLoss(layers=layers, dtype=name_of(names), logits=move)


@torch.no_grad()
def merge_and_measure(model: nn.Module, dtypes: dict[str, torch.dtype]) -> tuple[LayerMerge, ...]:
    """Merge all adapters of a model in place, and tell what a cast to its final dtypes leaves of each update.

    Args:
        model: An adapted model, widened to float32.
        dtypes: What each tensor is going to be cast to.

    Raises:
        NotMergeable: An adapter cannot be folded; the model is unchanged.
    """
    check_mergeable(model)
    layers = [
        measure(
            path if name == "weight" else join(path, name), weight, merged, dtypes.get(join(path, name), torch.float32)
        )
        for path, host, adapter in iter_adapters(model)
        if not is_copy(adapter) and adapter.changes_weights
        for name, weight, merged in adapter.merged_weights(host)
    ]
    merge(model)
    return tuple(layers)


def _describe(task: L.LightningModule, model: nn.Module, checkpoint: dict[str, Any]) -> Manifest:
    """Build the manifest of the merged folder, before the adapters are gone."""
    backbone, names = getattr(task, "backbone", None), getattr(task, "label_names", None)
    return Manifest(
        adapter_format="merged",
        methods=[class_config(method) for method in attached_methods(model)],
        base=backbone if isinstance(backbone, str) else None,
        base_fingerprint=fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint_in(checkpoint),
        task=f"{type(task).__module__}.{type(task).__qualname__}",
        label_names=[str(name) for name in names] if names else None,
        epoch=int(checkpoint.get("epoch", 0)),
        step=int(checkpoint.get("global_step", 0)),
    )


def _write_model(
    model: nn.Module, folder: Path, manifest: Manifest, tokenizer_name: str | None, max_shard_size: str
) -> bool:
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
    model.save_pretrained(folder, max_shard_size=max_shard_size)  # type: ignore[operator]  # nn.Module.__getattr__
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


def _check_tokenizer(name: str | None, checkpoint: dict[str, Any], ckpt_path: Path) -> None:
    """Refuse a tokenizer that has changed since the training; one that is gone is told of when it is written."""
    expected = tokenizer_fingerprint_in(checkpoint)
    if name is None or expected is None:
        return
    try:
        tokenizer = load_tokenizer(name)
    except BackboneError:
        return
    check_tokenizer(tokenizer, expected, str(ckpt_path))


def _tokenizer_name(task: L.LightningModule, checkpoint: dict[str, Any]) -> str | None:
    """Return the tokenizer that the data was made with: the data module's own, else the backbone's."""
    settings = checkpoint.get("datamodule_hyper_parameters")
    name = settings.get("tokenizer") if isinstance(settings, dict) else None
    name = name or getattr(task, "backbone", None)
    return name if isinstance(name, str) else None
