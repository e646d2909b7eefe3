"""Keys and values of adapters in front of those that a transformers model computes, through its attention interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.adapters.base import AttentionAdapter
from lora_lightning.adapters.selection.rows import Mixture
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
    front = None if stack is None else _front(module, stack, len(key))
    if front is not None:
        if attention_mask is None and (front.visible is not None or _masks_later(module, query, kwargs)):
            attention_mask = _mask(module, query, key, kwargs)
        key = torch.cat([front.keys.to(key.dtype), key], 2)
        value = torch.cat([front.values.to(value.dtype), value], 2)
        if attention_mask is not None:
            attention_mask = front.put_before(attention_mask)
        if position_bias is not None:
            position_bias = F.pad(position_bias, (front.keys.shape[2], 0))
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
    output: tuple[Tensor, Any] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output


@dataclass(frozen=True)
class _Front:
    """Keys and values in front of a module's own.

    Args:
        keys: `[batch, kv heads, num, head size]`.
        values: The same, of the values' head size.
        visible: Which of them each row has, `[batch, num]`; None where all have all.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor | None

    def put_before(self, mask: Tensor) -> Tensor:
        """Return a mask `[1 or batch, 1, length, kv length]` that says which of these keys are seen, too."""
        num, is_bool = self.keys.shape[2], mask.dtype is torch.bool
        if self.visible is None:
            return F.pad(mask, (num, 0), value=1.0 if is_bool else 0.0)
        own: Tensor = self.visible
        if not is_bool:
            own = torch.zeros_like(own, dtype=mask.dtype).masked_fill(~own, torch.finfo(mask.dtype).min)
        rows, heads, length = len(own), mask.shape[1], mask.shape[2]
        own = own[:, None, None, :].expand(rows, heads, length, num)
        return torch.cat([own, mask.expand(rows, -1, -1, -1)], 3)


def _front(module: nn.Module, stack: Any, batch: int) -> _Front | None:  # noqa: ANN401 - AdapterStack
    """Return the keys and values of a module's adapters for a batch, where some act; several have rows of their own."""
    names, rows = stack.selector.at(stack.path)
    adapters: Sequence[AttentionAdapter] = stack.chosen(AttentionAdapter, names)
    if not adapters:
        return None
    pairs = [adapter(module) for adapter in adapters]
    if rows is None:
        keys, values = (torch.cat(parts, 1)[None].expand(batch, -1, -1, -1) for parts in zip(*pairs, strict=True))
        return _Front(keys, values, None)
    mixture = Mixture(adapters, rows, rows.count_in(batch, stack.path))
    lengths = [keys.shape[1] for keys, _ in pairs]
    num = max(lengths)
    whole = []
    for parts in zip(*pairs, strict=True):
        heads, _, size = parts[0].shape
        all_rows = parts[0].new_zeros(batch, heads, num, size)
        for adapter, part in zip(adapters, parts, strict=True):
            index = mixture.index_of(adapter)
            padded = F.pad(part, (0, 0, 0, num - part.shape[1]))
            all_rows = all_rows.index_copy(0, index, padded.expand(len(index), -1, -1, -1).to(all_rows.dtype))
        whole.append(all_rows)
    keys, values = whole
    own_lengths = mixture.by_row(lengths, other=0)
    return _Front(keys, values, torch.arange(num, device=keys.device) < own_lengths[:, None])


def _masks_later(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Return whether attention without a mask hides later positions by itself."""
    return query.shape[2] > 1 and _is_causal(module, kwargs)


def _mask(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Return the mask that attention without one stands for, `[1, 1, length, kv length]`."""
    length, kv_length = query.shape[2], key.shape[2]
    ones = torch.ones(length, kv_length, dtype=torch.bool, device=query.device)
    is_causal = _masks_later(module, query, kwargs)
    return (ones.tril(kv_length - length) if is_causal else ones)[None, None]


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def route(model: Any) -> Callable[[nn.Module], None]:  # noqa: ANN401 - a transformers model
    """Send every attention of a model through `attend`.

    Returns:
        What undoes it; it can be pickled.
    """
    _check_implementation(model)
    before = implementations(model.config)
    register(ROUTED, attend)
    model.set_attn_implementation(ROUTED)
    return partial(restore, implementation=before)


def implementations(config: Any, outer: str | None = None) -> Any:  # noqa: ANN401 - transformers' own forms
    """Return the attention implementation of a config, as `set_attn_implementation` takes it back.

    Args:
        config: The config of a model or of a part.
        outer: The implementation of the config around it, for a part that does not say.

    Returns:
        A name; a dictionary of the parts' names for a model that was loaded with several.
    """
    own = getattr(config, "_attn_implementation", None) or outer
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    inside = {name: implementations(part, own) for name, part in parts.items() if part is not None}
    return {"": own, **inside} if any(one != own for one in inside.values()) else own


def restore(model: Any, implementation: Any) -> None:  # noqa: ANN401 - a transformers model
    """Give a model back the attention implementations that it had, in the form of `implementations`."""
    model.set_attn_implementation(implementation)


def find_attention(model: Any) -> list[AttentionPlace]:  # noqa: ANN401 - a transformers model
    """Return the attention modules that a trial call with a few tokens reaches, in the model's order.

    Raises:
        TargetError: The architecture does not go through transformers' attention interface, or computes its attention
            in another way than `attend`.
    """
    _check_implementation(model)
    before = implementations(model.config)
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
            restore(model, before)
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


def _check_implementation(model: Any) -> None:  # noqa: ANN401 - a transformers model
    name: str | None = getattr(model.config, "_attn_implementation", None)
    can_set: Any = getattr(model, "_can_set_attn_implementation", None)
    if can_set is None or not can_set():
        raise _unsupported(model)
    if name not in (*_SUPPORTED, ROUTED):
        raise TargetError(
            f"Prefix methods need the attention implementation sdpa or eager, and this model was loaded with {name!r}."
        )
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        raise TargetError(
            f"Prefix methods do not work on {model.config.model_type}: it caps the scores of its attention "
            "(attn_logit_softcapping), which scaled-dot-product attention does not. Use PromptTuning, or LoRA."
        )


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
