"""Cases in which PEFT computes something else than this library, so that adapters are not exchanged."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from lora_lightning.adapters.weights import RESERVED


def why_another_convolution(host: Any) -> str | None:  # noqa: ANN401 - any module
    """Return why PEFT's update of a convolution is not one of its weight, as the end of a sentence, or None."""
    if getattr(host, "groups", 1) != 1:
        return "PEFT adapts a convolution with groups in another way"
    if getattr(host, "padding_mode", "zeros") != "zeros":
        return f"PEFT pads with zeros where this convolution has padding_mode={host.padding_mode!r}"
    dilation = getattr(host, "dilation", 1)
    steps = dilation if isinstance(dilation, tuple) else (dilation,)
    if any(step != 1 for step in steps):
        return f"PEFT leaves out the dilation of this convolution ({dilation!r})"
    return None


def why_out_of_reach(model: nn.Module) -> dict[str, str]:
    """Return the paths at which an adapter of PEFT acts differently from one of this library, with the reason.

    The reasons are ends of sentences.
    """
    return dict.fromkeys(_inside_fast_layers(model), _FAST) | dict.fromkeys(_shared_modules(model), _SHARED)


def _inside_fast_layers(model: nn.Module) -> set[str]:
    """Return the paths inside torch's encoder layers, which read their weights directly in evaluation mode."""
    return {
        f"{path}.{inner}"
        for path, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        for inner, _ in module.named_modules()
        if inner and RESERVED not in inner.split(".")
    }


def _shared_modules(model: nn.Module) -> set[str]:
    """Return all paths of the modules that a model contains at several paths.

    PEFT wraps the module only at the first path; an adapter of this library acts at all of them.
    """
    named = [(path, module) for path, module in model.named_modules(remove_duplicate=False)]
    holders: Counter[int] = Counter()
    for module in model.modules():
        holders.update(id(child) for name, child in module._modules.items() if child is not None and name != RESERVED)
    return {path for path, module in named if holders[id(module)] > 1}


_SHARED = "it stands in several places of the model, and PEFT adapts the first of them alone"
_FAST = "torch's nn.TransformerEncoderLayer reads weights past PEFT's adapters in evaluation mode"
