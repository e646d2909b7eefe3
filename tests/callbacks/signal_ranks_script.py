"""Trains over two processes: SIGTERM to rank 1 ends both, they resume, and a loss ends both; run as a file."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch

from lora_lightning.callbacks import AdapterCheckpoint, NonFiniteGuard, SignalGuard
from lora_lightning.checkpoint import read_adapter_folder
from lora_lightning.errors import TrainingError
from tests.callbacks.runs import LineData, LineTask, make_trainer


class Disturb(L.Callback):
    """Disturbs rank 1: with a signal in the second step, or with an infinite loss in the fifth."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.first_step = -1
        self.signalled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: LineTask) -> None:
        self.first_step = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: LineTask, batch, batch_idx: int) -> None:
        if self.what == "signal" and trainer.global_rank == 1 and trainer.global_step == 1:
            self.signalled = True
            os.kill(os.getpid(), signal.SIGTERM)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: LineTask, optimizer) -> None:
        if self.what == "loss" and trainer.global_rank == 1 and trainer.global_step == 4:
            guard = next(one for one in trainer.callbacks if isinstance(one, NonFiniteGuard))
            guard._losses = [torch.tensor(torch.inf)]


def run(folder: Path, disturb: Disturb, task: LineTask, ckpt_path: Path | None = None) -> None:
    trainer = make_trainer(
        folder,
        disturb,
        NonFiniteGuard(),
        SignalGuard(),
        AdapterCheckpoint(dirpath=folder / "run" / "version_0" / "checkpoints"),
        devices=2,
        strategy="ddp",
        logger=False,
        max_epochs=4,
    )
    trainer.fit(task, LineData(), ckpt_path=ckpt_path)


def new_task() -> LineTask:
    torch.manual_seed(7)
    return LineTask()


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    children = []

    class Children(Disturb):
        def on_train_start(self, trainer: L.Trainer, pl_module: LineTask) -> None:
            children.extend(getattr(trainer.strategy.launcher, "procs", []))

    status, first = None, Children("signal")
    try:
        run(out, first, new_task())
    except SystemExit as stop:
        status = stop.code
    last = out / "run" / "version_0" / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)["global_step"], read_adapter_folder(last.with_suffix(""))[0].step
    second, error = Disturb("loss"), ""
    try:
        run(out, second, resumed := new_task(), last)
    except TrainingError as found:
        error = str(found)
    with contextlib.suppress(TrainingError):
        run(out / "whole", Disturb("loss"), whole := new_task())
    states = [task.adapter_state() for task in (resumed, whole)]
    start = new_task()
    start.configure_model()
    facts = {
        "status": status,
        "signalled": first.signalled,
        "saved": saved,
        "resumed_at": second.first_step,
        "error": error,
        "equal": all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items()),
        "moved": not all(torch.equal(start.adapter_state()[name], tensor) for name, tensor in states[1].items()),
    }
    rank = int(os.environ["LOCAL_RANK"])
    if rank == 0:
        facts["child_status"] = children[0].wait(60)
    (out / f"{rank}.json").write_text(json.dumps(facts))
    sys.exit(status)
