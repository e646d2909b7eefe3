"""Every shipped YAML runs: on its real model and data, for a few steps."""

from pathlib import Path

import pytest
import torch

from lora_lightning.__main__ import main

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = main(
        [
            "fit",
            "--config",
            str(path),
            *("--data.train_size", "64", "--data.val_size", "32", "--data.test_size", "32"),
            *("--trainer.max_epochs", "1", "--trainer.default_root_dir", "run"),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        ]
    )
    assert status == 0
    [checkpoint] = tmp_path.glob("run/version_0/checkpoints/last.ckpt")
    kept = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert sum(tensor.numel() for tensor in kept.values()) < 0.02 * 22_713_216
    assert (checkpoint.with_suffix("") / "manifest.json").is_file()
    assert len(path.read_text().splitlines()) <= 35


def test_there_is_a_config_for_each_method():
    assert {path.stem for path in CONFIGS} >= {"quickstart", "lora_classification", "dora_classification"}
