"""Export parts of the base that PEFT stores with a LoRA: shifted biases and trained rows of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters import iter_adapters
from lora_lightning.adapters.walk import join
from lora_lightning.adapters.weights import HostKind
from lora_lightning.methods.bitfit import BiasAdapter
from lora_lightning.methods.trainable_tokens import TrainableTokensAdapter
from lora_lightning.peft_format.adapter import PeftAdapter
from lora_lightning.peft_format.kinds.tokens import named_holder, namesakes, tied_namesakes, why_other_tokens
from lora_lightning.peft_format.lora.updates import Update
from lora_lightning.peft_format.names import PREFIX


def encode_beside(
    model: nn.Module,
    updates: Mapping[str, Update],
    biases: Mapping[str, BiasAdapter],
    tokens: Mapping[str, TrainableTokensAdapter],
) -> PeftAdapter | None:
    """Return the entries in config and tensors besides a LoRA; None if PEFT cannot express them (`why_not_beside`).

    Args:
        model: The model.
        updates: The LoRA's updates by their paths.
        biases: Shifts of biases by the paths of the modules.
        tokens: Trained rows by the paths of the modules that have them.
    """
    if why_not_beside(model) is not None or not _are_taken(model, updates, biases):
        return None
    config: dict[str, Any] = {}
    state: dict[str, Tensor] = {}
    added = [path for path in biases if _bias(model, path) is None]
    own = [path for path in biases if path not in added]
    if own:
        config["bias"] = "lora_only" if set(own) <= set(updates) else "all"
    for path in own:
        inside = f"{path}.base_layer" if path in updates else path
        base = _bias(model, path)
        assert base is not None
        state[f"{PREFIX}{inside}.bias"] = (base.detach().float() + biases[path].delta.detach()).to(base.dtype)
    if added:
        config["lora_bias"] = True  # for every layer of the LoRA, or PEFT misses some
        for path, update in updates.items():
            shift = biases[path].delta.detach() / update.scaling if path in added else torch.zeros(len(update.b))
            state[f"{PREFIX}{path}.lora_B.bias"] = shift
    if tokens:
        config |= _token_indices(model, tokens)
        for path in {named_holder(model, path): None for path in tokens}:
            for one in (path, *tied_namesakes(model, path)):
                name = join(f"{PREFIX}{one}", "token_adapter.trainable_tokens_delta")
                state[name] = tokens[path].rows.tokens.detach()
    return PeftAdapter(config=config, state=state)


def _token_indices(model: nn.Module, tokens: Mapping[str, TrainableTokensAdapter]) -> dict[str, Any]:
    paths = list({named_holder(model, path): None for path in tokens})
    return {"trainable_token_indices": {path: tokens[path].rows.token_indices for path in paths}}


def _are_taken(model: nn.Module, updates: Mapping[str, Update], biases: Mapping[str, BiasAdapter]) -> bool:
    """Return whether PEFT has a bias for every shift of a module without one."""
    added = [path for path in biases if _bias(model, path) is None]
    if not added:
        return True
    is_plain = all(update.kind in (HostKind.LINEAR, HostKind.CONV) for update in updates.values())
    return is_plain and set(added) <= set(updates) and all(one.magnitude is None for one in updates.values())


def why_not_beside(model: nn.Module) -> str | None:
    """Return why PEFT cannot express what was trained with a LoRA, as the end of a sentence, or None."""
    for path, host, adapter in iter_adapters(model):
        if isinstance(adapter, TrainableTokensAdapter):
            reason = why_other_tokens(model, path)
            reason = reason or _why_no_name(model, path, adapter)
            if reason is not None:
                return f"{reason} (at {path!r})"
        if isinstance(adapter, BiasAdapter) and getattr(host, "bias", None) is None and not _has_lora(model, path):
            return f"PEFT adds a bias to layers of a LoRA alone, and {path!r} is none"
    return None


def _why_no_name(model: nn.Module, path: str, adapter: TrainableTokensAdapter) -> str | None:
    """Return why PEFT cannot name an embedding without naming one that has other rows, or None."""
    others = {other: one for other, _, one in iter_adapters(model) if isinstance(one, TrainableTokensAdapter)}
    tied = tied_namesakes(model, path)
    for other in namesakes(model, path):
        own = others.get(other)
        has_same_tokens = own is not None and own.rows.token_indices == adapter.rows.token_indices
        if other not in tied and not has_same_tokens:
            return f"PEFT finds embeddings by the ends of their paths, and would train the same rows of {other!r}"
    return None


def _has_lora(model: nn.Module, path: str) -> bool:
    others = [one for other, _, one in iter_adapters(model) if other == path and not isinstance(one, BiasAdapter)]
    return bool(others)


def _bias(model: nn.Module, path: str) -> Tensor | None:
    bias = getattr(model.get_submodule(path), "bias", None)
    return bias if isinstance(bias, Tensor) else None
