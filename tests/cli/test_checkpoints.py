"""Checkpoints on the command line."""

import warnings
import zipfile
from pathlib import Path

import lightning as L
import pytest
import torch

from lora_lightning.__main__ import main
from lora_lightning.cli import run_lightning
from lora_lightning.methods import LoRA
from lora_lightning.optim import Optim
from tests.cli.lines import QUIET, mistake
from tests.cli_toys import ToyData, ToyTask

pytestmark = [
    # Lightning's own advice about toy data and default settings.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*`weights_only` was not set.*"),
]


def fit_from_cli():
    assert main(["fit", "--config", "good.yaml"]) == 0
    return "runs/version_0/checkpoints/last.ckpt"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_last_is_the_newest_complete_checkpoint_of_all_runs():
    fit_from_cli()
    fit_from_cli()
    first, second = (Path(f"runs/version_{number}/checkpoints/last.ckpt") for number in (0, 1))
    cli = run_lightning("fit", ["--config", "good.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    assert Path(cli.trainer.ckpt_path) == second
    assert cli.trainer.current_epoch == 2
    for path in Path("runs").rglob("*.ckpt"):
        if not path.is_relative_to("runs/version_0"):
            path.write_bytes(path.read_bytes()[:100])
    cli = run_lightning("fit", ["--config", "good.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    assert Path(cli.trainer.ckpt_path).parent == first.parent


def test_without_a_checkpoint_last_is_a_mistake(capsys):
    assert main(["fit", "--config", "good.yaml", "--ckpt_path", "last"]) == 2
    assert "no complete checkpoint to resume from is in runs" in capsys.readouterr().err
    assert not Path("runs").exists()


def fit_from_python():
    task = ToyTask(method=LoRA(r=2, alpha=4, target_modules=["2"]), optim=Optim(lr=0.01))
    L.seed_everything(42)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(task, ToyData(num_points=8))
    trainer.save_checkpoint("python.ckpt")
    return "python.ckpt"


def evaluated_loss(*arguments):
    cli = run_lightning("test", list(arguments))
    return cli.trainer.callback_metrics["test/loss"].item()


@pytest.mark.parametrize("fit", [fit_from_cli, fit_from_python])
def test_a_checkpoint_is_tested_with_its_own_settings(fit):
    checkpoint = fit()
    task = ToyTask.load_from_checkpoint(checkpoint, weights_only=True)
    assert task.methods == (LoRA(r=2, alpha=4, target_modules=["2"]),)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    expected = trainer.test(task, ToyData(num_points=8))[0]["test/loss"]

    assert evaluated_loss("--config", "good.yaml", "--ckpt_path", checkpoint) == expected
    assert evaluated_loss("--data", "ToyData", "--data.num_points=8", *QUIET, "--ckpt_path", checkpoint) == expected
    untrained = evaluated_loss("--config", "good.yaml")
    assert untrained != expected


def test_settings_that_contradict_the_checkpoint_are_refused(capsys):
    checkpoint = fit_from_cli()
    line = mistake(capsys, "test", "--config", "good.yaml", "--ckpt_path", checkpoint, "--model.method.alpha", "8")
    assert "`model.init_args.method.init_args.alpha` is 8.0 here, but the checkpoint" in line
    assert "trained with 4.0" in line
    assert "adapter:" not in line
    line = mistake(capsys, "fit", "--config", "good.yaml", "--ckpt_path", checkpoint, "--model.method.alpha", "8")
    folder = Path(checkpoint).with_suffix("")
    assert f"leave --ckpt_path out and give `adapter: {folder}` (model.init_args.adapter)" in line
    assert folder.is_dir()
    assert main(["test", "--config", "good.yaml", "--ckpt_path", checkpoint, "--model.optim.lr", "1"]) == 0


def test_the_users_backbone_replaces_a_moved_one():
    checkpoint = fit_from_cli()
    cli = run_lightning("test", ["--config", "good.yaml", "--ckpt_path", checkpoint, "--model.backbone", "moved"])
    assert cli.model.backbone == "moved"


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fit_resumes_with_another_rate_and_says_so():
    checkpoint = fit_from_cli()
    more = ["--config", "good.yaml", "--ckpt_path", checkpoint, "--trainer.max_epochs=2"]
    with pytest.warns(UserWarning, match=r"Resumed with optim\.lr 1\.0 \(before: 0\.01\): from here on"):
        cli = run_lightning("fit", [*more, "--model.optim.lr=1"])
    assert cli.trainer.global_step == 4
    assert cli.model.optim.lr == cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == 1.0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Resumed with")
        assert run_lightning("fit", more).model.optim.lr == 0.01  # negative control


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fit_resumes():
    checkpoint = fit_from_cli()
    cli = run_lightning("fit", ["--config", "good.yaml", "--ckpt_path", checkpoint, "--trainer.max_epochs=2"])
    assert cli.trainer.current_epoch == 2
    assert cli.trainer.global_step == 4


def test_paths_that_are_no_checkpoint(capsys):
    Path("text.ckpt").write_text("hello")
    with zipfile.ZipFile("zip.ckpt", "w") as archive:
        archive.writestr("a.txt", "hello")
    torch.save({"state_dict": {}}, "other.ckpt")
    Path("folder.ckpt").mkdir()
    for name in ("gone.ckpt", "text.ckpt", "zip.ckpt", "other.ckpt", "folder.ckpt"):
        assert name in mistake(capsys, "test", "--config", "good.yaml", "--ckpt_path", name)
    assert "only works after fit" in mistake(capsys, "test", "--config", "good.yaml", "--ckpt_path", "best")


def test_a_checkpoint_does_not_import_what_it_names(capsys):
    checkpoint = torch.load(fit_from_cli(), weights_only=True)
    Path("evil_task.py").write_text("open('pwned', 'w')")
    checkpoint["lora_lightning"]["task"] = "evil_task.Task"
    torch.save(checkpoint, "task.ckpt")
    assert "--model evil_task.Task" in mistake(capsys, "test", "--data", "ToyData", "--ckpt_path", "task.ckpt")

    checkpoint["lora_lightning"]["task"] = "tests.cli_toys.ToyTask"
    checkpoint["hyper_parameters"]["method"]["class_path"] = "evil_task.Method"
    torch.save(checkpoint, "method.ckpt")
    assert "evil_task.Method" in mistake(capsys, "test", "--data", "ToyData", "--ckpt_path", "method.ckpt")
