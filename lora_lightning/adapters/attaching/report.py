"""What adapters a model has, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora_lightning.adapters.walk import iter_adapters, iter_roles


@dataclass(frozen=True)
class AttachReport:
    """What adapters a model has.

    Args:
        num_trainable: Elements of all trainable adapter parameters.
        num_total: Elements of the base model's parameters (packed ones as stored) plus the adapters'.
        hosts: Paths of the adapted modules, in the model's order.
    """

    num_trainable: int
    num_total: int
    hosts: tuple[str, ...]

    @property
    def trainable_share(self) -> float:
        """Share of trainable elements among all, between 0 and 1."""
        return self.num_trainable / max(self.num_total, 1)


def report_of(model: nn.Module, name: str | None = None) -> AttachReport:
    """Return how many parameters of an adapted model train, and on which hosts, as it is now.

    Methods that look at data, or load a state, may have changed what `attach` made.

    Args:
        model: A model with adapters.
        name: The name of the adapter to report on; None for all.
    """
    own = [parameter for _, parameter, _ in iter_roles(model, name)]
    return AttachReport(
        num_trainable=sum(parameter.numel() for parameter in own if parameter.requires_grad),
        num_total=sum(parameter.numel() for parameter in model.parameters()),
        hosts=tuple(dict.fromkeys(path for path, _, _ in iter_adapters(model, name))),
    )
