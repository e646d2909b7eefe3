"""End a run over several ranks soon after one of them is gone, and name it."""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import distributed as dist

from lora_lightning.callbacks.rank_links import Loss, RankLinks
from lora_lightning.errors import ConfigError, RankLost
from lora_lightning.keywords import NamesNearest

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy

__all__ = ["RankWatch"]

_OF_COMMUNICATION = re.compile(r"gloo|nccl|process group|socket|connection (was )?(closed|reset)|broken pipe", re.I)


class RankWatch(NamesNearest, L.Callback):
    """End every rank when one is gone, in a sentence that names it; in a run of one process it does nothing.

    A collective with a dead rank fails at once (gloo) or only after the process group's timeout of half an hour (NCCL).
    Here each rank has a connection to rank 0. If one closes, or no heartbeat arrives for `timeout` seconds, each rank
    gets `grace` seconds to finish its step; then its process is ended. Slow work on one rank, such as merging, does not
    count, since its heartbeats continue. The exit status is 75, after which the run can be restarted.

    Args:
        timeout: Seconds without a heartbeat after which a rank counts as gone; above 3. None turns the watch off.
        grace: Seconds in which a rank may end by itself; at least 0.

    Raises:
        ConfigError: A number is out of its range.
        RankLost: In a run, another rank is gone.
    """

    def __init__(self, timeout: float | None = 45.0, grace: float = 10.0) -> None:
        if timeout is not None and timeout <= 3:
            raise ConfigError(f"RankWatch: timeout must be above 3 seconds, or null for no watch, got {timeout:g}.")
        if grace < 0:
            raise ConfigError(f"RankWatch: grace must be at least 0 seconds, got {grace:g}.")
        self.timeout, self.grace = timeout, grace
        self._links: RankLinks | None = None
        self._loss: Loss | None = None
        self._is_known = threading.Event()
        self._is_ending = threading.Event()
        self._checkpoint: ModelCheckpoint | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Connect the ranks; the model is not built yet."""
        del pl_module, stage
        self._end({"done": True})
        if self.timeout is None or trainer.world_size == 1 or not dist.is_initialized():
            return
        self._loss = None
        self._is_known.clear()
        self._is_ending.clear()
        checkpoint = trainer.checkpoint_callback
        self._checkpoint = checkpoint if isinstance(checkpoint, ModelCheckpoint) else None
        self._links = self._connect(trainer, self.timeout)
        if self._links is not None:
            self._links.start()
            _retire_observer()

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
    ) -> None:
        """End if another rank is known to be gone.

        Raises:
            RankLost: One is.
        """
        del trainer, pl_module, batch, batch_idx
        if self._is_known.is_set():
            raise self._error()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Notify the others how this rank ends; if communication failed, find out which rank caused it.

        Raises:
            RankLost: Another rank's.
        """
        del trainer, pl_module
        self._is_ending.set()
        if self._links is None or isinstance(exception, RankLost):
            return
        if _is_of_communication(exception):
            self._is_known.wait((self.timeout or 0) + 3)
            if self._loss is not None:
                raise self._error() from exception
        if isinstance(exception, Exception):
            words = " ".join(str(exception).split())
            self._end({"failed": f"{type(exception).__name__}: {words[:300]}"})
        else:
            self._end({"left": type(exception).__name__})

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Notify the others that this rank is done."""
        del trainer, pl_module, stage
        self._end({"done": True})

    def __getstate__(self) -> dict[str, Any]:
        """Return only the settings, for copies."""
        return {"timeout": self.timeout, "grace": self.grace}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a new watch from the settings."""
        self.__init__(**state)  # type: ignore[misc]  # a callback is no class to inherit state from

    # Helpers.

    def _connect(self, trainer: L.Trainer, timeout: float) -> RankLinks | None:
        """Open the connections; return None, after a warning, if the network blocks them."""
        strategy: ParallelStrategy = trainer.strategy  # type: ignore[assignment]  # the only ones with several ranks
        listener: socket.socket | None = None
        place: tuple[int, str] | None = None
        if trainer.is_global_zero:
            try:
                listener = _listen()
                place = (listener.getsockname()[1], secrets.token_hex(16))
            except OSError as error:
                rank_zero_warn(f"RankWatch cannot listen ({error}), so a rank that dies is noticed late.")
        place = strategy.broadcast(place)
        if place is None:
            return None
        port, token = place
        if listener is not None:
            return RankLinks(0, token, timeout, self._note, listener=listener)
        environment = strategy.cluster_environment
        assert environment is not None
        try:
            hub = socket.create_connection((environment.main_address, port), timeout)
        except OSError as error:
            print(
                f"Warning: rank {trainer.global_rank} does not reach RankWatch on {environment.main_address}:{port} "
                f"({error}), so its death is noticed late.",
                file=sys.stderr,
            )
            return None
        return RankLinks(trainer.global_rank, token, timeout, self._note, hub=hub)

    def _note(self, loss: Loss) -> None:
        """Called in the links' thread: let the main thread end by itself, or end the process."""
        self._loss = loss
        self._is_known.set()
        if self._is_ending.wait(self.grace):
            return
        print(f"lora-lightning: error: {self._error()}", file=sys.stderr, flush=True)
        os._exit(RankLost.status)  # the main thread waits in a collective that nothing else interrupts

    def _error(self) -> RankLost:
        loss = self._loss
        assert loss is not None
        kept = self._checkpoint.last_model_path or self._checkpoint.best_model_path if self._checkpoint else ""
        remedy = f"continue it with --ckpt_path {kept}" if kept else "it had saved no checkpoint yet"
        return RankLost(f"Rank {loss.rank} on {loss.host} is gone: {loss.how}. The run ends; {remedy}.")

    def _end(self, message: dict[str, Any]) -> None:
        links, self._links = self._links, None
        if links is not None:
            links.end(message)


def _listen() -> socket.socket:
    """Listen on any free port, also for IPv6 if available."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=1024)


def _is_of_communication(exception: BaseException) -> bool:
    """Return whether a collective failed, rather than something of this rank's own."""
    if isinstance(exception, dist.DistError):
        return True
    return isinstance(exception, RuntimeError) and bool(_OF_COMMUNICATION.search(str(exception)))


def _retire_observer() -> None:
    """Stop the thread of Lightning's launcher that kills rank 0 without a message when a child process is gone."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]  # with nobody to observe, it ends
