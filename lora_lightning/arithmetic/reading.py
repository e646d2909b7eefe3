"""Read adapters for arithmetic: from PEFT's folders, from checkpoints, and from this library's folders on a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_lightning.adapters import (
    adapter_names,
    attached_methods,
    detach,
    is_attached,
    load_adapter_state_dict,
    only,
)
from lora_lightning.arithmetic.adapter import LowRankAdapters, read_layers
from lora_lightning.backbones.attach import attach
from lora_lightning.checkpoint.base_sample import BASE_SAMPLE_NAME, base_sample_of, read_base_sample
from lora_lightning.checkpoint.complete import folder_at
from lora_lightning.checkpoint.fingerprint import fingerprint
from lora_lightning.checkpoint.folder import RunFacts, is_adapter_folder
from lora_lightning.checkpoint.manifest import Manifest, check_files, class_config, read_manifest
from lora_lightning.checkpoint.pair import SUFFIX
from lora_lightning.checkpoint.peft_folder import read_peft_files
from lora_lightning.checkpoint.saved_run import SavedRun, facts_of_manifest
from lora_lightning.errors import CheckpointError, TargetError
from lora_lightning.peft_format.config import CONFIG_NAME, PEFT_WEIGHTS_NAME, parse_peft_config
from lora_lightning.peft_format.encode import to_peft, why_not_peft
from lora_lightning.peft_format.kinds.adalora import AdaLoraConfig
from lora_lightning.peft_format.lora.config import LoraConfig
from lora_lightning.peft_format.schema.targets import PeftConfig
from lora_lightning.public import import_classes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_lightning.adapters import Method

_FROM_FILES = (LoraConfig, AdaLoraConfig)
"""What the files of a folder say without a model."""


def read_adapter(source: str | Path, model: nn.Module | None = None) -> LowRankAdapters:
    """Read the low-rank updates of an adapter.

    Args:
        source: A folder in PEFT's format, of PEFT or of this library; a `.ckpt` of a task, or the folder beside one;
            with `model` any adapter folder, or the name of an adapter that is attached to it.
        model: A model with adapters, whose names are sources; or the bare base. The base is needed where the folder
            alone does not say what is added to the weights, such as for VeRA; left out, a `.ckpt` beside the folder is
            loaded on its own base.

    Raises:
        CheckpointError: It is missing or damaged, or holds something else than low-rank updates.
        TargetError: `model` has adapters already.
    """
    path = Path(source)
    if model is not None and source in adapter_names(model):
        return _of_name(model, str(source))
    if path.is_file():
        return _of_checkpoint(path)
    if _has_peft_files(path):
        files = read_peft_files(path)
        is_enough = isinstance(files.config, _FROM_FILES)
        if is_enough and (model is None or not getattr(files.config, "target_parameters", None)):
            return read_layers(files.config, files.tensors, str(path), **_known_of_folder(path, files.config))
    if model is not None:
        return _on_model(path, model)
    checkpoint = path.with_name(path.name + SUFFIX)
    if is_adapter_folder(path) and checkpoint.is_file():
        return _of_checkpoint(checkpoint)
    if _has_peft_files(path):
        return read_layers(files.config, files.tensors, str(path), **_known_of_folder(path, files.config))
    if is_adapter_folder(path):
        names = " and ".join(str(one["class_path"]).rpartition(".")[2] for one in read_manifest(path).methods)
        raise CheckpointError(
            f"{path} holds {names} in this library's own format, which only its base completes. Name the .ckpt that it "
            "was written beside, pass the base as `model`, or write it with lora-lightning export --to peft."
        )
    raise CheckpointError(f"{path} is not an adapter: it is neither a .ckpt file nor a folder with {CONFIG_NAME}.")


def updates_of(model: nn.Module, source: str, **known: Any) -> LowRankAdapters:  # noqa: ANN401 - fields of the result
    """Return the updates that are attached to a model, as the LoRA that computes the same.

    Args:
        model: A model with adapters.
        source: What to call it in messages.
        **known: Further fields of the result.

    Raises:
        CheckpointError: They are not low-rank updates of weights, or PEFT has no words for them.
    """
    found = to_peft(model, as_lora=True)
    if found is None:
        raise CheckpointError(f"{source} cannot be added or cut as a low-rank update: {why_not_peft(model)}.")
    config = parse_peft_config(found.config, source)
    return read_layers(config, found.state, source, **known)


def _of_name(model: nn.Module, name: str) -> LowRankAdapters:
    """Return the updates that are attached to a model under one name."""
    with only(model, name):
        return updates_of(
            model,
            name,
            base_fingerprint=fingerprint(model),  # takes the sample, too
            base_sample=base_sample_of(model),
            corrects_quantization=_is_corrected(map(class_config, attached_methods(model))),
        )


def _has_peft_files(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() and (folder / PEFT_WEIGHTS_NAME).is_file()


def _known_of_folder(folder: Path, config: PeftConfig) -> dict[str, Any]:
    """Return what is known of a folder beside its tensors; its files were compared with its manifest."""
    if not is_adapter_folder(folder):
        return {"facts": RunFacts(base=config.base)}
    manifest = read_manifest(folder)
    return {
        "facts": facts_of_manifest(manifest, str(folder)),
        "base_fingerprint": manifest.base_fingerprint,
        "base_sample": read_base_sample(folder),
        "files": _further_files(folder, manifest),
        "corrects_quantization": _is_corrected(manifest.methods),
    }


def _is_corrected(methods: Iterable[Mapping[str, Any]]) -> bool:
    return any(one["init_args"].get("init") == "loftq" for one in methods)


def _further_files(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Return the files of a folder that are not the adapter's weights, such as the tokenizer's."""
    names = [name for name in manifest.files if not name.startswith("adapter") and name != BASE_SAMPLE_NAME]
    return {name: (folder / name).read_bytes() for name in names}


def _of_checkpoint(path: Path) -> LowRankAdapters:
    """Load a task's checkpoint on its base, and return its updates.

    Raises:
        CheckpointError: It cannot be used.
    """
    run = SavedRun.of_checkpoint(path)
    task = run.build()
    model = getattr(task, "model", None)
    if not isinstance(model, nn.Module) or not is_attached(model):
        raise CheckpointError(f"{path} holds no adapter, so there is nothing to add or cut.")
    files: dict[str, bytes] = {}
    if run.manifest is not None:
        folder = folder_at(path, run.manifest)
        check_files(folder, run.manifest)
        files = _further_files(folder, run.manifest)
    return updates_of(
        model,
        str(path),
        facts=run.facts_with(task),
        base_fingerprint=run.base_fingerprint,
        base_sample=run.base_sample,
        files=files,
        corrects_quantization=_is_corrected(map(class_config, attached_methods(model))),
    )


def _on_model(folder: Path, model: nn.Module) -> LowRankAdapters:
    """Load an adapter folder into a bare model, return its updates, and detach it again.

    Raises:
        TargetError: The model has adapters.
        CheckpointError: The folder does not fit it.
    """
    if is_attached(model):
        raise TargetError(f"`model` has adapters already, and {folder} is not the name of one; pass the bare base.")
    run = SavedRun.of_folder(folder)
    methods, state = run.adapter_for(model)
    attach(model, [_build(one, str(folder)) for one in methods])
    try:
        load_adapter_state_dict(model, state)
        return updates_of(
            model,
            str(folder),
            facts=run.facts,
            base_fingerprint=run.base_fingerprint,
            base_sample=run.base_sample,
            files={} if run.manifest is None else _further_files(folder, run.manifest),
            corrects_quantization=_is_corrected(methods),
        )
    finally:
        detach(model)


def _build(plain: Mapping[str, Any], source: str) -> Method:
    """Build a method of this library from its plain form.

    Raises:
        CheckpointError: It is another one.
    """
    known = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in import_classes("methods").values()}
    class_path = str(plain["class_path"])
    if class_path not in known:
        raise CheckpointError(f"{source} was trained with {class_path}, which is not a method of this library.")
    method: Method = known[class_path](**plain["init_args"])
    return method
