"""Write computed updates as an adapter folder in PEFT's format, which PEFT, transformers and this library read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_lightning.arithmetic.adapter import Layer, LowRankAdapters
from lora_lightning.arithmetic.factors import Factors
from lora_lightning.checkpoint.base_sample import BASE_SAMPLE_NAME, BaseSample
from lora_lightning.checkpoint.files import atomic_folder
from lora_lightning.checkpoint.folder import (
    RunFacts,
    check_finite,
    refuse_taken,
    save_tensors,
    write_peft_files,
)
from lora_lightning.checkpoint.manifest import FileRecord, Manifest, class_config, plain, write_manifest
from lora_lightning.errors import CheckpointError
from lora_lightning.peft_format.adapter import PeftAdapter
from lora_lightning.peft_format.lora.decode import method_of
from lora_lightning.peft_format.lora.parameters import flatten, wrapper_paths
from lora_lightning.peft_format.names import PREFIX, any_of, exactly
from lora_lightning.peft_format.schema.targets import TargetConfig


@dataclass(frozen=True, kw_only=True)
class Computed:
    """An adapter that was computed from others.

    Args:
        updates: The updates by the paths of their layers.
        layout: How each layer is spelled, likewise.
        targets: The layers that each source takes, by PEFT's rules.
        rest: Further tensors by PEFT's keys.
        copies: Paths of the modules that are trained as copies.
        facts: What is known of the runs.
        base_fingerprint: Digest of the base, or None.
        base_sample: A few values of the base, or None.
        files: Further files by name.
    """

    updates: dict[str, Factors]
    layout: Mapping[str, Layer]
    targets: Sequence[TargetConfig]
    rest: Mapping[str, Tensor]
    copies: Sequence[str]
    facts: RunFacts
    base_fingerprint: str | None = None
    base_sample: BaseSample | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


def write_computed(folder: Path, adapter: Computed, derived: Mapping[str, Any]) -> Manifest:
    """Write a computed adapter into a new folder, all of it or nothing.

    Args:
        folder: Where to; absent or empty.
        adapter: The adapter.
        derived: How it was computed, for the manifest.

    Returns:
        The manifest.

    Raises:
        CheckpointError: The folder is taken, or a value is NaN or infinite.
    """
    refuse_taken(folder)
    config = _config(adapter)
    peft = PeftAdapter(config=config, state={**_tensors(adapter), **adapter.rest})
    check_finite(peft.state, "The result")
    with atomic_folder(folder) as temporary:
        for name, content in adapter.files.items():
            (temporary / name).write_bytes(content)
        write_peft_files(temporary, peft, adapter.facts)
        sample = adapter.base_sample
        if sample is not None:
            save_tensors(temporary / BASE_SAMPLE_NAME, sample.values, sample.metadata())
        manifest = Manifest(
            **asdict(adapter.facts),
            adapter_format="peft",
            methods=[class_config(method_of(config))],
            base_fingerprint=adapter.base_fingerprint,
            files={path.name: FileRecord.of(path) for path in sorted(temporary.iterdir())},
            derived=plain(derived),
        )
        write_manifest(temporary, manifest)
    return manifest


def _config(adapter: Computed) -> dict[str, Any]:
    """Return PEFT's config: scaling 1 everywhere, so that alpha is the rank of each layer."""
    ranks = {path: update.rank for path, update in adapter.updates.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {exactly(path): rank for path, rank in ranks.items() if rank != usual}
    parameters = _parameters(adapter)
    paths = [path for path in ranks if path not in parameters]
    first = adapter.targets[0]
    task_types = [one.task_type for one in adapter.targets if one.task_type]
    config: dict[str, Any] = {
        "alpha_pattern": dict(pattern),
        "base_model_name_or_path": first.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "modules_to_save": list(adapter.copies) or None,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": pattern,
        "revision": None,
        "task_type": task_types[0] if task_types else None,
        "use_dora": False,
        "use_rslora": False,
        **_targets(adapter.targets, paths),
    }
    return {**config, "target_parameters": parameters} if parameters else config


def _targets(targets: Sequence[TargetConfig], paths: list[str]) -> dict[str, Any]:
    """Return which modules PEFT takes: as the sources say it, where all say the same, else by their whole paths."""
    names = [_names(one) for one in targets]
    is_alike = bool(names[0]) and all(one == names[0] for one in names)
    whole = any_of(paths) if paths else []  # for null PEFT takes its own usual ones
    return {
        "target_modules": names[0] if is_alike and paths else whole,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _names(targets: TargetConfig) -> list[str]:
    """Return the names of the targets, where names alone say which they are; PEFT's order means nothing."""
    is_narrowed = targets.exclude_modules or targets.layers_to_transform
    found = targets.target_modules
    return sorted(found) if isinstance(found, list) and not is_narrowed else []


def _parameters(adapter: Computed) -> list[str]:
    """Return the paths of single parameters, those of one module in the order in which the module lists them.

    Raises:
        CheckpointError: The sources adapt different parameters of one module, whose order is then unknown.
    """
    found = [path for path in adapter.updates if adapter.layout[path].is_parameter]
    for one in adapter.targets:
        listed = [path for path in getattr(one, "target_parameters", ()) if path in found]
        for holder in {path.rpartition(".")[0] for path in listed}:
            here, all_here = (
                [path for path in paths if path.rpartition(".")[0] == holder] for paths in (listed, found)
            )
            if here != all_here:
                raise CheckpointError(
                    f"The adapters take different parameters of {holder!r}, and PEFT's format goes by the order in "
                    "which the module lists them; combine adapters that take the same ones."
                )
    return found


def _tensors(adapter: Computed) -> dict[str, Tensor]:
    """Return the factors by PEFT's keys, in PEFT's shapes."""
    wrappers = wrapper_paths(_parameters(adapter))
    dtype = torch.float32
    for layer in adapter.layout.values():
        dtype = torch.promote_types(dtype, layer.dtype)
    tensors: dict[str, Tensor] = {}
    for path, update in adapter.updates.items():
        layer = adapter.layout[path]
        a, b = update.a.to(dtype), update.b.to(dtype)
        if layer.is_embedding:
            tensors |= {f"{PREFIX}{path}.lora_embedding_A": a, f"{PREFIX}{path}.lora_embedding_B": b}
            continue
        if layer.is_parameter:
            a, b = flatten(a, b)
        a = a.reshape(len(a), -1, *layer.kernel)
        b = b.reshape(*b.shape, *[1] * len(layer.kernel))
        owner = wrappers.get(path, path)
        tensors |= {f"{PREFIX}{owner}.lora_A.weight": a, f"{PREFIX}{owner}.lora_B.weight": b}
    return tensors


def copies_in(adapters: Sequence[LowRankAdapters], rest: Mapping[str, Tensor]) -> list[str]:
    """Return the paths of the copies whose tensors are kept."""
    every = dict.fromkeys(path for one in adapters for path in one.copies)
    return [path for path in every if any(f".{path}." in f".{key}" for key in rest)]
