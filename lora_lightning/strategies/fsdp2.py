"""FSDP2 for adapters: Lightning's ModelParallelStrategy with a sharded base and adapter-only checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch import distributed as dist

from lora_lightning.adapters.sharded import is_sharded
from lora_lightning.errors import ConfigError
from lora_lightning.keywords import NamesNearest
from lora_lightning.strategies.sharding import average_gradients, broadcast_adapters, shard_base

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["FSDP2Strategy"]


class FSDP2Strategy(ModelParallelStrategy, NamesNearest):
    """Train a task whose frozen base is sharded over all processes (FSDP2), as `trainer.strategy: fsdp2`.

    Every process holds the adapters and their whole optimizer state; their gradients are averaged once per optimizer
    step. A checkpoint is therefore the same single file as with DDP or one process, and each of them can resume from
    it. A task replaces Lightning's `ModelParallelStrategy` of a Trainer with this one.

    Args:
        process_group_backend: `nccl` or `gloo`; None means the device's default.
        timeout: Timeout of a collective; longer than any work of rank 0 alone, such as merging. A rank that died is
            detected sooner (see `RankWatch`).
    """

    _is_blocked = False

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Shard over all processes, where Lightning would shard over nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Prepare model and optimizers, then start all ranks from the same adapters.

        Raises:
            ConfigError: The module did not shard its model.
        """
        if self.lightning_module is None or not hasattr(self.lightning_module, "adapter_state"):
            raise ConfigError(
                f"{type(self).__name__} trains tasks of lora_lightning (AdapterTask), and this module is a "
                f"{type(self.lightning_module).__name__}; use Lightning's ModelParallelStrategy for it."
            )
        super().setup(trainer)
        broadcast_adapters(self.lightning_module)

    # Gradients.

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave gradients as they are while they are accumulated."""
        self._is_blocked = True
        try:
            yield
        finally:
            self._is_blocked = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the adapters' gradients over the ranks."""
        super().post_backward(closure_loss)
        if not self._is_blocked:
            assert self.lightning_module is not None
            average_gradients(self.lightning_module, self.device_mesh["data_parallel"].get_group())

    # Checkpoints: adapters are not sharded, so the methods for unsharded models apply.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning restore optimizers from the checkpoint's plain state."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return only the adapters: gathering the base would take its size in memory."""
        module: Any = self.lightning_module
        return dict(module.adapter_state())

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the adapters on each rank."""
        super(ModelParallelStrategy, self).load_model_state_dict(checkpoint, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's own state."""
        return super(ModelParallelStrategy, self).optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' state on each rank."""
        super(ModelParallelStrategy, self).load_optimizer_state_dict(checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:  # noqa: ANN401 - Lightning's own signature
        """Write one file, on rank 0, through the checkpoint plugin."""
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: ANN401 - Lightning's own signature
        """Read the file on each rank, through the checkpoint plugin."""
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only=weights_only)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Frozen base sharded over all processes, adapters whole")


def shard_for_trainer(model: nn.Module, fingerprint: str | None, trainer: L.Trainer | None) -> None:
    """Shard the base of an adapted model if the Trainer's strategy does so; do nothing the second time.

    Args:
        model: The model, with its adapters; changed in place.
        fingerprint: Fingerprint of its base, which must be the same on all ranks.
        trainer: The Trainer, or None.

    Raises:
        ConfigError: The strategy wants tensor parallelism as well, or the ranks hold different bases.
    """
    strategy = None if trainer is None else trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy) or strategy._device_mesh is None or is_sharded(model):
        return
    if not isinstance(strategy, FSDP2Strategy):
        # It would gather the base for every checkpoint, and resume only from one that holds the base.
        strategy.__class__ = FSDP2Strategy
    mesh = strategy.device_mesh
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            f"{mesh['tensor_parallel'].size()}-fold tensor parallelism is asked for (the default of "
            "ModelParallelStrategy, over all devices of a node), and adapters train under data parallelism alone; use "
            "strategy=fsdp2, or data_parallel_size=<all processes> and tensor_parallel_size=1."
        )
    _check_same_base(fingerprint)
    shard_base(model, mesh["data_parallel"])


def _check_same_base(fingerprint: str | None) -> None:
    """Refuse ranks with different bases, whose shards would not form one base."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, fingerprint)
    other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise ConfigError(
            f"Rank {other} loaded another base model than rank 0 (fingerprints {str(found[other])[:12]}… and "
            f"{str(found[0])[:12]}…), so they cannot share it; make every node read the same files, and seed weights "
            "that are drawn at random."
        )
