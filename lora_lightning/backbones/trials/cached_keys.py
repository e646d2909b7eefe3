"""Whether the keys and values of a cache reach the attention of a transformers model as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.sharded import is_sharded
from lora_lightning.backbones.attention import attend, implementations, register, restore
from lora_lightning.backbones.reasons import reason_of
from lora_lightning.backbones.trials.trial import NUM_FRONT, Trial, has_values, quiet

_WATCHED = "lora_lightning_watched"
_Taken = tuple[nn.Module, Tensor, Tensor]
_Pair = tuple[Tensor, Tensor]


def why_cache_is_changed(model: Any) -> str | None:  # noqa: ANN401 - a transformers model
    """Return how a model's attention takes other keys and values than its cache holds, as the end of a sentence.

    A prefix of this library stands in front of what the attention takes, and PEFT's stands in the cache. Most models
    pass on what they cache; DiffLlama takes the halves of its values in turn. A trial call with drawn keys and values
    shows it. There is none on the meta device, nor of a model that is spread over processes.

    Args:
        model: The model, with adapters or without.

    Returns:
        The reason; None where the attention takes what is cached.
    """
    if not has_values(model) or is_sharded(model):
        return None
    ids = Trial.of(model).rows(with_front=False, with_mask=False).ids
    with quiet(model):
        plain, problem = _watched(model, {"input_ids": ids})
        drawn = _drawn(model, plain)
        found, problem_of_cache = _watched(model, {"input_ids": ids, **_cache(list(drawn.values()), ids)})
    if problem or problem_of_cache:
        return f"with which a call of the model fails ({problem or problem_of_cache})"
    if all(_holds(drawn.get(module), key, value) for module, key, value in found):
        return None
    return "and its attention takes other keys and values than the cache holds"


def _watched(model: Any, given: dict[str, Any]) -> tuple[list[_Taken], str]:  # noqa: ANN401 - a transformers model
    """Return what each attention takes in a call of a model, in the order of their calls, and the call's error."""
    taken: list[_Taken] = []

    def watch(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,  # noqa: ANN401 - the interface's own
        **kwargs: Any,  # noqa: ANN401 - the interface's own
    ) -> tuple[Tensor, Any]:
        taken.append((module, key, value))
        return attend(module, query, key, value, *args, **kwargs)

    before = implementations(model.config)
    register(_WATCHED, watch)
    model.set_attn_implementation(_WATCHED)
    try:
        model(**given)
    except Exception as error:
        return taken, f"{type(error).__name__}: {reason_of(error)}"
    finally:
        restore(model, before)
    return taken, ""


def _drawn(model: nn.Module, taken: list[_Taken]) -> dict[nn.Module, _Pair]:
    """Return keys and values to cache for each attention, in the model's order, which is that of the cache."""
    by_module = {module: (key, value) for module, key, value in taken}
    ordered = [module for module in model.modules() if module in by_module]
    return {module: (_like(by_module[module][0]), _like(by_module[module][1])) for module in ordered}


def _like(tensor: Tensor) -> Tensor:
    return torch.randn_like(tensor[:, :, :NUM_FRONT])


def _cache(drawn: list[_Pair], ids: Tensor) -> dict[str, Any]:
    """Return a cache of some tokens, with the mask for these and those of `ids`, as PEFT gives them to a model."""
    from transformers import DynamicCache

    mask = ids.new_ones(len(ids), NUM_FRONT + ids.shape[1])
    return {"past_key_values": DynamicCache(drawn), "attention_mask": mask, "use_cache": True}


def _holds(drawn: _Pair | None, key: Tensor, value: Tensor) -> bool:
    """Return whether keys and values begin with the drawn ones."""
    if drawn is None:
        return False
    return torch.equal(key[:, :, :NUM_FRONT], drawn[0]) and torch.equal(value[:, :, :NUM_FRONT], drawn[1])
