"""The settings of a run, written into its folder after the model is built."""

from __future__ import annotations

import contextlib

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from lora_lightning.callbacks.places import free_name, run_folder
from lora_lightning.callbacks.run_logger import RunLogger
from lora_lightning.errors import UserError, trouble_of_disk


class RunConfig(SaveConfigCallback):
    """Write `config.yaml`, from which `lora-lightning fit --config` repeats the run, into the run's folder.

    Lightning writes it before data and model are built, and aborts if one exists. This callback waits until the model
    is built and a checkpoint is restored, so that an error there leaves no file. If the run continues in a folder that
    holds a `config.yaml`, it writes `config-2.yaml` and so on.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Do nothing yet."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the run's folder and write the settings, on rank 0.

        Raises:
            UserError: The disk refuses.
        """
        del pl_module
        folder = run_folder(trainer)  # on all ranks
        if not trainer.is_global_zero:
            return
        path = folder / self.config_filename
        try:
            if isinstance(trainer.logger, RunLogger):
                trainer.logger.claim()
            path = free_name(path)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_unset=False, multifile=False)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            trouble = trouble_of_disk(error) or error.strerror
            raise UserError(f"{path} could not be written: {trouble}; nothing was trained.") from error
