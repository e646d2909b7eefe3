"""What exact resuming reads and sets in Lightning's fit loop: its data, its counters, its lengths.

Lightning has no public way to any of these; all that depends on the insides of its loops is in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning.resume.position import Layout, Position, SeekableLoader
from lora_lightning.resume.random_state import RandomState

Lengths = tuple[Any, Any, Any]
"""Batches of an epoch, batches between validations, and the limit of each loader."""


class FitData:
    """The training loaders of a trainer, and the fetcher that iterates them."""

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = trainer
        self._loop: Any = trainer.fit_loop
        self._combined: Any = self._loop._combined_loader
        self._fetcher: Any = self._loop._data_fetcher
        self.loaders: list[Any] = [] if self._combined is None else list(self._combined.flattened)

    @property
    def is_there(self) -> bool:
        """Whether training has data by now."""
        return self._combined is not None

    @property
    def is_seekable(self) -> bool:
        """Whether all loaders go to a position by themselves."""
        return all(isinstance(loader, SeekableLoader) and loader.seekable() for loader in self.loaders)

    @property
    def layout(self) -> Layout:
        """How the first loader shares out its rows."""
        first = self.loaders[0]
        if isinstance(first, SeekableLoader):
            return first.layout
        workers = getattr(first, "num_workers", 0)
        return Layout(self._trainer.world_size, getattr(first, "batch_size", None) or 1, max(workers, 1))

    def num_batches(self, usual: Lengths | None = None) -> int:
        """Return the batches of an epoch, by `usual` lengths or by those of the current one; -1 if unknown."""
        length = self._loop.max_batches if usual is None else usual[0]
        return int(length) if length != float("inf") else -1

    @property
    def must_begin_again(self) -> bool:
        """Whether the first iterator drew random numbers before a callback could note them.

        A data set that is a stream is left alone: beginning it anew may lose what it gave already.
        """
        return all(isinstance(one, DataLoader) and not isinstance(one.dataset, IterableDataset) for one in self.loaders)

    @property
    def has_persistent_workers(self) -> bool:
        """Whether some loader has one iterator only: one that a method has calibrated with stands amid the data."""
        return any(getattr(loader, "persistent_workers", False) for loader in self.loaders)

    def restart(self) -> None:
        """Begin the iteration anew."""
        iter(self._fetcher)

    def before_next_batch(self, act: Callable[[], None]) -> None:
        """Act once, right before the next batch is fetched."""

        def acting(batches: Iterator[Any]) -> Iterator[Any]:
            act()
            # Not `yield from`: Lightning's loader is its own iterator, and begins anew when asked for one.
            while (batch := next(batches, None)) is not None:
                yield batch

        self._fetcher.iterator = acting(self._fetcher.iterator)

    # Loaders that seek.

    def seek(self, position: Position) -> Lengths | None:
        """Go to a position; return the usual lengths where this epoch has others."""
        usual = (self._loop.max_batches, self._trainer.val_check_batch, self._combined.limits)
        for loader in self.loaders:
            loader.seek(position)
        is_odd = any(passed.layout[:2] != self.layout[:2] for passed in position.passed)
        if is_odd and self._trainer.limit_train_batches == 1.0:
            self._combined.limits = [_length(loader) for loader in self.loaders]
        self.restart()
        if not is_odd:
            return None
        self._set_num_batches(_length(self._combined))
        return usual

    def seek_epoch(self, epoch: int, usual: Lengths | None) -> None:
        """Go to the beginning of an epoch; `usual` gives lengths back that `seek` has changed."""
        for loader in self.loaders:
            loader.seek(Position(epoch))
        if usual is not None:
            self._loop.max_batches, self._trainer.val_check_batch, self._combined.limits = usual

    def _set_num_batches(self, num_batches: float) -> None:
        self._loop.max_batches = num_batches
        interval = self._trainer.val_check_interval
        if isinstance(interval, float) and num_batches != float("inf"):
            self._trainer.val_check_batch = max(1, int(num_batches * interval))

    # Loaders that do not.

    def set_epoch(self, epoch: int) -> None:
        """Tell the samplers which epoch comes, before an iterator stands."""
        for loader in self.loaders:
            batch_sampler = getattr(loader, "batch_sampler", None)
            for sampler in (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
                set_epoch: Any = getattr(sampler, "set_epoch", None)
                if callable(set_epoch):
                    set_epoch(epoch)

    def epoch_start(self, state: RandomState) -> dict[str, Any]:
        """Return, in plain types, the random numbers from which the loaders' iterators are about to be made."""
        return {"random": state.plain(), "generators": [one.get_state() for one in self._generators()]}

    def base_seeds(self) -> list[int]:
        """Return what the loaders' iterators drew when they were made, by which one tells where they began."""
        iterators = getattr(self._combined._iterator, "iterators", [])
        own = [iterator for iterator in iterators if not getattr(iterator, "_persistent_workers", False)]
        return [seed for seed in (getattr(iterator, "_base_seed", None) for iterator in own) if seed is not None]

    def repeat(self, position: Position, start: dict[str, Any], device: torch.device) -> None:
        """Begin the epoch as it was begun, and load what has passed once more."""
        num_batches = position.num_batches
        if num_batches:
            rank_zero_info(f"Loading {num_batches} batches once more to come to the same place in the data.")
        generators = self._generators()
        if len(generators) != len(start["generators"]):
            rank_zero_warn(
                f"The data loader had {len(start['generators'])} generators of its own and has {len(generators)} now, "
                "so its order cannot be brought back; training does not resume exactly."
            )
        for generator, state in zip(generators, start["generators"], strict=False):
            generator.set_state(state.cpu())
        RandomState.from_plain(start["random"]).restore(device)
        self.set_epoch(position.epoch)
        if num_batches or self.must_begin_again:
            self.restart()
        if num_batches and self.base_seeds() != start.get("base_seeds", self.base_seeds()):
            rank_zero_warn(
                "The data loader's order cannot be brought back: something drew random numbers while its epoch began. "
                "Training does not resume exactly. Give the loader a `generator` of its own."
            )
        for number in range(num_batches):
            if next(self._fetcher, None) is None:
                rank_zero_warn(f"The data loader ended after {number} batches, and {num_batches} were trained on.")
                break
        self._fetcher.fetched -= num_batches  # the epoch's loop counts them itself

    def _generators(self) -> list[torch.Generator]:
        """Return the generators that loaders and samplers have of their own."""
        found = []
        for loader in self.loaders:
            batch_sampler = getattr(loader, "batch_sampler", None)
            owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
            found += [getattr(owner, "generator", None) for owner in owners]
        unique = {id(one): one for one in found if isinstance(one, torch.Generator)}
        return list(unique.values())


# Counters.


def epoch_of_samplers(trainer: L.Trainer) -> int:
    """Return the epoch that Lightning gives to samplers."""
    current: Any = trainer.fit_loop.epoch_progress.current
    return int(current.processed)


def is_amid_batch(trainer: L.Trainer) -> bool:
    """Return whether a batch was begun and its step is not over."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(current.ready != current.processed)


def is_amid_step(trainer: L.Trainer) -> bool:
    """Return whether gradients of the batches that are over await those of more."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(current.processed % trainer.accumulate_grad_batches != 0)


def current_position(trainer: L.Trainer, begun: Position, layout: Layout) -> Position:
    """Return where training stands, by the batches that are over; after the last one, it is the next epoch's start.

    Args:
        trainer: The trainer.
        begun: The current epoch, and where this process took it up.
        layout: How rows are shared out since.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    num_batches = progress.current.processed
    is_over = (progress.is_last_batch and not is_amid_batch(trainer)) or num_batches >= trainer.num_training_batches
    if is_over:
        return Position(begun.epoch + 1)
    return begun.after(num_batches - begun.num_batches, layout)


def correct_progress(fit_loop: dict[str, Any], position: Position) -> None:
    """Set the epochs in a saved fit loop to what they are at a position.

    Lightning writes them differently at the end of a batch, of a validation, of an epoch and of a run; from some of
    these it resumes in a wrong epoch, or takes one that `max_steps` cut short for finished.
    """
    epoch, is_amid = position.epoch, bool(position.passed)
    begun = epoch + 1 if is_amid else epoch
    for part in ("total", "current"):
        fit_loop["epoch_progress"][part].update(ready=begun, started=begun, processed=epoch, completed=epoch)
        batches = fit_loop["epoch_loop.batch_progress"][part]
        batches.update(ready=batches["processed"], started=batches["processed"])  # one amid which it failed comes again
        if not is_amid:
            batches.update(completed=batches["processed"])


def at_epoch_start(trainer: L.Trainer) -> None:
    """Prevent Lightning from continuing in a finished epoch, which it does if `max_steps` is set."""
    trainer.fit_loop.epoch_loop.restarting = False


def _length(loader: Any) -> float:  # noqa: ANN401 - any iterable
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return float("inf")
