"""Guards are on by default, each can be switched off, and what they find ends `lora-lightning fit` in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lora_lightning.__main__ import main
from lora_lightning.callbacks import Guards, IdleParameterGuard, NonFiniteGuard, OutOfMemoryGuard, SignalGuard
from lora_lightning.cli import run_lightning
from lora_lightning.run.defaults import default_callbacks
from tests.callbacks.runs import LIGHTNING_WARNINGS
from tests.cli_toys import ToyTask

pytestmark = LIGHTNING_WARNINGS
KINDS = {
    "non_finite": NonFiniteGuard,
    "idle_parameters": IdleParameterGuard,
    "out_of_memory": OutOfMemoryGuard,
    "signals": SignalGuard,
}
CONFIG: dict[str, Any] = {
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "Throughput"}],
        "log_every_n_steps": 1,
    },
    "model": {
        "class_path": "ToyTask",
        "init_args": {"method": {"class_path": "LoRA", "init_args": {"r": 2, "target_modules": ["2"]}}},
    },
    "data": {"class_path": "ToyData", "init_args": {"num_points": 16}},
}


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(CONFIG))
    return "run.yaml"


class HungryToyTask(ToyTask):
    """Runs out of memory in the second batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            torch.empty(1 << 50)
        return super().training_step(batch, batch_idx)


def kinds(callbacks: list[Any]) -> set[type]:
    return {type(callback) for callback in callbacks} & set(KINDS.values())


@pytest.mark.parametrize("name", KINDS)
def test_each_guard_can_be_switched_off(name: str) -> None:
    assert kinds(default_callbacks([], {})) == set(KINDS.values())
    assert kinds(default_callbacks([], {}, Guards(**{name: False}))) == set(KINDS.values()) - {KINDS[name]}
    assert kinds(default_callbacks([KINDS[name]()], {})) == set(KINDS.values()) - {KINDS[name]}  # the user's own stays


def test_in_a_config_and_as_a_flag(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(config).write_text(yaml.safe_dump({**CONFIG, "guards": {"signals": False}}))
    cli = run_lightning("fit", ["--config", config, "--guards.idle_parameters=false"])
    assert kinds(cli.trainer.callbacks) == {NonFiniteGuard, OutOfMemoryGuard}
    repeated = yaml.safe_load(Path("runs/version_0/config.yaml").read_text())
    assert repeated["guards"] == {
        "non_finite": True,
        "idle_parameters": False,
        "out_of_memory": True,
        "signals": False,
    }
    Path(config).write_text(yaml.safe_dump({**CONFIG, "guards": {"signal": False}}))
    assert main(["fit", "--config", config]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "guards" in error
    assert "`signals`" in error


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["fit", "--config", "run.yaml", *arguments])
    return status, capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_learning_rate_that_diverges(capsys: pytest.CaptureFixture[str]) -> None:
    rate = "--model.optim.lr=1e30"
    status, error = run(capsys, rate)
    assert status == 2
    assert "Traceback" not in error
    assert "lora-lightning: error: Training stopped before optimizer step " in error
    assert "learning rate " in error
    assert not list(Path("runs").rglob("*.ckpt"))
    status, error = run(capsys, "--guards.non_finite=false", "--trainer.enable_checkpointing=false", rate)
    assert status == 0  # the control: nobody else notices


def test_memory_that_runs_out(capsys: pytest.CaptureFixture[str]) -> None:
    status, error = run(capsys, "--model", "HungryToyTask")
    assert status == 2
    assert "Traceback" not in error
    assert "error: Out of memory on cpu (tried to allocate 4194304.00 GiB) in a train step of a batch of 4," in error
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):  # the control
        run(capsys, "--model", "HungryToyTask", "--guards.out_of_memory=false")
