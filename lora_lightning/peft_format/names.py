"""PEFT's matching of modules by names, and names that match only given modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import Tensor, nn

from lora_lightning.adapters.weights import RESERVED

CONFIG_NAME = "adapter_config.json"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


def module_paths(model: nn.Module) -> list[str]:
    """Return the paths of a model's own modules, without those of its adapters."""
    return [path for path, _ in model.named_modules() if path and RESERVED not in path.split(".")]


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a module of the base, without what adapters on it or in it own."""
    return {name: tensor for name, tensor in module.state_dict().items() if RESERVED not in name.split(".")}


def saved_paths(paths: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the modules that PEFT copies for `modules_to_save`: those whose path ends with a name, even without a dot.

    Example:
        >>> saved_paths(["bert", "pre_classifier", "classifier", "classifier.dense"], ["classifier"])
        ['pre_classifier', 'classifier']
    """
    found = [path for path in paths if any(path.endswith(name) for name in names)]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def exactly(path: str) -> str:
    """Return a pattern for one path: `^` keeps PEFT from matching paths that end in it."""
    return f"^{re.escape(path)}"


def target_modules(paths: Sequence[str], hosts: list[str]) -> list[str] | str:
    """Return the hosts as a list if PEFT's suffix matching selects only these, else as a regular expression."""
    taken = [path for path in paths if any(path == host or path.endswith(f".{host}") for host in hosts)]
    return hosts if set(taken) == set(hosts) else any_of(hosts)


def any_of(paths: Sequence[str]) -> str:
    """Return a regular expression for whole paths that matches only these."""
    return f"({'|'.join(re.escape(path) for path in paths)})"
