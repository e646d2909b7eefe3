"""Backbones without weights: the right modules and shapes, for counting what a run needs before anything is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lightning.adapters.targets import is_within
from lora_lightning.backbones.reasons import reason_of
from lora_lightning.backbones.storage.gguf import gguf_config, gguf_parts
from lora_lightning.backbones.view import view_of
from lora_lightning.errors import BackboneError

_IS_ACTIVE: ContextVar[bool] = ContextVar("lora_lightning_without_weights", default=False)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextmanager
def without_weights() -> Iterator[None]:
    """Make `load_backbone` build models from their config alone inside the block; no weight is read.

    Combine it with `torch.device("meta")` or a `FakeTensorMode`, or the model gets random weights in real memory.
    """
    token = _IS_ACTIVE.set(True)
    try:
        yield
    finally:
        _IS_ACTIVE.reset(token)


def is_without_weights() -> bool:
    """Return whether this runs inside `without_weights`."""
    return _IS_ACTIVE.get()


def build_skeleton(
    name: str, auto_class: str, dtype: str, overrides: dict[str, Any]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Build a model from its config, on the current default device.

    Args:
        name: Hub name, folder or `pkg://package/folder`; a GGUF file is not converted for it.
        auto_class: Name of transformers' class.
        dtype: `auto` for the files' own, or a dtype's name.
        overrides: Overrides of the model's config.

    Returns:
        The model, and the paths of the modules whose weights the files do not hold.

    Raises:
        BackboneError: There is no config, or `auto_class` does not know this kind of model.
    """
    import transformers

    config, source = _read_config(name, overrides)
    files = _stored(source) if source else {}
    wanted = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    if wanted is None:
        wanted = next(iter(files.values()), torch.float32)
    try:
        model = getattr(transformers, auto_class).from_config(config, dtype=wanted)
    except ValueError as error:
        raise BackboneError(f"{auto_class} cannot load {name!r}: {reason_of(error)}") from error
    return model, _new_modules(model, files, config)


def _read_config(name: str, overrides: dict[str, Any]) -> tuple[Any, str | None]:
    """Return a backbone's config and where its weights are, the latter None for a GGUF file."""
    from transformers import AutoConfig

    parts = gguf_parts(name)
    if parts is not None:
        config = gguf_config(parts)
        config.update(overrides)
        return config, None
    from lora_lightning.backbones.load import locate

    source = locate(name)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **overrides), source
    except (OSError, ValueError) as error:
        raise BackboneError(f"The config of {name!r} cannot be read: {reason_of(error)}") from error


def _stored(source: str) -> dict[str, torch.dtype]:
    """Return the names of the tensors in a model's safetensors files with their dtypes; empty where there are none."""
    from safetensors import SafetensorError, safe_open

    weights, index = _file_of(source, _WEIGHTS), _file_of(source, _INDEX)
    if weights is not None:
        try:
            with safe_open(weights, framework="pt") as tensors:
                named = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise BackboneError(f"{weights} is not a readable safetensors file ({error}); get it again.") from error
        return {key: _STORED_DTYPES.get(dtype, torch.float32) for key, dtype in named.items()}
    if index is not None:
        return dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"], torch.float32)
    return {}


def _file_of(source: str, file_name: str) -> Path | None:
    """Return a file of a model folder, or of the local Hub cache, where it is there."""
    if Path(source).is_dir():
        path = Path(source, file_name)
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, file_name)
    return Path(cached) if isinstance(cached, str) else None


def _new_modules(model: nn.Module, files: dict[str, torch.dtype], config: Any) -> tuple[str, ...]:  # noqa: ANN401 - transformers' configs differ by model
    """Return the heads and poolers whose weights the files lack; they would be drawn at random and trained.

    Where the files cannot be looked into, a head is new unless the config was written by the very same class.
    """
    heads = view_of(model).head_paths()
    if not files:
        is_same = type(model).__name__ in (getattr(config, "architectures", None) or [type(model).__name__])
        return () if is_same else tuple(heads)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    named = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in named)
    new = []
    for key, parameter in named:
        path = key.rpartition(".")[0]
        may_be_new = is_within(path, heads) or "pooler" in path.split(".")
        if may_be_new and uses[id(parameter)] == 1 and not {key, key.removeprefix(prefix)} & files.keys():
            new.append(path)
    return tuple(dict.fromkeys(new))
