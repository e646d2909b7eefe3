"""Saves and ends a run on all ranks after a signal."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.callbacks.adapter_checkpoint import AdapterCheckpoint
from lora_lightning.callbacks.gradients import over_ranks
from lora_lightning.callbacks.places import is_trial
from lora_lightning.callbacks.spared_workers import sparing_workers

__all__ = ["SignalGuard"]

_SECONDS_TO_WAIT = 60


class SignalGuard(L.Callback):
    """On SIGTERM, SIGINT or SIGUSR1 to any rank, save `last.ckpt` after the current step and end every rank.

    The exit status is 128 plus the signal's number, as shells count it: 143 for SIGTERM, 130 for SIGINT (Ctrl-C), 138
    for SIGUSR1 on Linux. `--ckpt_path <run>/checkpoints/last.ckpt` resumes from there. A second SIGINT ends at once
    without saving. A signal during validation takes effect after it; a signal before the first step or after the last
    has its usual effect.

    If the whole process group gets the signal, workers of data loaders continue until their loader ends them.

    In each optimizer step, ranks exchange one number by an all-reduce, so that all of them save after the same step.

    Lightning's handler of SIGTERM, which broadcasts inside the handler and saves nothing, is replaced during training.
    In a SLURM job with Lightning's automatic requeue, the requeue signal (SIGUSR1) still requeues the job and writes
    the `hpc_ckpt` from which the job continues, but after a step instead of within one.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._pid = 0
        self._is_training = False
        self._received = 0
        self._was_interrupted = False
        self._agreed: torch.Tensor | None = None
        self._last_step = 0
        self._requeue_signal: int | None = None
        self._sparing = ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Install the handlers that workers of data loaders inherit, before any worker starts.

        A schedule that needs the number of steps starts the training workers, even before `on_fit_start`.
        """
        del pl_module
        if stage != "fit":
            return
        self._received, self._was_interrupted, self._agreed = 0, False, None
        self._pid = os.getpid()
        self._requeue_signal = _requeue_signal(trainer)
        self._take({signal.SIGINT, signal.SIGUSR1, self._requeue_signal or signal.SIGUSR1})
        self._sparing.enter_context(sparing_workers(trainer))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's handler of SIGTERM, and install the others."""
        if trainer.received_sigterm:
            self._received = signal.SIGTERM
        self._last_step = trainer.global_step
        if trainer.world_size > 1:
            self._agreed = torch.zeros((), dtype=torch.int32, device=pl_module.device)
        self._take({signal.SIGTERM})
        self._is_training = True

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Exchange the signal between the ranks.

        With `NonFiniteGuard`, the host waits for the gradients here anyway.
        """
        del pl_module, optimizer
        if self._agreed is not None:
            over_ranks(trainer, self._agreed.fill_(self._received))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own signature
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Save and end after a signal, but only after an optimizer step, since checkpoints do not hold gradients."""
        del pl_module, outputs, batch, batch_idx
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        number = self._received if self._agreed is None else int(self._agreed)
        if number:
            self._stop(trainer, number)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop listening."""
        del pl_module
        self._stop_listening(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop listening."""
        del pl_module, exception
        self._stop_listening(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop listening if there was nothing to train."""
        del pl_module
        if stage == "fit":
            self._stop_listening(trainer)

    # Handling signals.

    def _take(self, numbers: set[int]) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other thread do it
        for number in numbers:
            if signal.getsignal(number) != self._handle:
                self._previous[number] = signal.signal(number, self._handle)

    def _stop_listening(self, trainer: L.Trainer) -> None:
        self._give_back()
        self._sparing.close()
        # Lightning, too, puts back what it met when the run began, which was this guard for some.
        met = trainer._signal_connector._original_handlers
        met.update({number: self._previous[number] for number, handler in met.items() if handler == self._handle})

    def _give_back(self) -> None:
        self._is_training = False
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Record a signal, which the next step handles."""
        del frame
        if os.getpid() != self._pid:
            return  # a worker of a data loader, which must go on until its loader ends it
        if not self._is_training:
            self._give_back()
            signal.raise_signal(number)
            return
        if number == signal.SIGINT and self._was_interrupted:
            raise KeyboardInterrupt
        self._was_interrupted |= number == signal.SIGINT
        self._received = max(self._received, number)
        again = " Press Ctrl-C again to end at once." if number == signal.SIGINT else ""
        text = f"\n{signal.Signals(number).name} received: the run saves after this step and ends.{again}\n"
        os.write(2, text.encode())  # print and logging may be in the middle of something here

    # Ending.

    def _stop(self, trainer: L.Trainer, number: int) -> None:
        name = signal.Signals(number).name
        path = save_last(trainer)
        if number == self._requeue_signal:
            # Lightning's own, and the only place that knows how it requeues.
            trainer._signal_connector._slurm_sigusr_handler_fn(number, None)  # type: ignore[arg-type]  # it does not look at the frame
        if path is None:
            rank_zero_info(f"{name}: ended after step {trainer.global_step}; no callback saves checkpoints here.")
        else:
            rank_zero_info(f"{name}: saved step {trainer.global_step}; resume with --ckpt_path {path}")
        _let_children_end(trainer)
        trainer.strategy.barrier("SignalGuard")
        raise SystemExit(128 + number)


def save_last(trainer: L.Trainer) -> str | None:
    """Save the current step as `last.ckpt`, on all ranks; return its path, or None if no callback saves checkpoints."""
    if is_trial(trainer):
        return None
    savers = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    for saver in savers:
        if isinstance(saver, AdapterCheckpoint):
            return saver.save_now(trainer)
    if not savers:
        return None
    path = Path(savers[0].dirpath or ".") / f"{savers[0].CHECKPOINT_NAME_LAST}{savers[0].FILE_EXTENSION}"
    trainer.save_checkpoint(path)
    return str(path)


def _requeue_signal(trainer: L.Trainer) -> int | None:
    """Return the signal on which Lightning requeues a SLURM job, or None if it does not."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return int(environment.requeue_signal or signal.SIGUSR1)
    return None


def _let_children_end(trainer: L.Trainer) -> None:
    """Wait for the processes that Lightning started, so that it does not kill this one for their exit status.

    Lightning watches them, and kills all ranks when one of them ends with a status other than 0.
    """
    children: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    for child in children:
        atexit.register(_wait, child)
    children.clear()


def _wait(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(_SECONDS_TO_WAIT)
    except subprocess.TimeoutExpired:
        child.kill()
