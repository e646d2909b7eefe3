"""Deep copies of modules that have been called with gradients."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of a module, which may have been called with gradients before.

    `copy.deepcopy` refuses tensors with a history, and some modules keep one after a call: the weights that
    `nn.utils.weight_norm` and `nn.utils.spectral_norm` compute, and running values that were not detached. The copy
    gets their values.

    Args:
        module: The module.
        memo: What not to copy, by `id`, as `copy.deepcopy` takes it.

    Example:
        >>> module = nn.utils.spectral_norm(nn.Linear(2, 2))
        >>> _ = module(torch.ones(1, 2))
        >>> module.weight.requires_grad, copied(module).weight.requires_grad
        (True, False)
    """
    memo = {} if memo is None else memo
    for inner in module.modules():
        for value in tree_leaves(vars(inner)):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)
