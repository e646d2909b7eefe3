"""Runs with several validation sets: the command line, what callbacks monitor and draw, resuming, comparisons."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping

from lora_lightning import LoRA, Optim, SequenceClassification
from lora_lightning.__main__ import main
from lora_lightning.adapters import adapter_state_dict
from lora_lightning.callbacks import AdapterCheckpoint, MetricCurve, NonFiniteGuard
from lora_lightning.callbacks.metric_curve import group_by_metric
from lora_lightning.checkpoint.manifest import read_manifest
from lora_lightning.commands._compare import runner, trial
from lora_lightning.commands._compare.report import charts
from lora_lightning.commands._compare.trial import _limit_validation
from lora_lightning.data import TextClassificationData
from lora_lightning.errors import TrainingError
from tests.checkpoint.runs import save_backbone
from tests.resume.runs import SaveAfter
from tests.tasks.toys import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]
SIZES = {"train": 48, "reviews": 10, "tweets": 22}
FIGURES = ("loss", "accuracy", "f1")
NAMES = [f"val/{prefix}{figure}" for prefix in ("", "reviews/", "tweets/") for figure in FIGURES]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a backbone, and a file of texts for each name, in which `w5` decides the label."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_backbone(tmp_path / "base")
    generator = torch.Generator().manual_seed(3)
    for name, count in SIZES.items():
        rows = torch.randint(5, 25, (count, 6), generator=generator).tolist()
        lines = [f"{' '.join(f'w{word}' for word in row)},{'no' if row[0] % 2 else 'yes'}" for row in rows]
        Path(f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    return tmp_path


def data_of(**settings):
    usual = {"val": {"reviews": "reviews.csv", "tweets": "tweets.csv"}, "test_size": 0, "batch_size": 8}
    return TextClassificationData("train.csv", **{**usual, **settings})


def task_of(**settings):
    torch.manual_seed(5)
    method = LoRA(r=2, dropout=0.1, target_modules=["query", "value"])
    return SequenceClassification("base", method, Optim(**{"lr": 1e-2, **settings}))


def fitted(*callbacks, data=None, task=None, ckpt_path=None, **settings):
    run = trainer(callbacks=list(callbacks), enable_checkpointing=bool(callbacks), default_root_dir=".", **settings)
    task = task or task_of()
    run.fit(task, data or data_of(), ckpt_path=ckpt_path, weights_only=True)
    return task, run


def figures(run):
    return {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("val/")}


# The command line.


def test_a_run_logs_every_set_and_validate_reports_them(folder, capsys):
    config = {
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {"class_path": "SequenceClassification", "init_args": {"backbone": "base"}},
        "data": {
            "class_path": "TextClassificationData",
            "init_args": {"train": "train.csv", "val": {"reviews": "reviews.csv"}, "test_size": 0},
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config=run.yaml", "--data.val.tweets=tweets.csv"]) == 0
    with (folder / "runs/version_0/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert len(rows) == 2
    assert {name for name in rows[0] if name.startswith("val/")} == set(NAMES)
    capsys.readouterr()
    saved = "runs/version_0/config.yaml"
    assert main(["validate", f"--config={saved}", "--ckpt_path=runs/version_0/checkpoints/last.ckpt"]) == 0
    shown = re.findall(r"(val/[\w/]+)\W+([\d.e-]+)", re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out))
    assert {name: float(value) for name, value in shown} == pytest.approx(
        {name: float(rows[1][name]) for name in NAMES}
    )
    assert rows[1]["val/reviews/loss"] != rows[1]["val/tweets/loss"]
    mean = (10 * float(rows[1]["val/reviews/loss"]) + 22 * float(rows[1]["val/tweets/loss"])) / 32
    assert float(rows[1]["val/loss"]) == pytest.approx(mean, rel=1e-5)


def test_names_are_checked_on_the_command_line(capsys):
    command = ["fit", "--model=SequenceClassification", "--model.backbone=base", "--data=TextClassificationData"]
    assert main([*command, "--data.train=train.csv", "--data.val.loss=tweets.csv"]) == 2
    assert "val has a set named 'loss', which is the name of a metric" in capsys.readouterr().err


# What callbacks see.


@pytest.mark.parametrize(
    ("monitor", "mode"), [("val/loss", "min"), ("val/tweets/loss", "min"), ("val/reviews/loss", "min")]
)
def test_any_figure_can_be_monitored(monitor, mode):
    best = AdapterCheckpoint("kept", filename="{step}", monitor=monitor, mode=mode)
    stop = EarlyStopping(monitor, patience=50, mode=mode)
    curve = MetricCurve()
    fitted(best, stop, curve, max_epochs=4)
    values = [value for _, value in curve.curves[monitor]]
    wanted = max(values) if mode == "max" else min(values)
    assert best.best_model_score.item() == stop.best_score.item() == pytest.approx(wanted)
    assert len(set(values)) > 1
    metrics = read_manifest(Path(best.best_model_path).with_suffix("")).metrics
    assert metrics[monitor] == pytest.approx(wanted)
    assert set(NAMES) <= set(metrics)


def test_the_picture_has_a_line_for_each_set():
    curve = MetricCurve()
    fitted(curve, log_every_n_steps=2)
    panels = group_by_metric(curve.curves)
    assert {name: list(lines) for name, lines in panels.items()} == {
        "loss": ["train", "val", "val/reviews", "val/tweets"],
        "accuracy": ["val", "val/reviews", "val/tweets"],
        "f1": ["val", "val/reviews", "val/tweets"],
    }
    assert all(len(line) == 2 for name, line in panels["loss"].items() if name != "train")


class BrokenOnTweets(SequenceClassification):
    """Has no finite loss on batches of the second set."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.is_second = dataloader_idx == 1
        super().validation_step(batch, batch_idx, dataloader_idx)

    def compute_loss(self, batch):
        output = super().compute_loss(batch)
        is_broken = not self.trainer.training and self.is_second
        return output._replace(loss=output.loss * float("nan")) if is_broken else output


def test_a_set_whose_loss_is_not_finite_is_named():
    task = BrokenOnTweets("base", LoRA(r=2))
    with pytest.raises(TrainingError, match="val/tweets/loss is nan") as caught:
        fitted(NonFiniteGuard(), task=task, max_epochs=1)
    assert "val/reviews" not in str(caught.value)


# Resuming, and comparisons.


def test_a_resumed_run_validates_as_the_whole_run(folder):
    task, whole = fitted(SaveAfter(folder, [8]), max_epochs=3)
    resumed, run = fitted(ckpt_path=folder / "8.ckpt", max_epochs=3)
    assert figures(run) == figures(whole)
    assert set(figures(run)) == set(NAMES)
    ours, theirs = adapter_state_dict(resumed.adapted), adapter_state_dict(task.adapted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    fresh, other = fitted(max_epochs=1)
    assert figures(other) != figures(whole)
    assert not torch.equal(adapter_state_dict(fresh.adapted)[next(iter(theirs))], next(iter(theirs.values())))


def test_a_comparison_takes_each_sets_share_of_rows():
    data = data_of(tokenizer="base")
    data.setup("fit")
    _limit_validation(data, 16)
    assert {name: len(loader.dataset) for name, loader in data.val_dataloader().items()} == {"reviews": 5, "tweets": 11}
    data = data_of(tokenizer="base")
    data.setup("fit")
    _limit_validation(data, 100)
    assert {name: len(loader.dataset) for name, loader in data.val_dataloader().items()} == {
        "reviews": 10,
        "tweets": 22,
    }


def test_a_comparison_judges_by_all_sets_together(folder, monkeypatch):
    def run_here(jobs, log):
        trial.run_jobs(json.loads(jobs.read_text()))
        return 0

    monkeypatch.setattr(runner, "run_child", run_here)
    monkeypatch.setattr(charts, "_DPI", 40)
    val = {"reviews": str(folder / "reviews.csv"), "tweets": str(folder / "tweets.csv")}
    train = str(folder / "train.csv")
    study = {
        "model": {"class_path": "SequenceClassification", "init_args": {"backbone": str(folder / "base")}},
        "data": {"class_path": "TextClassificationData", "init_args": {"train": train, "val": val}},
        "methods": [{"class_path": "LoRA", "init_args": {"target_modules": ["query", "value"]}}],
        "trainer": {"accelerator": "cpu"},
        "steps": 3,
        "search_steps": 2,
        "val_rows": 16,
        "output_dir": "out",
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(study))
    assert main(["compare", "--config=compare.yaml"]) == 0
    with (folder / "out/curves.csv").open(newline="") as file:
        row = [row for row in csv.DictReader(file) if row["method"] == "LoRA" and row["val_loss"]][-1]
    mean = (5 * float(row["val_reviews/loss"]) + 11 * float(row["val_tweets/loss"])) / 16
    assert float(row["val_loss"]) == pytest.approx(mean, rel=1e-5)
    assert row["val_reviews/loss"] != row["val_tweets/loss"]
