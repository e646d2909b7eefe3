"""Fine-tune adapters in any LightningModule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lora_lightning.adapters import Method, iter_roles
from lora_lightning.adapters.frozen import restore_after_conversion
from lora_lightning.callbacks.gradients import optimized, quoted
from lora_lightning.callbacks.merge_at_end import checkpoint_path
from lora_lightning.callbacks.places import is_trial
from lora_lightning.data.batches.restored import restore_loader_classes
from lora_lightning.errors import ConfigError
from lora_lightning.finetuning.attaching import builds_later, prepare
from lora_lightning.finetuning.checks import (
    announce,
    averages_stochastically,
    refuse_methods,
    refuse_module,
    refuse_order,
)
from lora_lightning.finetuning.cli_optimizer import renew_cli_optimizer
from lora_lightning.finetuning.merging import refuse_taken_file, refuse_unmergeable, write_merged
from lora_lightning.finetuning.names import is_of_adapter
from lora_lightning.finetuning.parts import attach_part, was_taken_off
from lora_lightning.finetuning.record import Part, attached_parts
from lora_lightning.finetuning.state import note_start
from lora_lightning.finetuning.steps import MethodSteps
from lora_lightning.keywords import NamesNearest
from lora_lightning.tasks.settings import methods_from

__all__ = ["AdapterFinetuning"]


class AdapterFinetuning(NamesNearest, L.Callback):
    """Attach adapters to an existing LightningModule, freeze the adapted submodule, and train the adapters.

    The module's code does not change: `L.Trainer(callbacks=[AdapterFinetuning(LoRA(r=8), module="backbone")])`. The
    submodule is frozen and gets its adapters before the optimizers are built; other trained parameters of the
    LightningModule continue to train. Checkpoints hold the adapters, all trained parameters, and the module's own
    buffers, and load strictly. Training resumes from them, and `validate`, `test` and `predict` load them, with the
    same callback. Without a Trainer, `load_finetuned` loads them.

    For LoRA+, build the optimizer in `configure_optimizers` over `param_groups(self, Optim(lora_plus_ratio=16))`.

    Several of these callbacks adapt several submodules. One device, or DDP.

    Args:
        method: The method, or a list of methods.
        module: Path of the submodule to adapt, such as `backbone` or `model.encoder`; None takes the whole
            LightningModule, whose own layers are then frozen too. It may be created in `__init__`, `setup` or
            `configure_model`.
        modules_to_save: Names of modules inside the submodule to train as full copies, such as its head.
        train_norm_statistics: Let batch norms inside the submodule use and update the statistics of the training
            batches; otherwise the base's statistics stay in use.
        merge_to: File to write when `fit` ends: a checkpoint with the adapters merged into the weights, which the
            module's class loads without this library. None does not merge.
        merge_which: `best` merges the best checkpoint of the run's `ModelCheckpoint`, `last` the weights at the end.

    Raises:
        ConfigError: A setting does not fit; when `fit` starts, that the optimizers hold none of the adapters.
    """

    def __init__(
        self,
        method: Method | list[Method],
        module: str | None = None,
        *,
        modules_to_save: Sequence[str] | None = None,
        train_norm_statistics: bool = False,
        merge_to: str | Path | None = None,
        merge_which: Literal["best", "last"] = "best",
    ) -> None:
        if isinstance(modules_to_save, str):
            raise ConfigError(f"modules_to_save takes a list of names; write [{modules_to_save!r}].")
        if merge_which not in ("best", "last"):
            raise ConfigError(f"merge_which must be best or last, got {merge_which!r}.")
        self.methods = methods_from(method)
        self.module = module
        self.modules_to_save = tuple(modules_to_save or ())
        self.train_norm_statistics = train_norm_statistics
        self.merge_to = None if merge_to is None else Path(merge_to)
        self.merge_which = merge_which
        self._steps: MethodSteps | None = None

    @property
    def state_key(self) -> str:
        """Return a key that distinguishes several of these callbacks, by their submodule."""
        return self._generate_state_key(module=self.module)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Attach the adapters, or arrange to attach them when `configure_model` has created the submodule."""
        refuse_module(trainer, pl_module)
        refuse_order(trainer, self)
        if stage == "fit":
            refuse_methods(self.methods, pl_module)
            if self.merge_to is not None:
                refuse_taken_file(self.merge_to)
        saved, statistics = self.modules_to_save, self.train_norm_statistics
        part = prepare(pl_module, Part(self.module or "", self.methods, saved, statistics))
        # A module's own setup comes after this, and may load weights, which adapters must find in place. Stochastic
        # weight averaging copies the module now.
        if not builds_later(pl_module) or averages_stochastically(trainer):
            attach_part(pl_module, part)
        if stage == "fit" and was_taken_off(pl_module, part):
            raise ConfigError(
                f"The adapters of {part.name} were merged or taken off, and would not train. Build "
                "the LightningModule anew, or leave AdapterFinetuning out."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse optimizers that would not train the adapters, and log what trains."""
        part, submodule = self._attached(pl_module)
        renew_cli_optimizer(pl_module)
        restore_after_conversion(submodule)  # a Trainer's sync_batchnorm has replaced norms by now
        adapters = [(name, parameter) for name, parameter, _ in iter_roles(submodule) if parameter.requires_grad]
        held = {id(parameter) for optimizer in trainer.optimizers for parameter in optimized(optimizer)}
        left_out = [name for name, parameter in adapters if id(parameter) not in held]
        if adapters and len(left_out) == len(adapters):
            raise ConfigError(
                f"The optimizers of {type(pl_module).__name__} hold none of the {len(adapters)} adapter parameters of "
                f"{part.name}, so they would not train. In configure_optimizers, use self.parameters(), or "
                "lora_lightning.param_groups(self, Optim(...))."
            )
        if left_out:
            rank_zero_warn(
                f"The optimizers hold {len(adapters) - len(left_out)} of the {len(adapters)} adapter parameters of "
                f"{part.name}; {quoted(left_out)} will not train."
            )
        if self.merge_to is not None:
            refuse_unmergeable(pl_module)
        note_start(pl_module)
        announce(pl_module, part)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run the methods' hooks around the steps of the optimizers that hold their adapters."""
        part, submodule = self._attached(pl_module)
        thawed = [name for name, parameter in submodule.named_parameters() if _is_thawed(name, parameter)]
        if thawed:
            rank_zero_warn(
                f"{len(thawed)} frozen weights of {part.name} were set to train since the adapters were attached: "
                f"{quoted(thawed)}. They train if an optimizer holds them, and checkpoints hold them."
            )
        self._steps = MethodSteps(pl_module, part, trainer)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Run the methods' hooks on the gradients."""
        del trainer, pl_module
        if self._steps is not None:
            self._steps.before(optimizer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of the optimizers."""
        del trainer, pl_module
        self._let_go()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the optimizers, and of what Lightning leaves on torch's loader classes."""
        del trainer, pl_module, exception
        self._let_go()
        restore_loader_classes()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the merged checkpoint, on rank 0."""
        if self.merge_to is None or is_trial(trainer):
            return
        path = checkpoint_path(trainer, "best") if self.merge_which == "best" else None
        if self.merge_which == "best" and path is None:
            rank_zero_warn("AdapterFinetuning found no best checkpoint, so it merges the weights at the end.")
        if trainer.is_global_zero:
            write_merged(pl_module, self.merge_to, path)
            rank_zero_info(f"Wrote the merged checkpoint {self.merge_to}.")
        trainer.strategy.barrier("AdapterFinetuning.merge")

    # Helpers.

    def _let_go(self) -> None:
        if self._steps is not None:
            self._steps.end()
        self._steps = None

    def _attached(self, module: L.LightningModule) -> tuple[Part, torch.nn.Module]:
        return next(pair for pair in attached_parts(module) if pair[0].path == (self.module or ""))


def _is_thawed(name: str, parameter: torch.nn.Parameter) -> bool:
    """Return whether a parameter of an adapted submodule belongs to no adapter and trains."""
    return parameter.requires_grad and not is_of_adapter(name)
