"""Prefix tuning in PEFT's format: keys and values of all layers in one matrix, which PEFT puts into the cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters import folded_state_dict
from lora_lightning.adapters.walk import unwrap
from lora_lightning.adapters.weights import original_class
from lora_lightning.backbones.trials.cached_keys import why_cache_is_changed
from lora_lightning.backbones.view import view_of
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import PTuningV2
from lora_lightning.methods.prefix import Prefix
from lora_lightning.peft_format.adapter import FittedAdapter
from lora_lightning.peft_format.kinds.prompts import (
    KEY,
    SIZES,
    copied_modules,
    sizes_of,
    split_tensors,
    why_no_wrapper,
)
from lora_lightning.peft_format.names import PEFT_WEIGHTS_NAME
from lora_lightning.peft_format.schema.fields import read_fields, refuse_unknown
from lora_lightning.peft_format.schema.targets import PeftConfig


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(PeftConfig):
    """The part of PEFT's `PrefixTuningConfig` that this library computes.

    Args:
        num_virtual_tokens: Number of keys and values in every layer.
    """

    num_virtual_tokens: int


def parse_prefix(data: Mapping[str, Any], source: str) -> PrefixConfig:
    """Check the content of an `adapter_config.json` of prefix tuning.

    Raises:
        CheckpointError: A value is missing, of the wrong kind, or an option that this library does not compute.
    """
    sizes = {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
    starts = {"encoder_hidden_size", "prefix_projection", "init_weights"}
    refuse_unknown(data, {*SIZES, *sizes, *starts}, "prefix tuning", source)
    return PrefixConfig(**read_fields(data, SIZES, source))


def fit_prefix(model: nn.Module, config: PrefixConfig, tensors: Mapping[str, Tensor], source: str) -> FittedAdapter:
    """Convert a prefix for one model; see `fit_to_model`."""
    reason = why_another_prefix(model)
    if reason is not None:
        raise CheckpointError(f"{source} holds a prefix, and {reason}. Train it again with this library.")
    rows, copies = split_tensors(model, config, tensors, source)
    places = view_of(model).attention_places()
    num, sizes = config.num_virtual_tokens, {(place.num_heads, place.head_size) for place in places}
    width = sum(2 * place.num_heads * place.head_size for place in places)
    if len(sizes) != 1 or rows.shape != (num, width):
        raise CheckpointError(
            f"{source}/{PEFT_WEIGHTS_NAME}: {KEY} is {list(rows.shape)}, and {num} keys and values of all layers of "
            f"this model are [{num}, {width}]; load the base that it was trained on."
        )
    num_heads, head_size = sizes.pop()
    by_layer = rows.view(num, 2 * len(places), num_heads, head_size).permute(1, 2, 0, 3)
    state: dict[str, Tensor] = {}
    for index, place in enumerate(places):
        state[f"{place.path}.prefix_keys"] = by_layer[2 * index].contiguous()
        state[f"{place.path}.prefix_values"] = by_layer[2 * index + 1].contiguous()
    method = PTuningV2(num_virtual_tokens=num, modules_to_save=copied_modules(model, copies) or None)
    return FittedAdapter(methods=(method,), state={**state, **copies})


def why_another_prefix(model: nn.Module) -> str | None:
    """Return why PEFT computes something else with a prefix on a model, as the end of a sentence, or None."""
    model = unwrap(model)
    config: Any = model.config
    text = config.get_text_config()
    if config.is_encoder_decoder:
        return "PEFT gives an encoder-decoder's prefix to the decoder alone, and this library to every attention"
    body: Any = getattr(model, getattr(model, "base_model_prefix", ""), model)
    if "past_key_values" not in inspect.signature(original_class(body).forward).parameters:
        return f"PEFT puts it into a cache, which {type(body).__name__} does not take"
    layers = getattr(text, "layer_types", None)
    windows = "sliding_attention" in layers if layers else getattr(text, "sliding_window", None) is not None
    if windows:
        return "PEFT lets layers with a sliding window lose sight of it, which this library does not"
    if layers and set(layers) != {"full_attention"}:
        return "PEFT counts layers without attention too"
    changed = why_cache_is_changed(model)
    return None if changed is None else f"PEFT puts it into a cache, {changed} (on {type(model).__name__})"


def encode_prefix(
    model: nn.Module, method: Prefix, state: Mapping[str, Tensor], paths: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of a prefix, by the paths of the attention modules; see `encode`."""
    num = method.num_virtual_tokens
    names = [f"{path}.prefix_{part}" for path in paths for part in ("keys", "values")]
    parts = [state[name].permute(1, 0, 2).flatten(1) for name in names]
    heads, _, head_size = state[names[0]].shape
    width = heads * head_size
    others = {
        "peft_type": "PREFIX_TUNING",
        "num_attention_heads": heads,
        "num_layers": len(paths),
        "encoder_hidden_size": width,
        "prefix_projection": False,
    }
    return sizes_of(model, num, width, **others), {KEY: torch.cat(parts, 1)}


def why_no_prefix(model: nn.Module) -> str | None:
    """Return why PEFT cannot use a model's prefix, as the end of a sentence, or None."""
    shapes = {tensor.shape for name, tensor in folded_state_dict(model).items() if name.endswith(".prefix_keys")}
    if len(shapes) > 1:
        return "PEFT has keys and values of one size for all layers, and those of this model differ"
    return why_another_prefix(model) or _why_other_size(model, *shapes) or why_no_wrapper(model)


def _why_other_size(model: nn.Module, shape: torch.Size) -> str | None:
    """Return why PEFT would make keys of another size than `[heads, num, head size]`, or None.

    Where a model's config has `num_key_value_heads`, PEFT goes by the config and not by the adapter's own sizes.
    """
    config: Any = unwrap(model).config
    settings = config.get_text_config().to_dict()
    heads, _, head_size = shape
    if "num_key_value_heads" not in settings:
        return None
    theirs = settings["num_key_value_heads"], settings.get("head_dim") or head_size
    if theirs == (heads, head_size):
        return None
    return (
        f"PEFT takes the size of keys from the config (num_key_value_heads={theirs[0]}, head_dim={theirs[1]}), and the "
        f"attention of this model has {heads} of {head_size}"
    )
