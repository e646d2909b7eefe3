"""One trial in a separate process: train with one rate, validate, and optionally measure and test.

Run as `python -m lora_lightning.commands._compare.trial JOBS.json`; each job's result is written when it is finished.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Subset

from lora_lightning.adapters.base import Method
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.commands._compare import measure
from lora_lightning.commands._compare.ends import fully_trained, no_adapters, trainable_counts
from lora_lightning.commands._compare.plain_classes import build_data, build_task
from lora_lightning.commands._compare.recorder import Recorder, finite, metrics_of
from lora_lightning.commands._compare.records import Result, Spec, digest, write_result
from lora_lightning.imports import import_class
from lora_lightning.tasks import AdapterTask

_LOOK_FOR_PARENT_SECONDS = 2.0


def run_jobs(jobs: list[dict[str, Any]]) -> None:
    """Run jobs one after the other; an exception becomes the result of its job, and the next job runs.

    Args:
        jobs: For each its `spec`, and the `path` of its result.
    """
    data: dict[str, L.LightningDataModule] = {}  # read and tokenized once for all jobs
    for job in jobs:
        try:
            result = run(job["spec"], data)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        write_result(Path(job["path"]), job["spec"], result)


def run(spec: Spec, known_data: dict[str, L.LightningDataModule] | None = None) -> Result:
    """Train, validate, and if the spec says so measure and test.

    Args:
        spec: `task`, `data`, `trainer`, `entry` (`kind`, `method`, `optim`), `seed`, `rate`, `steps`, `val_every`,
            `val_rows`, `trains` (whether anything can learn), and `is_final` (measure and test as well).
        known_data: Data modules that earlier trials built, by spec; this one's is added.

    Returns:
        The figures; `table` formats them.
    """
    started = time.perf_counter()
    L.seed_everything(spec["seed"], workers=True, verbose=False)
    task, data = _task(spec), _data(spec, {} if known_data is None else known_data)
    recorder = Recorder(measures=spec["is_final"])
    trainer = _trainer(spec, recorder)
    if spec["trains"]:
        trainer.fit(task, datamodule=data)
    if not recorder.validations or recorder.validations[-1]["step"] != trainer.global_step:
        trainer.validate(task, datamodule=data, verbose=False)
    last = recorder.validations[-1] if recorder.validations else {}
    result: Result = {
        "rate": spec["rate"],
        "steps": trainer.global_step,
        "val": {name: value for name, value in last.items() if name != "step"},
        "losses": recorder.losses,
        "validations": recorder.validations,
    }
    if spec["is_final"]:
        result |= _final(spec, task, data, trainer)
    return {**result, **recorder.figures, "notes": recorder.notes, "seconds": time.perf_counter() - started}


def _final(spec: Spec, task: AdapterTask, data: L.LightningDataModule, trainer: L.Trainer) -> Result:
    """Fold, test, and measure the trained state."""
    num_trainable, num_head = trainable_counts(task.adapted)
    is_full = spec["entry"]["kind"] == "full"
    task.fold()
    trainer.test(task, datamodule=data, verbose=False)
    return {
        "test": {name.removeprefix("test/"): finite(v) for name, v in metrics_of(trainer, "test/").items()},
        "num_trainable": num_trainable,
        "num_head": num_head,
        "num_base": sum(p.numel() for name, p in task.adapted.named_parameters() if RESERVED not in name.split(".")),
        "checkpoint_bytes": measure.checkpoint_bytes(task.adapted, with_base=is_full),
        "merges": measure.merges(task.adapted) if spec["entry"]["kind"] == "method" else None,
    }


def _task(spec: Spec) -> AdapterTask:
    entry = spec["entry"]
    optim = {**entry["optim"], "lr": spec["rate"]}
    if entry["kind"] == "method":
        method = import_class(entry["method"]["class_path"], Method, "compare")(**entry["method"]["init_args"])
        return build_task(spec["task"], method, optim)
    cls = import_class(spec["task"]["class_path"], AdapterTask, "compare")
    return build_task(spec["task"], no_adapters(), optim, fully_trained(cls) if entry["kind"] == "full" else cls)


def _data(spec: Spec, known: dict[str, L.LightningDataModule]) -> L.LightningDataModule:
    """Return the trial's data module: an earlier trial's, or a new one."""
    key = digest({"data": spec["data"], "val_rows": spec["val_rows"]})
    if key not in known:
        known[key] = build_data(spec["data"])
        if spec["val_rows"]:
            _limit_validation(known[key], spec["val_rows"])
    return known[key]


def _trainer(spec: Spec, recorder: Recorder) -> L.Trainer:
    settings = {"accelerator": "auto", "devices": 1, **spec["trainer"]}
    every = spec["val_every"] or spec["steps"]
    return L.Trainer(
        max_steps=spec["steps"],
        max_epochs=-1,
        val_check_interval=every * int(settings.get("accumulate_grad_batches", 1)),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
        **settings,
    )


def _limit_validation(data: L.LightningDataModule, num_rows: int) -> None:
    """Make a data module validate on a part of its rows, taken from each of several sets in proportion."""
    make: Callable[[], Any] = data.val_dataloader

    def limited() -> Any:  # noqa: ANN401 - Lightning's own union
        loaders = make()
        if not isinstance(loaders, Mapping):
            return _limited(loaders, num_rows)
        totals = {name: _num_rows(loader) for name, loader in loaders.items()}
        share = num_rows / max(sum(totals.values()), 1)
        return {name: _limited(loader, max(round(share * totals[name]), 1)) for name, loader in loaders.items()}

    data.val_dataloader = limited  # type: ignore[method-assign]  # replaced on this instance alone


def _limited(loader: Any, num_rows: int) -> Any:  # noqa: ANN401 - Lightning's own union
    """Return a loader of some rows of another, evenly spaced: files are often sorted by their source."""
    total = _num_rows(loader)
    if total <= num_rows:
        return loader
    dataset = loader.dataset
    lengths = getattr(dataset, "lengths", None)
    places = [index * total // num_rows for index in range(num_rows)]
    if lengths is not None:  # texts of like length together, so that little is padded
        places.sort(key=lambda place: -lengths[place])
    return DataLoader(Subset(dataset, places), batch_size=loader.batch_size, collate_fn=loader.collate_fn)


def _num_rows(loader: Any) -> int:  # noqa: ANN401 - Lightning's own union
    """Return the number of rows of a loader; 0 if unknown."""
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if isinstance(loader, DataLoader) and hasattr(dataset, "__len__") else 0  # type: ignore[arg-type]  # datasets need not be sized to torch


def _end_with_parent() -> None:
    """End this process when its parent process is gone, so that no trial continues unnoticed."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_FOR_PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def main(arguments: list[str]) -> None:
    """Run the jobs of a file."""
    _end_with_parent()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    run_jobs(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(sys.argv[1:])
