"""Load a task from a `.ckpt` file that matches its manifest, without running code in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, Self

import lightning as L
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lora_lightning.backbones.tokenizer_identity import tokenizer_fingerprint, tokenizer_of
from lora_lightning.checkpoint.base_sample import base_sample_of
from lora_lightning.checkpoint.own_state import own_entries
from lora_lightning.checkpoint.reading import read_file
from lora_lightning.checkpoint.task_class import arguments_given, build_task, class_path_of
from lora_lightning.errors import CheckpointError
from lora_lightning.keywords import ForwardsSettings
from lora_lightning.optim import Optim, param_groups
from lora_lightning.tasks.settings import plain_ones
from lora_lightning.texts.saved_tokenizer import SavedTokenizer

_CLASS_PATH = "_class_path"


class CheckedLoading(ForwardsSettings, L.LightningModule):
    """A LightningModule whose `load_from_checkpoint` reads the file once, safely, and compares it with its manifest."""

    _arguments: list[str]
    _plain_arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401 - those of __init__
        """Record the arguments of the constructor, since a subclass may take them through `**kwargs`."""
        task = super().__new__(cls, *args, **kwargs)
        given = arguments_given(cls, args, kwargs)
        object.__setattr__(task, "_arguments", sorted(given))
        object.__setattr__(task, "_plain_arguments", plain_ones(given))
        return task

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,  # noqa: ANN401 - a path, or a file that is open
        map_location: Any = None,  # noqa: ANN401 - as torch.load has it
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,  # noqa: ANN401 - settings of any type
    ) -> Self:
        """Load a task; see Lightning's method of the same name.

        Raises:
            CheckpointError: The file differs from what was written, its settings do not fit the class, or the base or
                the adapter differ from the checkpoint's.
        """
        safely = weights_only is not False
        path = Path(checkpoint_path) if isinstance(checkpoint_path, str | Path) else None
        if path is None or not path.is_file() or hparams_file is not None:
            return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, safely, **kwargs)
        content = read_file(path, map_location, weights_only=safely).content
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise CheckpointError(f"{path} holds no state_dict, so it is not a task's checkpoint; name a .ckpt file.")
        content.setdefault("hyper_parameters", {})
        task = build_task(cls, content, path, kwargs, strict=strict)
        assert isinstance(task, cls)
        tensors = (value for value in content["state_dict"].values() if isinstance(value, torch.Tensor))
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        return task.to(device)


def class_path_for_cli() -> dict[str, str]:
    """Return the entry that a `LightningCLI(..., subclass_mode_model=True)` looks for in the settings of a checkpoint.

    Such a CLI builds the task inside this context; nothing else uses the entry.
    """
    given = _given_hyperparameters.get() or {}
    return {_CLASS_PATH: str(given[_CLASS_PATH])} if _CLASS_PATH in given else {}


def entry_of(task: Any) -> dict[str, Any]:  # noqa: ANN401 - an AdapterTask, which imports this
    """Return a task's entry in a checkpoint, besides Lightning's entries and the adapters' weights."""
    data = getattr(task._trainer, "datamodule", None)
    tokenizer = SavedTokenizer.of_data(data, task.backbone)
    sampled = base_sample_of(task.adapted)
    return {
        "base_fingerprint": task.base_fingerprint,
        "base_sample": None if sampled is None else sampled.plain(),
        "method_state": [method.extra_state(task.adapted) for method in task.methods],
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer_of(task._trainer)),
        "tokenizer": None if tokenizer is None else tokenizer.plain(),
        "task": class_path_of(type(task)),
        "data": None if data is None else class_path_of(type(data)),
        "arguments": list(task._arguments),
        "label_names": None if task.label_names is None else [str(name) for name in task.label_names],
    }


def own_entry(checkpoint: Mapping[str, Any], num_methods: int) -> dict[str, Any]:
    """Return the entry of a task in a checkpoint, besides Lightning's entries and the adapters' weights.

    Args:
        checkpoint: The content of a `.ckpt` file.
        num_methods: How many methods the task has.

    Raises:
        CheckpointError: It is not there, or not as a task writes it.
    """
    own = checkpoint.get("lora_lightning")
    if own is None:
        raise CheckpointError(
            "This checkpoint was not written by lora_lightning: it holds no adapter state. Give a run's .ckpt file."
        )
    states = own.get("method_state") if isinstance(own, dict) else None
    if not isinstance(states, list) or len(states) != num_methods or not isinstance(own.get("base_fingerprint"), str):
        raise CheckpointError(
            "This checkpoint was changed since it was written: its entry lora_lightning must hold the base_fingerprint "
            f"and a method_state for each of {num_methods} methods; use another checkpoint."
        )
    return own


def own_entries_for(task: L.LightningModule, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a state that belong to a task outside its model.

    Raises:
        CheckpointError: They differ from those of the task.
    """
    own, expected = own_entries(state), own_entries(task.state_dict()).keys()
    if own.keys() != expected:
        raise CheckpointError(
            f"The checkpoint's own entries are {sorted(own) or 'none'}, and this task expects "
            f"{sorted(expected) or 'none'}."
        )
    return own


def refuse_unread_adapter(adapter: str | None) -> NoReturn:
    """Refuse to use a task whose adapter was not read because a checkpoint should have been loaded.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(
        f"The adapter {adapter!r} was not loaded: with a method in its plain form the weights are expected from a "
        "checkpoint. Give the method as an object, or leave it out."
    )


def check_optimization(
    checkpoint: Mapping[str, Any], optim: Optim, trainer: L.Trainer | None, model: nn.Module
) -> None:
    """Warn if a run resumes with other learning rates or another schedule; refuse another optimizer.

    Args:
        checkpoint: The content of a `.ckpt` file.
        optim: The settings of the run that resumes.
        trainer: Who loads it, or None.
        model: The model that trains.

    Raises:
        CheckpointError: The optimizer is of another class or has other groups, which the state in the checkpoint does
            not fit.
    """
    before = checkpoint.get("hyper_parameters", {}).get("optim")
    if trainer is None or trainer.state.fn != "fit" or not isinstance(before, dict):
        return
    now = asdict(optim)
    changed = [name for name, value in now.items() if name in before and before[name] != value]
    if "optimizer" in changed:
        raise CheckpointError(
            f"The checkpoint was trained with optim.optimizer={before['optimizer']!r}, and this run has "
            f"{now['optimizer']!r}, which cannot use its state. Keep the optimizer, or start a new run from the "
            "adapter folder beside the checkpoint (model.init_args.adapter)."
        )
    if "weight_decay" in changed and _num_groups(checkpoint) != len(param_groups(model, optim)):
        raise CheckpointError(
            f"The checkpoint was trained with optim.weight_decay={before['weight_decay']!r}, and this run has "
            f"{now['weight_decay']!r}: weight decay puts vectors into a group of their own, so the optimizer's "
            "state does not fit. Keep it, or start a new run from the adapter folder beside the checkpoint "
            "(model.init_args.adapter)."
        )
    if changed:
        listed = ", ".join(f"optim.{name} {now[name]!r} (before: {before[name]!r})" for name in changed)
        rank_zero_warn(f"Resumed with {listed}: from here on this is no longer the run that was stopped.")


def _num_groups(checkpoint: Mapping[str, Any]) -> int:
    """Return how many groups of parameters the optimizer in a checkpoint has."""
    states = checkpoint.get("optimizer_states") or [{}]
    return len(states[0].get("param_groups", ()))


def require_training_state(checkpoint: Mapping[str, Any], trainer: L.Trainer | None) -> None:
    """Refuse to resume training from a checkpoint that holds only weights.

    Args:
        checkpoint: The content of a `.ckpt` file.
        trainer: Who loads it, or None.

    Raises:
        CheckpointError: It holds no optimizer or no loops, and they are going to be restored from it.
    """
    if trainer is None or trainer.state.fn != "fit" or not trainer.strategy.lightning_restore_optimizer:
        return
    if not checkpoint.get("optimizer_states") or "fit_loop" not in checkpoint.get("loops", {}):
        raise CheckpointError(
            "The checkpoint holds no state of optimizer and loops (save_weights_only leaves them out), so training "
            "cannot resume from it; start a new run from the adapter folder beside it, with model.init_args.adapter."
        )
