"""The subcommands of Lightning: `fit`, `validate`, `test` and `predict` from config files and flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Union

import lightning as L
from jsonargparse import ArgumentError
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from lora_lightning import __version__
from lora_lightning import data as _data  # noqa: F401 - its classes are known by their short names
from lora_lightning.callbacks import (
    Guards,
    OutOfMemoryGuard,
    PredictionWriter,
)
from lora_lightning.callbacks.checkpoint_io import AdapterCheckpointIO
from lora_lightning.callbacks.run_config import RunConfig
from lora_lightning.callbacks.run_logger import loggers_of_run
from lora_lightning.checkpoint.saved_run import SavedRun
from lora_lightning.checks import mistake_of_settings, refuse_wrong_monitors
from lora_lightning.config.config_option import StrictConfigFile
from lora_lightning.config.diagnosis import explain, refusal_of_building, refuse_ignored
from lora_lightning.config.import_policy import set_import_policy
from lora_lightning.config.last_run import DEFAULT_ROOT, last_of_runs, require_requeued
from lora_lightning.config.loggers import with_logger_folders
from lora_lightning.config.parser_errors import reduce_error, unknown_options
from lora_lightning.config.right_words.misplaced import settings_known
from lora_lightning.config.saved_data import data_class_of, data_of_run, known_data_modules, named_checkpoint
from lora_lightning.config.saved_model import KEYWORDS, refuse_conflict, saved_model
from lora_lightning.config.settings import CLASS_PATH, INIT_ARGS, collect, flag_value
from lora_lightning.config.signatures import (
    Parameters,
    find_class,
    flag_names,
    parameters_of,
    parameters_of_function,
    subclasses,
)
from lora_lightning.config.strict_yaml import PARSER_MODE, register
from lora_lightning.data.record_data import RecordData
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.run.defaults import default_callbacks
from lora_lightning.run.ending import ending
from lora_lightning.run.quiet import tidy_output
from lora_lightning.run.trainer import RunTrainer
from lora_lightning.tasks import AdapterTask, CausalLM, Seq2SeqLM

PROG = "lora-lightning"
DEFAULT_SEED = 42
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
    with tidy_output(is_fit=subcommand == "fit"):
        return AdapterCLI(subcommand, arguments)


class AdapterCLI(LightningCLI):
    """LightningCLI for adapter tasks: strict files, one-line errors, a new folder for each run.

    Args:
        subcommand: What to run.
        arguments: The words after it.
    """

    def __init__(self, subcommand: str, arguments: Sequence[str]) -> None:
        self.chosen = subcommand
        self.saved_run: SavedRun | None = None
        self.arguments = with_logger_folders(arguments, DEFAULT_ROOT)
        super().__init__(
            model_class=AdapterTask,
            datamodule_class=L.LightningDataModule,
            trainer_class=RunTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunConfig,
            # One batch shows whether validation works, and whether its longest rows fit; it delays the first step.
            trainer_defaults={"default_root_dir": DEFAULT_ROOT, "num_sanity_val_steps": 1},
            seed_everything_default=DEFAULT_SEED,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # tasks keep their own settings, alike in every kind of run
            args=[subcommand, *self.arguments],
        )

    # Building the parser.

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401 - Lightning's own signature
        """Build a parser that reads strict YAML, takes no abbreviations and raises instead of exiting."""
        settings: dict[str, Any] = {
            "prog": PROG,
            "usage": f"{PROG} {self.chosen} [--config FILE] [--name value ...]",
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

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401 - Lightning's own signature
        """Add what only commands without training have."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            text = "Use a model whose head was never trained, with random weights."
            parser.add_argument("--untrained", action="store_true", help=text)
        if subcommand == "predict":
            text = "File of the predictions: .csv, .jsonl or .parquet; see PredictionWriter."
            parser.add_argument("--output", type=Union[str, None], default=None, help=text)  # noqa: UP007 - as Lightning declares types
        return parser

    # Reading the settings.

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401 - Lightning's own signature
        """Parse the command line.

        Raises:
            ConfigError: It, or a file that it names, is not right.
        """
        try:
            self.config = parser.parse_args(self._with_saved_data(args))
        except ArgumentError as error:
            raise ConfigError(self._explain(error)) from error
        refuse_ignored(collect(self.arguments), self._schema())

    def _with_saved_data(self, args: list[str]) -> list[str]:
        """Name the data module of the checkpoint, where a command that does not train names none."""
        path = None if self.chosen == "fit" else named_checkpoint(self.arguments)
        self.saved_run = None if path is None else SavedRun.of_checkpoint(path)
        class_path = data_class_of(self.saved_run, self.arguments)
        if class_path is None:
            return args
        self.arguments.insert(0, f"--data={class_path}")
        return [self.chosen, *self.arguments]

    def _parse_ckpt_path(self) -> None:
        """Take the model's settings from the checkpoint, where one is given, and check that there is a model."""
        config = self.config[self.chosen]
        # The config of a run, which names no checkpoint, may stand behind the flag.
        ckpt_path = config["ckpt_path"] = config.get("ckpt_path") or flag_value(self.arguments, "ckpt_path")
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
            self.saved_run = self.saved_run or SavedRun.of_checkpoint(ckpt_path)
        if self.saved_run is not None:
            self._take_model_from(self.saved_run)
            if self.chosen != "fit" and config.get("data") is not None:
                self._take_data_from(self.saved_run)
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
            settings["optim"] = optim if settings.get("optim") is None else settings["optim"].update(optim)

    def _take_data_from(self, run: SavedRun) -> None:
        """Take the data settings that the user left open from a checkpoint of the same data module."""
        given = self.parser.parse_args([self.chosen, *self.arguments], defaults=False)[self.chosen]["data"]
        data = data_of_run(run, given.as_dict())
        if data is None:
            return
        try:
            self.config = self.parser.parse_object({self.chosen: {"data": data}}, self.config)
        except ArgumentError as error:
            raise ConfigError(
                f"the data settings in {run.path} do not fit this version: {reduce_error(str(error))}"
            ) from error

    def _explain(self, error: Exception) -> str:
        """Return one line that says what is wrong with the command line."""
        text, schema, written = str(error), self._schema(), collect(self.arguments)
        known = ["--config", *flag_names(schema)]
        return (
            unknown_options(text, known, settings_known(schema, written.tree))
            or explain(written, schema)
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
                "trainer": parameters_of(RunTrainer),
                "guards": parameters_of(Guards),
                **({} if self.chosen == "fit" else {"untrained": bool}),
                **({"output": Union[str, None]} if self.chosen == "predict" else {}),  # noqa: UP007 - as below
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
            known = known_data_modules()
            raise ConfigError(f"no data are given; name them under `data:` in a config or with --data ({known}).")
        if self.chosen == "predict" and config.get("return_predictions") is None:
            config["return_predictions"] = False  # they go into a file, and would fill the memory

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
            elif self.chosen != "fit" and not self.config[self.chosen]["untrained"]:
                self.model.refuse_untrained()
            if self.saved_run is not None and isinstance(self.datamodule, RecordData) and self.chosen != "fit":
                self.datamodule.expect_run(self.saved_run.facts)
            self.trainer = self.instantiate_trainer()
            self._hand_over_checkpoint()
        except (ValueError, ImportError) as error:
            refusal = refusal_of_building(error, collect(self.arguments), self._schema())
            if refusal is None:
                raise
            raise ConfigError(refusal) from error

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
        config["callbacks"] = configured + default_callbacks(configured, config, guards) + self._writer(configured)
        if not config.get("barebones"):
            config["logger"] = loggers_of_run(config.get("logger"), config["default_root_dir"] or DEFAULT_ROOT)
        return super()._instantiate_trainer(config, callbacks)

    def _writer(self, configured: list[L.Callback]) -> list[L.Callback]:
        """Return what writes predictions, unless the user configured it himself."""
        output = self.config[self.chosen].get("output")
        has_writer = any(isinstance(one, PredictionWriter) for one in configured)
        if output is not None and has_writer:
            raise ConfigError("--output and a PredictionWriter are given; name the file in one of them.")
        return [PredictionWriter(output)] if self.chosen == "predict" and not has_writer else []

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it.

        Raises:
            TrainingError: Memory ran out.
            ConfigError: The trainer refuses a setting.
        """
        trainer = self.trainer
        device = type(trainer.accelerator).__name__.removesuffix("Accelerator").lower()
        processes = "1 process" if trainer.world_size == 1 else f"{trainer.world_size} processes"
        rank_zero_info(f"Running {subcommand} on {device} in {processes}, precision {trainer.precision}.")
        try:
            if subcommand == "fit":
                refuse_wrong_monitors(trainer, self.model)  # before data are read
            super()._run_subcommand(subcommand)
        except Exception as error:
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's callback connector
            guards = [one for one in callbacks if isinstance(one, OutOfMemoryGuard)]
            told: UserError | None = next((guard.error for guard in guards if guard.error is not None), None)
            told = told or mistake_of_settings(error)
            if told is None:
                raise
            raise told from error
        if subcommand == "fit":
            lines = ending(trainer, is_language_model=isinstance(self.model, CausalLM | Seq2SeqLM))
            rank_zero_info("\n".join(lines))
