"""What fine-tuning adds to a LightningModule of the user's own: its adapted parts, and which weights were frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from torch import nn

from lora_lightning.adapters import Method, is_attached
from lora_lightning.adapters.walk import join, unwrap
from lora_lightning.checkpoint.manifest import class_config
from lora_lightning.errors import CheckpointError, ConfigError
from lora_lightning.paths import nearest
from lora_lightning.tasks.settings import methods_from

ENTRY = "lora_lightning"
"""The key of a checkpoint under which this library keeps what is not Lightning's."""
RECORD = "_lora_lightning_finetuning"
MARK = "_lora_lightning_finetuned"
"""Set on a submodule once adapters were attached to it; it stays when they are merged."""


@dataclass
class Part:
    """One submodule that gets adapters.

    Args:
        path: Path of the submodule in the LightningModule; empty for the LightningModule itself.
        methods: What to attach.
        modules_to_save: See `attach`.
        train_norm_statistics: See `attach`.
        base_fingerprint: Digest of the weights under the adapters; None before they are attached.
        frozen_digest: Digest of the other frozen weights in the submodule.
        num_steps: Optimizer steps of this part's adapters.
    """

    path: str
    methods: tuple[Method, ...]
    modules_to_save: tuple[str, ...] = ()
    train_norm_statistics: bool = False
    base_fingerprint: str | None = None
    frozen_digest: str | None = None
    num_steps: int = 0

    @property
    def settings(self) -> tuple[Any, ...]:
        """What two parts must share to be the same."""
        configs = [class_config(method) for method in self.methods]
        return self.path, configs, self.modules_to_save, self.train_norm_statistics

    @property
    def name(self) -> str:
        """How messages name it."""
        return repr(self.path) if self.path else "the LightningModule"

    def submodule(self, module: nn.Module) -> nn.Module:
        """Return the submodule, without a `torch.compile` wrapper.

        Raises:
            ConfigError: There is none at the path; the message gives the nearest names.
        """
        try:
            return unwrap(module.get_submodule(self.path))
        except AttributeError:
            raise ConfigError(_unknown_path(module, self.path)) from None

    def exists_in(self, module: nn.Module) -> bool:
        """Return whether the submodule is there by now."""
        try:
            module.get_submodule(self.path)
        except AttributeError:
            return False
        return True

    def plain(self, module: nn.Module) -> dict[str, Any]:
        """Return the part in plain types, with what its methods carry along."""
        submodule = self.submodule(module)
        return {
            "module": self.path,
            "methods": [class_config(method) for method in self.methods],
            "modules_to_save": list(self.modules_to_save),
            "train_norm_statistics": self.train_norm_statistics,
            "base_fingerprint": self.base_fingerprint,
            "frozen_digest": self.frozen_digest,
            "method_state": [method.extra_state(submodule) for method in self.methods],
            "num_steps": self.num_steps,
        }

    @classmethod
    def from_plain(cls, entry: dict[str, Any]) -> Part:
        """Build a part that is not attached yet from what `plain` returned.

        Raises:
            CheckpointError: The entry is not one that `plain` returned.
        """
        try:
            methods = methods_from(entry["methods"])
            saved, statistics = tuple(entry["modules_to_save"]), bool(entry["train_norm_statistics"])
            return cls(str(entry["module"]), methods, saved, statistics)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                "This checkpoint was changed since it was written: its entry lora_lightning does not describe the "
                "adapters; use another checkpoint."
            ) from error


@dataclass
class Finetuning:
    """The adapted parts of one LightningModule, kept on it; plain data, so that the module copies and pickles.

    Args:
        parts: The submodules with adapters.
        frozen: Digest of each parameter outside the parts that was frozen when the first part was attached.
        at_start: Checksum of each frozen tensor that training code might change itself; None before training.
        kept: Frozen tensors that a checkpoint also holds, because they were changed.
    """

    parts: list[Part] = field(default_factory=list)
    frozen: dict[str, str] = field(default_factory=dict)
    at_start: dict[str, str] | None = None
    kept: set[str] = field(default_factory=set)


def record_of(module: nn.Module) -> Finetuning | None:
    """Return what fine-tuning keeps on a LightningModule, or None if it keeps nothing."""
    found: Finetuning | None = module.__dict__.get(RECORD)
    return found


def attached_parts(module: nn.Module) -> Iterator[tuple[Part, nn.Module]]:
    """Iterate over `(part, submodule)` of the parts whose adapters are there: not of those merged since."""
    record = record_of(module)
    for part in [] if record is None else record.parts:
        if part.exists_in(module):
            submodule = part.submodule(module)
            if is_attached(submodule):
                yield part, submodule


def prefix_of(module: nn.Module, part: Part) -> str:
    """Return what the names of a part's tensors begin with in the LightningModule's own `state_dict`."""
    is_compiled = hasattr(module.get_submodule(part.path), "_orig_mod")
    return join(part.path, "_orig_mod") if is_compiled else part.path


def is_finetuned(module: L.LightningModule) -> bool:
    """Return whether `finetune` or `AdapterFinetuning` takes care of a LightningModule's checkpoints."""
    return record_of(module) is not None


def _unknown_path(module: nn.Module, path: str) -> str:
    paths = [name for name, _ in module.named_modules() if name]
    near = nearest(path, paths)
    children = ", ".join(repr(name) for name, child in module.named_children() if any(True for _ in child.parameters()))
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"its submodules are {children or 'none'}."
    return (
        f"{type(module).__name__} has no submodule {path!r}; {hint} Create it in __init__, setup or configure_model, "
        "and give its path."
    )
