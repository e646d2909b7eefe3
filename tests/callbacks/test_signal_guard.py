"""A signal saves after the step and ends the run with its status, on all ranks, and the run goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader

from lora_lightning.callbacks import AdapterCheckpoint, SignalGuard
from lora_lightning.checkpoint import read_adapter_folder
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineData, LineTask, fit, make_trainer
from tests.killing import run_forked

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:.*weights_only. was not set"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Send(L.Callback):
    """Sends signals to this process at the beginning of a batch."""

    def __init__(self, *numbers: int, batch: int = 3) -> None:
        self.numbers, self.batch = numbers, batch

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0 and batch_idx == self.batch:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_are_given_back() -> Any:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def last(folder: Path) -> Path:
    return folder / "run" / "version_0" / "checkpoints" / "last.ckpt"


def stopped(folder: Path, *callbacks: L.Callback, **settings: Any) -> tuple[int, int]:
    """Train until a signal ends the run; return its status, and the step that was saved."""
    with pytest.raises(SystemExit) as stop:
        fit(folder, *callbacks, **settings)
    return stop.value.code, torch.load(last(folder), weights_only=True)["global_step"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_saves_after_the_step_and_ends(tmp_path: Path, number: int, status: int, capfd: Any) -> None:
    saver = AdapterCheckpoint(save_last=False, monitor="val/loss")
    assert stopped(tmp_path, Send(number), SignalGuard(), saver) == (status, 4)
    manifest, _ = read_adapter_folder(last(tmp_path).with_suffix(""))
    assert manifest.step == 4
    assert saver.save_last is False
    text = capfd.readouterr().err
    assert f"{signal.Signals(number).name} received: the run saves after this step and ends." in text
    assert f"saved step 4; resume with --ckpt_path {last(tmp_path)}" in text


def test_without_the_guard_nothing_is_saved(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(tmp_path, Send(signal.SIGTERM), AdapterCheckpoint())  # Lightning's own SIGTERMException
    assert not last(tmp_path).exists()


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    stopped(tmp_path, Send(signal.SIGTERM), SignalGuard(), AdapterCheckpoint())
    seen = []

    class Steps(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append((trainer.current_epoch, batch_idx, trainer.global_step))

    trainer = make_trainer(tmp_path, Steps(), SignalGuard(), AdapterCheckpoint())
    trainer.fit(LineTask(), LineData(), ckpt_path=last(tmp_path))
    assert seen == [(0, 4, 4), (0, 5, 5), *[(1, index, 6 + index) for index in range(6)]]
    assert trainer.global_step == 12


def test_accumulated_gradients_are_not_cut_off(tmp_path: Path) -> None:
    settings = {"accumulate_grad_batches": 3}
    assert stopped(tmp_path, Send(signal.SIGTERM, batch=0), SignalGuard(), AdapterCheckpoint(), **settings) == (143, 1)
    progress = torch.load(last(tmp_path), weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["current"]["ready"] == 3


@pytest.mark.parametrize("first", [(), (signal.SIGTERM,)], ids=["alone", "after SIGTERM"])
def test_a_second_sigint_ends_at_once(tmp_path: Path, first: tuple[int, ...]) -> None:
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, Send(*first, signal.SIGINT, signal.SIGINT), SignalGuard(), AdapterCheckpoint())
    assert isinstance(stop.value.__context__, KeyboardInterrupt)
    assert not last(tmp_path).exists()


def test_links_and_plain_checkpoints(tmp_path: Path) -> None:
    link = AdapterCheckpoint(save_last="link", every_n_train_steps=2)
    assert stopped(tmp_path / "link", Send(signal.SIGTERM, batch=2), SignalGuard(), link) == (143, 3)
    assert not last(tmp_path / "link").is_symlink()
    assert torch.load(last(tmp_path / "link").with_name("epoch=0-step=2.ckpt"), weights_only=True)["global_step"] == 2
    assert stopped(tmp_path / "plain", Send(signal.SIGTERM), SignalGuard(), ModelCheckpoint()) == (143, 4)
    with pytest.raises(SystemExit, match="143"):
        fit(tmp_path / "none", Send(signal.SIGTERM), SignalGuard())


class Workers(LineData):
    """Loads in another process, which gets the signal too, as on Ctrl-C in a terminal."""

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples(1), batch_size=4, num_workers=1)  # type: ignore[arg-type]


class SendToWorkers(Send):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            (worker,) = trainer.fit_loop._data_fetcher.combined_loader._iterator.iterators[0]._workers
            os.kill(worker.pid, signal.SIGINT)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


def test_workers_of_the_data_loader_go_on(tmp_path: Path) -> None:
    run = SendToWorkers(signal.SIGINT, batch=1), SignalGuard(), AdapterCheckpoint()
    assert stopped(tmp_path, *run, data=Workers()) == (130, 2)


class MoreWorkers(LineData):
    """Trains and validates on what other processes load."""

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples(1), batch_size=4, num_workers=2)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(self.samples(2), batch_size=4, num_workers=2)  # type: ignore[arg-type]


class SendToGroup(L.Callback):
    """Has another process send a signal to the whole group of this one, as a scheduler does."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            command = ["kill", f"-{self.number}", "--", f"-{os.getpgrp()}"]
            subprocess.run(command, start_new_session=True, check=True)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("number", SIGNALS)
def test_workers_outlive_a_signal_to_the_whole_group(tmp_path: Path, number: int, capfd: Any) -> None:
    def run() -> None:
        os.setsid()
        assert stopped(tmp_path, SendToGroup(number), SignalGuard(), AdapterCheckpoint(), data=MoreWorkers()) == (
            128 + number,
            4,
        )

    assert run_forked(run) == 0, capfd.readouterr().err
    assert "Traceback" not in capfd.readouterr().err
    whole, resumed = LineTask(), LineTask()
    fit(tmp_path / "whole", task=whole, data=MoreWorkers())
    make_trainer(tmp_path, SignalGuard(), AdapterCheckpoint()).fit(resumed, MoreWorkers(), ckpt_path=last(tmp_path))
    for name, tensor in whole.adapter_state().items():
        assert torch.equal(resumed.adapter_state()[name], tensor), name


def test_handlers_are_given_back_where_nothing_was_trained(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, SignalGuard(), max_epochs=0)
    trainer.fit(LineTask(), LineData())
    assert "process_dataloader" not in vars(trainer.strategy)


def test_slurm_requeues_after_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    for name, value in {"JOB_ID": "17", "LOCALID": "0", "PROCID": "0", "NTASKS": "1", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    plugins = [SLURMEnvironment(auto_requeue=True)]
    assert stopped(tmp_path, Send(signal.SIGUSR1), SignalGuard(), AdapterCheckpoint(), plugins=plugins) == (138, 4)
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    script = Path(__file__).with_name("signal_ranks_script.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 143, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["signalled"] for rank in ranks] == [False, True]
    assert [rank["status"] for rank in ranks] == [143, 143]
    assert ranks[0]["child_status"] == 143
    assert [rank["saved"] for rank in ranks] == [[2, 2], [2, 2]]
    # What they then have after step 4 is, bit for bit, what a run that nobody disturbed has.
    assert [(rank["equal"], rank["moved"]) for rank in ranks] == [(True, True)] * 2
    # Both go on from there, until the loss of rank 1 alone is not finite, in a step whose gradients are.
    assert [rank["resumed_at"] for rank in ranks] == [2, 2]
    assert "before optimizer step 5: a loss or gradient of another rank is not finite" in ranks[0]["error"]
    assert "before optimizer step 5: the loss is inf;" in ranks[1]["error"]
