"""Keys and values of adapters in front of those that a transformers model computes, through its attention interface."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.adapters.base import AttentionAdapter
from lora_lightning.adapters.view import AttentionPlace
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.backbones.trials.trial import Call, Trial, first_tensor, has_values, is_same, path_of, quiet
from lora_lightning.errors import TargetError

ROUTED = "lora_lightning"
_PROBED = "lora_lightning_probe"
_SUPPORTED = ("sdpa", "eager")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_bias: Tensor | None = None,
    **kwargs: Any,  # noqa: ANN401 - the interface's own
) -> tuple[Tensor, Any]:
    """Attend as transformers' `sdpa` does, with the keys and values of the module's adapters in front.

    The cache never holds them, since this comes after it; so cached and uncached generation are the same.

    Args:
        module: The attention module.
        query: `[batch, heads, length, head size]`.
        key: `[batch, kv heads, kv length, head size]`.
        value: The same.
        attention_mask: Boolean or additive, `[batch, 1, length, kv length]`, or None.
        position_bias: Additive, `[1 or batch, heads, length, kv length]` (T5), or None.
        **kwargs: The rest, passed on.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    stack: Any = module._modules.get(RESERVED)
    adapters = [] if stack is None else stack.acting(AttentionAdapter)
    for adapter in adapters:
        prefix_keys, prefix_values = adapter(module)
        num = prefix_keys.shape[1]
        if attention_mask is None and query.shape[2] > 1 and _is_causal(module, kwargs):
            length, kv_length = query.shape[2], key.shape[2]
            ones = torch.ones(length, kv_length, dtype=torch.bool, device=query.device)
            attention_mask = ones.tril(kv_length - length)[None, None]
        key = torch.cat([prefix_keys.to(key.dtype).expand(len(key), -1, -1, -1), key], 2)
        value = torch.cat([prefix_values.to(value.dtype).expand(len(value), -1, -1, -1), value], 2)
        if attention_mask is not None:
            visible = 1.0 if attention_mask.dtype is torch.bool else 0.0
            attention_mask = F.pad(attention_mask, (num, 0), value=visible)
        if position_bias is not None:
            position_bias = F.pad(position_bias, (num, 0))
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    output: tuple[Tensor, Any] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def route(model: Any) -> Callable[[nn.Module], None]:  # noqa: ANN401 - a transformers model
    """Send every attention of a model through `attend`.

    Returns:
        What undoes it; it can be pickled.
    """
    before = _implementation(model)
    register(ROUTED, attend)
    model.set_attn_implementation(ROUTED)
    return partial(restore, implementation=before)


def restore(model: Any, implementation: str) -> None:  # noqa: ANN401 - a transformers model
    """Give a model the attention implementation back that it had."""
    model.set_attn_implementation(implementation)


def find_attention(model: Any) -> list[AttentionPlace]:  # noqa: ANN401 - a transformers model
    """Return the attention modules that a trial call with a few tokens reaches, in the model's order.

    Raises:
        TargetError: The architecture does not go through transformers' attention interface, or computes its attention
            in another way than `attend`.
    """
    before = _implementation(model)
    trial = Trial.of(model)
    found: dict[nn.Module, tuple[int, int, int]] = {}

    def probe(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,  # noqa: ANN401 - the interface's own
        **kwargs: Any,  # noqa: ANN401 - the attention interface of transformers
    ) -> tuple[Tensor, Any]:
        found[module] = (key.shape[1], key.shape[3], value.shape[3])
        return attend(module, query, key, value, *args, **kwargs)

    register(_PROBED, probe)
    with quiet(model):
        plain = trial.call(model, trial.rows(with_front=True, with_mask=False))
        model.set_attn_implementation(_PROBED)
        try:
            probed = trial.call(model, trial.rows(with_front=True, with_mask=False))
        finally:
            model.set_attn_implementation(before)
    if not found:
        raise _unsupported(model, probed.problem)
    _check_same(model, plain, probed)
    order = {id(module): index for index, module in enumerate(model.modules())}
    return [
        AttentionPlace(path=path_of(model, module), num_heads=heads, head_size=keys, value_size=values)
        for module, (heads, keys, values) in sorted(found.items(), key=lambda item: order[id(item[0])])
    ]


def _check_same(model: Any, plain: Call, probed: Call) -> None:  # noqa: ANN401 - a transformers model
    """Raise TargetError where attention through `attend`, without a prefix, is not the model's own."""
    if probed.problem and not plain.problem:
        raise _unsupported(model, probed.problem)
    expected, actual = first_tensor(plain.output), first_tensor(probed.output)
    if expected is None or actual is None or not has_values(model) or is_same(actual, expected):
        return
    raise TargetError(
        f"Prefix methods do not work on {model.config.model_type}: its attention is another than "
        "scaled-dot-product attention (it has sinks, a cap or a mask of its own). Use PromptTuning, or LoRA."
    )


def _implementation(model: Any) -> str:  # noqa: ANN401 - a transformers model
    name: str | None = getattr(model.config, "_attn_implementation", None)
    can_set: Any = getattr(model, "_can_set_attn_implementation", None)
    if can_set is None or not can_set():
        raise _unsupported(model)
    if name not in _SUPPORTED:
        raise TargetError(
            f"Prefix methods need the attention implementation sdpa or eager, and this model was loaded with {name!r}."
        )
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        raise TargetError(
            f"Prefix methods do not work on {model.config.model_type}: it caps the scores of its attention "
            "(attn_logit_softcapping), which scaled-dot-product attention does not. Use PromptTuning, or LoRA."
        )
    return str(name)


def _unsupported(model: Any, problem: str = "") -> TargetError:  # noqa: ANN401 - a transformers model
    because = f" ({problem})" if problem else ""
    return TargetError(
        f"Prefix methods do not work on {model.config.model_type}: its attention does not go through transformers' "
        f"attention interface{because}. Use LoRA, or PromptTuning where that works."
    )


def register(name: str, function: Callable[..., Any]) -> None:
    """Give transformers an attention function by its name, with the masks of `sdpa`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)  # without it padding is ignored
