"""Lightning's Trainer with a logging interval that follows the length of the run."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L

NUM_POINTS = 50
"""About how many points a run logs with `log_every_n_steps: auto`."""


class RunTrainer(L.Trainer):
    """Lightning's Trainer; its logging interval may be `auto`.

    Args:
        log_every_n_steps: Optimizer steps from one logged point of training to the next. `auto` logs about fifty points
            a run, and every step of a run of fewer than a hundred.
        **settings: Those of Lightning's Trainer.
    """

    def __init__(
        self,
        *,
        log_every_n_steps: int | Literal["auto"] | None = "auto",
        **settings: Any,  # noqa: ANN401 - Lightning's own
    ) -> None:
        self.picks_log_interval = log_every_n_steps == "auto"
        # 1 until the run's length is known: Lightning warns of an interval that is longer than an epoch.
        interval = 1 if log_every_n_steps == "auto" else log_every_n_steps
        super().__init__(log_every_n_steps=interval, **settings)


class LogInterval(L.Callback):
    """Sets the logging interval of a `RunTrainer` whose interval is `auto`."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set it, now that the number of steps is known."""
        del pl_module
        if isinstance(trainer, RunTrainer) and trainer.picks_log_interval:
            trainer.log_every_n_steps = auto_interval(trainer.estimated_stepping_batches)  # type: ignore[attr-defined]  # set by Lightning's logger connector


def auto_interval(num_steps: float) -> int:
    """Return the logging interval of a run.

    Args:
        num_steps: Optimizer steps of the whole run; infinite if unknown.

    Example:
        >>> auto_interval(30), auto_interval(1000), auto_interval(float("inf"))
        (1, 20, 50)
    """
    if math.isinf(num_steps):
        return NUM_POINTS
    return max(int(num_steps) // NUM_POINTS, 1)
