"""The subcommands of Lightning: `fit`, `validate`, `test` and `predict` from config files and flags."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

import lightning as L
from jsonargparse import ArgumentError
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lora_lightning import __version__
from lora_lightning import data as _data  # noqa: F401 - its classes are known by their short names
from lora_lightning.callbacks import (
    AdapterCheckpoint,
    AdapterSummary,
    Guards,
    MetricCurve,
    OutOfMemoryGuard,
    PacedProgressBar,
    RankWatch,
    Throughput,
)
from lora_lightning.callbacks.checkpoint_io import AdapterCheckpointIO
from lora_lightning.callbacks.run_config import RunConfig
from lora_lightning.callbacks.run_logger import RunLogger
from lora_lightning.checkpoint.saved_run import SavedRun, newest_run
from lora_lightning.config.config_option import StrictConfigFile
from lora_lightning.config.diagnosis import explain
from lora_lightning.config.import_policy import set_import_policy
from lora_lightning.config.parser_errors import own_message, reduce_error, unknown_options
from lora_lightning.config.saved_model import KEYWORDS, refuse_conflict, saved_model
from lora_lightning.config.settings import CLASS_PATH, INIT_ARGS, collect
from lora_lightning.config.signatures import (
    Parameters,
    find_class,
    flag_names,
    parameters_of,
    parameters_of_function,
    subclasses,
)
from lora_lightning.config.strict_yaml import PARSER_MODE, register
from lora_lightning.errors import ConfigError
from lora_lightning.tasks import AdapterTask

PROG = "lora-lightning"
DEFAULT_SEED = 42
DEFAULT_ROOT = "runs"
DATALOADER_HOOKS = {
    "fit": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


def run_lightning(subcommand: str, arguments: Sequence[str]) -> AdapterCLI:
    """Run one of Lightning's subcommands.

    Args:
        subcommand: `fit`, `validate`, `test` or `predict`.
        arguments: The words after it.

    Raises:
        UserError: A mistake in the settings, the data or a checkpoint.
    """
    register()
    set_import_policy()
    with _progress_on_stdout(), warnings.catch_warnings():
        # Lightning calls a function that torch deprecates, and texts tokenized beforehand need no workers.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        if subcommand != "fit":  # said of a run's checkpoints, which an evaluation does not continue
            warnings.filterwarnings("ignore", message="The dirpath has changed from")
        return AdapterCLI(subcommand, arguments)


def default_callbacks(
    configured: list[L.Callback], trainer: dict[str, Any], guards: Guards | None = None
) -> list[L.Callback]:
    """Return the callbacks that every run gets, less those that the user configured himself or switched off.

    Args:
        configured: The callbacks that the user named.
        trainer: The trainer's settings.
        guards: Which guards are on; None means all.
    """

    def wanted(kind: type, switch: str | None = None) -> bool:
        is_off = switch is not None and trainer.get(switch) is False
        return not is_off and not any(isinstance(callback, kind) for callback in configured)

    if trainer.get("barebones"):
        return []
    callbacks: list[L.Callback] = []
    if wanted(Checkpoint, "enable_checkpointing"):
        callbacks.append(AdapterCheckpoint())
    if wanted(ModelSummary, "enable_model_summary"):
        callbacks.append(AdapterSummary())
    if wanted(ProgressBar, "enable_progress_bar"):
        callbacks.append(PacedProgressBar())
    if wanted(MetricCurve):
        callbacks.append(MetricCurve())
    if wanted(Throughput):
        callbacks.append(Throughput())
    if wanted(RankWatch):
        callbacks.append(RankWatch())
    return callbacks + [guard for guard in (guards or Guards()).callbacks() if wanted(type(guard))]


def last_of_runs(trainer: Mapping[str, Any]) -> SavedRun:
    """Read the newest complete checkpoint of all runs, for a process that starts a new one to go on from.

    Lightning would look in the folder of the new run, find nothing there, and start anew.

    Args:
        trainer: The trainer's settings.

    Raises:
        ConfigError: There is none.
    """
    root, callbacks = Path(trainer.get("default_root_dir") or DEFAULT_ROOT), trainer.get("callbacks") or []
    given = [one.get(INIT_ARGS) or {} for one in (callbacks if isinstance(callbacks, list) else [callbacks])]
    folders = [*root.glob("*/checkpoints"), *(Path(one["dirpath"]) for one in given if one.get("dirpath"))]
    newest = newest_run(folders)
    if newest is None:
        raise ConfigError(
            f"--ckpt_path last: there is no complete checkpoint in {root} to go on from; name the .ckpt file, or leave "
            "the option out to start anew."
        )
    return newest


def require_requeued(trainer: dict[str, Any]) -> None:
    """Make sure that there is a checkpoint of a job that Lightning requeued, which `--ckpt_path hpc` means.

    Args:
        trainer: The trainer's settings.

    Raises:
        ConfigError: There is none.
    """
    root = Path(trainer.get("default_root_dir") or DEFAULT_ROOT)
    if not any(root.glob("hpc_ckpt_*.ckpt")):
        raise ConfigError(
            f"--ckpt_path hpc: no requeued job left a hpc_ckpt_*.ckpt in {root}; name the .ckpt file, or leave the "
            "option out to start anew."
        )


class AdapterCLI(LightningCLI):
    """LightningCLI for adapter tasks: strict files, one-line errors, a new folder for each run.

    Args:
        subcommand: What to run.
        arguments: The words after it.
    """

    def __init__(self, subcommand: str, arguments: Sequence[str]) -> None:
        self.chosen = subcommand
        self.saved_run: SavedRun | None = None
        self.arguments = list(arguments)
        super().__init__(
            model_class=AdapterTask,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunConfig,
            # One batch shows whether validation works, and whether its longest rows fit; it delays the first step.
            trainer_defaults={"default_root_dir": DEFAULT_ROOT, "num_sanity_val_steps": 1},
            seed_everything_default=DEFAULT_SEED,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # tasks keep their own settings, alike in every kind of run
            args=[subcommand, *arguments],
        )

    # Building the parser.

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401 - Lightning's own signature
        """Build a parser that reads strict YAML, takes no abbreviations and raises instead of exiting."""
        settings: dict[str, Any] = {
            "prog": PROG,
            "exit_on_error": False,
            "allow_abbrev": False,
            "parser_mode": PARSER_MODE,
            "dump_header": [f"lora_lightning=={__version__}", f"lightning=={L.__version__}"],
        }
        parser = self.parser_class(**{**settings, **kwargs})
        parser.add_argument("-c", "--config", action=StrictConfigFile, help="Path to a YAML file with settings.")
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data; a model may come from a checkpoint, and a model may bring its own data."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True, required=False)
        parser.add_class_arguments(Guards, "guards")

    # Reading the settings.

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401 - Lightning's own signature
        """Parse the command line.

        Raises:
            ConfigError: It, or a file that it names, is not right.
        """
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise ConfigError(self._explain(error)) from error

    def _parse_ckpt_path(self) -> None:
        """Take the model's settings from the checkpoint, where one is given, and check that there is a model."""
        config = self.config[self.chosen]
        ckpt_path = config.get("ckpt_path")
        if config.get("weights_only") is False:
            raise ConfigError(
                "weights_only is false, which would run any code that a checkpoint carries, and no checkpoint of a run "
                "needs it; leave it out."
            )
        if ckpt_path == "best" or (ckpt_path in KEYWORDS and self.chosen != "fit"):
            raise ConfigError(f"--ckpt_path {ckpt_path} only works after fit in one process; name the .ckpt file.")
        if ckpt_path == "hpc":
            require_requeued(config["trainer"])
        if ckpt_path == "last":
            self.saved_run = last_of_runs(config["trainer"])
            config["ckpt_path"] = str(self.saved_run.path)
        elif ckpt_path is not None and ckpt_path not in KEYWORDS:
            self.saved_run = SavedRun.of_checkpoint(ckpt_path)
        if self.saved_run is not None:
            self._take_model_from(self.saved_run)
        elif config.get("model") is None:
            known = ", ".join(sorted(subclasses(AdapterTask).keys() - {AdapterTask.__name__}))
            raise ConfigError(f"no model is given; name one under `model:` in a config or with --model ({known}).")

    def _take_model_from(self, run: SavedRun) -> None:
        path = run.path
        given = self.parser.parse_args([self.chosen, *self.arguments], defaults=False)[self.chosen].get("model")
        if given is not None and find_class(given[CLASS_PATH], AdapterTask) is AdapterTask:
            given.pop(CLASS_PATH)  # flags such as --model.method.r without a class stand for the base class
        model = {self.chosen: {"model": saved_model(run)}}
        try:
            saved = self.parser.parse_object(model, defaults=False)[self.chosen]["model"]
            self.config = self.parser.parse_object(model, self.config)
        except ArgumentError as error:
            raise ConfigError(f"the settings in {path} do not fit this version: {reduce_error(str(error))}") from error
        if given is None:
            return
        # How fast it learnt says nothing about what it answers; of other rates in a run that resumes the task warns.
        # A backbone may have moved to another folder; its fingerprint tells whether it is the same.
        ignored = frozenset({"backbone", "optim"})
        trains = self.chosen == "fit"
        refuse_conflict(given.as_dict(), saved.as_dict(), path, ignored, trains=trains)
        settings = self.config[self.chosen]["model"][INIT_ARGS]
        backbone = given.get(f"{INIT_ARGS}.backbone")
        if backbone is not None:
            settings["backbone"] = backbone
        optim = given.get(f"{INIT_ARGS}.optim")
        if trains and optim is not None:
            settings["optim"].update(optim)

    def _explain(self, error: Exception) -> str:
        """Return one line that says what is wrong with the command line."""
        text, schema = str(error), self._schema()
        return (
            unknown_options(text, ["--config", *flag_names(schema)])
            or explain(collect(self.arguments), schema)
            or reduce_error(text)
        )

    def _schema(self) -> Parameters:
        """Return the type of each top-level setting of the chosen subcommand."""
        method = parameters_of_function(getattr(L.Trainer, self.chosen)).types
        skipped = self.subcommands()[self.chosen]
        return Parameters(
            {
                "model": AdapterTask,
                "data": L.LightningDataModule,
                "trainer": parameters_of(L.Trainer),
                "guards": parameters_of(Guards),
                "seed_everything": Union[bool, int],  # noqa: UP007 - as Lightning declares it
                **{name: hint for name, hint in method.items() if name not in skipped},
            }
        )

    # Building what runs.

    def before_instantiate_classes(self) -> None:
        """Check that data come from somewhere.

        Raises:
            ConfigError: No data module is given, and the task has no data loaders of its own.
        """
        config, hook = self.config[self.chosen], DATALOADER_HOOKS[self.chosen]
        task = find_class(config["model"][CLASS_PATH], AdapterTask) or AdapterTask
        if config.get("data") is None and getattr(task, hook) is getattr(L.LightningModule, hook):
            known = ", ".join(sorted(subclasses(L.LightningDataModule).keys() - {L.LightningDataModule.__name__}))
            raise ConfigError(f"no data are given; name them under `data:` in a config or with --data ({known}).")

    def instantiate_classes(self) -> None:
        """Build data module, task and trainer.

        Raises:
            ConfigError: One of them refuses its settings.
        """
        try:
            self.config_init = self.parser.instantiate(self.config)
            self.datamodule = self._get(self.config_init, "data")
            self.model = self._get(self.config_init, "model")
            if self.config[self.chosen].get("ckpt_path") not in (None, *KEYWORDS):
                self.model.expect_checkpoint()
            self.trainer = self.instantiate_trainer()
            self._hand_over_checkpoint()
        except ValueError as error:
            raise ConfigError(explain(collect(self.arguments), self._schema()) or own_message(error)) from error

    def _hand_over_checkpoint(self) -> None:
        """Give the trainer the content of a checkpoint that was read for its settings, so that it is read once."""
        strategy = self.trainer.strategy
        if self.saved_run is not None and type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = AdapterCheckpointIO(self.saved_run)
        self.saved_run = None

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        """Build the trainer, with the default callbacks and logger where the user named none."""
        configured = config.get("callbacks") or []
        configured = list(configured) if isinstance(configured, list | tuple) else [configured]
        guards = self._get(self.config_init, "guards")
        config["callbacks"] = configured + default_callbacks(configured, config, guards)
        if config.get("logger") in (None, True) and not config.get("barebones"):
            config["logger"] = RunLogger(config["default_root_dir"] or DEFAULT_ROOT)
        return super()._instantiate_trainer(config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it.

        Raises:
            TrainingError: Memory ran out.
        """
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's callback connector
            guards = [one for one in callbacks if isinstance(one, OutOfMemoryGuard)]
            told = next((guard.error for guard in guards if guard.error is not None), None)
            if told is None:
                raise
            raise told from error


@contextmanager
def _progress_on_stdout() -> Iterator[None]:
    """Send what Lightning reports of its progress to stdout, so that stderr holds warnings and errors alone."""
    handlers = [
        handler
        for name in ("lightning", "lightning.pytorch", "lightning.fabric")
        for handler in logging.getLogger(name).handlers
        if type(handler) is logging.StreamHandler
    ]
    streams = [handler.stream for handler in handlers]
    try:
        for handler in handlers:
            handler.setStream(sys.stdout)
        yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)
