"""Subclasses load whatever their constructors look like, and what they hold beside the model is taken along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning.__main__ import main
from lora_lightning.callbacks import AdapterCheckpoint
from lora_lightning.checkpoint.saved_run import SavedRun
from lora_lightning.errors import CheckpointError
from lora_lightning.merging import merge_checkpoint
from lora_lightning.methods import LoRA
from tests.checkpoint.runs import save_backbone, save_checkpoint
from tests.tasks.own_modules import Clashing, Fixed, Forgetful, Passing, Projected, Scaled
from tests.tasks.toys import trainer

METHOD = LoRA(r=2, target_modules=["0"])
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))


def saved(task: Projected, path: Path) -> Path:
    nn.init.normal_(task.projection.weight)
    task.seen += 7
    return save_checkpoint(task, path)


@pytest.mark.parametrize(
    "task",
    [Projected(method=METHOD, width=5), Projected(5, method=METHOD), Fixed(method=METHOD), Passing(5, method=METHOD)],
)
def test_constructors_with_kwargs_load(task: Projected, tmp_path: Path) -> None:
    path = saved(task, tmp_path / "x.ckpt")
    for loaded in (type(task).load_from_checkpoint(path), SavedRun.of_checkpoint(path).build()):
        assert type(loaded) is type(task)
        assert loaded.projection.weight.shape == task.projection.weight.shape != Projected().projection.weight.shape
        assert torch.equal(loaded.seen, task.seen)
        assert torch.equal(loaded(X), task(X))
        assert loaded.hparams == task.hparams


def test_settings_hold_arguments_alone(tmp_path: Path) -> None:
    content = torch.load(saved(Projected(method=METHOD), tmp_path / "x.ckpt"), weights_only=True)
    assert not [name for name in content["hyper_parameters"] if name.startswith("_")]
    assert content["lora_lightning"]["task"] == "tests.tasks.own_modules.Projected"


def test_checkpoints_of_version_0_1_load(tmp_path: Path) -> None:
    path = saved(task := Projected(method=METHOD, width=5), tmp_path / "x.ckpt")
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["_class_path"] = content["lora_lightning"].pop("task")
    for name in ("arguments", "tokenizer", "label_names"):
        content["lora_lightning"].pop(name)
    torch.save(content, path)
    for loaded in (Projected.load_from_checkpoint(path), SavedRun.of_checkpoint(path).build()):
        assert torch.equal(loaded(X), task(X))


@pytest.mark.parametrize("given", [{"temperature": 0.5}, {}], ids=["given", "left out"])
def test_plain_arguments_are_kept_without_its_doing(tmp_path: Path, given: dict[str, float]) -> None:
    path = saved(task := Forgetful(3, method=METHOD, width=5, **given), tmp_path / "x.ckpt")
    for loaded in (Forgetful.load_from_checkpoint(path), SavedRun.of_checkpoint(path).build()):
        assert (loaded.needed, loaded.temperature) == (3, task.temperature) == (3, given.get("temperature", 1.0))
        assert loaded.hparams == task.hparams
    assert Forgetful.load_from_checkpoint(path, temperature=2.0).temperature == 2


def test_what_a_task_keeps_itself_replaces_the_argument() -> None:
    class Rounding(Projected):
        def __init__(self, size: float = 1.0, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.keep_settings(size=round(size))

    assert Rounding(size=2.6).hparams["size"] == 3
    assert Forgetful(needed=2).hparams["needed"] == 2


def test_an_argument_that_has_no_plain_form_is_named(tmp_path: Path) -> None:
    path = saved(Forgetful(needed=3, rename=str.upper, method=METHOD), tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match=r"the arguments rename .*Forgetful.*self\.keep_settings"):
        assert Forgetful.load_from_checkpoint(path).rename is str
    # warnings are errors: to pass it on is enough
    assert Forgetful.load_from_checkpoint(path, rename=str.upper).rename is str.upper


def test_a_required_argument_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = saved(Forgetful(needed=3, method=METHOD), tmp_path / "x.ckpt")
    content = torch.load(path, weights_only=True)
    del content["hyper_parameters"]["needed"]
    torch.save(content, path)
    with (
        pytest.warns(UserWarning, match="the arguments needed"),
        pytest.raises(CheckpointError, match=r"needed.*call self\.keep_settings"),
    ):
        Forgetful.load_from_checkpoint(path)
    assert Forgetful.load_from_checkpoint(path, needed=3).needed == 3


def test_a_plain_model_is_merged_with_them(tmp_path: Path) -> None:
    path = saved(task := Projected(method=METHOD), tmp_path / "x.ckpt")
    merge_checkpoint(path, tmp_path / "merged")
    state = load_file(tmp_path / "merged" / "model.safetensors")
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in model.state_dict()})
    merged = model(X) @ state["projection.weight"].t() + state["projection.bias"]
    torch.testing.assert_close(merged, task(X))
    assert state["seen"] == 7
    assert state.keys() - model.state_dict().keys() == {"projection.weight", "projection.bias", "seen"}


def test_names_that_clash_are_refused(tmp_path: Path) -> None:
    path = save_checkpoint(Clashing(method=METHOD), tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"0\.bias, 0\.weight beside its model"):
        merge_checkpoint(path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_transformers_folder_gets_a_file_of_its_own(tmp_path: Path, command: str) -> None:
    base = save_backbone(tmp_path / "base")
    task = Scaled(str(base), method=LoRA(r=2), label_names=["a", "b"])
    nn.init.constant_(task.temperature, 3)
    path = save_checkpoint(task, tmp_path / "x.ckpt")
    words = [f"--ckpt_path={path}", f"--output_dir={tmp_path / 'out'}", "--task_class=tests.tasks.own_modules.Scaled"]
    with pytest.warns(UserWarning, match=r"holds temperature beside its model.*task\.safetensors"):
        main([command, *words])
    assert load_file(tmp_path / "out" / "task.safetensors")["temperature"] == 3


def test_a_run_that_starts_from_the_folder_takes_them_over(tmp_path: Path) -> None:
    task = Projected(method=METHOD)
    task.configure_model()
    nn.init.normal_(task.projection.weight)
    data = DataLoader(TensorDataset(X, torch.zeros(5, dtype=torch.long)), batch_size=5)
    trainer(max_steps=1, enable_checkpointing=True, callbacks=[AdapterCheckpoint(dirpath=tmp_path / "c")]).fit(
        task, data
    )
    again = Projected(adapter=str(tmp_path / "c/last"))
    again.configure_model()
    assert torch.equal(again(X), task(X))
    with pytest.raises(CheckpointError, match=r"holds projection\.bias \[3\], and this task has \[4\]"):
        Projected(adapter=str(tmp_path / "c/last"), width=4).configure_model()


SCRIPT = """
from lightning.pytorch.cli import LightningCLI
from lora_lightning import SequenceClassification
from lora_lightning.data import TextClassificationData

if __name__ == "__main__":
    LightningCLI(SequenceClassification, TextClassificationData)
"""
SUBCLASS_SCRIPT = (
    SCRIPT.replace("CLI(SequenceClassification, ", "CLI(AdapterTask, ")
    .replace("TextClassificationData)", "TextClassificationData, subclass_mode_model=True)")
    .replace("import SequenceClassification", "import AdapterTask, SequenceClassification")
)


@pytest.mark.slow
@pytest.mark.parametrize("script", [SCRIPT, SUBCLASS_SCRIPT])
def test_lightnings_own_cli_trains_tests_and_resumes(tmp_path: Path, script: str) -> None:
    save_backbone(tmp_path / "base")
    (tmp_path / "main.py").write_text(script)
    rows = "".join(f"w{index % 7} w{index % 5},{index % 2}\n" for index in range(40))
    (tmp_path / "t.csv").write_text("text,label\n" + rows)
    is_subclass = script == SUBCLASS_SCRIPT
    model = ["--model=SequenceClassification"] if is_subclass else []
    words = [*model, "--model.backbone=base", "--data.train=t.csv", "--data.duplicates=keep"]
    words += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]

    def run(*arguments: str) -> None:
        command = [sys.executable, "main.py", *arguments, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    run("fit", "--trainer.max_epochs=1")
    found = next(tmp_path.rglob("*.ckpt"))
    run("test", f"--ckpt_path={found}")
    run("fit", f"--ckpt_path={found}", "--trainer.max_epochs=2")
