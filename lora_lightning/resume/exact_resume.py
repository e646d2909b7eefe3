"""A callback that makes a resumed run continue exactly like the uninterrupted one."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lora_lightning.errors import CheckpointError
from lora_lightning.resume.loops import (
    FitData,
    Lengths,
    at_epoch_start,
    correct_progress,
    current_position,
    epoch_of_samplers,
    is_amid_batch,
    is_amid_step,
)
from lora_lightning.resume.position import Position
from lora_lightning.resume.random_state import RandomState
from lora_lightning.resume.unfinished import PendingGradients, load_unfinished, unfinished_state

__all__ = ["ExactResume"]

KEY = "exact_resume"


class ExactResume(L.Callback):
    """Save what a run needs to resume from any batch: random numbers of every rank, data position, unfinished steps.

    Every `AdapterTask` brings one along; give it to the Trainer beside `AdapterFinetuning`. Manual optimization and
    several optimizers are resumed as well. Losses and weights of the resumed run are bit-identical to those of the
    uninterrupted one, on the same machine, with the same settings and versions. The checkpoint stores plain numbers and
    tensors, under `exact_resume`.

    Data modules of this library go straight to their place in the epoch. A loader of your own is brought there by
    loading once more what has passed, from the random state with which its epoch began; this finds the same order for
    every sampler that draws from the global generators or from its own `generator`.

    With another number of ranks or another batch size, the remaining rows of the epoch are divided among the present
    ranks, each once, in their order; a message says so. Your own data loader cannot do that, and a warning says so.

    Validation leaves the random numbers of training alone: how often a run is validated does not change it.

    Not brought back: averages that Lightning itself takes over a training epoch (`self.log(..., on_epoch=True)`) cover
    what came after the checkpoint; a validation that was due right after a checkpoint at the end of a batch is left
    out, as Lightning does; random numbers that a callback draws between two batches, after the checkpoint was written.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._begun = Position()  # in the current epoch, where this process took it up
        self._is_before_first = True  # the loops still count the batches of the epoch before
        self._is_in_backward = False
        self._after_batch: RandomState | None = None
        self._epoch_start: dict[str, Any] | None = None  # only for loaders that cannot seek
        self._usual_length: Lengths | None = None
        self._unfinished: list[dict[str, Any] | None] | None = None
        self._pending: PendingGradients | None = None  # only for modules that optimize manually

    # Saving.

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the position, and for each rank its random numbers and what it holds of an unfinished step."""
        data = FitData(trainer)
        if self._after_batch is None or not data.is_there:
            return  # no batch was trained on: there is nothing to go on from
        is_between = not is_amid_batch(trainer) and not trainer.validating
        now = RandomState.now(_device(trainer)) if is_between else self._after_batch
        position = self._begun if self._is_before_first else current_position(trainer, self._begun, data.layout)
        mine = {
            "random": now.plain(),
            "epoch_start": None if data.is_seekable else self._start_of_epoch(data, position, now),
            "unfinished": self._unfinished_step(trainer, pl_module, position),
        }
        checkpoint[KEY] = {
            "position": position.plain(),
            "num_batches": data.num_batches(self._usual_length),
            "data_fingerprint": _data_fingerprint(trainer),
            "ranks": _from_all_ranks(mine, trainer),
        }

    def _start_of_epoch(self, data: FitData, position: Position, now: RandomState) -> dict[str, Any]:
        if not position.passed or self._epoch_start is None:
            return data.epoch_start(now)
        return {**self._epoch_start, "base_seeds": data.base_seeds()}

    def _unfinished_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, position: Position
    ) -> dict[str, Any] | None:
        # Automatic optimization steps at the end of an epoch at the latest; a module that steps itself may not.
        names = None if self._pending is None else self._pending.of(pl_module)
        is_unfinished = bool(position.passed) and is_amid_step(trainer) if names is None else bool(names)
        was_changed = is_amid_batch(trainer) and self._is_in_backward
        if not is_unfinished and not (was_changed and names is not None):
            return None
        if not was_changed:
            return unfinished_state(pl_module, names)
        rank_zero_warn(
            "The checkpoint is written amid a batch, whose gradients are partly added to those of the batches before "
            "it. It holds none of them, so a run cannot resume exactly from it."
        )
        return None

    # Loading.

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take what was saved, and let Lightning's loops begin at that very place.

        Raises:
            CheckpointError: The checkpoint does not hold all that was saved.
        """
        del pl_module
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._loaded = checkpoint.get(KEY)
        if self._loaded is None:
            rank_zero_warn(
                "The checkpoint holds no data position and no random numbers, so training continues from its weights, "
                "but not exactly: an epoch that was not over may repeat rows and leave out others."
            )
            return
        missing = sorted({"position", "num_batches", "data_fingerprint", "ranks"} - self._loaded.keys())
        if missing or not self._loaded["ranks"]:
            raise CheckpointError(
                f"The checkpoint was changed since it was written: its entry {KEY} lacks "
                f"{', '.join(missing) or 'ranks'}; use another checkpoint."
            )
        correct_progress(checkpoint["loops"]["fit_loop"], Position.from_plain(self._loaded["position"]))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring data and random numbers to their place."""
        self._pending = None if pl_module.automatic_optimization else PendingGradients(trainer.optimizers)
        self._usual_length, self._is_before_first = None, True
        data, loaded, self._loaded = FitData(trainer), self._loaded, None
        if loaded is None:
            self._begun = Position(epoch_of_samplers(trainer))
            self._after_batch = RandomState.now(_device(trainer))
            self._epoch_start = None if data.is_seekable else data.epoch_start(self._after_batch)
            if data.is_seekable:
                if data.has_persistent_workers:
                    data.seek(self._begun)
            elif data.must_begin_again:
                data.restart()  # so that its iterator stems from the random numbers that a checkpoint will hold
            return
        self._begun = Position.from_plain(loaded["position"])
        self._continue(trainer, data, loaded)

    def _continue(self, trainer: L.Trainer, data: FitData, loaded: dict[str, Any]) -> None:
        device, ranks = _device(trainer), loaded["ranks"]
        mine = ranks[trainer.global_rank % len(ranks)]
        self._after_batch = RandomState.from_plain(mine["random"])
        self._epoch_start = mine["epoch_start"]
        if any(one["unfinished"] is not None for one in ranks):
            self._unfinished = [one["unfinished"] for one in ranks]
        self._tell(trainer, data, loaded)
        if not self._begun.passed:
            at_epoch_start(trainer)
        if data.is_seekable:
            self._usual_length = data.seek(self._begun)
        else:
            self._epoch_start = self._epoch_start or data.epoch_start(self._after_batch)
            data.repeat(self._begun, self._epoch_start, device)
            if not self._begun.passed:
                self._after_batch = RandomState.now(device)  # the epoch's iterator has drawn from it
        self._after_batch.restore(device)
        data.before_next_batch(partial(self._after_batch.restore, device))

    def _tell(self, trainer: L.Trainer, data: FitData, loaded: dict[str, Any]) -> None:
        """Log where training continues, and what has changed."""
        passed = self._begun.passed
        rank_zero_info(f"Resuming in epoch {self._begun.epoch} after {self._begun.num_batches} batches.")
        # Lightning says that loaders without a state_dict cannot resume.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        num_ranks = len(loaded["ranks"])
        before, here = (passed[-1].layout if passed else None), data.layout
        if num_ranks != trainer.world_size:
            rank_zero_info(
                f"The checkpoint was written by {num_ranks} ranks, and there are {trainer.world_size} now. Random "
                "numbers are those of the ranks with the same number, in turn."
            )
        if before is not None and before[:2] != here[:2]:
            was = f"{before.num_replicas} ranks with batches of {before.batch_size}"
            now = f"{here.num_replicas} with batches of {here.batch_size}"
            if data.is_seekable:
                rank_zero_info(f"The epoch was begun by {was}; its remaining rows are divided among {now}, each once.")
            else:
                rank_zero_warn(
                    f"The epoch was begun by {was}, and continues with {now}. This data loader cannot divide the "
                    "remaining rows again, so rows are repeated or left out until the epoch ends. The data modules of "
                    "this library can."
                )
        elif passed and data.num_batches() != loaded["num_batches"]:
            rank_zero_warn(
                f"An epoch had {loaded['num_batches']} batches when the checkpoint was written, and has "
                f"{data.num_batches()} now, so the rest of this one does not hold the rows that were left."
            )
        fingerprint = _data_fingerprint(trainer)
        if loaded["data_fingerprint"] and fingerprint and fingerprint != loaded["data_fingerprint"]:
            rank_zero_warn(
                "The data are not those that the checkpoint was trained on (their fingerprints differ), so training "
                "does not resume exactly."
            )

    # While training.

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin an epoch in all its length, and note the random numbers from which a loader begins it."""
        del pl_module
        epoch = epoch_of_samplers(trainer)
        if epoch == self._begun.epoch:
            return  # begun in on_train_start
        self._begun, self._is_before_first = Position(epoch), True
        data = FitData(trainer)
        if data.is_seekable:
            data.seek_epoch(epoch, self._usual_length)
            self._usual_length = None
        else:
            self._epoch_start = data.epoch_start(RandomState.now(_device(trainer)))

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Give the first batch of a continued run what was left of an unfinished step."""
        del batch, batch_idx
        self._is_before_first = self._is_in_backward = False
        if self._unfinished is not None:
            loaded = load_unfinished(pl_module, self._unfinished, trainer.global_rank, trainer.world_size)
            self._unfinished = None
            if self._pending is not None:
                self._pending.add(loaded)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note that gradients change from now on."""
        del trainer, pl_module, loss
        self._is_in_backward = True

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own signature
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Note the random numbers, before a validation or an interrupted batch can draw more."""
        del pl_module, outputs, batch, batch_idx
        self._after_batch = RandomState.now(_device(trainer))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of the optimizers."""
        del trainer, pl_module
        self._let_go()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the optimizers."""
        del trainer, pl_module, exception
        self._let_go()

    def _let_go(self) -> None:
        if self._pending is not None:
            self._pending.end()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take back what validation drew."""
        del pl_module
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._after_batch is not None:
            self._after_batch.restore(_device(trainer))


def _device(trainer: L.Trainer) -> torch.device:
    device: torch.device = trainer.strategy.root_device
    return device


def _data_fingerprint(trainer: L.Trainer) -> str | None:
    found = getattr(getattr(trainer, "datamodule", None), "fingerprint", None)
    return found if isinstance(found, str) else None


def _from_all_ranks(mine: dict[str, Any], trainer: L.Trainer) -> list[dict[str, Any]]:
    """Return what each rank has, in their order."""
    if trainer.world_size == 1 or not dist.is_initialized():
        return [mine]
    gathered: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(gathered, mine)
    return gathered
