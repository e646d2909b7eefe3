"""The modules of a model that the config of an adapter selects, by PEFT's rules."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from lora_lightning.adapters.view import ModelView, output_embeddings
from lora_lightning.adapters.weights import RESERVED, HostKind, find_codec
from lora_lightning.errors import CheckpointError
from lora_lightning.peft_format.differences import why_another_convolution, why_out_of_reach
from lora_lightning.peft_format.names import base_state, saved_paths
from lora_lightning.peft_format.schema.targets import PeftConfig, TargetConfig

_ALL_LINEAR = "all-linear"
CLASSIFIER_NAMES = ("score", "classifier")
"""Modules that PEFT excludes from `all-linear` on a classifier, and trains as copies."""


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's own modules by path, without itself and without those of its adapters."""
    return {path: one for path, one in model.named_modules() if path and RESERVED not in path.split(".")}


def copied_paths(modules: Mapping[str, nn.Module], config: PeftConfig, keys: Collection[str]) -> list[str]:
    """Return the modules that are trained as copies: those that the config names, and those that PEFT adds.

    Args:
        modules: Those of the model by path.
        config: The adapter's config.
        keys: The names of the file's tensors.
    """
    implied: list[str] = []
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        endings = {key.rpartition(".")[0] for key in keys}
        implied = [name for name in CLASSIFIER_NAMES if any(ending.endswith(name) for ending in endings)]
    saved = saved_paths(list(modules), [*config.modules_to_save, *implied])
    return [path for path in saved if base_state(modules[path])]


def tied_to(modules: Mapping[str, nn.Module], paths: Collection[str]) -> list[str]:
    """Return the other modules that share the weight of a module of `paths`."""
    shared = {id(modules[path]._parameters.get("weight")) for path in paths if path in modules}
    shared.discard(id(None))
    return [
        path
        for path, module in modules.items()
        if path not in paths
        and id(module._parameters.get("weight")) in shared
        and module._parameters.get("weight") is not None
    ]


def expected_hosts(
    modules: Mapping[str, nn.Module], config: TargetConfig, found: Collection[str], view: ModelView
) -> list[str]:
    """Return the hosts by the config, or by the tensors if the config does not name them.

    Args:
        modules: Those of the model by path.
        config: The adapter's config.
        found: Paths of the modules that the file has tensors for.
        view: The model.
    """
    targets = config.target_modules
    if targets is None:
        return [path for path in modules if path in found]
    if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        return _all_linear(modules, config, view)
    return [path for path in modules if config.takes(path)]


def check_hosts(expected: Sequence[str], found: Collection[str]) -> None:
    """Refuse tensors for other modules than the config names.

    Raises:
        CheckpointError: They are, or some are missing.
    """
    missing = [path for path in expected if path not in found]
    unknown = [path for path in found if path not in expected]
    if missing or unknown:
        raise CheckpointError(
            f"The adapter's tensors do not fit its config on this model: of {len(expected)} targets, {len(missing)} "
            f"have no tensors{some(missing)}, and {len(unknown)} modules with tensors are not targets here"
            f"{some(unknown)}. Load the base that it was trained on, or get the adapter again."
        )


def refuse_different(model: nn.Module, hosts: Collection[str], source: str) -> None:
    """Refuse hosts on which PEFT computes something else than this library.

    Raises:
        CheckpointError: There is one; the message names it.
    """
    out_of_reach = why_out_of_reach(model)
    for path in hosts:
        host = _module_at(model, path)
        reason = out_of_reach.get(path) or why_another_convolution(host)
        if reason is not None:
            raise CheckpointError(f"{source} adapts {path!r}, and {reason}; merge it with PEFT.")


def _module_at(model: nn.Module, path: str) -> nn.Module | None:
    """Return a module by its path, or None for the path of a parameter."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _all_linear(modules: Mapping[str, nn.Module], config: TargetConfig, view: ModelView) -> list[str]:
    """Return the modules of PEFT's `all-linear`: every linear layer except the output layer."""
    output = output_embeddings(view.model)
    left_out = [path for path, module in modules.items() if output is not None and module is output]
    if output is None and config.task_type == "SEQ_CLS":
        left_out = [name for name in CLASSIFIER_NAMES if name in modules][:1]
    copied = saved_paths(list(modules), config.modules_to_save)
    return [
        path
        for path, module in modules.items()
        if (codec := find_codec(module)) is not None
        and codec.kind is HostKind.LINEAR
        and path not in left_out
        and not any(path == other or path.startswith(f"{other}.") for other in copied)
    ]


def some(names: Sequence[str], count: int = 3) -> str:
    """Return the first few names in brackets; nothing for none."""
    return f" ({', '.join(names[:count])}{', …' if len(names) > count else ''})" if names else ""
