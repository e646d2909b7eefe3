"""Spell an adapter the way PEFT does: its `adapter_config.json` and the keys of its tensors.

Written against PEFT 0.21. Scalings are kept by choosing `lora_alpha` so that PEFT computes the same factor, which also
covers the plain `alpha` scaling that PEFT has no word for. What PEFT cannot express is answered with None.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters import attached_methods, folded_state_dict, iter_adapters
from lora_lightning.adapters.weights import HostKind, original_class
from lora_lightning.methods.dora import DoRAAdapter
from lora_lightning.methods.expert_lora import ExpertLoRAAdapter
from lora_lightning.peft_format.copies import extra_copies, is_copy, task_type_of
from lora_lightning.peft_format.experts import flatten, wrapper_paths
from lora_lightning.peft_format.keys import PREFIX
from lora_lightning.peft_format.names import exactly, module_paths, target_modules
from lora_lightning.peft_format.updates import (
    Update,
    computed_update,
    expert_updates,
    stored_update,
    why_no_update,
)


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter as PEFT stores it.

    Args:
        config: Content of `adapter_config.json`.
        state: Tensors by PEFT's key names.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class _Parts:
    """The adapters of a model, sorted."""

    low_rank: dict[str, Update]
    heads: list[str]

    @property
    def parameters(self) -> list[str]:
        """Paths of the adapted parameters of experts."""
        return [path for path, update in self.low_rank.items() if update.kind is None]


def to_peft(
    model: nn.Module, state: Mapping[str, Tensor] | None = None, *, as_lora: bool = False
) -> PeftAdapter | None:
    """Describe the adapters of a model in PEFT's format.

    Args:
        model: A model with adapters.
        state: What `folded_state_dict` gives, where the caller has gathered it already.
        as_lora: Write every relative of LoRA as the LoRA that computes the same (at another rank, if need be), from
            which its own method could not go on training.

    Returns:
        Config and tensors; None where PEFT has no way to say it (`why_not_peft` tells why): other methods than LoRA and
        DoRA, both at once, a DoRA magnitude per input, a convolution with groups, or names that PEFT would match to
        more modules.
    """
    state = folded_state_dict(model) if state is None else state
    parts = _sort_adapters(model, state, as_lora=as_lora)
    if parts is None:
        return None
    paths = module_paths(model)
    task_type = task_type_of(model)
    extra = extra_copies(paths, parts.heads, parts.low_rank, task_type)
    if extra is None:  # without a task type PEFT adds no names of its own
        task_type, extra = None, extra_copies(paths, parts.heads, parts.low_rank, None)
    if extra is None:
        return None
    tensors = _rename(parts, state)
    for path in extra:
        own = model.get_submodule(path).state_dict()
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in own.items()}
    return PeftAdapter(config=_build_config(model, parts, paths, task_type), state=tensors)


def why_not_peft(model: nn.Module) -> str:
    """Return the reason for which `to_peft(model, as_lora=True)` has no answer, as the end of a sentence."""
    names = [type(method).__name__ for method in attached_methods(model)]
    found = [(path, host, adapter) for path, host, adapter in iter_adapters(model) if not (is_copy(adapter) and path)]
    reasons = {path: reason for path, host, adapter in found if (reason := why_no_update(host, adapter))}
    if 0 < len(reasons) < len(found) and len(names) > 1:
        return f"a folder of PEFT holds one method, and {' and '.join(names)} are attached"
    if reasons:
        path, reason = next(iter(reasons.items()))
        return f"{reason} (at {path!r})"
    if any(not path for path, _, _ in found):
        return "PEFT cannot adapt a model that is itself the adapted layer"
    if len({isinstance(adapter, DoRAAdapter) for _, _, adapter in found}) > 1:
        return f"a folder of PEFT holds LoRA or DoRA, and {' and '.join(names)} are attached"
    if not found:
        return "only full copies of modules were trained, and PEFT's LoRA wants at least one adapted layer"
    return "PEFT would match names of its modules_to_save or targets to other modules of this model too"


def _sort_adapters(model: nn.Module, state: Mapping[str, Tensor], *, as_lora: bool) -> _Parts | None:
    """Sort adapters into low-rank ones and heads; None where PEFT knows one of them not."""
    low_rank: dict[str, Update] = {}
    heads = []
    for path, host, adapter in iter_adapters(model):
        if is_copy(adapter) and path:
            heads.append(path)
            continue
        if isinstance(adapter, ExpertLoRAAdapter):
            updates = _expert_updates(path, host, adapter, as_lora=as_lora)
        else:
            one = computed_update(host, adapter) if as_lora else stored_update(path, host, adapter, state)
            updates = {} if one is None else {path: one}
        if not updates or not path or updates.keys() & low_rank.keys():
            return None
        low_rank |= updates
    kinds = {update.magnitude is None for update in low_rank.values()}
    parts = _Parts(low_rank, heads)
    return parts if len(kinds) == 1 and _names_parameters_alone(model, parts) else None


def _names_parameters_alone(model: nn.Module, parts: _Parts) -> bool:
    """Tell whether PEFT, which matches ends of paths, takes for `target_parameters` what we mean and nothing else.

    Beside them the targets must be a list, since our own list holds both.
    """
    if not parts.parameters:
        return True
    ends = tuple(f".{path}" for path in parts.parameters)
    others = [name for name, _ in model.named_parameters() if name.endswith(ends)]
    modules = [path for path in parts.low_rank if path not in parts.parameters]
    return not others and isinstance(target_modules(module_paths(model), modules), list)


def _expert_updates(path: str, host: nn.Module, adapter: ExpertLoRAAdapter, *, as_lora: bool) -> dict[str, Update]:
    """Return the updates of experts; nothing where PEFT could not go on training: it has no dropout there."""
    return expert_updates(path, host, adapter) if as_lora or not adapter.dropout else {}


def _rename(parts: _Parts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors PEFT's names and shapes."""
    renamed: dict[str, Tensor] = {}
    wrappers = wrapper_paths(parts.parameters)
    for path, update in parts.low_rank.items():
        a, b, kind = update.a, update.b, update.kind
        if kind is None:
            a, b = flatten(a, b)
            renamed |= {f"{PREFIX}{wrappers[path]}.lora_A.weight": a, f"{PREFIX}{wrappers[path]}.lora_B.weight": b}
        elif kind is HostKind.EMBEDDING:
            renamed |= {f"{PREFIX}{path}.lora_embedding_A": a, f"{PREFIX}{path}.lora_embedding_B": b}
        else:
            trailing = _kernel_size(update.host) if kind is HostKind.CONV else ()
            a = a.reshape(a.shape[0], -1, *trailing)
            b = b.reshape(*b.shape, *[1] * len(trailing))
            renamed |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
        magnitude = update.magnitude
        if magnitude is not None:
            if kind is HostKind.CONV:
                magnitude = magnitude.reshape(1, -1, *[1] * (a.dim() - 2))
            # PEFT itself leaves `.weight` out and reads both; transformers' `load_adapter` (5.23) reads only
            # this form, and would silently start from a fresh magnitude otherwise.
            renamed[f"{PREFIX}{path}.lora_magnitude_vector.weight"] = magnitude
    heads = tuple(f"{path}." for path in parts.heads)
    renamed |= {f"{PREFIX}{name}": tensor for name, tensor in state.items() if heads and name.startswith(heads)}
    return renamed


def _kernel_size(host: nn.Module) -> tuple[int, ...]:
    weight = host.weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape[2:])


def _build_config(model: nn.Module, parts: _Parts, paths: Sequence[str], task_type: str | None) -> dict[str, Any]:
    methods = attached_methods(model)
    use_rslora = all(getattr(method, "scaling", None) == "rslora" for method in methods)
    updates = parts.low_rank
    ranks = {path: update.rank for path, update in updates.items()}
    alphas = {path: _alpha(update, use_rslora=use_rslora) for path, update in updates.items()}
    r, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    classes = {original_class(update.host).__name__ for update in updates.values()}
    modules = [path for path in updates if path not in parts.parameters]
    wide = {path for path, update in updates.items() if update.is_wide}  # `r` may not be, an own rank may
    config = {
        "alpha_pattern": _pattern(alphas, alpha),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": "Conv1D" in classes,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parts.parameters else max(update.dropout for update in updates.values()),
        "modules_to_save": list(parts.heads) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": _pattern(ranks, r) | {exactly(path): rank for path, rank in ranks.items() if path in wide},
        "revision": None,
        "target_modules": target_modules(paths, modules) if modules else [],  # for null PEFT takes its own usual ones
        "task_type": task_type,
        "use_dora": any(update.magnitude is not None for update in updates.values()),
        "use_rslora": use_rslora,
    }
    return {**config, "target_parameters": parts.parameters} if parts.parameters else config


def _alpha(update: Update, *, use_rslora: bool) -> int | float:
    """Return the `lora_alpha` from which PEFT computes this update's scaling."""
    divisor = math.sqrt(update.rank) if use_rslora else update.rank
    alpha = update.scaling * divisor
    rounded = round(alpha, 9)  # undoes the rounding of alpha / r * r
    if math.isclose(rounded, alpha, rel_tol=1e-14):
        alpha = rounded
    return int(alpha) if float(alpha).is_integer() else alpha


def _most_common(values: Iterable[Any]) -> Any:  # noqa: ANN401 - ints or floats
    return Counter(values).most_common(1)[0][0]


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:  # noqa: ANN401 - ints or floats
    """Return PEFT's pattern for the hosts that differ from the usual value; `^` keeps it from matching suffixes."""
    return {exactly(path): value for path, value in values.items() if value != usual}
