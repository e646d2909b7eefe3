"""Adapter folders: weights of an adapter with a manifest, in PEFT's format if PEFT can express them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lightning.adapters import Method, attached_methods, folded_state_dict, load_adapter_state_dict, only
from lora_lightning.adapters.walk import unwrap
from lora_lightning.backbones.tokenizer_identity import check_tokenizer
from lora_lightning.checkpoint.base_name import name_for_others, public_name
from lora_lightning.checkpoint.base_sample import BASE_SAMPLE_NAME, base_sample_of, read_base_sample
from lora_lightning.checkpoint.files import atomic_folder
from lora_lightning.checkpoint.fingerprint import check_base, fingerprint
from lora_lightning.checkpoint.manifest import (
    MANIFEST_NAME,
    MAX_BYTES,
    FileRecord,
    Manifest,
    check_files,
    class_config,
    plain,
    read_manifest,
    write_manifest,
)
from lora_lightning.errors import CheckpointError
from lora_lightning.peft_format.adapter import PeftAdapter
from lora_lightning.peft_format.config import CONFIG_NAME, PEFT_WEIGHTS_NAME
from lora_lightning.peft_format.encode import to_peft
from lora_lightning.peft_format.lora.decode import from_peft, method_of
from lora_lightning.texts.model_card import CARD_NAME, CardFacts, head_of, keep_edited, model_card
from lora_lightning.texts.saved_tokenizer import TOKENIZER_CONFIG, SavedTokenizer

__all__ = ["load_adapter"]

OWN_WEIGHTS_NAME = "adapter.safetensors"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts about the run in the manifest; see `Manifest` for each."""

    base: str | None = None
    data_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    tokenizer: SavedTokenizer | None = None
    task: str | None = None
    label_names: list[str] | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0


def write_adapter_folder(
    folder: Path,
    model: nn.Module,
    facts: RunFacts | None = None,
    *,
    base_fingerprint: str | None = None,
    state: Mapping[str, Tensor] | None = None,
    peft: PeftAdapter | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> Manifest:
    """Write the adapters of a model into a folder atomically; the manifest is written last.

    Args:
        folder: The folder; an existing adapter folder is replaced.
        model: A model with adapters.
        facts: Facts about the run for the manifest.
        base_fingerprint: The base's fingerprint, if the caller knows it; it cannot be computed for a sharded base.
        state: The model's `folded_state_dict`, if the caller has gathered it from all processes.
        peft: The adapter in PEFT's terms, if it is exported for PEFT (`for_peft`) instead of written with a checkpoint.
        extra: Further files by their names, such as those of `text_files` and `own_file`.

    Returns:
        The manifest that was written.

    Raises:
        CheckpointError: A weight is NaN or infinite, or `folder` holds something else than an adapter folder.
    """
    refuse_foreign(folder)
    with atomic_folder(folder) as temporary:
        settings: dict[str, Any] = {"base_fingerprint": base_fingerprint, "state": state, "peft": peft, "extra": extra}
        manifest = fill_adapter_folder(temporary, model, facts, **settings)
        keep_edited(folder, temporary)
        return manifest


def fill_adapter_folder(
    folder: Path,
    model: nn.Module,
    facts: RunFacts | None = None,
    *,
    checkpoint: FileRecord | None = None,
    base_fingerprint: str | None = None,
    state: Mapping[str, Tensor] | None = None,
    peft: PeftAdapter | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> Manifest:
    """Write the adapters of a model into an empty folder, the manifest last; see `write_adapter_folder`.

    Args:
        folder: The folder.
        model: A model with adapters.
        facts: Facts about the run for the manifest.
        checkpoint: The `.ckpt` that belongs to the folder.
        base_fingerprint: The base's fingerprint, if the caller knows it.
        state: The model's `folded_state_dict`, if the caller has it.
        peft: The adapter in PEFT's terms, if it is exported for PEFT. If our tensors cannot be restored from it, the
            folder also holds them.
        extra: Further files by their names, such as those of `text_files` and `own_file`.

    Raises:
        CheckpointError: A weight is NaN or infinite.
        ConfigError: The model has adapters of several names, which one folder cannot hold.
    """
    with only(model, None):  # refuses several
        pass
    state = folded_state_dict(model) if state is None else dict(state)
    check_finite(state, "The adapter")
    exact, methods = to_peft(model, state), attached_methods(model)
    if exact is None and peft is not None and peft.reads_back:
        methods = (method_of(peft.config),)  # the LoRA that computes the same
    peft = exact or peft
    reads_back = peft is not None and peft.reads_back
    if not reads_back:
        save_tensors(folder / OWN_WEIGHTS_NAME, state)
    if peft is not None:
        write_peft_files(folder, peft, facts)
    base_fingerprint = base_fingerprint or fingerprint(model)
    sampled = base_sample_of(model)
    if sampled is not None:
        save_tensors(folder / BASE_SAMPLE_NAME, sampled.values, sampled.metadata())
    for name, content in (extra or {}).items():
        (folder / name).write_bytes(content)
    manifest = Manifest(
        **asdict(facts or RunFacts()),
        adapter_format="peft" if reads_back else "lora_lightning",
        methods=[class_config(method) for method in methods],
        base_fingerprint=base_fingerprint,
        files={path.name: FileRecord.of(path) for path in sorted(folder.iterdir())},
        checkpoint=checkpoint,
    )
    num_parameters = sum(tensor.numel() for tensor in state.values())
    write_card(folder, unwrap(model), manifest, num_parameters, is_for_peft=peft is not None)
    write_manifest(folder, manifest)
    return manifest


def write_card(
    folder: Path, model: nn.Module, manifest: Manifest, num_parameters: int, *, is_for_peft: bool = False
) -> None:
    """Write the model card of a folder; it is not part of the manifest, so that users may edit it.

    Args:
        folder: The folder.
        model: The model, without a wrapper.
        manifest: The folder's manifest.
        num_parameters: Number of trained parameters.
        is_for_peft: Whether PEFT reads the folder.
    """
    auto_class, pipeline_tag = head_of(model)
    facts = CardFacts(
        adapter_format=manifest.adapter_format,
        is_for_peft=is_for_peft,
        base=name_for_others(manifest.base),
        model_class=type(model).__name__,
        auto_class=auto_class,
        pipeline_tag=pipeline_tag,
        methods=manifest.methods,
        num_parameters=num_parameters,
        label_names=manifest.label_names,
        metrics=plain(manifest.metrics),
        epoch=manifest.epoch,
        step=manifest.step,
        versions=manifest.versions,
        has_tokenizer=(folder / TOKENIZER_CONFIG).is_file(),
    )
    (folder / CARD_NAME).write_bytes(model_card(facts))


def write_peft_files(folder: Path, peft: PeftAdapter, facts: RunFacts | None) -> None:
    """Write config and tensors of an adapter in PEFT's format."""
    config = {**peft.config, "base_model_name_or_path": _public_base(peft.config, facts)}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    save_tensors(folder / PEFT_WEIGHTS_NAME, peft.state)


def _public_base(config: Mapping[str, Any], facts: RunFacts | None) -> str | None:
    """Return the base's name as given by the user, else as known to transformers."""
    named = facts.base if facts is not None and facts.base is not None else config["base_model_name_or_path"]
    return None if named is None else public_name(named)


def refuse_foreign(folder: Path) -> None:
    """Refuse to replace a path that is neither an adapter folder nor an empty folder.

    Raises:
        CheckpointError: `folder` is there and holds something else.
    """
    if folder.exists() and not is_adapter_folder(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there and holds no adapter; move it away or save elsewhere.")


def refuse_taken(folder: Path) -> None:
    """Raise CheckpointError unless a path is free: absent, or an empty folder."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(f"{folder} exists already; name a folder that does not, or remove it.")


def read_adapter_folder(folder: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """Read an adapter folder that this library wrote, and check all of it.

    Args:
        folder: The folder.

    Returns:
        The manifest, and the tensors by the names of `adapter_state_dict`.

    Raises:
        CheckpointError: Something is missing, damaged, changed since it was written, NaN or infinite.
    """
    manifest = read_manifest(folder)
    is_peft = manifest.adapter_format == "peft"
    needed = [CONFIG_NAME, PEFT_WEIGHTS_NAME] if is_peft else [OWN_WEIGHTS_NAME]
    unlisted = [name for name in needed if name not in manifest.files]
    if unlisted:
        raise CheckpointError(
            f"The manifest of {folder} does not name {' and '.join(unlisted)}, so it holds no adapter to load; "
            "name the adapter folder that stands beside a checkpoint."
        )
    check_files(folder, manifest)
    state = load_tensors(folder / needed[-1])
    if is_peft:
        config = load_config(folder / CONFIG_NAME)
        _check_saved_modules(config, folder / CONFIG_NAME)
        state = from_peft(config, state)
    check_finite(state, str(folder))
    return manifest, state


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Any = None,  # noqa: ANN401 - tokenizers share no public base class
    *,
    name: str | None = None,
) -> Manifest:
    """Load an adapter folder into a model to which the same methods are attached.

    Args:
        model: A model with freshly attached adapters, on the base that the folder was trained on.
        folder: The folder, as `AdapterCheckpoint` writes it beside each checkpoint.
        tokenizer: The tokenizer of the model's data, which is compared with that of the training; None skips this.
        name: The name of the adapter to load into; may be left out where the model has one.

    Returns:
        The folder's manifest.

    Raises:
        ConfigError: No adapter has this name, or the model has several and none is named.
        CheckpointError: The folder is damaged, or its methods, base, keys or shapes differ from the model's, or its
            vocabulary from the tokenizer's; the model is unchanged.
    """
    folder = Path(folder)
    manifest, state = read_adapter_folder(folder)
    with only(model, name):
        check_methods(attached_methods(model), manifest.methods, folder)
        check_base(model, manifest.base_fingerprint, read_base_sample(folder), str(folder))
        check_tokenizer(tokenizer, manifest.tokenizer_fingerprint, str(folder))
        load_adapter_state_dict(model, state)
    return manifest


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a path is a folder with a manifest, as `write_adapter_folder` leaves it."""
    return (folder / MANIFEST_NAME).is_file()


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors with NaN or infinite values, and values that are not tensors.

    Raises:
        CheckpointError: Some have or are; the message names the first.
    """
    other = next((name for name, tensor in state.items() if not isinstance(tensor, Tensor)), None)
    if other is not None:
        raise CheckpointError(
            f"{source} holds a {type(state[other]).__name__} in {other!r}, where a tensor is expected: it was changed "
            "since it was written; use another checkpoint."
        )
    bad = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CheckpointError(
            f"{source} holds NaN or infinite values in {len(bad)} of {len(state)} tensors, the first in {bad[0]!r}; "
            "use an earlier checkpoint, and train on with a lower learning rate."
        )


def save_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors; shared storages are copied, since the format refuses them."""
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    try:
        save_file(own, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: It is truncated, damaged, of another kind, or its header is larger than any adapter's.
    """
    try:
        with path.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
        if size > MAX_BYTES:
            raise SafetensorError(f"its header claims {size} bytes, and this library reads up to {MAX_BYTES}")
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); use another checkpoint."
        ) from error


def load_config(path: Path) -> dict[str, Any]:
    """Read an `adapter_config.json`, of this library or of PEFT.

    Raises:
        CheckpointError: It is damaged or larger than any adapter's.
    """
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_BYTES} bytes, which no adapter's config is.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); get the adapter again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(config).__name__}; get the adapter again.")
    return config


def _check_saved_modules(config: Mapping[str, Any], path: Path) -> None:
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise CheckpointError(f"{path}: modules_to_save must be a list of names or null; use another checkpoint.")


def check_methods(attached: Sequence[Method], stored: Sequence[Mapping[str, Any]], folder: Path | str) -> None:
    """Refuse methods that compute something else from the same tensors, such as another alpha.

    A setting that is newer than the folder counts as its default.

    Args:
        attached: The methods of the model.
        stored: Those of the folder, as `class_config` gives them.
        folder: Path of the folder, or name of the source, for the message.

    Raises:
        CheckpointError: They differ in more than settings of training or of target selection.
    """
    configs = [class_config(method) for method in attached]
    names = [[method["class_path"] for method in methods] for methods in (configs, stored)]
    if names[0] != names[1]:
        raise CheckpointError(
            f"{folder} was trained with {names[1]}, and the model has {names[0]} attached; attach the same."
        )
    for method, config, other in zip(attached, configs, stored, strict=True):
        own = config["init_args"]
        theirs = {**_defaults(type(method)), **other["init_args"]}
        for key in sorted((own.keys() | theirs.keys()) - method.training_settings):
            if own.get(key) != theirs.get(key):
                raise CheckpointError(
                    f"{folder} was trained with {key}={theirs.get(key)!r}, and the model has {key}={own.get(key)!r}; "
                    f"attach {type(method).__name__} with {key}={theirs.get(key)!r}."
                )


def _defaults(method: type[Method]) -> dict[str, Any]:
    """Return the settings that have a plain default, as a manifest holds them."""
    return {spec.name: plain(spec.default) for spec in fields(method) if spec.default is not MISSING}
