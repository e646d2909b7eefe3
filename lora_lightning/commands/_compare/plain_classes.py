"""Tasks and data modules as plain specs, from which another process can build them."""

from __future__ import annotations

import inspect
from typing import Any

import lightning as L

from lora_lightning.checkpoint.manifest import plain
from lora_lightning.commands._compare.records import Spec
from lora_lightning.errors import ConfigError
from lora_lightning.imports import import_class
from lora_lightning.optim import Optim
from lora_lightning.tasks import AdapterTask

DEFAULT_HEAD_LR = 1e-3


def task_spec(task: AdapterTask) -> Spec:
    """Return a task as `{class_path, init_args}`, without its method; its head gets a separate learning rate.

    Raises:
        ConfigError: A setting contradicts the comparison: a method, an adapter to start from, or LoRA+.
    """
    settings = {name: value for name, value in task.hparams.items() if name != "method"}
    if settings.get("adapter") is not None:
        raise ConfigError("model.adapter is set, and compare starts every method afresh; leave it out.")
    optim = dict(settings.get("optim") or {})
    if optim.get("lora_plus_ratio") is not None:
        raise ConfigError(
            "model.optim.lora_plus_ratio is set for every method; leave it out and name LoRA+ among the methods, or "
            "give one of them `optim: {lora_plus_ratio: ...}`."
        )
    optim["head_lr"] = optim.get("head_lr") or DEFAULT_HEAD_LR
    settings["optim"] = optim
    return {"class_path": class_path(type(task)), "init_args": plain(_accepted(type(task), settings))}


def data_spec(data: L.LightningDataModule) -> Spec:
    """Return a data module as `{class_path, init_args}`.

    Raises:
        ConfigError: It does not keep the arguments that it was built with.
    """
    cls, kept = type(data), dict(data.hparams)
    parameters = inspect.signature(cls.__init__).parameters
    named = [name for name, one in parameters.items() if name != "self" and one.kind is not one.VAR_KEYWORD]
    lost = [name for name in named if name not in kept]
    if lost:
        raise ConfigError(
            f"{cls.__name__} does not keep its arguments ({', '.join(lost)}), so that no trial could build it again; "
            "call self.save_hyperparameters(logger=False) in its __init__."
        )
    return {"class_path": class_path(cls), "init_args": plain(kept)}


def build_task(spec: Spec, method: Any, optim: dict[str, Any], cls: type[AdapterTask] | None = None) -> AdapterTask:  # noqa: ANN401 - a method in its plain form, or several
    """Build a task from its spec.

    Args:
        spec: What `task_spec` returned.
        method: The method.
        optim: Settings of the optimizer over those of the spec.
        cls: The class to build instead of the one that the spec names.
    """
    arguments = dict(spec["init_args"])
    arguments["optim"] = Optim(**{**arguments.get("optim", {}), **optim})
    arguments["method"] = method
    found = cls or import_class(spec["class_path"], AdapterTask, "compare")
    return found(**_accepted(found, arguments))


def build_data(spec: Spec) -> L.LightningDataModule:
    """Build a data module from its spec."""
    cls = import_class(spec["class_path"], L.LightningDataModule, "compare")
    built: L.LightningDataModule = cls(**spec["init_args"])
    return built


def class_path(cls: type) -> str:
    """Return the import path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _accepted(cls: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Remove arguments that a class's constructor does not take: a subclass may fix some."""
    parameters = inspect.signature(cls).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return settings
    return {name: value for name, value in settings.items() if name in parameters}
