"""The two extremes of every comparison: only the head trains, and everything trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lora_lightning.adapters import Adapter, Method, ModelView, Role, iter_adapters, iter_roles
from lora_lightning.adapters.targets import is_within
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.errors import ConfigError
from lora_lightning.optim import Optim, build_schedule, param_groups
from lora_lightning.tasks import AdapterTask

FROZEN = "frozen + head"
FULL = "full fine-tuning"
FULL_RATES = (3e-5, 1e-4, 3e-4)
"""Learning rates to try for full fine-tuning, in ascending order."""


@dataclass(frozen=True, kw_only=True)
class _NoAdapters(Method):
    """A method without adapters: the base is frozen, and only copies such as a head train."""

    name: ClassVar[str] = "none"

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        """Yield nothing."""
        del view
        return iter(())


class _EverythingTrains(AdapterTask):
    """Mixin of a task in which the base also trains, at `optim.lr`, and the head at its own rate."""

    def configure_model(self) -> None:
        """Build the model, then let the base learn."""
        is_fresh = self.model is None
        super().configure_model()
        if is_fresh:
            for _, parameter in base_parameters(self.adapted):
                parameter.requires_grad_()

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own union
        """Build the optimizer with the base in groups of its own, and the usual schedule."""
        cls, arguments = self.optim.optimizer_class()
        groups = split_base(param_groups(self, self.optim), self.adapted, self.optim)
        optimizer = cls(groups, lr=self.optim.lr, **arguments)  # type: ignore[call-arg]  # every optimizer has lr
        scheduler = build_schedule(optimizer, self.optim, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def no_adapters() -> Method:
    """Return the method of the two ends."""
    return _NoAdapters()


def fully_trained(cls: type[AdapterTask]) -> type[AdapterTask]:
    """Return a task's class whose base trains too."""
    return type(f"FullyTrained{cls.__name__}", (_EverythingTrains, cls), {})


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the base's parameters that a full fine-tuning trains: all except those that a copy replaces.

    Raises:
        ConfigError: The base is quantized (4 or 8 bits) and cannot be trained.
    """
    copied = [path for path, _, adapter in iter_adapters(model) if Role.HEAD in _roles(adapter)]
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        if RESERVED in path.split(".") or is_within(path, copied):
            continue
        if not parameter.is_floating_point():
            raise ConfigError("A base in 4 or 8 bits cannot be fine-tuned as a whole; it is the adapters that learn.")
        yield name, parameter


def split_base(groups: list[dict[str, Any]], model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """Move the parameters outside adapters, which `param_groups` counts as head, into groups with the base rate.

    Args:
        groups: What `param_groups` returned.
        model: The model with its head's copy.
        optim: The rates.

    Returns:
        Groups that contain every parameter once; none is empty.
    """
    owned = {id(parameter) for _, parameter, _ in iter_roles(model)}
    split: list[dict[str, Any]] = []
    for group in groups:
        head = [parameter for parameter in group["params"] if id(parameter) in owned]
        body = [parameter for parameter in group["params"] if id(parameter) not in owned]
        if head:
            split.append({**group, "params": head})
        if body:
            name = group["name"].replace(Role.HEAD.value, "base")
            split.append({**group, "params": body, "lr": optim.lr, "name": name})
    return split


def _roles(adapter: Adapter) -> set[Role]:
    return {role for _, _, role in adapter.named_roles()}


def trainable_counts(model: nn.Module) -> tuple[int, int]:
    """Return how many elements train outside the head, and in it.

    Args:
        model: A model with its adapters; the head are parameters of role HEAD.
    """
    roles = {id(parameter): role for _, parameter, role in iter_roles(model)}
    trained = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    head = sum(parameter.numel() for key, parameter in trained.items() if roles.get(key) is Role.HEAD)
    return sum(parameter.numel() for parameter in trained.values()) - head, head


def state_to_keep(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state that a checkpoint of full fine-tuning must hold besides the head: every trained parameter."""
    return {name: parameter.detach() for name, parameter in base_parameters(model) if parameter.requires_grad}
