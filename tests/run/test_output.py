"""What a run of the command prints into a pipe: kinds of lines and their order."""

from __future__ import annotations

import inspect
import logging
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning
import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.__main__ import main
from lora_lightning.run.ending import ending
from lora_lightning.run.quiet import HIDDEN_IN_EVALUATIONS, HIDDEN_MESSAGES, hide_bars, tidy_output
from lora_lightning.run.trainer import auto_interval

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")

CONFIG = {
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    "model": {
        "class_path": "tests.cli_toys.ToyTask",
        "init_args": {"method": {"class_path": "LoRA", "init_args": {"r": 2, "target_modules": ["2"]}}},
    },
    "data": {"class_path": "tests.cli_toys.ToyData"},
}
KINDS = {
    "seed": r"Seed set to \d+",
    "device": r"Running fit on cpu in 1 process, precision 32-true\.",
    "table": r"[│┃┏┡└├].*| +Parameters by role +",
    "length": r"Training: 8 steps in at most 2 epochs, a line every 1 steps",
    "step": r"epoch \d/2  step \d/8  train/loss \S+  lr \S+  \S+ samples/s  0:00:0\d left",
    "validation": r"epoch \d/2  step \d/8  val/loss \S+",
    "stopped": r"`Trainer.fit` stopped: .*",
    "folder": r"Run folder: runs/version_0",
    "checkpoint": r"Last checkpoint: runs/version_0/checkpoints/last.ckpt",
    "next": r"Next:",
    "command": r"  lora-lightning .*",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def kind_of(line):
    found = [kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, line)]
    assert found, f"an unknown kind of line: {line!r}"
    return found[0]


def test_lines_of_a_run_and_their_order(capsys):
    assert main(["fit", "--config", "run.yaml"]) == 0
    out, err = capsys.readouterr()
    kinds = [kind_of(line) for line in out.splitlines()]
    assert [kind for kind in kinds if kind != "table"] == [
        *("seed", "device", "length"),
        *(["step"] * 4 + ["validation"]) * 2,
        *("stopped", "folder", "checkpoint", "next", "command", "command", "command"),
    ]
    assert "100%" not in err


def test_printed_commands_run(capsys):
    main(["fit", "--config", "run.yaml"])
    commands = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  lora-lightning")]
    test, predict, merge = (shlex.split(command)[1:] for command in commands)
    assert (test[0], predict[0], merge[0]) == ("test", "predict", "merge")
    assert main(test) == 0
    path = Path(predict[predict.index("--ckpt_path") + 1])
    assert torch.load(path, weights_only=True)["global_step"] == 8


def test_a_trial_promises_no_folder(capsys):
    assert main(["fit", "--config", "run.yaml", "--trainer.fast_dev_run=true"]) == 0
    assert "Run folder" not in capsys.readouterr().out


@pytest.mark.parametrize(("setting", "num_points"), [("auto", 8), ("3", 2), (None, 8)])
def test_logging_interval(setting, num_points):
    chosen = [] if setting is None else ["--trainer.log_every_n_steps", setting]
    assert main(["fit", "--config", "run.yaml", *chosen]) == 0
    lines = Path("runs/version_0/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    assert sum(bool(line.split(",")[column]) for line in lines[1:]) == num_points


def test_a_long_run_logs_about_fifty_points():
    assert [auto_interval(steps) for steps in (1, 99, 100, 5000)] == [1, 1, 2, 100]
    assert all(50 <= steps / auto_interval(steps) < 100 for steps in range(100, 3000, 7))


def test_hidden_messages_are_lightnings():
    sources = "".join(path.read_text() for path in Path(inspect.getfile(lightning)).parent.rglob("*.py"))
    put_together = {
        "Restored all states from": "Restored all states",
        "Loaded model weights from": "Loaded model weights",
    }
    for message, reason in (HIDDEN_MESSAGES | HIDDEN_IN_EVALUATIONS).items():
        start = " ".join(message.split()[:4])
        assert put_together.get(start, message) in sources, f"Lightning no longer says {message!r}"
        assert reason


def test_other_messages_stay(capsys):
    logger = logging.getLogger("lightning.pytorch")
    handler = logging.StreamHandler(sys.stderr)  # pytest takes the place of the one that Lightning adds
    logger.addHandler(handler)
    try:
        with tidy_output(is_fit=True):
            rank_zero_info("GPU available: False, used: False")
            rank_zero_info("GPU memory is short")
        assert {*capsys.readouterr().out.splitlines()} == {"GPU memory is short"}
        rank_zero_info("GPU available: False, used: False")
        assert "GPU available: False, used: False" in capsys.readouterr().err
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_without_validation_has_no_best_checkpoint(capsys, steps):
    """Lightning would ask whether the task logs the metric, which was checked before the first step."""
    callback = {"class_path": "AdapterCheckpoint", "init_args": {"monitor": "val/loss", "mode": "min"}}
    trainer = {**CONFIG["trainer"], "callbacks": [callback], "max_steps": steps}
    Path("short.yaml").write_text(yaml.safe_dump({**CONFIG, "trainer": trainer}))
    assert main(["fit", "--config", "short.yaml"]) == 0
    out, err = capsys.readouterr()
    line = "No best checkpoint: the run ended before val/loss was measured."
    assert (line in out.splitlines()) == (steps < 4)
    assert "Last checkpoint: " in out
    assert "monitored key" not in err


@pytest.mark.parametrize("beginning", HIDDEN_IN_EVALUATIONS)
def test_warnings_of_checkpoints_are_hidden_in_evaluations_alone(beginning):
    with warnings.catch_warnings(record=True) as seen, tidy_output(is_fit=False):
        warnings.warn(f"{beginning} this and that.", stacklevel=1)
    assert not seen
    with pytest.warns(UserWarning, match=re.escape(beginning)), tidy_output(is_fit=True):
        warnings.warn(f"{beginning} this and that.", stacklevel=1)


@pytest.mark.parametrize(("counts", "first"), [({"test": 0}, "predict"), ({"test": 3}, "test"), ({}, "test")])
def test_commands_without_test_rows(tmp_path, counts, first):
    trainer = L.Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, logger=False, barebones=False)
    trainer.checkpoint_callback.last_model_path = str(tmp_path)  # any path that exists
    trainer.datamodule = SimpleNamespace(counts=counts)
    lines = ending(trainer, is_language_model=False)
    commands = [line.split()[1] for line in lines[lines.index("Next:") + 1 :]]
    assert commands == ["test", "predict", "merge"][0 if first == "test" else 1 :]
    (predict,) = [line for line in lines if " predict " in line]
    assert ("--data.predict FILE" in predict) == (first == "predict")


def test_bars_are_hidden_in_a_pipe_alone(monkeypatch):
    variable = "HF_HUB_DISABLE_PROGRESS_BARS"
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    hide_bars()
    assert variable not in os.environ
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    monkeypatch.setenv(variable, "0")
    hide_bars()
    assert os.environ[variable] == "0"
