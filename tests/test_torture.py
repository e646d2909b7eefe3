"""A run that is killed again and again ends with the weights of one left in peace; see `scripts/torture`."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lora_lightning.callbacks import adapter_checkpoint
from lora_lightning.checkpoint import complete
from lora_lightning.tasks import AdapterTask

SCRIPT = Path(__file__).parent.parent / "scripts" / "torture.py"


def script() -> ModuleType:
    """Import the script."""
    spec = importlib.util.spec_from_file_location("torture", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    torch.set_num_threads(1)  # a process with more is not safe to fork
    module = sys.modules["torture"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def in_a_fresh_process(act: Callable[..., Any], *arguments: object) -> Any:
    """Call a function of this file where nothing has run yet: a process that has used more threads can't be forked."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(act, *arguments).result()


def torture(num_kills: int, folder: Path) -> tuple[list[str], Counter[str], int]:
    report = script().torture(num_kills, 0, folder)
    return report.failures, report.kills, report.runs


def torture_without_resume(num_kills: int, folder: Path) -> tuple[list[str], Counter[str], int]:
    AdapterTask.configure_callbacks = lambda _: []  # type: ignore[method-assign] # without ExactResume
    module = script()
    module.NUM_EPOCHS, module.SHARE_KILLED_AT_START = 1, 0
    report = module.torture(num_kills, 0, folder)
    return report.failures, report.kills, report.runs


def leave_an_orphan(folder: Path) -> tuple[int, int, int, bool]:
    """Run one epoch, leave half a file, and start again twice: with nothing left to train, and with another epoch."""
    adapter_checkpoint.recover = lambda _: None  # type: ignore[attr-defined] # orphans stay
    module = script()

    def live(num_epochs: int) -> int:
        module.NUM_EPOCHS = num_epochs
        return int(module.Life.begin(lambda pipe: module.train(folder, pipe)).end(with_kill=False))

    first = live(1)
    (folder / "rolling" / ".last.ckpt.01234567.tmp").write_text("half")
    second, is_there = live(1), complete.newest_complete(folder / "rolling") is not None
    return first, second, live(2) >> 8, is_there


@pytest.mark.parametrize(
    "num_kills", [pytest.param(5, id="five"), pytest.param(100, id="hundred", marks=pytest.mark.slow)]
)
def test_killed_runs_end_as_if_nobody_had_disturbed_them(num_kills: int, tmp_path: Path) -> None:
    failures, kills, runs = in_a_fresh_process(torture, num_kills, tmp_path)
    assert failures == []
    assert kills.total() == num_kills
    assert runs >= 1
    if num_kills == 100:
        assert kills["while saving"] > 5


def test_a_run_that_does_not_go_on_exactly_is_noticed(tmp_path: Path) -> None:
    failures, kills, _ = in_a_fresh_process(torture_without_resume, 2, tmp_path)
    assert kills.total() == 2
    assert any("final weights differ" in failure for failure in failures)


def test_an_orphan_is_noticed(tmp_path: Path) -> None:
    first, second, third, is_there = in_a_fresh_process(leave_an_orphan, tmp_path / "run")
    assert is_there
    assert (first, second) == (0, 0)  # in the second, nothing was left to train, so nobody looked
    assert third == script().ORPHANS


def test_weights_are_compared_bit_by_bit() -> None:
    differences = script()._differences
    weights = {"a": torch.ones(2), "b": torch.ones(2)}
    assert differences(weights, dict(weights)) == []
    near = {**weights, "b": torch.ones(2) + 1e-7}
    assert differences(near, weights) == ["the final weights differ in 1 of 2 tensors"]
