"""What PEFT computes in another way than this library, so that neither reads the other's adapters there."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from lora_lightning.adapters.weights import RESERVED


def why_another_convolution(host: Any) -> str | None:  # noqa: ANN401 - any module
    """Return why PEFT's update of a convolution is not that of its weight, as the end of a sentence, or None."""
    if getattr(host, "groups", 1) != 1:
        return "PEFT adapts a convolution with groups in another way"
    if getattr(host, "padding_mode", "zeros") != "zeros":
        return f"PEFT pads with zeros where this convolution has padding_mode={host.padding_mode!r}"
    dilation = getattr(host, "dilation", 1)
    steps = dilation if isinstance(dilation, tuple) else (dilation,)
    if any(step != 1 for step in steps):
        return f"PEFT leaves out the dilation of this convolution ({dilation!r})"
    return None


def shared_modules(model: nn.Module) -> set[str]:
    """Return all paths of the modules that stand in several places of a model.

    PEFT puts its own module into the first of these places alone; an adapter of this library acts in all of them.
    """
    named = [(path, module) for path, module in model.named_modules(remove_duplicate=False)]
    holders: Counter[int] = Counter()
    for module in model.modules():
        holders.update(id(child) for name, child in module._modules.items() if child is not None and name != RESERVED)
    return {path for path, module in named if holders[id(module)] > 1}


SHARED = "it stands in several places of the model, and PEFT adapts the first of them alone"
