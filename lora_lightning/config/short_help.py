"""The short help of the subcommands of Lightning: the settings that people change, a line each; imports no torch."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from lora_lightning.public import nameable

PROG = "lora-lightning"
WIDTH = 36
"""Columns for the name of a setting."""


ALL = ("fit", "validate", "test", "predict")


@dataclass(frozen=True)
class Line:
    """A setting of the short help.

    Args:
        flag: The setting with its value, such as `--model.method.r N`.
        text: Short description.
        default: Its default in YAML; empty if it has none or depends on other settings.
        commands: The subcommands that show it.
    """

    flag: str
    text: str
    default: str = ""
    commands: tuple[str, ...] = ("fit",)

    @property
    def name(self) -> str:
        """Name of the setting without its dashes, such as `model.method.r`."""
        return self.flag.split()[0].removeprefix("--")

    def __str__(self) -> str:
        """Return the line of the help."""
        suffix = f" (default: {self.default})" if self.default else ""
        return f"  {self.flag:<{WIDTH}}{self.text}{suffix}"


GROUPS = {
    "files": (
        Line("--config FILE", "YAML file with settings; flags after it go over it", commands=ALL),
        Line("--ckpt_path FILE", "checkpoint to resume from or to evaluate; last takes the newest", commands=ALL),
        Line("--trainer.default_root_dir DIR", "folder of all runs", "runs", commands=ALL),
        Line("--output FILE", "file of the predictions: .csv, .jsonl or .parquet", commands=("predict",)),
        Line("--untrained", "allow a model whose head was never trained", "false", commands=ALL[1:]),
    ),
    "model": (
        Line("--model TASK", "what to learn"),
        Line("--model.backbone NAME", "Hub name, folder, GGUF file or pkg://package/folder"),
        Line("--model.method METHOD", "how to adapt it; LoRA unless given"),
        Line("--model.method.r N", "rank of the update", "8"),
        Line("--model.method.target_modules X", "modules to adapt: all-linear or [query, value]"),
        Line("--model.quantization.bits N", "store the backbone in 4 or 8 bits (QLoRA); dense unless given"),
        Line("--model.gradient_checkpointing X", "compute again instead of keeping: true, activations", "false"),
    ),
    "learning rate": (
        Line("--model.optim.lr X", "learning rate", "0.0002"),
        Line("--model.optim.head_lr X", "learning rate of the head; lr unless given"),
        Line("--model.optim.schedule X", "constant, linear or cosine", "linear"),
        Line("--model.optim.warmup X", "steps, or a share of all steps below 1", "0.0"),
    ),
    "data": (
        Line("--data DATA", "how rows are read", commands=ALL),
        Line("--data.train SOURCE", "file, folder, glob or Hub data set to train on", commands=ALL),
        Line("--data.val SOURCE", "rows to validate on; split off unless given", commands=ALL),
        Line("--data.predict SOURCE", "rows to predict; those to test on unless given", commands=("predict",)),
        Line("--data.test SOURCE", "rows to test on; split off unless given", commands=ALL),
        Line("--data.batch_size N", "rows in a batch, on each device", commands=ALL),
        Line("--data.max_length N", "tokens after which a row is too long", commands=ALL),
    ),
    "training": (
        Line("--trainer.max_epochs N", "passes over the training rows"),
        Line("--trainer.max_steps N", "optimizer steps, at most", "-1"),
        Line("--trainer.accumulate_grad_batches N", "batches in an optimizer step", "1"),
        Line("--trainer.devices X", "number or list of devices", "auto", commands=ALL),
        Line("--trainer.precision X", "32-true, bf16-mixed, bf16-true, 16-mixed, …", commands=ALL),
        Line("--seed_everything N", "seed of weights, order and dropout", "42", commands=ALL),
    ),
}
"""The settings of the short help, in order."""


def short_help(command: str, summary: str) -> str:
    """Return the short help of a subcommand.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        summary: What it does.
    """
    lines = [f"usage: {PROG} {command} [--config FILE] [--name value ...]", "", summary]
    for title, settings in GROUPS.items():
        shown = [str(one) for one in settings if command in one.commands]
        if shown:
            lines += ["", f"{title}:", *shown]
    return "\n".join([*lines, "", *_classes(), "", *_more(command)])


def _classes() -> list[str]:
    """Return the lines with the classes that a config may name."""
    kinds = {"TASK": "tasks", "DATA": "data", "METHOD": "methods", "callbacks": "callbacks"}
    return [line for kind, room in kinds.items() for line in _wrapped(f"{kind}: {', '.join(nameable(room))}")]


def _wrapped(text: str) -> list[str]:
    """Break a long line of names into lines of a terminal's width."""
    return textwrap.wrap(text, 100, subsequent_indent="  ")


def _more(command: str) -> list[str]:
    return [
        f"{PROG} {command} --help all     every setting",
        f"{PROG} {command} --help LoRA    every setting of a class: of a task, a method, data or a callback",
        f"{PROG} {command} --config FILE --print_config    the settings of a run, with all defaults",
    ]
