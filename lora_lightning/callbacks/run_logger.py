"""Lightning's CSVLogger, which creates no files before the first entry."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lora_lightning.errors import ConfigError


class RunLogger(CSVLogger):
    """Log metrics to `<save_dir>/version_<k>/metrics.csv`, k the first that is free.

    Lightning requests the writer before data and model are built. This logger makes its folder with the first entry, so
    that a run that fails earlier leaves no files.

    Args:
        save_dir: Folder of all runs.
        name: Sub-folder in it, or nothing.
        version: Number or name of the run; None takes the next free number.
        prefix: Put before the names of metrics.
        flush_logs_every_n_steps: How often the file is written.
    """

    def __init__(
        self,
        save_dir: str | Path = "runs",
        name: str | None = "",
        version: int | str | None = None,
        **settings: Any,  # noqa: ANN401 - those of CSVLogger
    ) -> None:
        super().__init__(save_dir, name, version, **settings)
        self._picks_version = version is None
        self._is_claimed = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # noqa: ANN401 - the writer, or Lightning's dummy on other ranks
        """The writer; building it creates no file."""
        if self._experiment is None:
            self._experiment = _LazyWriter(log_dir=self.log_dir)
        return self._experiment

    def claim(self) -> None:
        """Make the run's folder, on rank 0; a second call does nothing.

        Raises:
            ConfigError: Another run took the same number in the meantime.
        """
        if self._is_claimed:
            return
        try:
            Path(self.log_dir).mkdir(parents=True, exist_ok=not self._picks_version)
        except FileExistsError as error:
            raise ConfigError(
                f"{self.log_dir} was taken by another run in the meantime; start this one again."
            ) from error
        self._is_claimed = True


def loggers_of_run(given: Logger | Iterable[Logger] | bool | None, root: str | Path) -> list[Logger] | Logger | bool:
    """Return the loggers of a run, the one whose folder is the run's first.

    Checkpoints and settings go into the folder of the first logger. Only Lightning's CSV and TensorBoard loggers have
    one; beside others (Weights & Biases, MLflow) a `RunLogger` comes first.

    Args:
        given: The user's setting; None and True mean only the `RunLogger`, False none.
        root: Folder of all runs.
    """
    if given is None or isinstance(given, bool):
        return False if given is False else RunLogger(root)
    loggers = [given] if isinstance(given, Logger) else list(given)
    with_folder = [one for one in loggers if isinstance(one, CSVLogger | TensorBoardLogger)] or [RunLogger(root)]
    first = with_folder[0]
    for other in with_folder[1:]:
        if other._version is None and other.root_dir == first.root_dir:
            other._version = first.version  # else each would take a number of its own
    return [*with_folder, *(one for one in loggers if one not in with_folder)]


class _LazyWriter(ExperimentWriter):
    """A writer that creates its folder with the first file, and appends in an existing folder."""

    def __init__(self, log_dir: str) -> None:
        # The base class makes the folder and removes older metrics when it is built, so it is not called.
        self.log_dir = log_dir
        self.metrics_file_path = str(Path(log_dir) / self.NAME_METRICS_FILE)
        self.metrics: list[dict[str, float]] = []
        self.metrics_keys: list[str] = _header(Path(self.metrics_file_path))
        self.hparams: dict[str, Any] = {}
        self._fs = get_filesystem(log_dir)

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Write the hyperparameters."""
        Path(self.log_dir).mkdir(parents=True, exist_ok=True)
        super().log_hparams(params)

    def save(self) -> None:
        """Write the metrics so far."""
        if self.metrics:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            super().save()


def _header(path: Path) -> list[str]:
    """Return the columns of a CSV file, none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])
