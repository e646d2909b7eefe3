"""Convert a LoRA or DoRA in PEFT's format for a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters import TargetedMethod
from lora_lightning.adapters.targets import has_suffix, select_weights
from lora_lightning.adapters.view import ModelView
from lora_lightning.adapters.weights import find_codec
from lora_lightning.backbones.view import view_of
from lora_lightning.errors import CheckpointError, ConfigError, TargetError
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.peft_format.adapter import FittedAdapter
from lora_lightning.peft_format.hosts import (
    check_hosts,
    copied_paths,
    expected_hosts,
    own_modules,
    refuse_different,
    tied_to,
)
from lora_lightning.peft_format.keys import LORA, SortedTensors, sort_tensors
from lora_lightning.peft_format.kinds.tokens import read_listed_tokens
from lora_lightning.peft_format.lora.config import LoraConfig
from lora_lightning.peft_format.lora.parameters import AdaptedParameter, own_names, parameters_of
from lora_lightning.peft_format.names import CONFIG_NAME, PEFT_WEIGHTS_NAME, base_state, target_modules
from lora_lightning.peft_format.trained_base import Beside, read_base, read_biases

_Numbers = dict[str, tuple[int, float]]


def fit_lora(model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], source: str) -> FittedAdapter:
    """Convert a LoRA or DoRA for one model; see `fit_to_model`."""
    modules = own_modules(model)
    saved = copied_paths(modules, config, tensors)
    saved += tied_to(modules, saved) if config.ties else []
    found = sort_tensors(tensors, LORA, saved, base_state(model).keys(), f"{source}/{PEFT_WEIGHTS_NAME}")
    saved = [path for path in saved if any(name.startswith(f"{path}.") for name in found.copies)]
    parameters = _parameters(modules, config, source)
    found = replace(found, own=_own(model, parameters, config, found))
    added = {name.removesuffix(".lora_bias"): found.own.pop(name) for name in _bias_names(found)}
    if not found.hosts:
        raise CheckpointError(f"{source}/{PEFT_WEIGHTS_NAME} holds no LoRA tensor; the file is not an adapter of PEFT.")
    view = view_of(model)
    numbers = _hosts(modules, config, found, view, parameters)
    check_hosts(list(numbers), found.hosts)
    refuse_different(model, [*numbers, *saved], source)
    method = _method(config, view, modules, numbers, saved, source)
    beside = _beside(model, config, found, added, saved, numbers, source)
    return FittedAdapter(methods=(method, *beside.methods), state={**found.own, **found.copies, **beside.state})


def _parameters(modules: Mapping[str, nn.Module], config: LoraConfig, source: str) -> list[AdaptedParameter]:
    """Return the parameters that the config names.

    Raises:
        CheckpointError: It names others.
    """
    known = parameters_of(modules)
    other = [one for one in config.target_parameters if not any(has_suffix(known_one.path, one) for known_one in known)]
    if other:
        raise CheckpointError(
            f"{source}/{CONFIG_NAME}: target_parameters names {', '.join(map(repr, other[:3]))}, and this model has no "
            "such parameter of two or three dimensions that is stored dense; load the base that it was trained on, or "
            "merge the adapter with PEFT."
        )
    return [one for one in known if any(has_suffix(one.path, name) for name in config.target_parameters)]


def _own(
    model: nn.Module, parameters: Sequence[AdaptedParameter], config: LoraConfig, found: SortedTensors
) -> dict[str, Tensor]:
    """Return the adapter's tensors with those of single parameters by our names."""
    ranks = {one.path: config.rank_and_alpha(one.path)[0] for one in parameters}
    dims = {one.path: model.get_parameter(one.path).dim() for one in parameters}
    return own_names(found.own, parameters, ranks, dims)


def _bias_names(found: SortedTensors) -> list[str]:
    return [name for name in found.own if name.endswith(".lora_bias")]


def _hosts(
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    found: SortedTensors,
    view: ModelView,
    parameters: Sequence[AdaptedParameter],
) -> _Numbers:
    """Return rank and alpha of each host and each single parameter, by path."""
    only_parameters = config.target_modules is None and bool(config.target_parameters)
    expected = [] if only_parameters else expected_hosts(modules, config, found.hosts, view)
    if config.ties:
        expected += [path for path in tied_to(modules, expected) if path in found.hosts]
    numbers = {path: config.rank_and_alpha(path) for path in expected}
    return numbers | {one.target: config.rank_and_alpha(one.path) for one in parameters}


def _beside(
    model: nn.Module,
    config: LoraConfig,
    found: SortedTensors,
    added: Mapping[str, Tensor],
    saved: Sequence[str],
    numbers: _Numbers,
    source: str,
) -> Beside:
    """Return what was trained of the base in addition to the adapter."""
    is_bias = {name: name == "bias" or name.endswith(".bias") for name in found.base}
    biases = {name: tensor for name, tensor in found.base.items() if is_bias[name] and config.bias != "none"}
    rest = {name: tensor for name, tensor in found.base.items() if name not in biases}
    scaled = {path: _scaling(config, numbers[path]) * bias for path, bias in added.items()}
    parts = (
        read_biases(model, biases, scaled, saved, source),
        read_base(model, rest, list(numbers), source),
        read_listed_tokens(model, config.token_indices, found, source),
    )
    return Beside.of(parts)


def _scaling(config: LoraConfig, numbers: tuple[int, float]) -> float:
    r, alpha = numbers
    return alpha / (r**0.5 if config.use_rslora else r)


def _method(
    config: LoraConfig,
    view: ModelView,
    modules: Mapping[str, nn.Module],
    numbers: _Numbers,
    saved: list[str],
    source: str,
) -> LoRA:
    """Build the method: with the config's target names if they select the same modules here, else with paths."""
    cls = DoRA if config.use_dora else LoRA
    ranks = {f"^{_escape(path)}": r for path, r in _own_ranks(config, view, numbers).items()}
    alphas = {f"^{_escape(path)}": alpha for path, (_, alpha) in numbers.items() if alpha != config.alpha}
    settings: dict[str, Any] = {
        "r": config.r,
        "alpha": config.alpha,
        "dropout": config.dropout,
        "scaling": "rslora" if config.use_rslora else "standard",
        "rank_pattern": ranks or None,
        "alpha_pattern": alphas or None,
        "modules_to_save": saved or None,
    }
    targets = config.target_modules  # PEFT keeps a set, whose order means nothing
    if isinstance(targets, list) or config.target_parameters:
        targets = sorted({*(targets if isinstance(targets, list) else ()), *config.target_parameters})
    own_words: dict[str, Any] = {
        "target_modules": targets,
        "exclude_modules": config.exclude_modules or None,
        "layers_to_transform": config.layers_to_transform,
    }
    try:
        method = cls(**settings, **own_words)
        if sorted(_selected(view, method) or ()) == sorted(numbers):
            return method
        return cls(**settings, target_modules=_named(list(modules), list(numbers), source))
    except ConfigError as error:
        raise CheckpointError(f"{source}/{CONFIG_NAME}: {error}") from error


def _own_ranks(config: LoraConfig, view: ModelView, numbers: _Numbers) -> dict[str, int]:
    """Return the ranks that differ from the usual one, or are larger than their weight, which `r` may not be."""
    ranks = {path: r for path, (r, _) in numbers.items()}
    return {path: r for path, r in ranks.items() if r != config.r or r > _smaller_side(view.model, path)}


def _smaller_side(model: nn.Module, path: str) -> int:
    """Return the smaller side of the matrices of a layer, or of a parameter of a module."""
    holder, _, name = path.rpartition(".")
    parent = model.get_submodule(holder)
    if name in parent._parameters:
        return min(parent.get_parameter(name).shape[-2:])
    host = model.get_submodule(path)
    codec = find_codec(host)
    return min(codec.shape(host)) if codec is not None else 1 << 30  # attaching says what is wrong with it


def _named(paths: Sequence[str], hosts: Sequence[str], source: str) -> list[str] | str:
    """Return our own target_modules for hosts and single parameters, by their paths."""
    modules = [path for path in hosts if path in paths]
    parameters = [path for path in hosts if path not in paths]
    targets = target_modules(paths, modules)
    if parameters and isinstance(targets, str):
        raise CheckpointError(
            f"{source} adapts single parameters, and beside them modules whose paths other modules' paths end in, for "
            "which this library has no target_modules; merge it with PEFT."
        )
    return [*targets, *parameters] if parameters else targets


def _selected(view: ModelView, method: TargetedMethod) -> list[str] | None:
    """Return the hosts and single parameters that a method would select, or None if it would refuse or warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return [path for path, _ in select_weights(view, method)]
        except (TargetError, ConfigError, UserWarning):
            return None


def _escape(path: str) -> str:
    return path.replace(".", r"\.")
