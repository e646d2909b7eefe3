"""Suggests settings to change when memory runs out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lora_lightning.callbacks.throughput import count_samples
from lora_lightning.errors import TrainingError

__all__ = ["OutOfMemoryGuard"]

_MARKS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_SIZE = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")
_NUM_HINTS = 4


class OutOfMemoryGuard(L.Callback):
    """Explain an out-of-memory error in a sentence: size and length of the batch, and settings to change.

    The sentence is added to the exception as a note, which Python shows under the traceback; `lora-lightning` shows
    only the sentence.

    Attributes:
        error: The sentence as an error after memory ran out; None before.
    """

    def __init__(self) -> None:
        self.error: TrainingError | None = None
        self._batch: Any = None

    def on_train_batch_start(self, *args: Any) -> None:  # noqa: ANN401 - Lightning's own signature
        """Remember the batch, the third argument."""
        self._batch = args[2]

    def on_train_batch_end(self, *args: Any) -> None:  # noqa: ANN401, ARG002 - Lightning's own signature
        """Forget the batch."""
        self._batch = None

    def on_validation_batch_start(self, *args: Any) -> None:  # noqa: ANN401 - Lightning's own signature
        """Remember the batch, the third argument."""
        self._batch = args[2]

    def on_validation_batch_end(self, *args: Any) -> None:  # noqa: ANN401, ARG002 - Lightning's own signature
        """Forget the batch."""
        self._batch = None

    def on_test_batch_start(self, *args: Any) -> None:  # noqa: ANN401 - Lightning's own signature
        """Remember the batch, the third argument."""
        self._batch = args[2]

    def on_test_batch_end(self, *args: Any) -> None:  # noqa: ANN401, ARG002 - Lightning's own signature
        """Forget the batch."""
        self._batch = None

    def on_predict_batch_start(self, *args: Any) -> None:  # noqa: ANN401 - Lightning's own signature
        """Remember the batch, the third argument."""
        self._batch = args[2]

    def on_predict_batch_end(self, *args: Any) -> None:  # noqa: ANN401, ARG002 - Lightning's own signature
        """Forget the batch."""
        self._batch = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Explain the exception if memory ran out."""
        batch, self._batch = self._batch, None
        if is_out_of_memory(exception):
            self.error = TrainingError(explain(trainer, pl_module, batch, exception))
            exception.add_note(str(self.error))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory of the device or of the host ran out.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
        (True, False)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)


def explain(trainer: L.Trainer, module: L.LightningModule, batch: Any, error: BaseException) -> str:  # noqa: ANN401 - the data module's own type
    """Return which memory ran out when, and at least three settings to change, as in a config file.

    Args:
        trainer: The trainer.
        module: The task.
        batch: The batch that was being computed, or None outside of one.
        error: What torch raised.
    """
    size = _SIZE.search(str(error))
    asked = f" (tried to allocate {_readable(size[1])})" if size else ""
    if batch is None:
        when = f"outside of a batch, at step {trainer.global_step}"
    else:
        stage = "run" if trainer.state.stage is None else trainer.state.stage.value
        when = f"in a {stage.replace('_', ' ')} step of {_describe(batch)}, at step {trainer.global_step}"
    hints = _hints(trainer, module, count_samples(batch), is_training=trainer.training)[:_NUM_HINTS]
    listed = "; ".join(f"({number}) {hint}" for number, hint in enumerate(hints, 1))
    return (
        f"Out of memory on {trainer.strategy.root_device}{asked} {when}. Change at least one of these: {listed}. "
        "`lora-lightning plan` tells what a run takes before it starts."
    )


def length_of(batch: Any) -> int | None:  # noqa: ANN401 - a batch of any shape
    """Return the number of tokens in each row of a batch, padding included, or None where it has no tokens.

    Example:
        >>> length_of({"input_ids": torch.zeros(4, 7)})
        7
    """
    for name in ("input_ids", "attention_mask", "labels"):
        tokens = batch.get(name) if isinstance(batch, Mapping) else None
        if isinstance(tokens, Tensor) and tokens.dim() > 1:
            return tokens.shape[-1]
    return None


def _describe(batch: Any) -> str:  # noqa: ANN401 - the data module's own type
    length, num_samples = length_of(batch), count_samples(batch)
    return f"a batch of {num_samples}" + (f" x {length} tokens" if length is not None else "")


def _hints(trainer: L.Trainer, module: L.LightningModule, num_samples: int, *, is_training: bool) -> list[str]:
    """Return the changes to suggest, the least costly first, without those already in effect."""
    if not hasattr(module, "gradient_checkpointing"):
        return _hints_for_others(trainer, module, num_samples, is_training=is_training)
    data = getattr(trainer, "datamodule", None)
    hints = []
    batch_size = getattr(data, "batch_size", None) or num_samples
    if batch_size > 1 and is_training:
        before, halves = trainer.accumulate_grad_batches, max(batch_size // 2, 1)
        hints.append(
            f"data.init_args.batch_size {halves} instead of {batch_size} with trainer.accumulate_grad_batches "
            f"{2 * before} instead of {before}, which makes the same update"
        )
    elif num_samples > 1:
        hints.append(f"data.init_args.eval_batch_size {max(num_samples // 2, 1)} instead of {num_samples}")
    if is_training and getattr(module, "gradient_checkpointing", None) is not True:
        hints.append("model.init_args.gradient_checkpointing true, which takes a third more time")
    elif is_training and trainer.strategy.root_device.type == "cuda" and not getattr(module, "offload_activations", 0):
        hints.append("model.init_args.offload_activations true, which keeps the layers' inputs in host memory")
    max_length = getattr(data, "max_length", None)
    now = f" (now {max_length})" if isinstance(max_length, int) else ""
    hints.append(f"a smaller data.init_args.max_length{now}")
    if getattr(module, "quantization", None) is None:
        hints.append("model.init_args.quantization {quant_type: nf4}, which stores the base in 4 bits")
    hints.append("trainer.precision bf16-mixed, or model.init_args.dtype bfloat16")
    hints.append("a smaller backbone, or fewer target_modules")
    return hints


def _hints_for_others(
    trainer: L.Trainer, module: L.LightningModule, num_samples: int, *, is_training: bool
) -> list[str]:
    """Return the changes to suggest for a module that is not a task of this library."""
    hints = []
    if num_samples > 1:
        accumulated = trainer.accumulate_grad_batches
        same = f" with accumulate_grad_batches={2 * accumulated} instead of {accumulated}, which makes the same update"
        can_accumulate = is_training and module.automatic_optimization
        hints.append(f"batches of {num_samples // 2} instead of {num_samples}{same if can_accumulate else ''}")
    if is_training:
        hints.append("the model's own gradient checkpointing, or lora_lightning.recompute_activations(model)")
    hints += ["precision bf16-mixed", "a smaller model", "fewer target_modules"]
    return hints


def _readable(size: str) -> str:
    """Return a size as torch writes it, with bytes in GiB.

    Example:
        >>> _readable("2.00 GiB"), _readable("3221225472 bytes")
        ('2.00 GiB', '3.00 GiB')
    """
    number, _, unit = size.partition(" ")
    return f"{int(number) / (1 << 30):.2f} GiB" if unit == "bytes" else size
