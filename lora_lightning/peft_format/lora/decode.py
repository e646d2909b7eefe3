"""Convert the result of `to_peft` back into our names and method."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_lightning.methods import DoRA, LoRA
from lora_lightning.peft_format.lora.parameters import AdaptedParameter, own_names
from lora_lightning.peft_format.names import PREFIX, exactly


def from_peft(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors from PEFT's names to those of `adapter_state_dict`.

    Args:
        config: Content of `adapter_config.json`.
        state: Tensors by PEFT's key names.

    Returns:
        Tensors by our names, without copies of modules that PEFT wraps only because their name has the suffix of a
        saved one.
    """
    saved = config.get("modules_to_save") or []
    own = {}
    for key, tensor in state.items():
        path = key.removeprefix(PREFIX)
        match = re.fullmatch(
            r"(.+)\.(?:(lora_A|lora_B)\.weight|lora_embedding_(A|B)|(lora_magnitude_vector)(?:\.weight)?)", path
        )
        if match is None:
            if any(path.startswith(f"{name}.") for name in saved):
                own[path] = tensor
        elif match[4]:
            own[f"{match[1]}.magnitude"] = tensor.flatten()
        else:
            own[f"{match[1]}.{match[2] or f'lora_{match[3]}'}"] = tensor.flatten(1)
    paths, special = config.get("target_parameters") or (), config.get("rank_pattern") or {}
    parameters = [AdaptedParameter(path=path, target=path) for path in paths]
    ranks = {path: special.get(exactly(path), config["r"]) for path in paths}
    return own_names(own, parameters, ranks, dict.fromkeys(paths, 3))


def method_of(config: Mapping[str, Any]) -> LoRA:
    """Return the method that a config of `to_peft` describes."""
    cls = DoRA if config["use_dora"] else LoRA
    targets, parameters = config["target_modules"], config.get("target_parameters")
    return cls(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config["lora_dropout"],
        scaling="rslora" if config["use_rslora"] else "standard",
        rank_pattern=config["rank_pattern"] or None,
        alpha_pattern=config["alpha_pattern"] or None,
        target_modules=[*targets, *parameters] if parameters else targets,
        modules_to_save=config["modules_to_save"],
    )
