"""A callback that compares the settings of a fit with the run."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.checks.monitors import refuse_missing_sets, refuse_wrong_monitors


class RunCheck(L.Callback):
    """Find mistakes before the first step: monitors of metrics that are not logged, modes that do not fit them.

    Tasks add it to each fit. It also warns if a checkpoint is of a run that was complete, so that nothing trains.
    """

    def __init__(self) -> None:
        self._has_trained = self._has_checked_sets = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check what callbacks and schedules monitor, now that optimizers are built.

        Raises:
            ConfigError: A metric is not logged, or its mode does not fit.
        """
        self._has_trained = self._has_checked_sets = False
        refuse_wrong_monitors(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check what is monitored of validation, now that its loaders are known: usually in Lightning's sanity check.

        Raises:
            ConfigError: There is no validation set of that name.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            self._check_sets(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the same if there was no sanity check.

        Raises:
            ConfigError: There is no validation, or no set of that name.
        """
        self._has_trained = True
        # Without validation in the first epoch, its loaders are not built yet.
        if trainer.val_dataloaders is not None or not trainer.enable_validation:
            self._check_sets(trainer, pl_module)

    def _check_sets(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._has_checked_sets:
            self._has_checked_sets = True
            refuse_missing_sets(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if the checkpoint left nothing to train."""
        del pl_module
        if self._has_trained or trainer.ckpt_path is None:
            return
        rank_zero_warn(
            f"Nothing was trained: the run of {trainer.ckpt_path} is complete ({_limit_of(trainer)}). To train on, "
            "raise that limit."
        )


def _limit_of(trainer: L.Trainer) -> str:
    """Return the limit that a run has reached, as its setting."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"trainer.max_steps is {trainer.max_steps}"
    return f"trainer.max_epochs is {trainer.max_epochs}"
