"""Kill a training run at random moments, go on from its newest checkpoint each time, and check that nothing is lost.

The run saves after every step, and a milestone every few. After each SIGKILL the newest complete checkpoint must load,
must not be older than the one before, every milestone must be there, and the next start must leave no orphan behind. A
run that came to its end must have exactly the weights of one that nobody disturbed. Libraries are imported once; each
life is a fork.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning.callbacks import AdapterCheckpoint
from lora_lightning.checkpoint import read_adapter_folder
from lora_lightning.checkpoint.complete import is_complete, newest_complete
from lora_lightning.checkpoint.files import hidden_entries
from lora_lightning.checkpoint.pair import folder_of
from lora_lightning.checkpoint.reading import read_checkpoint
from lora_lightning.methods import LoRA
from lora_lightning.optim import Optim
from lora_lightning.tasks import AdapterTask, StepOutput

NUM_EPOCHS, STEPS_PER_EPOCH, BATCH_SIZE = 3, 20, 4
MILESTONE = 10
MAX_STEPS_OF_A_LIFE = 8
SHARE_KILLED_AT_START = 0.2
FAILED, ORPHANS = 3, 4


class Perceptron(AdapterTask):
    """Classifies points with a frozen perceptron under adapters."""

    def __init__(self) -> None:
        super().__init__(
            method=LoRA(r=2, dropout=0.2, target_modules=["0", "2"]),
            optim=Optim(lr=0.02, schedule="linear", warmup=5),
        )

    def configure_backbone(self) -> nn.Module:
        """Build the same perceptron every time."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def compute_loss(self, batch: tuple[Tensor, Tensor]) -> StepOutput:
        """Return the cross entropy."""
        return StepOutput(nn.functional.cross_entropy(self.adapted(batch[0]), batch[1]))


class Points(L.LightningDataModule):
    """Random points, labelled by the sign of their first coordinate."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a plain shuffling loader: that a life goes on where the last one was is `ExactResume`'s doing."""
        points = torch.randn(STEPS_PER_EPOCH * BATCH_SIZE, 8, generator=torch.Generator().manual_seed(3))
        return DataLoader(TensorDataset(points, (points[:, 0] > 0).long()), batch_size=BATCH_SIZE, shuffle=True)


class Announce(L.Callback):
    """Says through a pipe that training goes on, once no orphan is left; ends the process if one is."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:  # noqa: ANN401 - not looked at
        """Look at the folders before the first step of this life."""
        del args
        if self.pipe < 0:
            return
        folders = [Path(str(callback.dirpath)) for callback in trainer.checkpoint_callbacks]  # type: ignore[attr-defined]
        if any(folder.is_dir() and hidden_entries(folder) for folder in folders):
            os._exit(ORPHANS)
        os.write(self.pipe, b"\n")
        self.pipe = -1


def train(folder: Path, pipe: int) -> None:
    """Begin a run, or go on with it, to its end; then write the adapter's weights as `final.pt`."""
    rolling = AdapterCheckpoint(dirpath=folder / "rolling", every_n_train_steps=1)
    milestones = AdapterCheckpoint(
        dirpath=folder / "milestones",
        filename="{step}",
        every_n_train_steps=MILESTONE,
        save_top_k=-1,
        save_last=False,
        enable_version_counter=False,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=NUM_EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Announce(pipe), milestones, rolling],  # a life goes on from what is saved last
    )
    torch.manual_seed(0)
    task = Perceptron()
    newest = newest_complete(folder / "rolling")
    trainer.fit(task, Points(), ckpt_path=newest and str(newest), weights_only=True)
    torch.save(task.adapter_state(), folder / "final.pt")


@dataclass
class Life:
    """A forked process that trains.

    Args:
        process: Its id.
        pipe: Readable once it trains.
    """

    process: int
    pipe: int

    @classmethod
    def begin(cls, act: Callable[[int], object]) -> Life:
        """Fork; `act` gets the end of the pipe to write to."""
        reader, writer = os.pipe()
        process = os.fork()
        if process:
            os.close(writer)
            return cls(process, reader)
        quiet()
        try:
            act(writer)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(FAILED)
        os._exit(0)

    def end(self, *, with_kill: bool) -> int:
        """Wait for the end, or bring it about; return the status as `os.waitpid` gives it."""
        if with_kill:
            os.kill(self.process, signal.SIGKILL)
        os.close(self.pipe)
        return os.waitpid(self.process, 0)[1]

    def trains_within(self, seconds: float) -> bool:
        """Wait until it trains (or ends), at most so long; return whether that came."""
        return bool(select.select([self.pipe], [], [], seconds)[0])


@dataclass
class Report:
    """What happened.

    Args:
        kills: How many processes were killed, by what they were doing.
        runs: How many runs came to their end.
        failures: What was wrong, in words.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    failures: list[str] = field(default_factory=list)


def torture(num_kills: int, seed: int, folder: Path) -> Report:
    """Kill runs until there were `num_kills` kills; then let the last one come to its end."""
    generator, report = random.Random(seed), Report()
    began = time.monotonic()
    peaceful = Life.begin(lambda pipe: train(folder / "peaceful", pipe))
    peaceful.trains_within(600)
    startup = time.monotonic() - began
    if peaceful.end(with_kill=False) != 0:
        report.failures.append("the undisturbed run failed")
        return report
    pause = (time.monotonic() - began - startup) / (NUM_EPOCHS * STEPS_PER_EPOCH)  # seconds for a step
    expected = torch.load(folder / "peaceful" / "final.pt", weights_only=True)
    while not report.failures:
        run = folder / f"run-{report.runs}"
        _one_run(run, num_kills, generator, (startup, pause), report)
        if not report.failures:
            report.runs += 1
            report.failures += _differences(torch.load(run / "final.pt", weights_only=True), expected)
        if report.kills.total() >= num_kills:
            break
        shutil.rmtree(run)
    return report


def _one_run(run: Path, num_kills: int, generator: random.Random, times: tuple[float, float], report: Report) -> None:
    """Kill one run again and again, until it came to its end in spite of that or there were enough kills."""
    startup, pause = times
    step = 0
    while True:
        life = Life.begin(lambda pipe: train(run, pipe))
        if report.kills.total() >= num_kills:
            status = life.end(with_kill=False)
        else:
            if generator.random() < SHARE_KILLED_AT_START:
                life.trains_within(generator.uniform(0, startup))
            else:
                life.trains_within(600)
                time.sleep(generator.uniform(0, MAX_STEPS_OF_A_LIFE * pause))
            status = life.end(with_kill=True)
        if status == signal.SIGKILL:
            step = _check(run, step, report)
        elif status != 0:
            found = os.waitstatus_to_exitcode(status)
            report.failures.append("orphans stayed" if found == ORPHANS else f"a life ended with status {found}")
        if status == 0 or report.failures:
            return


def _check(run: Path, step: int, report: Report) -> int:
    """Check what a killed process left, and return the step of the newest complete checkpoint."""
    rolling = run / "rolling"
    files = sorted(rolling.glob("*.ckpt")) if rolling.is_dir() else []
    left = hidden_entries(rolling) if rolling.is_dir() else {}
    report.kills["while saving" if left else "between saves" if files else "before the first save"] += 1
    for path in files:
        if not is_complete(path):
            report.failures.append(f"{path} is not complete")
    newest = newest_complete(rolling)
    if newest is None:
        if step:
            report.failures.append(f"the checkpoint of step {step} was lost")
        return 0
    found = int(read_checkpoint(newest).content["global_step"])
    if found < step:
        report.failures.append(f"step {step} was saved, and {found} is the newest")
    if not left and read_adapter_folder(folder_of(newest))[0].step != found:
        report.failures.append(f"{folder_of(newest)} is of another step than {newest.name}")
    for milestone in range(MILESTONE, found, MILESTONE):
        if not is_complete(run / "milestones" / f"step={milestone}.ckpt"):
            report.failures.append(f"the milestone of step {milestone} was lost")
    return found


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    return [f"the final weights differ in {len(different)} of {len(expected)} tensors"] if different else []


def main() -> int:
    """Read the flags, and print what happened."""
    parser = argparse.ArgumentParser(description="Kill a run at random moments, and check that nothing is lost.")
    parser.add_argument("--kills", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with more threads is not safe to fork
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = torture(options.kills, options.seed, Path(folder))
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.kills.items()))
    print(f"{report.kills.total()} kills ({kinds}), {report.runs} runs to the end, {time.monotonic() - began:.0f} s")
    for failure in report.failures:
        print(f"FAILED: {failure}")
    return 1 if report.failures else 0


def quiet() -> None:
    """Silence Lightning."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
