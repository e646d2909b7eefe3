"""The metrics that callbacks and schedules of a run monitor, compared with those that the run logs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.checks.logging_code import logs_by_itself
from lora_lightning.errors import ConfigError
from lora_lightning.paths import nearest

Direction: TypeAlias = Literal["min", "max"]
"""Whether a smaller or a larger value of a metric is better."""
Declared: TypeAlias = Mapping[str, Direction | None]
"""Directions by the metrics' names; None if neither is better, or it is not known."""

_VALIDATION, _TEST = "val/", "test/"


@dataclass(frozen=True)
class Monitor:
    """A metric that a callback or a schedule monitors.

    Args:
        owner: Name of its class.
        metric: Name of the metric.
        mode: `min` or `max`, or None if the owner has no mode.
        is_required: Whether the owner ends the run if the metric is missing.
    """

    owner: str
    metric: str
    mode: Direction | None
    is_required: bool


def refuse_wrong_monitors(trainer: L.Trainer, task: L.LightningModule) -> None:
    """Refuse monitors of metrics that are not logged, and modes that do not fit them.

    What is logged is what task and callbacks declare with `logged_metrics()`. A name that is not declared passes if
    code of the user's own may log it.

    Args:
        trainer: The trainer; schedules are checked once it has built the optimizers.
        task: The task; one without `logged_metrics` is not checked.

    Raises:
        ConfigError: A metric is not logged, or its mode does not fit.
    """
    declared = declared_metrics(trainer, task)
    if declared is None:
        return
    is_open = _logs_more(trainer, task)
    for monitor in monitors_of(trainer):
        direction = _direction_of(monitor.metric, declared)
        if direction is not None and monitor.mode not in (None, direction):
            better = "larger" if direction == "max" else "smaller"
            raise ConfigError(
                f"{monitor.owner} monitors `{monitor.metric}` with mode {monitor.mode}, but a {better} value is "
                f"better; set mode: {direction}."
            )
        if not is_open and not _is_declared(monitor.metric, declared):
            _refuse(monitor, f"{type(task).__name__} does not log", declared)


def refuse_missing_sets(trainer: L.Trainer, task: L.LightningModule) -> None:
    """Refuse monitors of validation sets that do not exist; to be called once the validation loaders are known.

    Args:
        trainer: The trainer.
        task: The task; one without `logged_metrics` is not checked.

    Raises:
        ConfigError: There is no validation, or no set of that name.
    """
    declared = declared_metrics(trainer, task)
    if declared is None or _logs_more(trainer, task):
        return
    loaders = trainer.val_dataloaders
    names = [str(name) for name in loaders] if isinstance(loaders, Mapping) else []
    if isinstance(loaders, list | tuple) and len(loaders) > 1:
        names = [str(index) for index in range(len(loaders))]
    known = {**declared, **{one: None for name in names for one in _of_set(name, declared)}}
    for monitor in monitors_of(trainer):
        if not monitor.metric.startswith(_VALIDATION):
            continue
        if not sum(trainer.num_val_batches):
            raise ConfigError(
                f"{monitor.owner} monitors `{monitor.metric}`, but there are no validation batches; give validation "
                "data, or monitor train/loss."
            )
        if monitor.metric not in known:
            _refuse(monitor, "no validation set logs", known)


def monitors_of(trainer: L.Trainer) -> Iterator[Monitor]:
    """Yield what the callbacks and schedules of a run monitor."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's callback connector
        metric = getattr(callback, "monitor", None)
        if isinstance(metric, str):
            mode = getattr(callback, "mode", None)
            yield Monitor(type(callback).__name__, metric, _mode(mode), getattr(callback, "strict", True) is not False)
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and isinstance(config.monitor, str):
            mode = getattr(config.scheduler, "mode", None)
            yield Monitor(type(config.scheduler).__name__, config.monitor, _mode(mode), config.strict)


def declared_metrics(trainer: L.Trainer, task: L.LightningModule) -> Declared | None:
    """Return the metrics that a task and the callbacks of its run declare, or None if the task declares none."""
    declare = getattr(task, "logged_metrics", None)
    if declare is None:
        return None
    declared: dict[str, Direction | None] = dict(declare())
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's callback connector
        declared.update(getattr(callback, "logged_metrics", dict)())
        if isinstance(callback, LearningRateMonitor):
            declared.update({one.metric: None for one in monitors_of(trainer) if one.metric.startswith("lr-")})
    return declared


def _logs_more(trainer: L.Trainer, task: L.LightningModule) -> bool:
    """Return whether anything of the run may log what is not declared."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's callback connector
    data = getattr(trainer, "datamodule", None)
    others = [one for one in (*callbacks, data) if one is not None]
    return any(map(logs_by_itself, (task, *others)))


def _direction_of(metric: str, declared: Declared) -> Direction | None:
    return declared.get(metric) or declared.get(_without_set(metric))


def _is_declared(metric: str, declared: Declared) -> bool:
    return metric in declared or _without_set(metric) in declared


def _without_set(metric: str) -> str:
    """Return the name that a metric of a named validation set has for all sets together.

    Example:
        >>> _without_set("val/reviews/f1"), _without_set("val/f1")
        ('val/f1', 'val/f1')
    """
    stage, _, rest = metric.partition("/")
    return f"{stage}/{rest.rpartition('/')[2]}" if f"{stage}/" == _VALIDATION else metric


def _of_set(name: str, declared: Declared) -> Iterator[str]:
    for metric in declared:
        if metric.startswith(_VALIDATION):
            yield f"{_VALIDATION}{name}/{metric.removeprefix(_VALIDATION)}"


def _refuse(monitor: Monitor, what: str, declared: Declared) -> None:
    """Raise, or warn if the owner may do without the metric."""
    names = sorted((name for name in declared if not name.startswith(_TEST)), key=lambda name: (name[0] != "v", name))
    near = nearest(monitor.metric, names)[:1]
    hint = f"did you mean `{near[0]}`? " if near else ""
    text = f"{monitor.owner} monitors `{monitor.metric}`, which {what}; {hint}Logged are {', '.join(names)}."
    if monitor.is_required:
        raise ConfigError(text)
    rank_zero_warn(text)


def _mode(value: object) -> Direction | None:
    return "min" if value == "min" else "max" if value == "max" else None
