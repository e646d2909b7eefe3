"""Fit an adapter that PEFT wrote to a model: what to attach, and its tensors by this library's names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters import TargetedMethod
from lora_lightning.adapters.targets import has_suffix, select_weights
from lora_lightning.adapters.view import ModelView
from lora_lightning.adapters.weights import RESERVED, HostKind, codec_of, find_codec
from lora_lightning.backbones.view import view_of
from lora_lightning.errors import CheckpointError, ConfigError, TargetError
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.peft_format.config import CONFIG_NAME, PEFT_WEIGHTS_NAME, PeftConfig
from lora_lightning.peft_format.experts import own_names, parameter_paths
from lora_lightning.peft_format.keys import SortedTensors, sort_tensors
from lora_lightning.peft_format.names import saved_paths, target_modules

_ALL_LINEAR = "all-linear"
_CLASSIFIER_NAMES = ("score", "classifier")  # what PEFT leaves out of all-linear on a classifier
_BASE_TOLERANCE = 1e-2  # a base saved in bfloat16 and loaded in float32 is the same base


@dataclass(frozen=True, kw_only=True)
class FittedAdapter:
    """An adapter in PEFT's format, understood for one model.

    Args:
        method: What to attach; it names copies to train in `modules_to_save`.
        state: The tensors by the names of `adapter_state_dict`.
    """

    method: LoRA
    state: dict[str, Tensor]


def fit_to_model(model: nn.Module, config: PeftConfig, tensors: Mapping[str, Tensor], source: str) -> FittedAdapter:
    """Understand an adapter in PEFT's format for one model, without changing the model.

    Args:
        model: The bare model.
        config: What the adapter's `adapter_config.json` says.
        tensors: The adapter's tensors by PEFT's key names.
        source: Where the adapter came from, for messages.

    Raises:
        CheckpointError: Keys or tensors do not fit the config or the model.
    """
    _warn_of_other_base(model, config, source)
    modules = {path: one for path, one in model.named_modules() if path and RESERVED not in path.split(".")}
    saved = saved_paths(list(modules), [*config.modules_to_save, *_implied_copies(config, tensors)])
    found = sort_tensors(tensors, saved, model.state_dict().keys(), f"{source}/{PEFT_WEIGHTS_NAME}")
    saved = [path for path in saved if modules[path].state_dict()]
    if not found.hosts:
        raise CheckpointError(f"{source}/{PEFT_WEIGHTS_NAME} holds no LoRA tensor; the file is no adapter of PEFT.")
    _check_base_parameters(model, found, source)
    view = view_of(model)
    parameters = _parameters(modules, config, source)
    ranks = {path: config.rank_and_alpha(path)[0] for path in parameters}
    found = replace(found, low_rank=own_names(found.low_rank, ranks))
    hosts = _hosts(modules, config, found, view, parameters)
    _refuse_grouped(modules, hosts, source)
    method = _method(config, view, list(modules), hosts, saved, source)
    return FittedAdapter(method=method, state={**found.low_rank, **found.copies})


def _implied_copies(config: PeftConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names that PEFT's wrapper for classifiers adds to `modules_to_save`, where the file has tensors."""
    if config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return []
    return [name for name in _CLASSIFIER_NAMES if any(re.search(rf"{name}\.[^.]+$", key) for key in tensors)]


def _warn_of_other_base(model: nn.Module, config: PeftConfig, source: str) -> None:
    """Say that the adapter names another base; only its last part counts, since folders move."""
    here = getattr(getattr(model, "config", None), "_name_or_path", None)
    names = [PurePosixPath(str(name).replace("\\", "/")).name.lower() for name in (here, config.base) if name]
    if len(names) == 2 and names[0] != names[1]:
        warnings.warn(
            f"{source} names {config.base!r} as its base, and this model came from {here!r}: the shapes are compared, "
            "the base's weights are not.",
            stacklevel=5,
        )


def _parameters(modules: Mapping[str, nn.Module], config: PeftConfig, source: str) -> list[str]:
    """Return the parameters of experts that the config names.

    Raises:
        CheckpointError: It names other parameters.
    """
    known = parameter_paths(modules)
    other = [one for one in config.target_parameters if not any(has_suffix(path, one) for path in known)]
    if other:
        raise CheckpointError(
            f"{source}/{CONFIG_NAME}: target_parameters names {', '.join(map(repr, other[:3]))}, and this model has no "
            "such parameter of experts in the layout of transformers' experts interface; load the base that it was "
            "trained on, or merge the adapter with PEFT."
        )
    return [path for path in known if any(has_suffix(path, one) for one in config.target_parameters)]


def _hosts(
    modules: Mapping[str, nn.Module],
    config: PeftConfig,
    found: SortedTensors,
    view: ModelView,
    parameters: Sequence[str],
) -> list[str]:
    """Return the hosts by the config; by the tensors where the config does not say. Then the parameters of experts.

    Raises:
        CheckpointError: The tensors are for other modules than the config names.
    """
    targets = config.target_modules
    if targets is None and config.target_parameters:
        expected = []
    elif targets is None:
        expected = [path for path in modules if path in found.hosts]
    elif isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        expected = _all_linear(modules, config, view)
    else:
        expected = [path for path in modules if config.takes(path)]
    expected += parameters
    missing = [path for path in expected if path not in found.hosts]
    unknown = [path for path in found.hosts if path not in expected]
    if missing or unknown:
        raise CheckpointError(
            f"The adapter's tensors do not fit its config on this model: of {len(expected)} targets, {len(missing)} "
            f"have no tensors{_some(missing)}, and {len(unknown)} modules with tensors are no targets here"
            f"{_some(unknown)}. Load the base that it was trained on, or get the adapter again."
        )
    return expected


def _all_linear(modules: Mapping[str, nn.Module], config: PeftConfig, view: ModelView) -> list[str]:
    """Return what PEFT means by `all-linear`: every linear layer but the output one."""
    find: Any = getattr(view.model, "get_output_embeddings", lambda: None)
    output = find()
    left_out = [path for path, module in modules.items() if output is not None and module is output]
    if output is None and config.task_type == "SEQ_CLS":
        left_out = [name for name in _CLASSIFIER_NAMES if name in modules][:1]
    copied = saved_paths(list(modules), config.modules_to_save)
    return [
        path
        for path, module in modules.items()
        if (codec := find_codec(module)) is not None
        and codec.kind is HostKind.LINEAR
        and path not in left_out
        and not any(path == other or path.startswith(f"{other}.") for other in copied)
    ]


def _method(
    config: PeftConfig, view: ModelView, paths: Sequence[str], hosts: list[str], saved: list[str], source: str
) -> LoRA:
    """Build the method: with the config's own words for the targets where they mean the same here, else by paths."""
    cls = DoRA if config.use_dora else LoRA
    settings: dict[str, Any] = {
        "r": config.r,
        "alpha": config.alpha,
        "dropout": config.dropout,
        "scaling": "rslora" if config.use_rslora else "standard",
        "rank_pattern": {f"^{_escape(path)}": r for path, r in _own_ranks(config, view, hosts).items()} or None,
        "alpha_pattern": {f"^{_escape(p)}": a for p in hosts if (a := config.rank_and_alpha(p)[1]) != config.alpha}
        or None,
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
        if sorted(_selected(view, method) or ()) == sorted(hosts):
            return method
        return cls(**settings, target_modules=_named(paths, hosts, source))
    except ConfigError as error:
        raise CheckpointError(f"{source}/{CONFIG_NAME}: {error}") from error


def _own_ranks(config: PeftConfig, view: ModelView, hosts: list[str]) -> dict[str, int]:
    """Return the ranks that differ from the usual one, or are larger than their weight, which `r` may not be."""
    ranks = {path: config.rank_and_alpha(path)[0] for path in hosts}
    return {path: r for path, r in ranks.items() if r != config.r or r > min(_shape(view.model, path))}


def _shape(model: nn.Module, path: str) -> tuple[int, int]:
    """Return `(out, in)` of a host, or of one expert of a parameter of experts."""
    parent, _, name = path.rpartition(".")
    stacked = model.get_submodule(parent)._parameters.get(name)
    if stacked is not None:
        return stacked.shape[-2], stacked.shape[-1]
    host = model.get_submodule(path)
    return codec_of(host).shape(host)


def _named(paths: Sequence[str], hosts: Sequence[str], source: str) -> list[str] | str:
    """Return our own target_modules for hosts and parameters of experts, by their paths."""
    modules = [path for path in hosts if path in paths]
    parameters = [path for path in hosts if path not in paths]
    targets = target_modules(paths, modules)
    if parameters and isinstance(targets, str):
        raise CheckpointError(
            f"{source} adapts experts, and beside them modules whose paths other modules' paths end in, for which this "
            "library has no target_modules; merge it with PEFT."
        )
    return [*targets, *parameters] if parameters else targets


def _selected(view: ModelView, method: TargetedMethod) -> list[str] | None:
    """Return the hosts and parameters of experts that a method would take, or None where it would refuse or warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return [path for path, _ in select_weights(view, method)]
        except (TargetError, ConfigError, UserWarning):
            return None


def _check_base_parameters(model: nn.Module, found: SortedTensors, source: str) -> None:
    """Compare the base's own parameters that PEFT put beside the adapter with those of the model.

    PEFT does so for embeddings that are targets or were resized; in the first case they are the base's, unchanged.
    """
    own = model.state_dict()
    for name, tensor in found.base.items():
        mine = own[name]
        if mine.is_floating_point() and not _is_same(tensor, mine):
            raise CheckpointError(
                f"{source} holds {name!r} itself, {list(tensor.shape)}, which is not what this base has "
                f"({list(mine.shape)}): the vocabulary was resized or the layer trained, or it is another base. Load "
                "the base as it was in training, or merge the adapter with PEFT."
            )


def _is_same(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    scale = right.detach().abs().max().float().item()
    return torch.allclose(left.float().to(right.device), right.float(), rtol=_BASE_TOLERANCE, atol=1e-3 * scale)


def _refuse_grouped(modules: Mapping[str, nn.Module], hosts: Sequence[str], source: str) -> None:
    grouped = [path for path in hosts if getattr(modules.get(path), "groups", 1) != 1]
    if grouped:
        raise CheckpointError(
            f"{source} adapts {grouped[0]!r}, a convolution with groups, for which PEFT and this library build "
            "different updates; merge it with PEFT."
        )


def _escape(path: str) -> str:
    return path.replace(".", r"\.")


def _some(names: Sequence[str], count: int = 3) -> str:
    return f" ({', '.join(names[:count])}{', …' if len(names) > count else ''})" if names else ""
