"""What new users typed or wrote: each ends in an error before training, in one line of warning, or just works."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lora_lightning.optim import Optim
from lora_lightning.optim.schedule import build_schedule
from tests.faults.bench import CKPT, CONFIG, FIT
from tests.mistakes.lines import fit, mistake, works

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*dirpath has changed.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
]
REPOSITORY = Path(__file__).parent.parent.parent


def resume(*arguments: str) -> list[str]:
    return ["fit", "--config", "good.yaml", "--ckpt_path", CKPT, *arguments]


# The trainer.


@pytest.mark.parametrize("interval", ["1000", "5"])
def test_validation_beyond_the_epoch(here, capsys, interval):
    error = mistake(capsys, *fit(f"--trainer.val_check_interval={interval}"), leaves=True)
    assert error.startswith(f"trainer.val_check_interval is {interval}, but an epoch has 4 batches; set at most 4")


@pytest.mark.parametrize("settings", [["--trainer.val_check_interval=4"], ["--trainer.val_check_interval=0.5"]])
def test_validation_inside_the_epoch(here, capsys, settings):
    works(capsys, *fit(*settings))


@pytest.mark.parametrize("warmup", ["1000", "4"])
def test_warm_up_longer_than_the_run(here, capsys, warmup):
    with pytest.warns(
        UserWarning, match=rf"4 optimizer steps and warmup is {warmup}, so .* reaches only \d\S* % of lr"
    ):
        works(capsys, *fit("--model.optim.warmup", warmup))


@pytest.mark.parametrize("warmup", ["3", "0.5", "0"])
def test_warm_up_that_fits(here, capsys, warmup):
    works(capsys, *fit("--model.optim.warmup", warmup))  # a warning would be an error


def test_the_warning_of_warm_up_says_the_highest_rate():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.warns(UserWarning, match=r"reaches only 33 % of lr"):
        schedule = build_schedule(optimizer, Optim(warmup=5), 2)
    rates = []
    for _ in range(2):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(2 / 6)


# Data.


def rows(name: str, *labels: str) -> str:
    lines = [f"w{index} w{index * 7 % 50},{labels[index % len(labels)]}" for index in range(40)]
    Path(name).write_text("\n".join(["text,label", *lines]) + "\n")
    return name


def test_class_weights_of_integer_labels(here, capsys):
    rows("numbers.csv", "0", "1")
    weights = yaml.safe_dump({"model": {"init_args": {"class_weights": {0: 1.0, 1: 5.0}}}})
    Path("weights.yaml").write_text(weights)
    works(capsys, *fit("--config", "weights.yaml", "--data.train", "numbers.csv"))


def test_labels_that_are_scores(here, capsys):
    rows("scores.csv", "4.5", "3.0", "2.5", "1.0")
    error = mistake(capsys, *fit("--data.train", "scores.csv"))
    assert "problem: regression" in error
    assert "label_names" in error


def test_labels_that_hold_several(here, capsys):
    rows("several.csv", "sports;politics", "sports", "politics")
    with pytest.warns(UserWarning, match="problem: multi_label"):
        works(capsys, *fit("--data.train", "several.csv"))


@pytest.mark.parametrize("train", ["parts/*.csv", "train.csv.gz"])
def test_patterns_and_compressed_files(here, capsys, train):
    Path("parts").mkdir()
    shutil.copy("train.csv", "parts/one.csv")
    Path("train.csv.gz").write_bytes(gzip.compress(Path("train.csv").read_bytes()))
    works(capsys, *fit("--data.train", train))


# Loggers.


@pytest.mark.parametrize("how", ["flag", "key", "path", "list"])
def test_tensorboard_writes_into_the_folder_of_the_run(here, capsys, how):
    spec = {"key": "TensorBoardLogger", "path": {"class_path": "lightning.pytorch.loggers.TensorBoardLogger"}}
    spec["list"] = ["TensorBoardLogger", {"class_path": "CSVLogger", "init_args": {"flush_logs_every_n_steps": 1}}]
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": {"logger": spec.get(how), "default_root_dir": "all"}}))
    flags = ["--trainer.logger", "TensorBoardLogger"] if how == "flag" else []
    works(capsys, *fit("--config", "more.yaml", *flags))
    names = {path.name.partition(".tfevents")[0] for path in Path("all/version_0").iterdir()}
    assert {"events.out", "checkpoints", "config.yaml"} <= names
    assert ("metrics.csv" in names) == (how == "list")
    assert [path.name for path in Path("all").iterdir()] == ["version_0"]
    assert not Path("runs").exists()
    works(capsys, *fit("--config", "all/version_0/config.yaml"))  # what is written repeats the run beside it
    assert sorted(path.name for path in Path("all").iterdir()) == ["version_0", "version_1"]


def test_a_folder_of_ones_own_for_tensorboard(here, capsys):
    works(capsys, *fit("--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=mine"))
    assert list(Path("mine/lightning_logs/version_0").glob("events*"))


PACKAGES = [
    ("WandbLogger", "wandb", "wandb>="),
    ("MLFlowLogger", "mlflow", "mlflow>="),
    ("CometLogger", "comet_ml", "comet-ml>="),
]


@pytest.mark.slow
@pytest.mark.parametrize(("logger", "module", "requirement"), PACKAGES, ids=[name for name, _, _ in PACKAGES])
def test_a_logger_without_its_package(here, logger, module, requirement):
    # In a process of its own, in which nothing of the package is found.
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from importlib import metadata\n"
        "found = metadata.version\n"
        f"metadata.version = lambda name: found('no-such' if name == {requirement.partition('>')[0]!r} else name)\n"
        "from lora_lightning.__main__ import main\n"
        f"sys.exit(main({[*FIT, '--trainer.logger', logger]!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 2
    assert line.startswith(f"lora-lightning: error: {logger} needs the package ")
    assert f"pip install '{requirement}" in line
    assert len(line) < 200
    assert not Path("runs").exists()


# Classes of the user's own.

OWN_TASK = "from lora_lightning import SequenceClassification\nclass Mine(SequenceClassification):\n    pass\n"
SCRIPT = "import sys; from lora_lightning.__main__ import script; sys.argv[0] = 'lora-lightning'; script()"


@pytest.mark.parametrize("start", [["-c", SCRIPT], ["-m", "lora_lightning"]], ids=["script", "module"])
def test_a_class_in_the_current_folder(here, start):
    Path("my_task.py").write_text(OWN_TASK)
    Path("my_data.py").write_text(
        "from lora_lightning import TextClassificationData\nclass Texts(TextClassificationData):\n    pass\n"
    )
    Path("yaml.py").write_text("raise SystemExit('stands in for an installed module')\n") if start[0] == "-c" else None
    text = CONFIG.replace("SequenceClassification", "my_task.Mine").replace("TextClassificationData", "my_data.Texts")
    Path("mine.yaml").write_text(text)
    # As the console script has it, the first entry is the folder of the script.
    isolated = "import sys; sys.path.pop(0);" if start[0] == "-c" else ""
    words = [start[0], f"{isolated}{start[1]}" if isolated else start[1], "fit", "--config", "mine.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert list(Path("runs").rglob("*.ckpt"))


@pytest.mark.slow
def test_python_minus_p_keeps_the_folder_out(here):
    Path("my_task.py").write_text(OWN_TASK)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = ["-P", "-c", SCRIPT, "fit", "--config", "good.yaml", "--model", "my_task.Mine"]
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2
    assert "this Python does not look into" in result.stderr
    assert "which holds my_task.py. Run it without -P" in result.stderr


# Checkpoints.


def test_a_checkpoint_of_a_complete_run(here, capsys):
    with pytest.warns(UserWarning, match=r"Nothing was trained: .*last\.ckpt is complete \(trainer\.max_epochs is 1\)"):
        works(capsys, *resume())


def test_a_checkpoint_of_a_run_that_has_reached_max_steps(here, capsys):
    with pytest.warns(UserWarning, match=r"Nothing was trained: .*\(trainer\.max_steps is 4\)"):
        works(capsys, *resume("--trainer.max_epochs=9", "--trainer.max_steps=4"))


def test_a_checkpoint_to_train_on_from(here, capsys):
    works(capsys, *resume("--trainer.max_epochs=2"))  # a warning would be an error


def rates() -> list[float]:
    content = torch.load(next(Path("runs").rglob("last.ckpt")), weights_only=True)
    return [group["lr"] for group in content["optimizer_states"][0]["param_groups"]]


def test_another_rate_from_a_checkpoint_on(here, capsys):
    more = ["--trainer.max_epochs=2", "--model.optim.schedule=constant"]
    with pytest.warns(UserWarning, match=r"Resumed with optim\.lr 1e-05 \(before: 0\.01\)"):
        works(capsys, *resume(*more, "--model.optim.lr=1e-5"))
    assert rates() == pytest.approx([1e-5] * len(rates()))
    settings = yaml.safe_load(next(Path("runs").rglob("config.yaml")).read_text())
    assert settings["model"]["init_args"]["optim"]["lr"] == 1e-5


@pytest.mark.parametrize("setting", ["--model.optim.optimizer=SGD"])
def test_what_does_not_fit_the_optimizer_of_a_checkpoint(here, capsys, setting):
    error = mistake(capsys, *resume("--trainer.max_epochs=2", setting))
    assert f"The checkpoint was trained with {setting.removeprefix('--model.').partition('=')[0]}=" in error
    assert "start a new run from the adapter folder beside the checkpoint" in error


def test_what_does_not_fit_a_checkpoint(here, capsys):
    error = mistake(capsys, *resume("--trainer.max_epochs=2", "--model.method.r=3"))
    assert "`adapter: run/last`" in error


def test_merge_after_the_base_has_moved(here, capsys):
    shutil.move("base", "elsewhere")
    assert "--backbone" in mistake(capsys, "merge", "--ckpt_path", CKPT, "--output_dir", "out")
    works(capsys, "merge", "--ckpt_path", CKPT, "--output_dir", "out", "--backbone", "elsewhere")
    assert Path("out/config.json").is_file()


# Targets.


def test_a_target_that_is_in_the_head_too(here, capsys):
    targets = json.dumps(["query", "classifier"])
    with pytest.warns(UserWarning, match="classifier") as told:
        works(capsys, *fit(f"--model.method.target_modules={targets}"))
    assert len([one for one in told if "modules_to_save" in str(one.message)]) == 1


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]])
def test_targets_of_another_architecture(here, capsys, targets):
    error = mistake(capsys, *fit(f"--model.method.target_modules={json.dumps(targets)}"))
    assert all(repr(target) in error for target in targets)
    assert error.count("word_embeddings") == 1


def test_a_logger_whose_package_cannot_be_imported(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    error = mistake(capsys, *fit("--trainer.logger=WandbLogger"), leaves=True)
    assert error == "The logger needs the package wandb, which cannot be imported: pip install wandb."
