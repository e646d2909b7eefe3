"""Metrics that a run monitors but does not log, and modes that do not fit, are refused before the first step."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lora_lightning.methods import LoRA
from tests.cli_toys import ToyData, ToyTask
from tests.mistakes.lines import fit, mistake, works

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*figures for val/.* will be too good.*"),
    pytest.mark.filterwarnings("ignore:.*length of .list. across ranks is zero.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


def callbacks(*specs: dict) -> str:
    return "--trainer.callbacks=" + json.dumps(list(specs))


def callback(name: str, **settings) -> dict:
    return {"class_path": name, "init_args": settings}


METHOD = LoRA(r=2, target_modules=["2"])
UNKNOWN = [
    (callback("EarlyStopping", monitor="val_loss"), "EarlyStopping monitors `val_loss`", "did you mean `val/loss`?"),
    (callback("AdapterCheckpoint", monitor="val_acc"), "AdapterCheckpoint monitors `val_acc`", "`val/accuracy`?"),
    (callback("ModelCheckpoint", monitor="eval_loss"), "ModelCheckpoint monitors `eval_loss`", "`val/loss`?"),
    (callback("EarlyStopping", monitor="val/F1"), "monitors `val/F1`", "did you mean `val/f1`?"),
    (callback("EarlyStopping", monitor="val/rouge1"), "monitors `val/rouge1`", "Logged are val/accuracy, val/f1, "),
    (callback("EarlyStopping", monitor="train_loss"), "monitors `train_loss`", "did you mean `train/loss`?"),
    (callback("tests.mistakes.test_monitors.Watching", monitor="val_f1"), "Watching monitors `val_f1`", "`val/f1`?"),
]


class Watching(L.Callback):
    """A callback of a user's own that reads a metric."""

    def __init__(self, monitor: str, mode: str = "min") -> None:
        self.monitor, self.mode = monitor, mode

    def on_validation_end(self, trainer, pl_module):
        assert self.monitor in trainer.callback_metrics


@pytest.mark.parametrize(
    ("spec", "start", "hint"), UNKNOWN, ids=lambda one: one["class_path"] if isinstance(one, dict) else ""
)
def test_a_metric_that_is_not_logged(here, capsys, spec, start, hint):
    error = mistake(capsys, *fit(callbacks(spec)))
    assert start in error
    assert hint in error
    assert "which SequenceClassification does not log" in error


WRONG_MODES = [
    (callback("EarlyStopping", monitor="val/f1"), "mode min, but a larger value is better; set mode: max"),
    (callback("AdapterCheckpoint", monitor="val/accuracy"), "set mode: max"),
    (callback("ModelCheckpoint", monitor="val/loss", mode="max"), "a smaller value is better; set mode: min"),
    (callback("tests.mistakes.test_monitors.Watching", monitor="val/f1"), "set mode: max"),
]


@pytest.mark.parametrize(
    ("spec", "words"), WRONG_MODES, ids=lambda one: one["class_path"] if isinstance(one, dict) else ""
)
def test_a_mode_that_does_not_fit(here, capsys, spec, words):
    assert words in mistake(capsys, *fit(callbacks(spec)))


def test_a_monitor_of_rates_beside_it_changes_nothing(here, capsys):
    rates = callback("LearningRateMonitor", logging_interval="step")
    assert "did you mean `val/loss`" in mistake(
        capsys, *fit(callbacks(rates, callback("EarlyStopping", monitor="val_loss")))
    )
    works(capsys, *fit(callbacks(rates, callback("EarlyStopping", monitor="lr-AdamW", strict=False))))


def test_what_is_logged_passes_in_its_mode(here, capsys):
    specs = [
        callback("EarlyStopping", monitor="val/loss"),
        callback("AdapterCheckpoint", monitor="val/f1", mode="max"),
        callback("EarlyStopping", monitor="train/loss", mode="min"),
        callback("tests.mistakes.test_monitors.Watching", monitor="val/accuracy", mode="max"),
    ]
    assert "monitors" not in works(capsys, *fit(callbacks(*specs)))


def test_early_stopping_that_is_not_strict_warns(here, capsys):
    spec = callback("EarlyStopping", monitor="val_loss", strict=False)
    with pytest.warns(UserWarning, match=r"monitors `val_loss`.*did you mean `val/loss`"):
        works(capsys, *fit(callbacks(spec)))


SETS = ["--data.val", json.dumps({"reviews": "train.csv", "tweets": "train.csv"})]


def test_named_validation_sets(here, capsys):
    good = callback("EarlyStopping", monitor="val/tweets/f1", mode="max")
    works(capsys, *fit(*SETS, "--data.val_size=null", callbacks(good)))


@pytest.mark.parametrize(
    ("metric", "mode", "words"),
    [
        ("val/tweet/f1", "max", "did you mean `val/tweets/f1`?"),
        ("val/tweets/f1", "min", "set mode: max"),
        ("val/tweets/f2", "max", "does not log"),
    ],
)
def test_wrong_names_of_validation_sets(here, capsys, metric, mode, words):
    bad = callback("EarlyStopping", monitor=metric, mode=mode)
    assert words in mistake(capsys, *fit(*SETS, "--data.val_size=null", callbacks(bad)), leaves=True)


def test_a_set_where_there_is_one_only(here, capsys):
    bad = callback("EarlyStopping", monitor="val/tweets/f1", mode="max")
    assert "which no validation set logs; did you mean" in mistake(capsys, *fit(callbacks(bad)), leaves=True)


@pytest.mark.parametrize("settings", [["--data.val_size=0"], ["--trainer.limit_val_batches=0"]])
def test_validation_that_does_not_run(here, capsys, settings):
    spec = callback("EarlyStopping", monitor="val/loss")
    error = mistake(capsys, *fit(*settings, callbacks(spec)), leaves=True)
    assert "there are no validation batches; give validation data, or monitor train/loss" in error
    works(capsys, *fit(*settings, callbacks(callback("EarlyStopping", monitor="train/loss"))))


# From Python, with tasks of a user's own.


def trainer(*callbacks, **settings):
    return L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        callbacks=list(callbacks),
        **settings,
    )


class Plateau(ToyTask):
    """Lowers the rate once a metric no longer improves."""

    def __init__(self, monitor, mode="min", strict=True):
        super().__init__(method=METHOD)
        self.monitor, self.mode, self.strict = monitor, mode, strict

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=self.mode)
        config = {"scheduler": schedule, "monitor": self.monitor, "strict": self.strict}
        return {"optimizer": optimizer, "lr_scheduler": config}


def test_schedules_monitor_too():
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau monitors `val_loss`.*did you mean `val/loss`"):
        trainer().fit(Plateau("val_loss"), ToyData())
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau monitors `val/loss` with mode max.*set mode: min"):
        trainer().fit(Plateau("val/loss", "max"), ToyData())
    trainer().fit(Plateau("val/loss"), ToyData())


class Logging(ToyTask):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_mine", 1.0)


def measure(task):
    task.log("val_mine", 1.0)


class Helped(ToyTask):
    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        measure(self)


class Tool:
    def tell(self, task):
        task.log_dict({"val_mine": 1.0})


class Holding(ToyTask):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.tool = Tool()

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.tool.tell(self)


class Declaring(ToyTask):
    def logged_metrics(self):
        return {**super().logged_metrics(), "val_mine": "max"}

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("val_mine", 1.0)


class LoggingCallback(L.Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val_mine", 1.0)


class WritingCallback(L.Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        trainer.callback_metrics["val_mine"] = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("task", "others"),
    [
        (Logging, []),
        (Helped, []),
        (Holding, []),
        (Declaring, []),
        (ToyTask, [LoggingCallback]),
        (ToyTask, [WritingCallback]),
        (ToyTask, [lambda: L.pytorch.callbacks.LambdaCallback(on_validation_epoch_end=lambda _, task: measure(task))]),
    ],
)
def test_what_a_user_logs_himself_is_not_refused(task, others):
    stopping = EarlyStopping("val_mine", mode="max", check_on_train_epoch_end=False)
    trainer(*[make() for make in others], stopping).fit(task(method=METHOD), ToyData())
    assert stopping.best_score == 1.0


def test_a_task_that_logs_nothing_of_its_own_is_held_to_its_declaration():
    with pytest.raises(ValueError, match=r"EarlyStopping monitors `val_mine`, which ToyTask does not log"):
        trainer(EarlyStopping("val_mine")).fit(ToyTask(method=METHOD), ToyData())


def test_a_declaration_counts_for_names_and_modes():
    with pytest.raises(ValueError, match=r"monitors `val_mine` with mode min.*set mode: max"):
        trainer(EarlyStopping("val_mine")).fit(Declaring(method=METHOD), ToyData())
    with pytest.raises(
        ValueError, match=r"monitors `val_yours`, which Declaring does not log.*Logged are val/loss, val_mine, train"
    ):
        trainer(EarlyStopping("val_yours")).fit(Declaring(method=METHOD), ToyData())


def test_a_metric_of_a_users_own_code_that_does_not_come_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = callback("EarlyStopping", monitor="val_yours")
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
    name = f"{__name__}.Logging"

    error = mistake(
        capsys,
        "fit",
        "--model",
        name,
        "--model.method=LoRA",
        "--model.method.r=2",
        "--data",
        "ToyData",
        *quiet,
        callbacks(spec),
        leaves=True,
    )
    assert "EarlyStopping monitors `val_yours`, which was not logged; logged were" in error
    assert "val_mine" in error
    assert Path("runs").exists()
