"""The command `lora-lightning export`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import nn

from lora_lightning.adapters.walk import unwrap
from lora_lightning.checkpoint.folder import refuse_taken
from lora_lightning.checkpoint.own_state import own_file, warn_of_own_file
from lora_lightning.checkpoint.peft_folder import export_peft
from lora_lightning.checkpoint.saved_run import SavedRun, generation_settings_of
from lora_lightning.commands._push import Target, push
from lora_lightning.errors import BackboneError, CheckpointError, ConfigError
from lora_lightning.merging.merge import merge_checkpoint
from lora_lightning.merging.report import UpdateLost
from lora_lightning.peft_format.config import CONFIG_NAME, PEFT_WEIGHTS_NAME
from lora_lightning.peft_format.preflight import TOOLS, preflight
from lora_lightning.texts.files import text_files


def export(
    ckpt_path: str,
    output_dir: str,
    to: Literal["peft", "merged"] = "peft",
    task_class: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "1GB",
    dequantize: bool = False,
    force: bool = False,
    sample: str | None = None,
    backbone: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Write a checkpoint's adapter for other tools, in PEFT's format or merged into its base.

    `peft` writes a folder that PEFT and transformers load. For a decoder language model it also reports what vLLM and
    llama.cpp do not support; for other models this is not checked.
    `merged` writes a plain Hugging Face folder, and reports the loss of the merge.

    Args:
        ckpt_path: The .ckpt file, such as runs/version_0/checkpoints/last.ckpt.
        output_dir: The folder to write; it must not exist, or be empty.
        to: peft or merged.
        task_class: Import path of the task, such as my_module.MyTask; needed only where the checkpoint was written by
            a task of your own.
        dtype: For merged: float32, bfloat16 or float16; by default the base's own.
        max_shard_size: For merged: largest size of one weight file.
        dequantize: For merged: take the dequantized base of a run on a quantized one, not the dense one.
        force: For merged: write even if the cast loses most of the update.
        sample: For merged: a text on which the outputs before and after are compared; by default random tokens.
        backbone: The base, if it has moved since the training; its weights must be the same.
        push_to_hub: A repository of the Hugging Face Hub to upload the folder to, owner/name; it is created if missing.
        private: Upload only to a private repository.
    """
    target = Target.of(push_to_hub, private)
    if to == "merged":
        write_merged(ckpt_path, output_dir, task_class, dtype, max_shard_size, dequantize, force, sample, backbone)
        push(target, output_dir)
        return
    for name, is_given in {"dtype": dtype, "dequantize": dequantize, "force": force, "sample": sample}.items():
        if is_given:
            raise ConfigError(f"--{name} is for --to merged; an adapter is written as it was trained.")
    write_peft(Path(ckpt_path), Path(output_dir), task_class, backbone)
    push(target, output_dir)


def write_peft(ckpt_path: Path, output_dir: Path, task_class: str | None, backbone: str | None = None) -> None:
    """Write an adapter in PEFT's format, and report the support by vLLM and llama.cpp if known."""
    refuse_taken(output_dir)
    run = SavedRun.of_checkpoint(ckpt_path)
    task = run.build(task_class, **({} if backbone is None else {"backbone": backbone}))
    model = getattr(task, "model", None)
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{ckpt_path} holds no adapter, so there is nothing to export.")
    manifest = export_peft(
        model,
        output_dir,
        run.facts_with(task),
        base_fingerprint=getattr(task, "base_fingerprint", None),
        extra={**_texts(run, task, model, backbone), **own_file(run.own_state)},
    )
    warn_of_own_file(task, run.own_state, output_dir)
    print(f"Wrote the adapter of {ckpt_path} to {output_dir}, for the base {manifest.base or 'of your own'}.")
    if not _is_decoder(model):
        kind = type(unwrap(model)).__name__
        print(f"What vLLM and llama.cpp take is known for decoder language models alone; this base is a {kind}.")
        return
    config = json.loads((output_dir / CONFIG_NAME).read_text(encoding="utf-8"))
    tensors = load_file(output_dir / PEFT_WEIGHTS_NAME)
    for tool in TOOLS:
        print("\n".join(preflight(config, tensors, tool).lines()))


def _texts(run: SavedRun, task: object, model: nn.Module, backbone: str | None) -> dict[str, bytes]:
    """Return the files of the training's tokenizer and generation settings; none, with a warning, if it is missing."""
    if not run.has_tokenizer:
        return {}
    try:
        tokenizer = run.load_tokenizer(backbone)
    except BackboneError as error:
        warnings.warn(f"The folder gets no tokenizer: {error}", stacklevel=2)
        return {}
    return text_files(model, tokenizer, run.facts.tokenizer, generation_settings_of(task))


def _is_decoder(model: nn.Module) -> bool:
    """Return whether a model generates text and has no encoder beside its decoder."""
    generates: Any = getattr(model, "can_generate", lambda: False)
    return bool(generates()) and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def write_merged(
    ckpt_path: str,
    output_dir: str,
    task_class: str | None,
    dtype: str | None,
    max_shard_size: str,
    dequantize: bool,
    force: bool,
    sample: str | None,
    backbone: str | None,
) -> None:
    """Merge a checkpoint into its base, and report the loss."""
    try:
        report = merge_checkpoint(
            ckpt_path,
            output_dir,
            task_class,
            dtype=dtype,
            max_shard_size=max_shard_size,
            dequantize=dequantize,
            force=force,
            sample=sample,
            backbone=backbone,
        )
    except UpdateLost as error:
        print("\n".join(error.loss.lines()))
        raise
    print(f"Merged {len(report.layers)} layers of {ckpt_path} into {report.output_dir} ({report.num_bytes:,} bytes).")
    print("\n".join(report.loss.lines()))
    if not report.has_tokenizer:
        print("The folder holds no tokenizer.")
