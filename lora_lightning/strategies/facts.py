"""How a Trainer's strategy distributes the parameters of a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning as L


@dataclass(frozen=True, kw_only=True)
class StrategyFacts:
    """How a strategy distributes the parameters of a module.

    Args:
        name: Its class, for messages.
        shards: Each weight is sharded over the processes and gathered for its layer (FSDP2, `ModelParallelStrategy`).
        partitions: Weights, gradients or optimizer state are divided among the processes by DeepSpeed.
        flattens: Weights are joined into flat parameters of the strategy's own (FSDP1).
        is_known: It is one of those above, DDP, or one device.
    """

    name: str
    shards: bool = False
    partitions: bool = False
    flattens: bool = False
    is_known: bool = True

    @property
    def keeps_whole(self) -> bool:
        """Whether every process holds every parameter as the module defines it."""
        return not (self.shards or self.partitions or self.flattens)


def facts_of(trainer: L.Trainer) -> StrategyFacts:
    """Return how a Trainer's strategy distributes parameters.

    Example:
        >>> import lightning as L
        >>> facts_of(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)).keeps_whole
        True
    """
    from lightning.pytorch.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
    )

    strategy = trainer.strategy
    known = (DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy)
    return StrategyFacts(
        name=type(strategy).__name__,
        shards=isinstance(strategy, ModelParallelStrategy),
        partitions=isinstance(strategy, DeepSpeedStrategy),
        flattens=isinstance(strategy, FSDPStrategy),
        is_known=isinstance(strategy, known),
    )


def shards_by_name(strategy: object) -> bool:
    """Return whether a strategy, as settings name it, shards the base over processes.

    Args:
        strategy: A name such as `fsdp2`, or the settings of a class.

    Example:
        >>> shards_by_name("ddp"), shards_by_name({"class_path": "FSDP2Strategy"})
        (False, True)
    """
    name = str(strategy).lower()
    return "fsdp" in name or "modelparallel" in name
