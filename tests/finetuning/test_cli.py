"""The callback in a user's own LightningCLI, from YAML."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_lightning import load_finetuned
from lora_lightning.errors import CheckpointError
from tests.callbacks.runs import LIGHTNING_WARNINGS
from tests.finetuning.cli_script import Classifier

pytestmark = LIGHTNING_WARNINGS
ROOT = Path(__file__).parents[2]
CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_progress_bar: false
  callbacks:
    - class_path: lora_lightning.AdapterFinetuning
      init_args:
        method: {class_path: lora_lightning.LoRA, init_args: {r: 4}}
        module: MODULE
        merge_to: merged.ckpt
    - class_path: lora_lightning.ExactResume
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: checkpoints, every_n_train_steps: 5, save_top_k: -1}
optimizer:
  class_path: torch.optim.AdamW
  init_args: {lr: 0.01}
"""


def run(folder: Path, *arguments: str, module: str = "backbone") -> subprocess.CompletedProcess[str]:
    (folder / "mine.yaml").write_text(CONFIG.replace("MODULE", module))
    script = ROOT / "tests" / "finetuning" / "cli_script.py"
    config = ["--config", "mine.yaml"]
    return subprocess.run(
        [sys.executable, str(script), arguments[0], *config, *arguments[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # Lightning's own call
def test_fit_resume_and_test(tmp_path):
    done = run(tmp_path, "fit")
    assert done.returncode == 0, done.stderr[-3000:]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"epoch=0-step=5.ckpt", "epoch=1-step=10.ckpt", "epoch=1-step=15.ckpt"}
    last = torch.load(tmp_path / "checkpoints" / "epoch=1-step=15.ckpt", weights_only=True)
    lora = {f"backbone.{layer}.lora_{factor}" for layer in (0, 2) for factor in "AB"}
    assert last["state_dict"].keys() == {*lora, "head.weight", "head.bias"}

    (tmp_path / "again").mkdir()
    early = tmp_path / "checkpoints" / "epoch=0-step=5.ckpt"
    resumed = run(tmp_path / "again", "fit", "--ckpt_path", str(early))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    again = torch.load(tmp_path / "again" / "checkpoints" / "epoch=1-step=15.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, again[name]) for name, tensor in last["state_dict"].items())
    first = torch.load(early, weights_only=True)["state_dict"]
    assert not torch.equal(first["backbone.0.lora_A"], again["backbone.0.lora_A"])

    (tmp_path / "tested").mkdir()
    path = tmp_path / "checkpoints" / "epoch=1-step=15.ckpt"
    tested = run(tmp_path / "tested", "test", "--ckpt_path", str(path))
    assert tested.returncode == 0, tested.stderr[-3000:]
    assert "test_loss" in tested.stdout
    merged = Classifier.load_from_checkpoint(tmp_path / "merged.ckpt", weights_only=True)
    assert merged.state_dict().keys() == Classifier().state_dict().keys()

    assert "_instantiator" in last["hyper_parameters"]  # by which the CLI's checkpoints are built again
    with pytest.raises(CheckpointError, match="another base model"):
        load_finetuned(Classifier, path)  # whose base is drawn anew, and is not that of the seeded run
    torch.manual_seed(1)
    assert torch.equal(load_finetuned(Classifier, path).head.weight, last["state_dict"]["head.weight"])


@pytest.mark.slow
def test_an_unknown_submodule_is_named(tmp_path):
    done = run(tmp_path, "fit", module="backbon")
    assert done.returncode != 0
    assert "Classifier has no submodule 'backbon'; did you mean 'backbone'" in done.stderr
