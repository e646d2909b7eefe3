"""The optimizer that a LightningCLI builds from its config, before any callback has attached adapters."""

from __future__ import annotations

from functools import partial

import lightning as L
from torch.optim import Optimizer


def renew_cli_optimizer(module: L.LightningModule) -> None:
    """Give the optimizer of a LightningCLI (`--optimizer`) the parameters that train now.

    The CLI builds it over `module.parameters()` as they were without adapters. It has taken no step yet, so that the
    list of its one group may change. A module's own `configure_optimizers` is called later, and needs nothing.
    """
    optimizer = _optimizer_of_cli(module)
    if optimizer is None or optimizer.state or len(optimizer.param_groups) != 1:
        return
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer.param_groups[0]["params"][:] = trained


def _optimizer_of_cli(module: L.LightningModule) -> Optimizer | None:
    """Return the optimizer that `LightningCLI` has put into a module's `configure_optimizers`, or None."""
    function = getattr(module.__dict__.get("configure_optimizers"), "__func__", None)
    found = function.keywords.get("optimizer") if isinstance(function, partial) else None
    return found if isinstance(found, Optimizer) else None
