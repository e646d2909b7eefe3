"""A run that is killed again and again ends with the weights of one left in peace; see `scripts/torture`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lora_lightning.checkpoint import complete
from lora_lightning.tasks import AdapterTask
from tests.callbacks.runs import LIGHTNING_WARNINGS

pytestmark = LIGHTNING_WARNINGS
SCRIPT = Path(__file__).parent.parent / "scripts" / "torture.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("torture", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "torture", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "num_kills", [pytest.param(5, id="five"), pytest.param(100, id="hundred", marks=pytest.mark.slow)]
)
def test_killed_runs_end_as_if_nobody_had_disturbed_them(script: ModuleType, tmp_path: Path, num_kills: int) -> None:
    report = script.torture(num_kills, 0, tmp_path)
    assert report.failures == []
    assert report.kills.total() == num_kills
    assert report.runs >= 1
    if num_kills == 100:
        assert report.kills["while saving"] > 5


def test_a_run_that_does_not_go_on_exactly_is_noticed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdapterTask, "configure_callbacks", lambda _: [])  # without ExactResume
    monkeypatch.setattr(script, "NUM_EPOCHS", 1)
    monkeypatch.setattr(script, "SHARE_KILLED_AT_START", 0)
    report = script.torture(2, 0, tmp_path)
    assert report.kills.total() == 2
    assert any("final weights differ" in failure for failure in report.failures)


def test_an_orphan_is_noticed(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_lightning.callbacks.adapter_checkpoint.recover", lambda _: None)
    monkeypatch.setattr(script, "NUM_EPOCHS", 1)
    run = tmp_path / "run"
    status = script.Life.begin(lambda pipe: script.train(run, pipe)).end(with_kill=False)
    assert status == 0
    (run / "rolling" / ".last.ckpt.01234567.tmp").write_text("half")
    status = script.Life.begin(lambda pipe: script.train(run, pipe)).end(with_kill=False)
    assert complete.newest_complete(run / "rolling") is not None
    assert status == 0  # nothing was left to train, so nobody looked
    monkeypatch.setattr(script, "NUM_EPOCHS", 2)
    assert script.Life.begin(lambda pipe: script.train(run, pipe)).end(with_kill=False) >> 8 == script.ORPHANS


def test_weights_are_compared_bit_by_bit(script: ModuleType) -> None:
    weights = {"a": torch.ones(2), "b": torch.ones(2)}
    assert script._differences(weights, dict(weights)) == []
    near = {**weights, "b": torch.ones(2) + 1e-7}
    assert script._differences(near, weights) == ["the final weights differ in 1 of 2 tensors"]
