"""What the training loop adds to a step: `fit` with logging, progress bar and default callbacks, and a bare loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from lora_lightning import LoRA, Optim, SequenceClassification
from lora_lightning.callbacks.run_logger import RunLogger
from lora_lightning.cli import default_callbacks
from lora_lightning.optim import build_optimizer, build_schedule

_LABELS = ["no", "yes"]
_ROWS, _LENGTH, _VOCABULARY = 4, 16, 64


class TinyTask(SequenceClassification):
    """Classifies with a BERT of two small layers, so that the loop's own share shows."""

    def configure_backbone(self) -> nn.Module:
        """Build the model, the same one every time."""
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=_VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=len(_LABELS),
        )
        return transformers.BertForSequenceClassification(config)


def extra_seconds(*, steps: int = 300, rounds: int = 5) -> tuple[float, float]:
    """Return the CPU seconds of a step in a bare loop and what `fit` adds to it, medians over rounds of both."""
    bare, added = [], []
    for _ in range(rounds):
        own = statistics.median(_bare(steps))
        bare.append(own)
        added.append(statistics.median(_fitted(steps)) - own)
    return statistics.median(bare), statistics.median(added)


def _task() -> TinyTask:
    return TinyTask(method=LoRA(r=4), optim=Optim(lr=1e-3, warmup=0.1), label_names=_LABELS)


def _loader(steps: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, _VOCABULARY, (steps, _ROWS, _LENGTH), generator=generator)
    mask = torch.ones(_ROWS, _LENGTH, dtype=torch.long)
    batches: Any = [{"input_ids": row, "attention_mask": mask, "labels": row[:, 0] % len(_LABELS)} for row in ids]
    return DataLoader(batches, batch_size=None)


def _bare(steps: int) -> list[float]:
    """Return the CPU seconds of each step of the shortest loop that does the same."""
    task = _task()
    task.configure_model()
    optimizer = build_optimizer(task, task.optim)
    schedule = build_schedule(optimizer, task.optim, steps)
    seconds = []
    for batch in _loader(steps):
        start = time.process_time()
        torch.autograd.backward(task.compute_loss(batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.process_time() - start)
    return seconds


class _Clock(L.Callback):
    """Notes the process's CPU time after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:  # noqa: ANN401 - Lightning's own signature
        """Note the time."""
        del args
        self.times.append(time.process_time())

    def seconds(self) -> Iterator[float]:
        """Yield the CPU seconds from each step to the next."""
        yield from (later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False))


def _fitted(steps: int) -> list[float]:
    """Return the CPU seconds from step to step of a `fit` as the command line sets it up."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder}
        callbacks = [*default_callbacks([], settings), clock]
        trainer = L.Trainer(**settings, callbacks=callbacks, logger=RunLogger(folder), enable_model_summary=False)
        trainer.fit(_task(), _loader(steps))
    return [*clock.seconds()]


def main() -> None:
    """Print what `fit` adds."""
    torch.set_num_threads(1)
    bare, added = extra_seconds()
    print(f"a step of the bare loop: {bare * 1e3:.2f} ms; fit adds {added * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
