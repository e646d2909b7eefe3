"""The schema of a whole config file: of a run, or of a comparison."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

from lora_lightning import __version__
from lora_lightning.adapters import Method
from lora_lightning.callbacks import Guards
from lora_lightning.commands._schema.builder import FILE, Builder, Schema, reference
from lora_lightning.commands._schema.signatures import Setting, settings_of, settings_of_function
from lora_lightning.commands.compare import compare
from lora_lightning.run.trainer import RunTrainer
from lora_lightning.tasks import AdapterTask

DIALECT = "https://json-schema.org/draft/2020-12/schema"
KINDS = {
    "task": AdapterTask,
    "data": L.LightningDataModule,
    "method": Method,
    "callback": L.Callback,
    "logger": Logger,
    "strategy": Strategy,
}
_OBJECTS = frozenset({"self", "model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"})
"""Parameters of the Trainer's methods that the command line builds."""
_LOADED = (
    "lora_lightning.data",
    "lora_lightning.callbacks",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)
"""Packages whose classes a config may name by their short names."""


def config_schema() -> Schema:
    """Return the JSON Schema of config files, in plain types."""
    for name in _LOADED:
        importlib.import_module(name)
    builder = Builder(KINDS)
    builder.definitions["run"] = _run(builder)
    builder.definitions["comparison"] = _comparison(builder)
    only_compared = sorted(builder.definitions["comparison"]["properties"].keys() - _run_keys(builder))
    return {
        "$schema": DIALECT,
        "title": f"lora_lightning {__version__}: a config file",
        "description": "Settings of `lora-lightning fit` (validate, test, predict), or of `lora-lightning compare`.",
        "if": {"anyOf": [{"required": [name]} for name in only_compared]},
        "then": reference("comparison"),
        "else": reference("run"),
        "$defs": dict(sorted(builder.definitions.items())),
    }


def _run_keys(builder: Builder) -> set[str]:
    return set(builder.definitions["run"]["properties"])


def _run(builder: Builder) -> Schema:
    """Return the schema of the settings of `fit` and its relatives."""
    trainer, _ = settings_of(RunTrainer)
    properties = {
        "seed_everything": {
            "type": ["integer", "boolean"],
            "description": "Seed of weights, order and dropout; true draws one, false sets none.",
            "default": 42,
        },
        "model": _section(builder.define_kind("task"), "The task: what is learnt, on which backbone, by which method."),
        "data": _section(builder.define_kind("data"), "The data module: which rows, and how they are read."),
        "trainer": _section(builder.of_settings(trainer), "Settings of Lightning's Trainer."),
        "guards": _section(builder.define_class(Guards), "Which guards watch the run."),
        **builder.of_settings(_of_subcommands())["properties"],
        "untrained": {
            "type": "boolean",
            "description": "Use a model whose head was never trained; of validate, test and predict.",
            "default": False,
        },
        "output": {
            "type": ["string", "null"],
            "description": "File of the predictions: .csv, .jsonl or .parquet; of predict.",
            "default": None,
        },
    }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _of_subcommands() -> list[Setting]:
    """Return what `fit`, `validate`, `test` and `predict` take themselves, each once."""
    methods: list[Callable[..., Any]] = [L.Trainer.fit, L.Trainer.validate, L.Trainer.test, L.Trainer.predict]
    found = {one.name: one for method in methods for one in settings_of_function(method)}
    return [one for name, one in found.items() if name not in _OBJECTS]


def _comparison(builder: Builder) -> Schema:
    """Return the schema of the settings of `compare`."""
    settings = [one for one in settings_of_function(compare) if one.name != "methods"]
    schema = builder.of_settings(settings)
    return {**schema, "properties": {**schema["properties"], "methods": _methods(builder)}}


def _methods(builder: Builder) -> Schema:
    """Return the schema of the list of methods that are compared."""
    spec, bare, elsewhere = builder.definitions["method"]["anyOf"]
    of_compare: dict[str, Any] = {
        "label": {"type": "string", "description": "What the row is called."},
        "optim": {"type": "object", "description": "Settings of the optimizer that belong to it."},
        "rates": {"type": "array", "items": {"type": "number"}, "description": "Learning rates to choose from."},
    }
    names = {"enum": [*bare["enum"], "LoRA+", "all"]}
    class_path = {"anyOf": [*spec["properties"]["class_path"]["anyOf"], {"const": "LoRA+"}]}
    properties = {**spec["properties"], "class_path": class_path, **of_compare}
    one = {"anyOf": [{**spec, "properties": properties}, names, elsewhere]}
    several = {"type": "array", "items": one, "minItems": 1}
    return {
        "anyOf": [names, elsewhere, several],
        "description": "What is compared: `all`, or a list.",
        "default": "all",
    }


def _section(schema: Schema, description: str) -> Schema:
    """Return the schema of a whole section, which may stand in a file of its own."""
    return {"anyOf": [schema, FILE], "description": description}
