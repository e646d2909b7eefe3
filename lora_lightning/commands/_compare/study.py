"""The settings of a comparison, its files, and its trials."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.commands._compare.entries import Entry
from lora_lightning.commands._compare.records import Spec, write_json
from lora_lightning.errors import ConfigError

STUDY_NAME = "study.json"


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison.

    Args:
        task: The task as `{class_path, init_args}`.
        data: The data module, likewise.
        trainer: Settings of the trainer that every trial gets.
        entries: The rows, in the order of the table.
        seeds: Seeds of the full runs; rates are chosen with the first.
        trainable_parameters: Parameters that each method trains, without the head; None keeps the given sizes.
        steps: Optimizer steps of a full run; None if `minutes` limits it.
        minutes: Minutes of a full run's steps.
        search_steps: Optimizer steps with each learning rate.
        val_rows: Rows on which rates are compared; None means all of the validation split.
        val_every: Steps between two validations of a full run; None validates only at its end.
        folder: Folder of all files.
    """

    task: Spec
    data: Spec
    trainer: dict[str, Any]
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    trainable_parameters: int | None
    steps: int | None
    minutes: float | None
    search_steps: int
    val_rows: int | None
    val_every: int | None
    folder: Path

    @property
    def head_lr(self) -> float:
        """The learning rate of every head."""
        return float(self.task["init_args"]["optim"]["head_lr"])

    @property
    def budget(self) -> str:
        """The budget in words."""
        long = f"{self.steps:,} steps" if self.steps else f"{self.minutes:g} minutes of steps"
        if self.trainable_parameters is None:
            return f"{long} for each method"
        return f"{self.trainable_parameters:,} trainable parameters beside the head, {long} for each method"

    def settings(self) -> dict[str, Any]:
        """Return what all trials have in common, in plain types; methods and seeds may be added later."""
        return {
            "task": self.task,
            "data": self.data,
            "trainer": self.trainer,
            "trainable_parameters": self.trainable_parameters,
            "steps": self.steps,
            "minutes": self.minutes,
            "search_steps": self.search_steps,
            "val_rows": self.val_rows,
            "val_every": self.val_every,
        }

    # Files.

    def check_folder(self) -> None:
        """Refuse a folder that holds something else.

        Raises:
            ConfigError: It is not a directory, holds other files, or a comparison with other settings.
        """
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise ConfigError(f"output_dir {str(self.folder)!r} is a file; name a folder.")
        path = self.folder / STUDY_NAME
        if not path.is_file():
            if any(self.folder.iterdir()):
                raise ConfigError(
                    f"output_dir {str(self.folder)!r} holds other files and no comparison; name a new folder."
                )
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); name another output_dir.") from error
        difference = first_difference(before, self.settings())
        if difference:
            raise ConfigError(
                f"output_dir {str(self.folder)!r} holds a comparison with other settings: {difference}. Go back to "
                "them to continue it, or name another output_dir."
            )

    def claim_folder(self, command: str) -> None:
        """Make the folder, and write the settings of the comparison."""
        labels = [entry.label for entry in self.entries]
        content = {"command": command, "methods": labels, "seeds": list(self.seeds), "settings": self.settings()}
        write_json(self.folder / STUDY_NAME, content)

    def search_path(self, entry: Entry, rate: float) -> Path:
        """Return the path of the result of a search with one rate."""
        return self._folder_of(entry) / f"search-{rate:g}.json"

    def final_path(self, entry: Entry, seed: int) -> Path:
        """Return the path of the result of a full run."""
        return self._folder_of(entry) / f"seed-{seed}.json"

    def _folder_of(self, entry: Entry) -> Path:
        return self.folder / "trials" / folder_name(entry.label)

    # Trials.

    def search_spec(self, entry: Entry, rate: float) -> Spec:
        """Return the search trial of a learning rate."""
        spec = self._spec(entry, self.seeds[0], rate, self.search_steps)
        return {**spec, "val_rows": self.val_rows, "val_every": None, "is_final": False}

    def final_spec(self, entry: Entry, seed: int, rate: float, steps: int) -> Spec:
        """Return the full run."""
        spec = self._spec(entry, seed, rate, steps)
        return {**spec, "val_rows": None, "val_every": self.val_every, "is_final": True}

    def _spec(self, entry: Entry, seed: int, rate: float, steps: int) -> Spec:
        return {
            "task": self.task,
            "data": self.data,
            "trainer": self.trainer,
            "entry": {"kind": entry.kind, "method": entry.method, "optim": entry.optim},
            "trains": entry.kind != "frozen" or entry.num_head > 0,
            "seed": seed,
            "rate": rate,
            "steps": steps,
        }


def first_difference(before: Any, now: Any, name: str = "") -> str:  # noqa: ANN401 - plain JSON types
    """Return the first key in which two settings differ; empty if they are equal.

    Example:
        >>> first_difference({"data": {"seed": 0}}, {"data": {"seed": 1}})
        'data.seed was 0, and is 1'
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            found = first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return ""
    return "" if before == now else f"{name} was {before!r}, and is {now!r}"


def folder_name(label: str) -> str:
    """Return a unique folder name for a label.

    Example:
        >>> folder_name("LoRA+"), folder_name("full fine-tuning")
        ('LoRA+', 'full_fine-tuning')
    """
    return "".join(letter if letter.isalnum() or letter in "+-." else f"%{ord(letter):x}" for letter in label).replace(
        "%20", "_"
    )
