"""Writes the predictions of a run to a file, with the rows of the input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lora_lightning.callbacks.places import free_name, is_trial, run_folder
from lora_lightning.callbacks.predictions.parts import Part, in_order
from lora_lightning.callbacks.predictions.rows import plain, rows_of
from lora_lightning.callbacks.predictions.tables import PredictedRow, check_format, write_table
from lora_lightning.data.rows.inputs import InputRow
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.keywords import NamesNearest
from lora_lightning.tasks.evaluation import names_of_sets
from lora_lightning.tasks.prediction_columns import columns_of
from lora_lightning.tasks.step_output import batch_size_of

__all__ = ["PredictionWriter"]


class PredictionWriter(NamesNearest, L.Callback):
    """Write the predictions of `trainer.predict` to a file: each row of the input once, in order, with all its columns.

    The columns are `index` (the position of the row in its source, from 0), those of the input, and those of the task
    (see `AdapterTask.prediction_columns`). A column of the input whose name is taken gets `input_` in front. Cells of a
    CSV file that hold lists or mappings are JSON.

    Each rank writes its predictions to a separate file during the run. At the end, rank 0 joins them with the input,
    which it reads again, and renames the file when it is complete. The ranks need a shared folder.

    The input's columns come from the data module: those of this library provide them, and another one may define
    `input_rows(dataloader_idx)`, which returns a mapping for each row of the loader's data set in order.

    Args:
        path: The file, with the suffix `.csv`, `.jsonl` (JSON lines) or `.parquet`; an existing file is replaced. None
            means `predictions` in the run's folder, with a suffix by the task, and a number if it is taken. Several
            sets get one file each, with the name of the set after a hyphen.

    Attributes:
        paths: The files that the last run wrote.

    Raises:
        ConfigError: The suffix does not name a format.

    Example:
        >>> trainer = L.Trainer(callbacks=[PredictionWriter("answers.csv")], logger=False)
    """

    def __init__(self, path: str | None = None) -> None:
        if path is not None:
            check_format(path)
        self.path = path
        self.paths: list[Path] = []
        self._messages: list[str] = []
        self._target: Path | None = None
        self._made: list[Path] = []
        self._parts: dict[int, Part] = {}
        self._has_indices: dict[int, bool] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse to replace the input.

        Raises:
            ConfigError: The file is one of the input's.
        """
        del pl_module
        find = getattr(trainer.datamodule, "input_files", None)  # type: ignore[attr-defined]  # set by Lightning's data connector
        if stage != "predict" or self.path is None or find is None:
            return
        if Path(self.path).resolve() in [path.resolve() for path in find()]:
            raise ConfigError(f"{self.path} is the file that is predicted, and would be replaced; name another one.")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the file and make its folder."""
        self._close()
        self.paths, self._target = [], None
        folder = run_folder(trainer)  # on all ranks
        if is_trial(trainer):
            return
        if self.path is None:
            ending = getattr(pl_module, "predictions_format", ".jsonl")
            target = folder / f"predictions{ending}"
        else:
            target = Path(self.path)
        if trainer.is_global_zero:
            self._made = [one for one in (target.parent, *target.parent.parents) if not one.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            target = free_name(target) if self.path is None else target
        self._target = trainer.strategy.broadcast(target)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - whatever the task returns
        batch: Any,  # noqa: ANN401 - the data module's own type
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the predictions of a batch to this rank's file.

        Raises:
            DataError: They are not one for each row.
        """
        del pl_module
        if self._target is None or outputs is None:
            return
        indices = _indices(trainer, batch_idx, dataloader_idx)
        num_rows = len(indices) if indices is not None else _num_rows(outputs, batch)
        part = self._part(trainer, self._target, dataloader_idx)
        self._has_indices[dataloader_idx] = indices is not None
        for position, prediction in enumerate(rows_of(outputs, num_rows)):
            if indices is None:
                part.add(batch_idx, position, prediction)
            else:
                part.add(indices[position], 0, prediction)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Join the predictions of all ranks, on rank 0."""
        target = self._target
        if target is None:
            return
        names = names_of_sets(trainer.predict_loop._combined_loader) or ("",)
        for index in range(len(names)):
            self._part(trainer, target, index)  # a rank may have had no batch
        for part in self._parts.values():
            part.close()
        trainer.strategy.barrier("PredictionWriter")
        if trainer.is_global_zero:
            for index, name in enumerate(names):
                self._join(trainer, pl_module, target.with_stem(f"{target.stem}-{name}") if name else target, index)
        trainer.strategy.barrier("PredictionWriter")
        self._close()
        self._made.clear()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the path of the predictions, after the progress bars."""
        del trainer, pl_module, stage
        for message in self._messages:
            rank_zero_info(message)
        self._messages.clear()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove incomplete files."""
        del trainer, pl_module, exception
        self._close()
        for folder in self._made:
            with contextlib.suppress(OSError):  # others may have put something into it
                folder.rmdir()
        self._made.clear()

    # Helpers.

    def _part(self, trainer: L.Trainer, target: Path, index: int) -> Part:
        if index not in self._parts:
            self._parts[index] = Part(_part_path(target, index, trainer.global_rank))
        return self._parts[index]

    def _join(self, trainer: L.Trainer, module: L.LightningModule, path: Path, index: int) -> None:
        assert self._target is not None
        parts = [_part_path(self._target, index, rank) for rank in range(trainer.world_size)]
        missing = next((part for part in parts if not part.exists()), None)
        if missing is not None:
            raise ConfigError(f"{missing} of another rank is not there: name a file in a folder that all ranks see.")
        if not any(part.stat().st_size for part in parts):
            rank_zero_warn(f"predict_step returned nothing, so that there is no {path}.")
            return
        are_indices = self._has_indices.get(index, True)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's data connector
        try:
            num_rows = write_table(path, _with_inputs(data, module, index, in_order(parts, are_indices=are_indices)))
        except DataError as error:
            # Keep predictions that may have taken hours, even if the input has changed in the meantime.
            rank_zero_warn(f"{path} is written without the columns of the input: {error}")
            num_rows = write_table(path, _with_inputs(None, module, index, in_order(parts, are_indices=are_indices)))
        self.paths.append(path)
        self._messages.append(f"Predictions: {num_rows} rows in {path}")

    def _close(self) -> None:
        """Remove the parts of this rank."""
        for part in self._parts.values():
            part.close()
            part.path.unlink(missing_ok=True)
        self._parts.clear()
        self._has_indices.clear()


def _part_path(target: Path, index: int, rank: int) -> Path:
    return target.with_name(f"{target.name}.{index}.rank{rank}")


def _indices(trainer: L.Trainer, batch_idx: int, dataloader_idx: int) -> list[int] | None:
    """Return the indices of a batch's rows in their data set; None if the loader does not provide them."""
    loaders = trainer.predict_loop._combined_loader
    assert loaders is not None
    sampler = getattr(loaders.flattened[dataloader_idx], "batch_sampler", None)
    seen: list[list[int]] | None = getattr(sampler, "seen_batch_indices", None)
    return None if not seen else seen[batch_idx]


def _num_rows(outputs: Any, batch: Any) -> int:  # noqa: ANN401 - whatever the task returns
    return len(outputs) if isinstance(outputs, list) else batch_size_of(batch)


def _with_inputs(
    data: Any,  # noqa: ANN401 - a data module of any kind, or None
    module: L.LightningModule,
    index: int,
    found: Iterator[tuple[int, Any]],
) -> Iterator[PredictedRow]:
    """Return predictions and their rows as columns."""
    inputs = data.input_rows(index) if hasattr(data, "input_rows") else None
    complete = getattr(data, "complete_prediction", None)
    describe = getattr(module, "prediction_columns", columns_of)
    number = -1
    row = InputRow(-1, {}, [])
    for at, prediction in found:
        while inputs is not None and number < at:
            number += 1
            row = _input_row(number, next(inputs, None))
        position = at if inputs is None else row.position
        completed = prediction if complete is None else complete(row, prediction)
        yield position, plain(row.fields), plain(describe(completed))


def _input_row(number: int, row: Any) -> InputRow:  # noqa: ANN401 - what a user's data module returns
    if isinstance(row, InputRow):
        return row
    if isinstance(row, Mapping):
        return InputRow(number, row, [])
    raise DataError(
        f"input_rows of the data module returned {'no row' if row is None else type(row).__name__} for row {number} of "
        "those predicted; expected a mapping for each row of the data set."
    )
