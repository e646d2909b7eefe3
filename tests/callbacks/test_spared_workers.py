"""Workers of data loaders outlive a SIGTERM of others, and obey that of their run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lora_lightning.callbacks.spared_workers import SparedWorker, sparing_workers
from tests.callbacks.runs import LIGHTNING_WARNINGS
from tests.killing import FAILED, run_forked

pytestmark = [*LIGHTNING_WARNINGS, pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")]


@pytest.fixture
def trainer() -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def loader(trainer: L.Trainer, data: Any = range(8), **settings: Any) -> DataLoader[Any]:
    """Return a loader as a Trainer prepares it."""
    prepared = trainer.strategy.process_dataloader(DataLoader(data, num_workers=2, **settings))
    assert isinstance(prepared, DataLoader)
    return prepared


@contextlib.contextmanager
def signals_to_the_group() -> Iterator[None]:
    """Have another process send SIGTERM to this one's group every 2 ms; needs a session of its own."""
    os.setsid()
    signal.signal(signal.SIGTERM, lambda *_: None)
    sender = os.fork()
    if sender == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            os.killpg(0, signal.SIGTERM)
            time.sleep(0.002)
    try:
        yield
    finally:
        os.kill(sender, signal.SIGKILL)
        os.waitpid(sender, 0)


@pytest.mark.parametrize("is_spared", [True, False])
def test_they_load_on_while_others_send_sigterm(trainer: L.Trainer, is_spared: bool, capfd: Any) -> None:
    def load() -> None:
        spared = sparing_workers(trainer) if is_spared else contextlib.nullcontext()
        with spared, signals_to_the_group():
            for _ in range(5):  # many times, since the moment at which a worker starts is the weakest
                assert sorted(map(int, loader(trainer))) == list(range(8))

    status = os.waitstatus_to_exitcode(run_forked(load))
    assert status == (0 if is_spared else FAILED)
    assert ("DataLoader worker (pid" in capfd.readouterr().err) is not is_spared


class Endless:
    """Never has its row ready."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        time.sleep(600)
        return index


def test_they_end_when_their_run_says_so(trainer: L.Trainer) -> None:
    with sparing_workers(trainer):
        workers = iter(loader(trainer, Endless()))._workers  # type: ignore[attr-defined]
    for worker in workers:
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0


def five(worker: int) -> None:
    torch.manual_seed(5)


def test_what_else_prepares_a_worker_is_kept(trainer: L.Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    with sparing_workers(trainer):
        own, lightnings = loader(trainer, worker_init_fn=five), loader(trainer)
        plain = trainer.strategy.process_dataloader(DataLoader(range(2)))
        again = trainer.strategy.process_dataloader(own)
    assert isinstance(own.worker_init_fn, SparedWorker)
    assert isinstance(lightnings.worker_init_fn, SparedWorker)
    assert own.worker_init_fn.then is five
    assert lightnings.worker_init_fn.then.func.__name__ == "pl_worker_init_function"  # type: ignore[union-attr]
    assert again is own
    assert plain.worker_init_fn is None  # type: ignore[attr-defined]
    assert loader(trainer).worker_init_fn is None  # what a Trainer prepares later
