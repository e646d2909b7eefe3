"""Tensors that backward needs from a forward pass: kept on the device, offloaded to host memory, or recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.backbones.load import enable_gradient_checkpointing
from lora_lightning.errors import ConfigError
from lora_lightning.methods.recompute import recompute_activations
from lora_lightning.strategies.facts import facts_of
from lora_lightning.tasks.offload import OffloadActivations

if TYPE_CHECKING:
    from torch import nn

    from lora_lightning.tasks.base import AdapterTask
    from lora_lightning.tasks.settings import Recomputing

T = TypeVar("T")


def recompute(model: nn.Module, what: Recomputing) -> None:
    """Make backward recompute layers or activations.

    Args:
        model: The adapted model; changed in place.
        what: Every layer (True), nothing (False), or the `activations` in front of adapted linear layers.

    Raises:
        ConfigError: No adapter can compute its input again.
        BackboneError: The model has no gradient checkpointing.
    """
    if what == "activations":
        recompute_activations(model)
    elif what:
        enable_gradient_checkpointing(model)


def check_offloading(task: AdapterTask) -> None:
    """Refuse a Trainer under which weights look like activations, and warn if there is nothing to offload.

    Raises:
        ConfigError: The Trainer shards the model.
    """
    trainer = task._trainer
    if not task.offload_activations or trainer is None:
        return
    strategy, facts = trainer.strategy, facts_of(trainer)
    if not facts.keeps_whole:
        raise ConfigError(
            f"offload_activations goes with one device or strategy=ddp: under {facts.name} backward keeps "
            "weights that are gathered for each layer, which nothing tells from activations. Leave it out, or use "
            "gradient_checkpointing: true."
        )
    if trainer.state.fn == "fit" and strategy.root_device.type != "cuda":
        rank_zero_warn(
            f"offload_activations is set, and this run is on {strategy.root_device.type}, not on a CUDA device: there "
            "is nothing to offload, so it changes nothing."
        )


def offloaded(task: AdapterTask, compute: Callable[[Any], T]) -> Callable[[Any], T]:
    """Return a function with the same result whose saved tensors go to host memory if the task offloads them.

    Args:
        task: The task, with its model built.
        compute: Takes a batch.
    """
    if not task.offload_activations:
        return compute

    def compute_offloaded(batch: Any) -> T:  # noqa: ANN401 - the data module's own type
        with OffloadActivations(task.adapted):
            return compute(batch)

    return compute_offloaded


def describe_backward(task: Any) -> str:  # noqa: ANN401 - any LightningModule
    """Describe how a task treats the tensors that backward needs; empty if it keeps them.

    Example:
        >>> from types import SimpleNamespace
        >>> describe_backward(SimpleNamespace(gradient_checkpointing="activations", offload_activations=True))
        'backward: activations before adapters computed again, the rest kept in host memory'
    """
    again = {True: "every layer computed again", "activations": "activations before adapters computed again"}
    parts = [again.get(getattr(task, "gradient_checkpointing", False), "")]
    if getattr(task, "offload_activations", False):
        kept = {True: "the layers' inputs", "activations": "the rest"}.get(task.gradient_checkpointing, "all it needs")
        parts.append(f"{kept} kept in host memory")
    said = ", ".join(filter(None, parts))
    return f"backward: {said}" if said else ""
