"""Rows to predict: read without the training rows, and given back beside their predictions."""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from lightning.pytorch.trainer.states import TrainerFn

from lora_lightning.checkpoint.folder import RunFacts
from lora_lightning.checkpoint.saved_run import SavedRun
from lora_lightning.data.base import TokenizedData
from lora_lightning.data.batches.columns import EncodedRows
from lora_lightning.data.rows.inputs import InputRow, input_rows
from lora_lightning.data.rows.plan import Plan
from lora_lightning.data.rows.pool import About, SplitRows, kind_of
from lora_lightning.data.sources import source_files
from lora_lightning.errors import CheckpointError, ConfigError, DataError
from lora_lightning.texts.saved_tokenizer import PLAINLY_JOINED

SOURCES = ("train", "val", "test", "predict")
"""The settings that name sources."""


class PredictedRows(TokenizedData, abc.ABC):
    """The part of `RecordData` that predicts: a saved run is enough for it, and no training rows are needed."""

    plan: Plan
    facts: RunFacts | None = None
    """What is known of the run whose model is used; None where none was named."""
    _about: About
    _folder: Path | None
    _encoded_by: Any
    _reads_alone = False

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **settings: Any) -> Self:  # noqa: ANN401 - as Lightning's method
        """Build the data module with the settings that a `.ckpt` file holds, to use its model on other rows.

        Args:
            checkpoint_path: The file.
            *args: Not used; as Lightning's method has them.
            **settings: Settings to take instead, such as `predict`; where one names a source, the others of the
                training are left out.

        Raises:
            CheckpointError: The file is damaged, or holds no settings of this class.
        """
        del args
        run = SavedRun.of_checkpoint(checkpoint_path)
        saved = run.data_settings(cls)
        if saved is None:
            raise CheckpointError(
                f"{checkpoint_path} was not trained with a {cls.__name__}, so it holds no settings of one; build the "
                "data module with its constructor."
            )
        names_source = any(settings.get(name) is not None for name in SOURCES)
        saved = settings_to_use(saved, run.facts, names_source=names_source)
        data = cls(**{**saved, **settings})
        data.expect_run(run.facts)
        return data

    def expect_run(self, facts: RunFacts) -> None:
        """Take names of labels and the chat template from a saved run, where neither settings nor model have them."""
        self.facts = facts

    def needs_training_rows(self) -> bool:
        """Return whether only the training rows say what a model's answers mean, such as the names of its labels."""
        return False

    def input_rows(self, dataloader_idx: int = 0) -> Iterator[InputRow]:
        """Return the rows to predict with all fields of their records, in the order of `predict_dataloader`.

        Args:
            dataloader_idx: Which of several sets.

        Raises:
            ConfigError: `setup` has not run for them.
            DataError: Their source has changed in the meantime.
        """
        split = self._splits_of("predict")[dataloader_idx]
        rows = self._rows(split)
        found = enumerate(input_rows(rows, self.plan, rows.split))
        row: tuple[int, InputRow] | None = None
        for origin in self._documents(split).origins.tolist():
            while row is None or row[0] < origin:
                row = next(found)
            yield row[1]

    def input_files(self) -> list[Path]:
        """Return the files that the rows to predict are read from; none for other sources."""
        kind = "predict" if self.plan.has_own_source("predict") else "test"
        split = kind if self.plan.has_own_source(kind) else "train"
        named = [name for name in self.plan.sources if kind_of(name) == split and self.plan.sources[name] is not None]
        parts = [source for name in named for source in self.plan.parts(name)]
        return [path for source in parts for path, _ in source_files(source, self.plan.settings)]

    def complete_prediction(self, row: InputRow, prediction: Any) -> Any:  # noqa: ANN401 - the task's own type
        """Return a prediction with what only the data know of it, such as the text of the chosen answer."""
        return prediction

    # Helpers.

    def _choose_reading(self, stage: str | None) -> None:
        """Decide whether the rows to predict are read alone; forget what was read where a stage needs more.

        Raises:
            DataError: The training rows are needed, and `train` names none.
        """
        has_own = self.plan.has_own_source("predict")
        needs_training = self.needs_training_rows()
        if needs_training and self.plan.sources["train"] is None:
            raise DataError(
                "The names of the labels are not known. Take the model from its checkpoint (--ckpt_path) or its "
                "adapter (--model.adapter), or set label_names, or name the training rows as train."
            )
        is_alone = stage == "predict" and has_own and not needs_training
        if self._reads_alone and not is_alone:
            self.counts = {}
            self._encoded.clear()
        if not self.counts:
            self._reads_alone = is_alone

    @property
    def _plan_read(self) -> Plan:
        """The plan of what is read: all, or the rows to predict alone."""
        return self.plan.only("predict") if self._reads_alone else self.plan

    @property
    def _splits_read(self) -> Collection[str]:
        splits = list(self._about.num_rows)
        is_test_predicted = "test" in splits and "predict" not in map(kind_of, splits)
        return [*splits, "predict"] if is_test_predicted else splits

    def _rows(self, split: str) -> SplitRows:
        if self._folder is None:
            raise ConfigError(f"The {split} rows are not there: call setup() first (the Trainer does).")
        found = "test" if split == "predict" and "predict" not in self._about.num_rows else split
        return SplitRows(self._folder, found, self._about)

    def _documents(self, split: str) -> EncodedRows:
        """Return the encoded rows of a split, one by one."""
        return self._encoded_rows(split)

    def _facts_of_model(self) -> RunFacts | None:
        """Return what is known of the run that trained the model, from its checkpoint or its adapter folder.

        A fit that starts from an adapter learns what its own training rows say.
        """
        if self.facts is not None or self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            return self.facts
        facts_of_adapter = getattr(self._module(), "facts_of_adapter", None)
        return None if facts_of_adapter is None else facts_of_adapter()

    def _saved_template(self) -> str | None:
        """Return the chat template of the saved run, where one was named and has one."""
        facts = self._facts_of_model()
        tokenizer = None if facts is None else facts.tokenizer
        return None if tokenizer is None else tokenizer.chat_template

    def _known_labels(self) -> list[str]:
        """Return the names of the model's labels, where the model or its saved run has some."""
        names = getattr(self._module(), "label_names", None)
        facts = self._facts_of_model() if names is None else None
        if facts is not None:
            names = facts.label_names
        return list(names or [])


def settings_to_use(settings: Mapping[str, Any], facts: RunFacts, *, names_source: bool) -> dict[str, Any]:
    """Return the settings of a training's data module with which its model is used.

    Args:
        settings: The settings.
        facts: What is known of the run. It holds the chat template itself, whose file may be gone.
        names_source: Whether another source is named, so that those of the training are left out.
    """
    left_out = {*SOURCES, "train_size", "val_size", "test_size"} if names_source else set()
    used = {name: value for name, value in settings.items() if name not in left_out}
    has_template = facts.tokenizer is not None and facts.tokenizer.chat_template is not None
    if has_template and used.get("template") not in (None, PLAINLY_JOINED):
        used["template"] = None
    return used
