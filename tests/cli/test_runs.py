"""What runs of the command write and log."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_lightning.__main__ import main
from lora_lightning.callbacks import (
    AdapterCheckpoint,
    AdapterSummary,
    IdleParameterGuard,
    MetricCurve,
    NonFiniteGuard,
    OutOfMemoryGuard,
    PacedProgressBar,
    PlainProgress,
    RankWatch,
    RunReport,
    SignalGuard,
    Throughput,
)
from lora_lightning.checks import RunCheck
from lora_lightning.cli import run_lightning
from lora_lightning.run.defaults import default_callbacks
from lora_lightning.run.trainer import LogInterval
from tests.cli.lines import QUIET, metrics_of

pytestmark = [
    # Lightning's own advice about toy data and default settings.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*`weights_only` was not set.*"),
]


def test_a_second_run_starts_a_new_version_and_its_config_repeats_it():
    assert main(["fit", "--config", "good.yaml"]) == 0
    assert main(["fit", "--config", "runs/version_0/config.yaml"]) == 0
    first, second = (yaml.safe_load(Path(f"runs/version_{k}/config.yaml").read_text()) for k in (0, 1))
    assert first == second
    assert first["model"]["init_args"]["method"]["init_args"]["r"] == 2
    assert first["model"]["init_args"]["optim"]["lr"] == 0.01
    assert metrics_of("runs/version_0") == metrics_of("runs/version_1")
    for k in (0, 1):
        assert Path(f"runs/version_{k}/checkpoints/last.ckpt").is_file()
        assert Path(f"runs/version_{k}/hparams.yaml").is_file()


def test_another_seed_gives_other_metrics():
    main(["fit", "--config", "good.yaml"])
    main(["fit", "--config", "good.yaml", "--seed_everything", "5"])
    assert metrics_of("runs/version_0") != metrics_of("runs/version_1")


def test_flags_win_over_the_config_and_short_names_work():
    flags = ["--model.method", "DoRA", "--model.method.r", "1", "--trainer.default_root_dir", "elsewhere"]
    assert main(["fit", "--config", "good.yaml", *flags]) == 0
    method = yaml.safe_load(Path("elsewhere/version_0/config.yaml").read_text())["model"]["init_args"]["method"]
    assert method["class_path"].endswith("DoRA")
    assert (method["init_args"]["r"], method["init_args"]["target_modules"]) == (1, ["2"])


def test_several_methods_and_a_task_with_its_own_data():
    methods = "[{class_path: LoRA, init_args: {r: 2, target_modules: ['0']}}, {class_path: DoRA, init_args: {r: 1, "
    methods += "target_modules: ['2']}}]"
    assert main(["fit", *QUIET, "--model", "OwnDataTask", "--model.method", methods]) == 0


def test_switched_off_parts_stay_off():
    off = ["--trainer.enable_checkpointing=false", "--trainer.logger=false"]
    assert main(["fit", "--config", "good.yaml", *off]) == 0
    assert {path.name for path in Path("runs").rglob("*")} == {"config.yaml", "curve.png", "report.html"}


def test_fast_dev_run_writes_nothing():
    assert main(["fit", "--config", "good.yaml", "--trainer.fast_dev_run=true"]) == 0
    assert not Path("runs").exists()


def test_print_config(capsys):
    assert main(["fit", "--config", "good.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == "tests.cli_toys.ToyTask"
    assert not Path("runs").exists()


def test_default_callbacks_give_way_to_the_users(monkeypatch):
    guards = [NonFiniteGuard, IdleParameterGuard, OutOfMemoryGuard, SignalGuard]
    others = [MetricCurve, RunReport, RankWatch, *guards]
    kinds = [AdapterCheckpoint, AdapterSummary, RunCheck, LogInterval, Throughput, PlainProgress, *others]
    assert [type(callback) for callback in default_callbacks([], {})] == kinds
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    mine = [ModelCheckpoint(), Throughput()]
    assert [type(callback) for callback in default_callbacks(mine, {})] == [
        AdapterSummary,
        RunCheck,
        LogInterval,
        PacedProgressBar,
        *others,
    ]
    off = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    assert [type(callback) for callback in default_callbacks([], off)] == [RunCheck, LogInterval, Throughput, *others]
    assert default_callbacks([], {"barebones": True}) == []


def test_the_users_callback_is_the_only_one_of_its_kind():
    callbacks = "{class_path: AdapterCheckpoint, init_args: {filename: mine, save_last: false}}"
    cli = run_lightning("fit", ["--config", "good.yaml", "--trainer.callbacks", callbacks])
    assert len([c for c in cli.trainer.callbacks if isinstance(c, ModelCheckpoint)]) == 1
    assert [path.name for path in Path("runs").rglob("*.ckpt")] == ["mine.ckpt"]
