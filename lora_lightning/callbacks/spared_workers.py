"""Keeps the workers of data loaders running when a signal goes to all processes of a run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from torch.utils.data import DataLoader


class SparedWorker:
    """A `worker_init_fn` for a worker with blocked SIGTERM, which only its own run can end with that signal.

    Args:
        then: The loader's own `worker_init_fn`, or None.
    """

    def __init__(self, then: Callable[[int], object] | None = None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        """Prepare this process, which is the worker of a number."""
        threading.Thread(target=_obey_the_run, name="spared-worker", daemon=True).start()
        if self.then is not None:
            self.then(worker)


def _obey_the_run() -> None:
    """End this process when the run sends SIGTERM or has ended."""
    run = multiprocessing.parent_process()
    assert run is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run.pid and run.is_alive():
        pass
    os._exit(0)


@contextmanager
def _blocked(number: int) -> Iterator[None]:
    """Block a signal in this thread during the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _spare(loader: DataLoader[Any], rank: int) -> None:
    """Make a loader block SIGTERM while it starts its workers, which inherit the mask."""
    if isinstance(loader.worker_init_fn, SparedWorker):
        return
    _auto_add_worker_init_fn(loader, rank)  # Lightning adds none where it finds one
    loader.worker_init_fn = SparedWorker(loader.worker_init_fn)
    begin = loader._get_iterator

    def begin_blocked() -> Any:  # noqa: ANN401 - torch's own iterator
        with _blocked(signal.SIGTERM):
            return begin()

    loader._get_iterator = begin_blocked  # type: ignore[method-assign]  # torch has no hook there


@contextmanager
def sparing_workers(trainer: L.Trainer) -> Iterator[None]:
    """Protect the workers of all data loaders that a Trainer prepares inside the block from SIGTERM.

    Schedulers, containers and `timeout` send SIGTERM to a whole process group. A worker of torch dies of it, and torch
    then raises an error in the run, within the step after which it would save. Protected workers start with SIGTERM
    blocked. On systems that do not report the sender of a signal (macOS, Windows) nothing changes.
    """
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    process = trainer.strategy.process_dataloader

    def process_and_spare(dataloader: object) -> object:
        if isinstance(dataloader, DataLoader) and dataloader.num_workers:
            _spare(dataloader, trainer.global_rank)
        return process(dataloader)

    trainer.strategy.process_dataloader = process_and_spare  # type: ignore[method-assign]  # no callback has a hook there
    try:
        yield
    finally:
        del trainer.strategy.process_dataloader
