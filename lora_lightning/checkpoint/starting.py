"""Start a new run from an existing adapter: ours or one of PEFT's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters import Method, Role, iter_adapters, iter_roles, load_adapter_state_dict
from lora_lightning.adapters.frozen import NormStatistics
from lora_lightning.adapters.walk import join
from lora_lightning.backbones.tokenizer_identity import check_tokenizer
from lora_lightning.checkpoint.base_sample import BaseSample
from lora_lightning.checkpoint.fingerprint import check_base
from lora_lightning.checkpoint.folder import check_methods
from lora_lightning.checkpoint.own_state import own_entries
from lora_lightning.checkpoint.saved_run import SavedRun
from lora_lightning.errors import CheckpointError
from lora_lightning.paths import resolve
from lora_lightning.peft_format.copies import is_copy

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StartingAdapter:
    """An adapter folder that a new run starts from.

    Args:
        folder: The folder.
        methods: The methods to attach, as `{"class_path": ..., "init_args": {...}}`.
        state: The tensors by the names of `adapter_state_dict`.
        base_fingerprint: The base's digest if this library wrote the folder, else None.
        label_names: The classes in the order of its head, or None.
        base_sample: Sampled values of the base, if this library wrote the folder.
        tokenizer_fingerprint: Digest of the vocabulary of its training, or None if unknown.
        own_state: State of the task that trained it outside its model.
    """

    folder: Path
    methods: list[dict[str, Any]]
    state: dict[str, Tensor]
    base_fingerprint: str | None
    label_names: list[str] | None
    base_sample: BaseSample | None = None
    tokenizer_fingerprint: str | None = None
    own_state: Mapping[str, Tensor] = field(default_factory=dict)

    def load_into(self, model: nn.Module, methods: Sequence[Method], tokenizer: Any = None) -> None:  # noqa: ANN401 - tokenizers share no public base class
        """Load the tensors into a model to which `methods` are attached.

        Keys and shapes must be exactly the model's, except for trained copies (heads) that the folder does not hold:
        these start from the base's values.

        Args:
            model: The adapted model.
            methods: The attached methods.
            tokenizer: That of the run's data, which is compared with that of the adapter's training; None skips this.

        Raises:
            CheckpointError: Methods, base, vocabulary, keys or shapes differ.
        """
        check_methods(methods, self.methods, self.folder)
        if self.base_fingerprint is not None or self.base_sample is not None:
            check_base(model, self.base_fingerprint, self.base_sample, str(self.folder))
        check_tokenizer(tokenizer, self.tokenizer_fingerprint, str(self.folder))
        fresh = self._fresh_copies(model)
        if fresh:
            log.info("%s holds no %s: these start from the base's.", self.folder, ", ".join(fresh))
        try:
            load_adapter_state_dict(model, {**fresh, **self.state})
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder}: {error}") from error

    def check_labels(self, label_names: Sequence[str] | None, model: nn.Module) -> None:
        """Refuse a trained head whose classes or their order differ from the run's.

        Raises:
            CheckpointError: They are.
        """
        heads = [name for name, _, role in iter_roles(model) if role is Role.HEAD and name in self.state]
        if heads and label_names and self.label_names and list(label_names) != self.label_names:
            raise CheckpointError(
                f"{self.folder} holds a head for the labels {', '.join(self.label_names)}, and this run has "
                f"{', '.join(label_names)}: name the same labels in the same order, or start without this adapter."
            )

    @torch.no_grad()
    def load_own(self, task: nn.Module) -> None:
        """Load the state outside the model of the task that trained the adapter, if this task has the same entries.

        Raises:
            CheckpointError: A shape differs.
        """
        own = own_entries(task.state_dict())
        if self.own_state and own.keys() != self.own_state.keys():
            log.info("%s also holds %s, which this task does not take.", self.folder, ", ".join(self.own_state))
            return
        for name, tensor in self.own_state.items():
            if own[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{self.folder} holds {name} {list(tensor.shape)}, and this task has {list(own[name].shape)}; "
                    "build the task with the settings that it was trained with."
                )
            own[name].copy_(tensor)

    def _fresh_copies(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's tensors of the trained copies that the folder does not hold."""
        fresh: dict[str, Tensor] = {}
        for path, _, adapter in iter_adapters(model):
            is_own = is_copy(adapter) or isinstance(adapter, NormStatistics)
            if is_own and not any(name.startswith(f"{path}.") for name in self.state):
                fresh |= {join(path, adapter.public_name(name)): one for name, one in adapter.state_dict().items()}
        return fresh


def read_starting_adapter(model: nn.Module, folder: str) -> StartingAdapter:
    """Read the adapter folder that a run starts from.

    Args:
        model: The bare base model.
        folder: A folder of this library (beside a checkpoint) or of PEFT; `pkg://package/folder` too.

    Raises:
        CheckpointError: It is missing, damaged, or not for this model.
    """
    path = resolve(folder)
    if path.is_file():
        raise CheckpointError(f"adapter={folder!r} is a file; name the folder that stands beside a .ckpt file.")
    return starting_adapter(SavedRun.of_folder(path), model)


def starting_adapter(run: SavedRun, model: nn.Module) -> StartingAdapter:
    """Return the adapter that a run starts from.

    Args:
        run: An adapter folder.
        model: The bare base model.

    Raises:
        CheckpointError: It is not for this model.
    """
    methods, state = run.adapter_for(model)
    return StartingAdapter(
        folder=run.path,
        methods=methods,
        state=state,
        base_fingerprint=run.base_fingerprint,
        label_names=run.facts.label_names,
        base_sample=run.base_sample,
        tokenizer_fingerprint=run.facts.tokenizer_fingerprint,
        own_state=run.own_state,
    )
