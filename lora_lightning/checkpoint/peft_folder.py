"""Adapter folders in PEFT's format: exported for other tools, and imported from any tool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lora_lightning.adapters import (
    AttachReport,
    detach,
    disabled,
    folded_state_dict,
    is_attached,
    load_adapter_state_dict,
    only,
)
from lora_lightning.backbones.attach import attach
from lora_lightning.checkpoint.base_sample import BaseSample, read_base_sample
from lora_lightning.checkpoint.fingerprint import check_base
from lora_lightning.checkpoint.folder import (
    OWN_WEIGHTS_NAME,
    RunFacts,
    check_finite,
    is_adapter_folder,
    load_config,
    load_tensors,
    write_adapter_folder,
)
from lora_lightning.checkpoint.manifest import Manifest, check_files, read_manifest
from lora_lightning.errors import CheckpointError, TargetError
from lora_lightning.peft_format.adapter import FittedAdapter
from lora_lightning.peft_format.config import CONFIG_NAME, PEFT_WEIGHTS_NAME, PeftConfig, parse_peft_config
from lora_lightning.peft_format.export import for_peft, why_not_for_peft
from lora_lightning.peft_format.fit import fit_to_model

__all__ = ["export_peft", "load_peft"]

_PICKLED_NAME = "adapter_model.bin"


@dataclass(frozen=True, kw_only=True)
class PeftFiles:
    """Content of an adapter folder in PEFT's format.

    Args:
        folder: The folder.
        config: Its `adapter_config.json`.
        tensors: Its tensors by PEFT's key names.
        base_fingerprint: The base's digest if this library wrote the folder, else None.
        base_sample: A few of the base's values, likewise.
    """

    folder: Path
    config: PeftConfig
    tensors: dict[str, Tensor]
    base_fingerprint: str | None = None
    base_sample: BaseSample | None = None

    def fit(self, model: nn.Module) -> FittedAdapter:
        """Match the adapter with a bare model, which is not changed.

        Raises:
            CheckpointError: It does not fit the model.
        """
        return fit_to_model(model, self.config, self.tensors, str(self.folder))


def export_peft(
    model: nn.Module,
    folder: str | Path,
    facts: RunFacts | None = None,
    *,
    name: str | None = None,
    base_fingerprint: str | None = None,
    own_kind: bool = False,
    extra: Mapping[str, bytes] | None = None,
) -> Manifest:
    """Write the adapters of a model in PEFT's format: `adapter_config.json`, `adapter_model.safetensors`, a manifest.

    `peft.PeftModel.from_pretrained(base, folder)` and transformers' `model.load_adapter(folder)` read it, and so does
    `load_peft`. Trained copies (heads) become `modules_to_save`. A relative of LoRA becomes the equivalent LoRA, from
    its `factors()`: often of another rank, and its own method cannot continue to train it. IA3, soft prompts, prefixes
    and trainable tokens become PEFT's own types; the folder then also holds the adapter in this library's format, from
    which training continues. `docs/peft.md` lists what can be exported and imported.

    Args:
        model: A model with adapters of a method that PEFT has too, or of a relative of LoRA.
        folder: The folder; an existing adapter folder is replaced.
        facts: Facts about the run for the manifest.
        name: The name of the adapter to write; may be left out where the model has one.
        base_fingerprint: The base's fingerprint, if the caller knows it.
        own_kind: Write AdaLoRA and VeRA as PEFT's AdaLoRA and VeRA, which fewer tools read than LoRA.
        extra: Further files by their names, such as those of `text_files` and `own_file`.

    Returns:
        The manifest.

    Raises:
        ConfigError: No adapter has this name, or the model has several and none is named.
        CheckpointError: PEFT cannot express these adapters (the message says why), a weight is NaN or infinite, or the
            folder holds something else.
    """
    if not is_attached(model):
        raise CheckpointError("The model has no adapters, so there is nothing to export; attach and train them first.")
    with only(model, name):
        state = folded_state_dict(model)
        adapter = for_peft(model, state, own_kind=own_kind)
        if adapter is None:
            raise CheckpointError(f"This adapter cannot be written in PEFT's format: {why_not_for_peft(model)}.")
        return write_adapter_folder(
            Path(folder), model, facts, base_fingerprint=base_fingerprint, state=state, peft=adapter, extra=extra
        )


def load_peft(model: nn.Module, folder: str | Path, name: str | None = None) -> AttachReport:
    """Attach an adapter in PEFT's format to a model, and load its tensors.

    Reads what PEFT wrote (any version whose adapters are safetensors), what transformers' `save_pretrained` wrote for
    a model with an adapter, and what this library wrote in PEFT's format: LoRA, rsLoRA and DoRA on layers and single
    parameters, AdaLoRA, VeRA, IA3, prompt tuning, P-tuning, prefix tuning and trainable tokens, with trained biases,
    copies and rows of embeddings beside them. `docs/peft.md` lists what is read and what is refused.

    Args:
        model: The base that the adapter was trained on; frozen, as `attach` does.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        name: What to call the adapter; may be left out where the model has no other.

    Returns:
        What was attached.

    Raises:
        CheckpointError: The folder is damaged, uses an option that this library does not compute, or its keys or
            shapes are not those of this model; the model is unchanged.
        TargetError: The name is taken or missing beside other adapters, or a host is of a kind that cannot be adapted.
    """
    folder = Path(folder)
    if name is None and is_attached(model):
        raise TargetError(
            f"This model has adapters already; give those of {folder} a name (name=...) beside them, or detach them "
            "first."
        )
    found = read_peft_files(folder)
    with disabled(model):  # trial calls of the model are to show the base
        fitted = found.fit(model)
    report = attach(model, fitted.methods, name=name)
    try:
        load_adapter_state_dict(model, fitted.state, name)
        if found.base_fingerprint is not None or found.base_sample is not None:
            with only(model, name):
                check_base(model, found.base_fingerprint, found.base_sample, str(folder))
    except CheckpointError as error:
        detach(model, name)
        raise CheckpointError(f"{folder}: {error}") from error
    return report


def read_peft_files(folder: Path) -> PeftFiles:
    """Read and check an adapter folder in PEFT's format; see `load_peft`.

    Raises:
        CheckpointError: It is missing or damaged, or uses an option that this library does not compute.
    """
    _check_there(folder)
    base_fingerprint = _own_fingerprint(folder)
    config = read_peft_config(folder / CONFIG_NAME)
    tensors = load_tensors(folder / PEFT_WEIGHTS_NAME)
    check_finite(tensors, str(folder))
    return PeftFiles(
        folder=folder,
        config=config,
        tensors=tensors,
        base_fingerprint=base_fingerprint,
        base_sample=read_base_sample(folder),
    )


def read_peft_config(path: Path) -> PeftConfig:
    """Read and check an `adapter_config.json`.

    Raises:
        CheckpointError: It is damaged, of a kind that is not read, or uses an option not computed here.
    """
    return parse_peft_config(load_config(path), str(path))


def _check_there(folder: Path) -> None:
    """Refuse folders without a config or without safetensors, saying what is there instead."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory; name the one that holds {CONFIG_NAME}.")
    if not (folder / CONFIG_NAME).is_file():
        if (folder / OWN_WEIGHTS_NAME).is_file():
            raise CheckpointError(
                f"{folder} holds an adapter in this library's own format alone; attach its method and use load_adapter."
            )
        raise CheckpointError(f"{folder} holds no {CONFIG_NAME}, so it is not an adapter of PEFT.")
    if (folder / PEFT_WEIGHTS_NAME).is_file():
        return
    if (folder / _PICKLED_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds its weights as {_PICKLED_NAME}, a pickle, which could run code when it is read, so it is "
            "refused. If you trust it, load it with PEFT and save it again: that writes safetensors."
        )
    raise CheckpointError(f"{folder} holds no {PEFT_WEIGHTS_NAME}; get the adapter again.")


def _own_fingerprint(folder: Path) -> str | None:
    """Return the base's fingerprint if this library wrote the folder, and check its files."""
    if not is_adapter_folder(folder):
        return None
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return manifest.base_fingerprint
