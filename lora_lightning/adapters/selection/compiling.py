"""What `torch.compile` needs to follow selections: room for a compilation of each, an entrance that it leaves alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from lora_lightning.adapters.weights import RESERVED

_SEEN: set[int] = set()
"""Hashes of the selections that this process has used."""

_usual_limit: int | None = None
_is_watching = False


def make_room_for(selections: Iterable[Hashable]) -> None:
    """Raise the limit on compilations of one function by the number of different selections used so far.

    Each selection compiles once. torch allows 8 compilations, and then raises an error (`fullgraph`) or no longer
    compiles; beside those for selections, a model keeps its 8. The limit belongs to a thread or task, so each calls
    this for itself.
    """
    global _usual_limit
    _SEEN.update(map(hash, selections))
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and the import takes a second
        return
    config: Any = sys.modules["torch._dynamo"].config
    if _usual_limit is None:
        _usual_limit = config.recompile_limit
    if config.recompile_limit < _usual_limit + len(_SEEN):
        config.recompile_limit = _usual_limit + len(_SEEN)


def with_unknown_length(index: Tensor) -> Tensor:
    """Return an index whose length compiled code does not look at, so that one compilation serves all lengths."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].decorators.mark_unbacked(index, 0)
    return index


def watch(enter: Callable[[nn.Module, tuple[Any, ...]], None]) -> None:
    """Give every model with adapters that is compiled from now on a forward pre-hook that compiled code leaves alone.

    `torch.compile(model)` traces the hooks of the model itself, but not those of the module that it wraps around it.

    Args:
        enter: The hook.
    """
    global _is_watching
    if _is_watching:
        return
    _is_watching = True

    def on_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
        if name == "_orig_mod" and child is not None and any(RESERVED in one._modules for one in child.modules()):
            module.register_forward_pre_hook(enter)

    register_module_module_registration_hook(on_registration)
