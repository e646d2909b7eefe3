"""Checkpointed layers compute in backward under the selection that was in force in their forward pass.

Backward may run after the block, inside another one, or in a thread of autograd. transformers' layers checkpoint
through an attribute, `_gradient_checkpointing_func`; a hook puts ours around whatever function stands there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_lightning.adapters.selection.state import current_selection, run_under

_FUNCTION = "_gradient_checkpointing_func"


class SelectionCheckpoint:
    """A checkpoint function that runs a layer again under the selection of its forward pass.

    Args:
        checkpoint: Takes a function and its arguments, as `torch.utils.checkpoint.checkpoint` does.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - checkpoint's
        """Checkpoint `function(*args)`."""
        if torch.compiler.is_dynamo_compiling():  # compiled code computes again what it has traced
            return self.checkpoint(function, *args, **kwargs)
        captured = functools.partial(run_under, current_selection(), function)
        return self.checkpoint(captured, *args, **kwargs)


def follow_selection(model: nn.Module) -> None:
    """Have the modules of a model that can checkpoint keep to the selection, whenever checkpointing is turned on."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing") and _keep_selection not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_keep_selection)


def unfollow_selection(model: nn.Module) -> None:
    """Undo `follow_selection`."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _keep_selection]:
            del module._forward_pre_hooks[key]
        function = module.__dict__.get(_FUNCTION)
        if isinstance(function, SelectionCheckpoint):
            setattr(module, _FUNCTION, function.checkpoint)


def _keep_selection(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Put ours around the checkpoint function that a module has now."""
    del args
    if torch.compiler.is_dynamo_compiling():
        return
    function = module.__dict__.get(_FUNCTION)
    if function is not None and not isinstance(function, SelectionCheckpoint):
        setattr(module, _FUNCTION, SelectionCheckpoint(function))
