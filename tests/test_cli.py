import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lora_lightning import __main__
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
from lora_lightning.cli import default_callbacks, run_lightning
from lora_lightning.errors import DataError
from lora_lightning.methods import LoRA
from lora_lightning.optim import Optim
from lora_lightning.run.trainer import LogInterval
from tests.cli_toys import ToyData, ToyTask

pytestmark = [
    # Lightning's own advice about toy data and default settings.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*`weights_only` was not set.*"),
]

REPOSITORY = Path(__file__).parent.parent
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
CONFIG = """\
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
model:
  class_path: ToyTask
  init_args:
    method:
      class_path: LoRA
      init_args: {r: 2, alpha: 4, target_modules: ["2"]}
    optim: {lr: 1e-2}
data:
  class_path: ToyData
  init_args: {num_points: 8}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(CONFIG)
    return tmp_path


def mistake(capsys, *arguments):
    """Run a command line that must fail, and return the one line that it prints; nothing may be written."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    status = main(list(arguments))
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("lora-lightning: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert sorted(Path().rglob("*")) == before
    return error


def write(text, name="bad.yaml"):
    Path(name).write_text(text)
    return name


def metrics_of(folder):
    """Return what a run logged, but for how long it took."""
    metrics = pd.read_csv(Path(folder) / "metrics.csv")
    counted = metrics.drop(columns=[name for name in metrics if name.endswith("per_second")])
    return counted.fillna(-1.0).to_dict("list")  # an empty cell equals another


# Commands. What most mistakes are told as is in the table of tests/faults.


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "merge"):
        assert re.search(rf"^  {command} +\w.*\.$", shown, re.MULTILINE)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"lora-lightning \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "x"], "unexpected words: x; settings are given as --name value"),
    ],
)
def test_mistakes_of_commands(capsys, arguments, words):
    assert words in mistake(capsys, *arguments)


def test_help_of_a_command_shows_its_docstring_and_options(capsys):
    assert main(["merge", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "plain Hugging Face folder" in shown
    assert "--output_dir" in shown


def test_help_without_heavy_imports():
    code = "import sys; from lora_lightning.__main__ import main; main(['--help']); main(['--version']); main(['x']);"
    code += "print([name for name in ('torch', 'lightning', 'transformers', 'jsonargparse') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_help_of_fit_imports_no_more_of_transformers_than_lightning_does(folder):
    # torchmetrics, which Lightning imports, looks at transformers' top module; no model code may come on top.
    code = """
import sys
import lightning.pytorch.cli
before = {name for name in sys.modules if name.split(".")[0] in ("transformers", "datasets", "sklearn", "peft")}
from lora_lightning.__main__ import main
status = main(["fit", "--help", "all"])
after = {name for name in sys.modules if name.split(".")[0] in ("transformers", "datasets", "sklearn", "peft")}
print("new:", sorted(after - before), status)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "--trainer.max_epochs" in result.stdout
    assert result.stdout.splitlines()[-1] == "new: [] 0"


def test_a_real_process_ends_with_status_2_and_one_line(folder):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "lora_lightning", "fit", "--model", "SequenceClasification"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2
    assert result.stderr == (
        "lora-lightning: error: unknown class `SequenceClasification` at `model`; "
        "did you mean `SequenceClassification`?\n"
    )


# Mistakes in settings.


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("    method:", "    metod:", "bad.yaml, line 9: unknown key `model.init_args.metod`; did you mean `method`?"),
        ("  max_epochs", "  max_epoch", "unknown key `trainer.max_epoch`; did you mean `max_epochs`?"),
        ("trainer:", "trainr:", "bad.yaml, line 1: unknown key `trainr`; did you mean `trainer`?"),
        ("num_points", "num_point", "unknown key `data.init_args.num_point`; did you mean `num_points`?"),
        ("{r: 2", "{rr: 2", "unknown key `model.init_args.method.init_args.rr`; did you mean `r`?"),
        ("optim: {lr", "optim: {lrr", "unknown key `model.init_args.optim.lrr`; did you mean `lr`?"),
        ("path: LoRA", "path: LoRa", "unknown class `LoRa` at `model.init_args.method`; did you mean `LoRA`?"),
        ("path: LoRA", "path: nowhere.LoRA", "unknown class `nowhere.LoRA` at `model.init_args.method`"),
        ("path: ToyTask", "path: ToyTsk", "unknown class `ToyTsk` at `model`; did you mean `ToyTask`?"),
        ("path: ToyData", "path: ToyDta", "unknown class `ToyDta` at `data`; did you mean `ToyData`?"),
        ("r: 2", "r: 0", "bad.yaml, line 11: model.init_args.method.init_args.r: LoRA: r must be"),
        ("r: 2", "r: -1", "r must be an integer of at least 1, got -1"),
        ("r: 2", "r: true", "model.init_args.method.init_args.r: expected an int, got True"),
        ("alpha: 4", "alpha: 0", "alpha must be a finite number above 0, got 0"),
        ("alpha: 4", "alpha: .nan", "alpha must be a finite number above 0, got nan"),
        ("alpha: 4", "alpha: nan", "alpha: expected a number, got 'nan'"),
        ("alpha: 4", "scaling: rs", "scaling: expected one of standard, rslora, alpha, got 'rs'"),
        ("num_points: 8", "num_points: 8.5", "data.init_args.num_points: expected an int, got 8.5"),
        ("num_points: 8", "batch_size: 0", "batch_size must be at least 1, got 0"),
        ("max_epochs: 1", "max_epochs: many", "trainer.max_epochs: expected an int, got 'many'"),
        ("max_epochs: 1", "precision: 17", "trainer.precision: expected"),
        ("  class_path: ToyTask\n  init_args:", "  class_path: ToyTask\n  init_arg:", "unknown key `model.init_arg`"),
        ("data:", "data: 3\nunused:", "data: expected"),
        ("  max_epochs: 1", "  callbacks: [{class_path: MetricCurv}]", "did you mean `MetricCurve`?"),
        ("  max_epochs: 1", "  callbacks: {class_path: MetricCurve, init_args: {file: a}}", "unknown key"),
    ],
)
def test_mistakes_in_a_config(capsys, old, new, words):
    assert old in CONFIG
    assert words in mistake(capsys, "fit", "--config", write(CONFIG.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.method.metod", "3"], "metod`"),
        (["--model.method.r", "8x"], "model.init_args.method.init_args.r: expected an int, got '8x'"),
        (["--model.method.r=0"], "r must be an integer of at least 1, got 0"),
        (["--model.method", "LoRa"], "did you mean `LoRA`?"),
        (["--model.method", "Lora"], "did you mean `LoRA`?"),
        (["--model", "ToyTsk"], "did you mean `ToyTask`?"),
        (["--trainer.max_epoch", "3"], "did you mean `--trainer.max_epochs`?"),
        (["--ckpt", "x"], "unknown option `--ckpt`"),
        (["--seed_everything", "x"], "seed_everything: expected"),
        (["--config"], "config"),
        (["--trainer.max_epochs"], "max_epochs"),
    ],
)
def test_mistakes_in_flags(capsys, arguments, words):
    assert words in mistake(capsys, "fit", "--config", "good.yaml", *arguments)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: !Task x\n", "the tag `!Task` is not allowed"),
        ("- a\n- b\n", "expected a mapping (`key: value` lines) at the top, got a list"),
    ],
)
def test_mistakes_of_yaml(capsys, text, words):
    assert words in mistake(capsys, "fit", "--config", write(text))


def test_missing_config_names_the_nearest(capsys):
    line = mistake(capsys, "fit", "--config", "god.yaml")
    assert "there is no config file 'god.yaml'; nearest there: good.yaml" in line


def test_a_section_in_a_file_of_its_own(capsys):
    model = yaml.safe_load(CONFIG)["model"]
    Path("model.yaml").write_text(yaml.safe_dump(model))
    flags = ["--model", "model.yaml", "--data", "ToyData", *QUIET]
    assert main(["fit", *flags, "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optim"]["lr"] == 0.01
    Path("model.yaml").write_text("class_path: ToyTask\nclass_path: ToyTask\n")
    assert "model.yaml, line 2: the key `class_path` is there twice" in mistake(capsys, "fit", *flags)
    write("model: model.yaml\n")
    assert "model.yaml, line 2: the key `class_path` is there twice" in mistake(capsys, "fit", "--config", "bad.yaml")


def test_no_model_and_no_data(capsys):
    assert "no model is given" in mistake(capsys, "fit")
    line = mistake(capsys, "fit", "--model", "ToyTask")
    assert "no data are given" in line
    assert "ToyData" in line


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('["2"]', "[query]", "query"),
        ('["2"]', '["2", query]', "query"),
        ("r: 2", "r: 3", "2"),
    ],
)
def test_mistakes_found_in_the_model_leave_nothing_behind(capsys, old, new, words):
    assert words in mistake(capsys, "fit", "--config", write(CONFIG.replace(old, new)))


def test_debug_shows_the_traceback(capsys):
    assert main(["fit", "--config", "gone.yaml", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("lora-lightning: error: there is no config file")


@pytest.mark.parametrize("error", [DataError("two\nlines"), MisconfigurationException("two\nlines")])
def test_errors_of_users_are_one_line(capsys, monkeypatch, error):
    def fail(arguments):
        raise error

    monkeypatch.setattr(__main__, "run", fail)
    assert mistake(capsys) == "lora-lightning: error: two lines\n"


def test_bugs_keep_their_traceback():
    with pytest.raises(IndexError, match="a bug"):
        main(["fit", "--config", "good.yaml", "--model", "BuggyTask"])


def test_sigterm_without_the_guard_is_143(monkeypatch):
    def ended(*arguments):
        raise SIGTERMException

    monkeypatch.setattr(__main__, "run", ended)
    assert main(["fit"]) == 143


def test_ctrl_c_is_130(monkeypatch):
    assert main(["fit", "--config", "good.yaml", "--model", "InterruptedTask"]) == 130

    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "run", interrupt)
    assert main(["fit"]) == 130


# Runs.


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


# Checkpoints.


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
    assert "there is no complete checkpoint in runs to go on from" in capsys.readouterr().err
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
