"""Write a merged model as a folder that other tools load, with the settings with which it answers as in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lightning.checkpoint.folder import is_adapter_folder, write_card
from lora_lightning.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, read_manifest, write_manifest
from lora_lightning.checkpoint.own_state import own_file
from lora_lightning.errors import CheckpointError
from lora_lightning.texts.generation_config import generation_config_for
from lora_lightning.texts.model_card import CARD_NAME, is_untouched
from lora_lightning.texts.saved_tokenizer import tokenizer_files

WEIGHTS_NAME = "model.safetensors"


def write_merged_folder(
    folder: Path,
    model: nn.Module,
    manifest: Manifest,
    *,
    tokenizer: Any,  # noqa: ANN401 - tokenizers share no public base class
    answers: bool,
    generation_settings: Mapping[str, Any],
    max_shard_size: str,
    own_state: Mapping[str, Tensor],
    num_parameters: int,
) -> None:
    """Write a merged model into an empty folder; the manifest is written last.

    Args:
        folder: The folder.
        model: The merged model. A transformers model is written with `save_pretrained`, any other one as the
            safetensors of its state dict.
        manifest: The manifest, without files.
        tokenizer: The tokenizer of the training, with its chat template, or None.
        answers: Whether the model was trained to answer messages.
        generation_settings: Generation settings of the task, such as `num_beams`.
        max_shard_size: Largest size of one weight file, such as `1GB` (transformers models).
        own_state: State of the task outside its model: a separate file beside a transformers model, which other tools
            ignore, and part of the weights of any other model.
        num_parameters: Number of trained parameters.

    Raises:
        CheckpointError: Two weights would have one name.
    """
    if hasattr(model, "save_pretrained"):
        _settle_labels(model, manifest.label_names)
        if tokenizer is not None:
            _write_tokenizer(folder, model, tokenizer)
        config = generation_config_for(model, tokenizer, answers=answers, settings=generation_settings)
        if config is not None:
            model.generation_config = config
        model.save_pretrained(folder, max_shard_size=max_shard_size)  # type: ignore[operator]  # nn.Module.__getattr__
        for name, content in own_file(own_state).items():
            (folder / name).write_bytes(content)
    else:
        state = model.state_dict()
        twice = sorted(state.keys() & own_state.keys())
        if twice:
            raise CheckpointError(
                f"The task holds {', '.join(twice)} beside its model, which has weights of the same names; rename them "
                "in the task, or merge the model alone: merge(task.model)."
            )
        tensors = {name: one.detach().clone().contiguous() for name, one in {**state, **own_state}.items()}
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    files = {path.name: FileRecord.of(path) for path in sorted(folder.iterdir()) if path.is_file()}
    manifest = replace(manifest, files=files)
    write_card(folder, model, manifest, num_parameters)
    write_manifest(folder, manifest)


def merged_before(folder: Path) -> FileRecord | None:
    """Return which `.ckpt` a folder was merged from, if it holds exactly what that merge wrote; else None."""
    if not is_adapter_folder(folder):
        return None
    manifest = read_manifest(folder)
    card = folder / CARD_NAME
    names = {path.name for path in folder.iterdir()} - {MANIFEST_NAME, CARD_NAME}
    is_whole = names == manifest.files.keys() and (is_untouched(card) or not card.exists())
    is_unchanged = is_whole and all(
        (folder / name).stat().st_size == record.num_bytes for name, record in manifest.files.items()
    )
    return manifest.checkpoint if manifest.adapter_format == "merged" and is_unchanged else None


def _settle_labels(model: nn.Module, names: list[str] | None) -> None:
    config: Any = getattr(model, "config", None)
    if names and getattr(config, "num_labels", None) == len(names):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}


def _write_tokenizer(folder: Path, model: nn.Module, tokenizer: Any) -> None:  # noqa: ANN401 - tokenizers share no public base class
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # as our data modules pad
    config: Any = model.config
    config.pad_token_id = tokenizer.pad_token_id  # heads of decoders look for the last token that does not pad
    for name, content in tokenizer_files(tokenizer, None).items():
        (folder / name).write_bytes(content)
