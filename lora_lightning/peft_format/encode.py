"""Convert an adapter to PEFT's format: its `adapter_config.json` and the keys of its tensors.

Written against PEFT 0.21. `lora_alpha` is chosen so that PEFT computes the same scaling factor, which also covers the
plain `alpha` scaling, for which PEFT has no option. The result is None for adapters that PEFT cannot express.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters import Adapter, attached_methods, folded_state_dict, iter_adapters
from lora_lightning.adapters.experts import expert_weights
from lora_lightning.adapters.weights import HostKind, original_class
from lora_lightning.methods.bitfit import BiasAdapter
from lora_lightning.methods.dora import DoRAAdapter
from lora_lightning.methods.expert_lora import ExpertLoRAAdapter
from lora_lightning.methods.parameter_lora import ParameterLoRAAdapter
from lora_lightning.methods.trainable_tokens import TrainableTokensAdapter
from lora_lightning.peft_format.adapter import PeftAdapter
from lora_lightning.peft_format.copies import extra_copies, is_copy, task_type_of
from lora_lightning.peft_format.differences import why_out_of_reach
from lora_lightning.peft_format.expert_names import NO_DORA, by_parameter, is_named_as_experts
from lora_lightning.peft_format.lora.beside import encode_beside, why_not_beside
from lora_lightning.peft_format.lora.parameters import flatten, wrapper_paths
from lora_lightning.peft_format.lora.updates import (
    Update,
    computed_update,
    parameter_updates,
    stored_update,
    why_no_update,
)
from lora_lightning.peft_format.names import PREFIX, base_state, exactly, module_paths, target_modules


@dataclass
class _Parts:
    """The adapters of a model, sorted.

    Args:
        low_rank: Updates by the paths of their hosts or parameters.
        heads: Paths of copies.
        biases: Shifts of biases, by the paths of the modules.
        tokens: Trained rows, by the paths of the modules that have them.
    """

    low_rank: dict[str, Update] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    biases: dict[str, BiasAdapter] = field(default_factory=dict)
    tokens: dict[str, TrainableTokensAdapter] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        """Paths of the parameters that are adapted by their names."""
        return [path for path, update in self.low_rank.items() if update.kind is None]


def to_peft(
    model: nn.Module, state: Mapping[str, Tensor] | None = None, *, as_lora: bool = False
) -> PeftAdapter | None:
    """Describe the adapters of a model in PEFT's format.

    Args:
        model: A model with adapters.
        state: Result of `folded_state_dict`, if the caller has gathered it.
        as_lora: Write every relative of LoRA as the equivalent LoRA (possibly of another rank), which its own method
            cannot continue to train; and include what PEFT stores of the base with a LoRA: shifted biases (BitFit),
            trained rows of embeddings and single parameters.

    Returns:
        Config and tensors; None if PEFT cannot express them (`why_not_peft` returns the reason): other methods than
        LoRA and DoRA, both at once, a DoRA magnitude per input, a convolution with groups, or names that PEFT would
        match to more modules.
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
        own = base_state(model.get_submodule(path))
        tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in own.items()}
    config = _build_config(model, parts, paths, task_type)
    beside = encode_beside(model, parts.low_rank, parts.biases, parts.tokens)
    if beside is None:
        return None
    is_plain = not parts.biases and not parts.tokens and not _bare_parameters(model, parts)
    return PeftAdapter(config=config | beside.config, state=tensors | beside.state, reads_back=is_plain)


def why_not_peft(model: nn.Module) -> str:
    """Return the reason why `to_peft(model, as_lora=True)` returns None, as the end of a sentence."""
    names = [type(method).__name__ for method in attached_methods(model)]
    found = [(path, host, one) for path, host, one in iter_adapters(model) if not (is_copy(one) and path)]
    out_of_reach = why_out_of_reach(model)
    reasons = {path: out_of_reach[path] for path, _, _ in iter_adapters(model) if path in out_of_reach}
    beside = [(path, host) for path, host, one in found if isinstance(one, BiasAdapter | TrainableTokensAdapter)]
    updates = [(path, host, one) for path, host, one in found if (path, host) not in beside or _is_update(one)]
    reasons |= {path: reason for path, host, one in updates if (reason := why_no_update(host, one))}
    if 0 < len(reasons) < len(found) and len(names) > 1:
        return f"a folder of PEFT holds one method, and {' and '.join(names)} are attached"
    if reasons:
        path, reason = next(iter(reasons.items()))
        return f"{reason} (at {path!r})"
    as_experts = [path for path, _, one in found if isinstance(one, DoRAAdapter) and is_named_as_experts(model, path)]
    if as_experts:
        return f"{NO_DORA} (at {as_experts[0]!r})"
    if any(not path for path, _, _ in found):
        return "PEFT cannot adapt a model that is itself the adapted layer"
    if len({isinstance(adapter, DoRAAdapter) for _, _, adapter in updates}) > 1:
        return f"a folder of PEFT holds LoRA or DoRA, and {' and '.join(names)} are attached"
    if not updates:
        return "only biases or full copies of modules were trained, and PEFT's LoRA wants at least one adapted layer"
    return why_not_beside(model) or (
        "PEFT would match names of its modules_to_save or targets to other modules of this model too"
    )


def _is_update(adapter: Adapter) -> bool:
    return not isinstance(adapter, BiasAdapter | TrainableTokensAdapter)


def _sort_adapters(model: nn.Module, state: Mapping[str, Tensor], *, as_lora: bool) -> _Parts | None:
    """Sort adapters by their type in PEFT; None if one of them has none."""
    parts, out_of_reach = _Parts(), why_out_of_reach(model)
    for path, host, adapter in iter_adapters(model):
        if not path or path in out_of_reach:
            return None
        if is_copy(adapter):
            parts.heads.append(path)
        elif isinstance(adapter, BiasAdapter) and as_lora:
            parts.biases[path] = adapter
        elif isinstance(adapter, TrainableTokensAdapter) and as_lora:
            parts.tokens[path] = adapter
        else:
            updates = by_parameter(model, _updates(path, host, adapter, state, as_lora=as_lora))
            if not updates or updates.keys() & parts.low_rank.keys():
                return None
            parts.low_rank |= updates
    kinds = {update.magnitude is None for update in parts.low_rank.values()}
    if any(update.magnitude is not None for update in parts.low_rank.values() if update.kind is None):
        return None
    return parts if len(kinds) == 1 and _names_parameters_alone(model, parts) else None


def _updates(
    path: str, host: nn.Module, adapter: Adapter, state: Mapping[str, Tensor], *, as_lora: bool
) -> dict[str, Update]:
    """Return the updates of one adapter by their paths; empty if PEFT cannot express them or continue to train them."""
    if isinstance(adapter, ParameterLoRAAdapter):
        return parameter_updates(path, host, adapter) if as_lora else {}
    if isinstance(adapter, ExpertLoRAAdapter):  # PEFT has no dropout there
        return parameter_updates(path, host, adapter) if as_lora or not adapter.dropout else {}
    one = computed_update(host, adapter) if as_lora else stored_update(path, host, adapter, state)
    return {} if one is None else {path: one}


def _bare_parameters(model: nn.Module, parts: _Parts) -> bool:
    """Return whether an adapted parameter cannot be restored from its tensors: any except those of experts."""
    holders = {path.rpartition(".")[0] for path in parts.parameters}
    return any(not expert_weights(model.get_submodule(path)) for path in holders)


def _names_parameters_alone(model: nn.Module, parts: _Parts) -> bool:
    """Return whether PEFT, which matches suffixes of paths, selects exactly our parameters with `target_parameters`.

    The targets must then also be a list, since our own list holds both.
    """
    if not parts.parameters:
        return True
    ends = tuple(f".{path}" for path in parts.parameters)
    others = [name for name, _ in model.named_parameters() if name.endswith(ends)]
    modules = [path for path in parts.low_rank if path not in parts.parameters]
    return not others and isinstance(target_modules(module_paths(model), modules), list)


def _rename(parts: _Parts, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors to PEFT's names and shapes."""
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
    """Return the `lora_alpha` with which PEFT computes this update's scaling."""
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
