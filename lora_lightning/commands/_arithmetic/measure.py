"""What an adapter that was added up or cut does to the metrics: the task and the data of a checkpoint measure it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn

from lora_lightning.adapters import detach
from lora_lightning.arithmetic.moments import input_moments
from lora_lightning.checkpoint.peft_folder import load_peft
from lora_lightning.checkpoint.saved_run import SavedRun
from lora_lightning.errors import ConfigError
from lora_lightning.public import import_classes
from lora_lightning.run.trainer import RunTrainer

NUM_BATCHES = 16
"""Training batches by which layers are weighted."""


class Measurement:
    """The task and the data of a checkpoint, to validate other adapters with.

    Args:
        ckpt_path: The `.ckpt`.

    Raises:
        ConfigError: Its data module is not known.
        CheckpointError: It cannot be used.
    """

    def __init__(self, ckpt_path: str) -> None:
        run = SavedRun.of_checkpoint(ckpt_path)
        self.ckpt_path = ckpt_path
        self.data = _data_of(run)
        self.task: Any = run.build()
        self._own: dict[str, float] = {}
        self._trainer = RunTrainer(
            accelerator="auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def measure_own(self) -> dict[str, float]:
        """Return the validation metrics with the checkpoint's own adapter, measured once, before another is loaded."""
        if not self._own:
            self._own = self._validate()
        return self._own

    def of(self, folder: Path) -> dict[str, float]:
        """Return the validation metrics with the adapter of a folder."""
        self._load(folder)
        return self._validate()

    def moments(self, source: str) -> dict[str, Tensor]:
        """Return the second moments of what an adapter's layers are fed on the first training batches.

        Args:
            source: The adapter's folder, or the `.ckpt` itself.
        """
        self.measure_own()
        if Path(source).is_dir():
            self._load(Path(source))
        self.data.setup("fit")
        batches = islice(iter(self.data.train_dataloader()), NUM_BATCHES)
        self._model.eval()
        return input_moments(self._model, source, batches, self.task.compute_loss)

    def lines(self, folder: Path) -> list[str]:
        """Tell the metrics of the checkpoint's own adapter and of a folder's."""
        before, after = self.measure_own(), self.of(folder)
        lines = [f"On the validation data of {self.ckpt_path}, with its own adapter and with {folder}:"]
        return lines + [f"  {name}: {value:.4g} → {after[name]:.4g}" for name, value in before.items()]

    @property
    def _model(self) -> nn.Module:
        model: nn.Module = self.task.adapted
        return model

    def _load(self, folder: Path) -> None:
        detach(self._model)
        load_peft(self._model, folder)

    def _validate(self) -> dict[str, float]:
        found = self._trainer.validate(self.task, self.data, verbose=False)
        merged: Mapping[str, float] = {name: value for one in found for name, value in one.items()}
        return {name: float(value) for name, value in merged.items()}


def _data_of(run: SavedRun) -> L.LightningDataModule:
    """Build the data module that trained a checkpoint.

    Raises:
        ConfigError: It is not one of this library, or the checkpoint does not say its settings.
    """
    known = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in import_classes("data").values()}
    cls = known.get(run.data_class_path or "")
    settings = None if cls is None else run.data_settings(cls)
    if cls is None or settings is None:
        raise ConfigError(
            f"{run.path} was trained with {run.data_class_path or 'data that it does not name'}, which this command "
            "cannot build again. Leave --ckpt_path out, and measure with lora-lightning validate or in Python."
        )
    data: L.LightningDataModule = cls(**settings)
    return data
