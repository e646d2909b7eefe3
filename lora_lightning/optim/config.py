"""Learning rates by role, optimizer and schedule."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_lightning.errors import ConfigError
from lora_lightning.imports import import_class
from lora_lightning.keywords import names_nearest

__all__ = ["Optim"]

Schedule = Literal["constant", "linear", "cosine"]
EMBEDDING_LR_OF_LORA_PLUS = 1e-6
BITSANDBYTES_OPTIMIZERS = (
    *(f"{name}{bits}bit" for name in ("AdEMAMix", "Adam", "AdamW", "LAMB", "LARS", "Lion", "SGD") for bits in (8, 32)),
    *(f"Paged{name}{bits}" for name in ("AdEMAMix", "Adam", "AdamW", "Lion") for bits in ("", "8bit", "32bit")),
)
"""Short names that need no `class_path`; those that torch has too (`AdamW`) are torch's."""


@names_nearest
@dataclass(frozen=True, kw_only=True)
class Optim:
    """Learning rates by role, the optimizer class and the schedule.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354) is `lora_plus_ratio`: only the B factors of low-rank updates take it.
    The paper uses 16 in general, 10 for GPT-2 and 80 for RoBERTa at a lower base rate.

    Args:
        lr: Base learning rate, above 0.
        head_lr: Rate of heads and other full copies; None means `lr`.
        embedding_lr: Rate of adapters on embeddings; None means 1e-6 with LoRA+ (the paper's value), else `lr`.
        lora_plus_ratio: lr(B) / lr(A), at least 1 in practice; None turns LoRA+ off.
        weight_decay: For matrices; vectors (biases, norms, magnitudes) get none.
        optimizer: Name of a class in `torch.optim`, or one of bitsandbytes' whose state takes 8 bits or is paged out of
            a full GPU (`AdamW8bit`, `PagedAdamW`, `PagedAdamW8bit`, ...), or `{class_path: ..., init_args: {...}}` for
            any optimizer class.
        schedule: `constant`, or `linear` or `cosine` decay to zero at the last optimizer step.
        warmup: Linear warm-up: a number of optimizer steps, or, below 1, a share of all steps.

    Raises:
        ConfigError: A value is out of its range, or the optimizer class is not there.
    """

    lr: float = 2e-4
    head_lr: float | None = None
    embedding_lr: float | None = None
    lora_plus_ratio: float | None = None
    weight_decay: float = 0.0
    optimizer: str | dict[str, Any] = "AdamW"
    schedule: Schedule = "linear"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        """Check every value's range and find the optimizer class."""
        for name in ("lr", "head_lr", "embedding_lr", "lora_plus_ratio"):
            value = getattr(self, name)
            if value is None and name != "lr":
                continue
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise ConfigError(f"Optim: {name} must be a finite number above 0, got {value!r}.")
        for name in ("weight_decay", "warmup"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ConfigError(f"Optim: {name} must be a finite number of at least 0, got {value!r}.")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ConfigError(f"Optim: warmup is a share below 1 or a whole number of steps, got {self.warmup!r}.")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ConfigError(f"Optim: schedule must be one of constant, linear, cosine, got {self.schedule!r}.")
        if not self.is_of_bitsandbytes:  # importing that takes seconds, and who only tests a checkpoint can do without
            self.optimizer_class()

    @property
    def is_of_bitsandbytes(self) -> bool:
        """Whether the optimizer is from bitsandbytes, which is imported only when the optimizer is built."""
        spec = self.optimizer
        name = str(spec.get("class_path", "")) if isinstance(spec, dict) else spec
        return name in BITSANDBYTES_OPTIMIZERS or name.startswith("bitsandbytes.")

    def optimizer_class(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Return the optimizer's class and its extra arguments.

        Raises:
            ConfigError: There is no such class, or it does not take these arguments.

        Example:
            >>> Optim(optimizer={"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}).optimizer_class()
            (<class 'torch.optim.sgd.SGD'>, {'momentum': 0.9})
        """
        spec: dict[str, Any] = {"class_path": self.optimizer} if isinstance(self.optimizer, str) else self.optimizer
        if "class_path" not in spec or not set(spec) <= {"class_path", "init_args"}:
            raise ConfigError(
                f"Optim: optimizer is a class name or has class_path and init_args, got {self.optimizer!r}."
            )
        class_path = str(spec["class_path"])
        if "." not in class_path and class_path in BITSANDBYTES_OPTIMIZERS:
            class_path = f"bitsandbytes.optim.{class_path}"
        cls, arguments = _import_optimizer(class_path), dict(spec.get("init_args") or {})
        accepted = inspect.signature(cls.__init__).parameters
        unknown = [name for name in arguments if name not in accepted]
        reserved = [name for name in arguments if name in ("params", "lr", "weight_decay")]
        if reserved:
            raise ConfigError(f"Optim: set {', '.join(reserved)} beside the optimizer, not in its init_args.")
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            names = ", ".join(name for name in accepted if name not in ("self", "params", "lr", "weight_decay"))
            raise ConfigError(f"Optim: {cls.__name__} does not take {', '.join(unknown)}; it takes {names}.")
        return cls, arguments


def dense_alternative(name: str) -> str:
    """Return the torch optimizer of the same algorithm as one from bitsandbytes, or `AdamW` if torch has none.

    Example:
        >>> dense_alternative("PagedAdam8bit"), dense_alternative("PagedLion")
        ('Adam', 'AdamW')
    """
    plain = name.removeprefix("Paged").removesuffix("bit").rstrip("0123456789")
    return plain if hasattr(torch.optim, plain) else "AdamW"


def _import_optimizer(class_path: str) -> type[torch.optim.Optimizer]:
    source = "Optim: optimizer"
    if "." not in class_path and not hasattr(torch.optim, class_path):
        known = [name for name, value in vars(torch.optim).items() if isinstance(value, type)]
        near = difflib.get_close_matches(class_path, [*known, *BITSANDBYTES_OPTIMIZERS], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "name a subclass of torch.optim.Optimizer."
        raise ConfigError(f"{source}: there is no optimizer {class_path!r}; {hint}")
    full = class_path if "." in class_path else f"torch.optim.{class_path}"
    try:
        return import_class(full, torch.optim.Optimizer, source)
    except ConfigError as error:
        if full.startswith("bitsandbytes.") and importlib.util.find_spec("bitsandbytes") is None:
            name = full.rpartition(".")[2]
            raise ConfigError(
                f"Optim: {name} is an optimizer of bitsandbytes, which is not installed: "
                f"pip install 'lora-lightning[quant]', or use optimizer={dense_alternative(name)}."
            ) from error
        raise ConfigError(f"{source}: {error}") from error
