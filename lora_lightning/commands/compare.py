"""The command `lora-lightning compare`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from lora_lightning import data as _data  # noqa: F401 - its classes are known by their short names
from lora_lightning.checkpoint.files import write_atomically
from lora_lightning.commands._compare.budget import Skeleton
from lora_lightning.commands._compare.ends import no_adapters
from lora_lightning.commands._compare.entries import check_rates, entries_of
from lora_lightning.commands._compare.plain_classes import build_task, data_spec, task_spec
from lora_lightning.commands._compare.report import page
from lora_lightning.commands._compare.report.charts import draw_all
from lora_lightning.commands._compare.report.csv_files import curves_csv, search_csv, to_csv
from lora_lightning.commands._compare.report.table import columns_of, rows_of, to_terminal
from lora_lightning.commands._compare.runner import Outcome, Runner
from lora_lightning.commands._compare.study import Study
from lora_lightning.data.base import TokenizedData
from lora_lightning.errors import ConfigError
from lora_lightning.methods import LoRA
from lora_lightning.tasks import AdapterTask

FAILED = 1
USUAL_STEPS = 200
_WIDTH = 200
"""Width of the table in characters if the output is not a terminal."""
_TRAINER_SETTINGS = (
    *("accelerator", "devices", "precision", "accumulate_grad_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm", "deterministic"),
)


def compare(
    model: AdapterTask,
    data: L.LightningDataModule,
    methods: str | list[str | dict[str, Any]] = "all",
    trainable_parameters: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    search_rates: list[float] | None = None,
    search_steps: int = 50,
    seeds: list[int] | None = None,
    val_rows: int | None = None,
    val_every: int | None = None,
    steps_to_reach: str | None = None,
    output_dir: str = "runs/compare",
    trainer: dict[str, Any] | None = None,
    seed_everything: bool | int = True,
) -> int:
    """Train several methods on one task within one budget, and compare them.

    The frozen base with a trained head, and full fine-tuning, are always included. Each method tries its learning rates
    for a few steps, compared on the validation split, and trains with the best; the test split is read once at the end.
    Every trial is a separate process, and finished trials are not repeated when the command is started again. Writes
    comparison.md, .csv and .html, charts, search.csv and curves.csv.

    Args:
        model: The task and its backbone as for `fit`, without a method.
        data: The data.
        methods: A list of names such as [LoRA, DoRA, LoRA+] or of {class_path, init_args, label, optim, rates}, or all.
        trainable_parameters: Number of parameters that each method trains, without the head: ranks and widths are
            chosen accordingly. By default methods keep their own size.
        steps: Optimizer steps of each full run; 200 if neither steps nor minutes are given.
        minutes: Minutes of each full run's steps, instead of steps.
        search_rates: Learning rates to try with every method; by default the three usual ones of each.
        search_steps: Optimizer steps with each learning rate.
        seeds: Seeds of the full runs, by default only 0; rates are chosen with the first.
        val_rows: Compare learning rates on this many rows of the validation split, evenly spaced.
        val_every: Validate a full run every so many steps; by default only at its end.
        steps_to_reach: Label of a method; reports the steps until the others reach its final validation loss.
        output_dir: The folder to write; a comparison there with the same settings is continued.
        trainer: Settings of the trainer: accelerator, devices, precision, accumulate_grad_batches and gradient
            clipping count.
        seed_everything: Not used, see seeds; `fit` takes it.
    """
    del seed_everything
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    if steps is None and minutes is None:
        steps = USUAL_STEPS
    _check(steps=steps, minutes=minutes, search_steps=search_steps, val_rows=val_rows, val_every=val_every)
    if trainable_parameters is not None and trainable_parameters < 1:
        raise ConfigError(f"trainable_parameters is {trainable_parameters}: expected a whole number of at least 1.")
    if search_rates is not None and not check_rates("search_rates", search_rates):
        raise ConfigError("search_rates is empty; name some rates, or leave it out for each method's usual ones.")
    if list(map(type, model.methods)) != [LoRA] or model.methods[0] != LoRA():
        raise ConfigError("model.method is set, and compare takes its methods from `methods`; leave it out.")
    task = task_spec(model)
    skeleton = Skeleton(build_task(task, no_adapters(), {}))
    study = Study(
        task=task,
        data=data_spec(data),
        trainer=_trainer_settings(trainer or {}, console),
        entries=tuple(entries_of(methods, skeleton, trainable_parameters, search_rates)),
        seeds=_seeds(seeds),
        trainable_parameters=trainable_parameters,
        steps=steps,
        minutes=minutes,
        search_steps=search_steps,
        val_rows=val_rows,
        val_every=val_every,
        folder=Path(output_dir).expanduser(),
    )
    _check_reference(steps_to_reach, study)
    study.check_folder()
    _check_splits(data)
    command = _command()
    study.claim_folder(command)
    console.print(f"{len(study.entries)} rows; budget: {study.budget}.", highlight=False)

    def write(outcomes: list[Outcome], *, is_last: bool = False) -> None:
        _write(study, outcomes, command, steps_to_reach, with_charts=is_last)

    outcomes = Runner(study, console, write).run()
    write(outcomes, is_last=True)
    rows = rows_of(outcomes, steps_to_reach)
    console.print(to_terminal(rows, columns_of(rows, steps_to_reach)), crop=False)
    console.print(f"Written to {study.folder}: comparison.md, comparison.csv, comparison.html.", highlight=False)
    return FAILED if any(outcome.errors for outcome in outcomes) else 0


def _write(study: Study, outcomes: list[Outcome], command: str, reference: str | None, *, with_charts: bool) -> None:
    """Write the available results; charts and page only at the end, since drawing takes a while."""
    rows = rows_of(outcomes, reference)
    columns = columns_of(rows, reference)
    files = {
        "comparison.csv": to_csv(rows, columns).encode(),
        "search.csv": search_csv(outcomes).encode(),
        "curves.csv": curves_csv(outcomes).encode(),
    }
    pictures = draw_all(rows, outcomes) if with_charts else {}
    files |= {f"{name}.png": picture for name, picture in pictures.items()}
    files["comparison.md"] = page.markdown(study, rows, columns, command, list(pictures)).encode()
    if with_charts:
        files["comparison.html"] = page.html(study, rows, columns, command, pictures).encode()
    for name, content in files.items():
        write_atomically(study.folder / name, content)


def _check(**numbers: float | None) -> None:
    """Refuse numbers below their minimum."""
    for name, value in numbers.items():
        if value is None:
            continue
        if name == "minutes":
            if not 0 < value < float("inf"):
                raise ConfigError(f"minutes is {value}: expected a number above 0.")
        elif value < 1:
            raise ConfigError(f"{name} is {value}: expected a whole number of at least 1.")
    if numbers["steps"] is not None and numbers["minutes"] is not None:
        raise ConfigError("Both steps and minutes are given; a full run ends by one of them.")


def _check_splits(data: L.LightningDataModule) -> None:
    """Refuse data without a validation or test split: a trial would find it only after its training.

    Raises:
        ConfigError: A data module has no loader for one of them.
        DataError: A split has no rows, or the data cannot be divided.
    """
    for hook, reason in (("val_dataloader", "learning rates are judged"), ("test_dataloader", "methods are compared")):
        if getattr(type(data), hook) is getattr(L.LightningDataModule, hook):
            raise ConfigError(f"{type(data).__name__} defines no {hook}, on whose rows {reason}; define it.")
    if isinstance(data, TokenizedData):
        data.require_rows("val", "test")


def _seeds(seeds: list[int] | None) -> tuple[int, ...]:
    if seeds is None:
        return (0,)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds is {seeds}: expected at least one, each once, and none below 0.")
    return tuple(seeds)


def _trainer_settings(given: dict[str, Any], console: Console) -> dict[str, Any]:
    """Return the trainer's settings that a trial takes, and warn of those without effect here."""
    ignored = [name for name in given if name not in _TRAINER_SETTINGS]
    if ignored:
        console.print(f"Not used of trainer: {', '.join(ignored)}.", highlight=False)
    return {name: value for name, value in given.items() if name in _TRAINER_SETTINGS and value is not None}


def _check_reference(label: str | None, study: Study) -> None:
    known = [entry.label for entry in study.entries if entry.kind == "method" and not entry.error]
    if label is None:
        return
    if label not in known:
        raise ConfigError(f"steps_to_reach is {label!r}, which is not compared here; it is one of {', '.join(known)}.")
    if study.val_every is None:
        raise ConfigError("steps_to_reach needs val_every: between how many steps the validation loss is looked at.")


def _command() -> str:
    return shlex.join(["lora-lightning", *(sys.argv[1:] or ["compare"])])
