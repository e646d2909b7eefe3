"""Merge a checkpoint's adapter into its base, and write the result as a plain model folder."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters import adapter_state_dict, attached_methods, is_attached, iter_adapters
from lora_lightning.adapters.merge import check_mergeable, refuse_unmergeable_kinds
from lora_lightning.adapters.walk import join
from lora_lightning.backbones.attach import merge
from lora_lightning.backbones.storage.quantized import is_quantized
from lora_lightning.checkpoint.files import atomic_folder
from lora_lightning.checkpoint.fingerprint import fingerprint
from lora_lightning.checkpoint.folder import refuse_taken as refuse_taken
from lora_lightning.checkpoint.manifest import Manifest, class_config
from lora_lightning.checkpoint.own_state import warn_of_own_file
from lora_lightning.checkpoint.saved_run import SavedRun, generation_settings_of
from lora_lightning.errors import BackboneError, CheckpointError, NotMergeable, trouble_of_disk
from lora_lightning.merging.check import check_written
from lora_lightning.merging.dense import dequantize as dequantize_base
from lora_lightning.merging.precision import dtype_of, final_dtypes, name_of, narrow, round_to, widen
from lora_lightning.merging.probe import Probe, sample_batch
from lora_lightning.merging.report import THRESHOLD, LayerMerge, MergeLoss, MergeReport, UpdateLost, measure
from lora_lightning.merging.spool import Spool, spooling
from lora_lightning.merging.write import WEIGHTS_NAME, merged_before, write_merged_folder
from lora_lightning.peft_format.copies import is_copy

if TYPE_CHECKING:
    import lightning as L

__all__ = ["merge_checkpoint"]

_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B", re.IGNORECASE)


def merge_checkpoint(
    ckpt_path: str | Path,
    output_dir: str | Path,
    task_class: type[L.LightningModule] | str | None = None,
    *,
    dtype: str | None = None,
    max_shard_size: str = "1GB",
    dequantize: bool = False,
    force: bool = False,
    threshold: float = THRESHOLD,
    sample: str | None = None,
    backbone: str | None = None,
) -> MergeReport:
    """Merge a checkpoint into its base and write a model folder that does not need this library.

    The merge is computed in float32 with one cast at the end. Float32 and merged weights are stored in temporary files
    beside the output, mapped into memory: up to three times the bytes of a half-precision base on disk, little in
    memory. A transformers model is written with `save_pretrained`, its tokenizer and its label names; any other model
    as the safetensors of its state dict, with a manifest. The written model is loaded again and compared, and the
    folder gets its name only when it is complete.

    A run on a quantized base is merged into the dense base, loaded from the same files, or with `dequantize` into the
    dequantized weights, on which the adapter was trained.

    Args:
        ckpt_path: The `.ckpt` file.
        output_dir: The folder to write; it must not exist, be empty, or hold what an earlier merge of the same
            checkpoint wrote and nothing else.
        task_class: The task's class or its import path; see `SavedRun.build`.
        dtype: `float32`, `bfloat16` or `float16`; None keeps the base's own.
        max_shard_size: Largest size of one weight file, such as `1GB` (transformers models).
        dequantize: Merge into the dequantized base of a quantized run.
        force: Write even where too much of the update is lost.
        threshold: Least share of the update, by its squared norm, that must be kept; see `MergeLoss.kept`.
        sample: A text on which the outputs are compared; None takes 64 random tokens.
        backbone: New location of the base, if it has moved since the training; its weights are compared.

    Returns:
        The written folder, and the loss of the merge.

    Raises:
        CheckpointError: The folder is taken or cannot be written, `max_shard_size` is not a size, the checkpoint cannot
            be used, or the written folder does not load as the merged model.
        NotMergeable: The adapter cannot be folded into weights.
        UpdateLost: Less than `threshold` of the update would be kept; nothing is written.
    """
    ckpt_path, output_dir, chosen = Path(ckpt_path), Path(output_dir), dtype_of(dtype)
    earlier = merged_before(output_dir)
    if earlier is None:
        refuse_taken(output_dir)
    if not _SIZE.fullmatch(max_shard_size):
        raise CheckpointError(f"max_shard_size must be a size such as 5GB or 500MB, got {max_shard_size!r}.")
    run = SavedRun.of_checkpoint(ckpt_path)
    if earlier != run.record:  # merging the same checkpoint again replaces what that wrote
        refuse_taken(output_dir)
    task, model = _load(run, task_class, backbone, dequantize=dequantize)
    manifest = _describe(run, task, model)
    num_parameters = sum(tensor.numel() for tensor in adapter_state_dict(model).values())
    if dequantize and not dequantize_base(model):
        raise CheckpointError(f"{ckpt_path} stands on a base that is not quantized; leave dequantize out.")
    tokenizer = _tokenizer_of(run, backbone)
    batch = sample_batch(model, sample, tokenizer)
    try:
        with atomic_folder(output_dir) as folder:
            with spooling(folder) as spool:
                loss = _merge(model, chosen, batch, spool)
                if loss.kept < threshold and not force:
                    raise UpdateLost(loss, threshold)
                write_merged_folder(
                    folder,
                    model,
                    manifest,
                    tokenizer=tokenizer,
                    answers=tokenizer is not None and run.answers_with(tokenizer),
                    generation_settings=generation_settings_of(task),
                    max_shard_size=max_shard_size,
                    own_state=run.own_state,
                    num_parameters=num_parameters,
                )
                check_written(folder, model, batch, WEIGHTS_NAME)
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        trouble = trouble_of_disk(error) or error.strerror or error
        raise CheckpointError(f"{output_dir} could not be written: {trouble}; nothing was left there.") from error
    if hasattr(model, "save_pretrained"):
        warn_of_own_file(task, run.own_state, output_dir)
    return MergeReport(output_dir=output_dir, loss=loss, num_bytes=num_bytes, has_tokenizer=tokenizer is not None)


def _load(
    run: SavedRun, task_class: type[L.LightningModule] | str | None, backbone: str | None, *, dequantize: bool
) -> tuple[L.LightningModule, nn.Module]:
    """Build the task and its adapted model; a quantized run is built on the dense base, unless it is dequantized."""
    ckpt_path = run.path
    changes: dict[str, Any] = {} if backbone is None else {"backbone": backbone}
    if not dequantize and run.settings.get("quantization") is not None:
        changes["quantization"] = None
    task = run.build(task_class, **changes)
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
def _merge(model: nn.Module, chosen: torch.dtype | None, batch: dict[str, Tensor] | None, spool: Spool) -> MergeLoss:
    """Merge all adapters of a model in place, in float32 with one cast, and return the loss."""
    dtypes = final_dtypes(model, chosen)
    widen(model, dtypes, spool)
    probe = None if batch is None else Probe(model, batch)
    layers = merge_and_measure(model, dtypes)
    round_to(model, dtypes)
    move = None if probe is None else probe.compare(model)
    narrow(model, dtypes, spool)
    names = {name: dtype for name, dtype in dtypes.items() if name in dict(model.named_parameters())}
    return MergeLoss(layers=layers, dtype=name_of(names), logits=move)


@torch.no_grad()
def merge_and_measure(model: nn.Module, dtypes: dict[str, torch.dtype]) -> tuple[LayerMerge, ...]:
    """Merge all adapters of a model in place, and return what a cast to its final dtypes keeps of each update.

    Args:
        model: An adapted model, widened to float32.
        dtypes: Final dtype of each tensor.

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


def _describe(run: SavedRun, task: L.LightningModule, model: nn.Module) -> Manifest:
    """Build the manifest of the merged folder, before the adapters are removed."""
    return Manifest(
        **asdict(run.facts_with(task)),
        adapter_format="merged",
        checkpoint=run.record,
        methods=[class_config(method) for method in attached_methods(model)],
        base_fingerprint=fingerprint(model),
    )


def _tokenizer_of(run: SavedRun, backbone: str | None) -> Any:  # noqa: ANN401 - tokenizers share no public base class
    """Load the tokenizer of the training; None, with a warning, if it no longer exists.

    Raises:
        CheckpointError: Its vocabulary has changed since the training.
    """
    if not run.has_tokenizer:
        return None
    try:
        return run.load_tokenizer(backbone)
    except BackboneError as error:
        warnings.warn(f"The merged folder gets no tokenizer: {error}", stacklevel=3)
        return None
