"""Base of the data modules that read records: the path from sources to encoded rows."""

from __future__ import annotations

import abc
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info

from lora_lightning.data.batches.columns import EncodedRows, write_columns
from lora_lightning.data.batches.mixing import Mixture, drawn_fingerprint, mixture_of
from lora_lightning.data.cache import built, key_of
from lora_lightning.data.keys import code_digest, rows_key
from lora_lightning.data.notices import keeping, noting, tell_noted
from lora_lightning.data.predicted_rows import PredictedRows
from lora_lightning.data.rows.cells import ignored_message, is_empty
from lora_lightning.data.rows.conditions import parse_condition
from lora_lightning.data.rows.inputs import predicted_message
from lora_lightning.data.rows.named_sets import named_by_text, split_sources
from lora_lightning.data.rows.plan import Plan
from lora_lightning.data.rows.pool import About, SplitRows, kind_of, load_about, save_about
from lora_lightning.data.rows.reports import bad_rows_file, read_message, write_bad_rows
from lora_lightning.data.rows.row import Example, Row, StoredRow
from lora_lightning.data.sources import ReadSettings, Record, Source, describe, download, is_hub_name, is_in_memory
from lora_lightning.data.tokenizers import tokenizer_key
from lora_lightning.errors import DataError

# A change of any other setting reads the sources again: that costs little, and cached rows could be wrong.
_NOT_FOR_READING = (
    "batch_size",
    "cache",
    "eval_batch_size",
    "group_by_length",
    "max_length",
    "num_workers",
    "tokenizer",
    "too_long",
)


class RecordData(PredictedRows, abc.ABC):
    """Reads, checks and splits records, encodes each split once, and batches rows of similar length.

    A source is a `.csv`, `.tsv`, `.jsonl` (`.ndjson`, `.json`), `.parquet` or `.yml` file (also compressed: `.gz`,
    `.bz2`, `.xz`, `.zst`), a list of files, a glob, a folder of such files or of texts, a folder that `datasets` saved,
    any of them inside an installed package (`pkg://package/path`), or the name of a Hub data set; from Python also a
    `pandas.DataFrame`, a `datasets.Dataset` or a list of dicts.

    Rows and tokens are stored in the cache folder (see `lora-lightning cache`); all ranks and later runs read them
    through a memory map.

    Args:
        train: Source of the training rows and of those to split off; None if a saved model is only used. Or several
            with weights, such as `[{source: a.csv, weight: 0.7}, {source: b.csv, weight: 0.3}]`. An epoch then has as
            many rows as all of them together, divided by weight: of a source with more rows, each epoch takes a
            different part, and a source with fewer is repeated.
        val: Source of the validation rows; None splits them off `train`. A mapping of names to sources, such as
            `{reviews: a.csv, tweets: b.csv}`, is evaluated set by set: the split of each is `val/<name>`.
        test: Source of the test rows; None splits them off `train`.
        predict: Source of the rows to predict, which need no target, or a mapping of names to sources; None predicts
            the test rows. With a model that knows its labels, no other source is read to predict.
        batch_size: Rows in a training batch, on each device.
        eval_batch_size: Rows in any other batch; None means `batch_size`.
        encoding: Encoding of text files.
        separator: Separator of a `.csv` or `.tsv` file; None means a comma and a tab.
        subset: Configuration of a Hub data set that has several.
        where: Conditions that every row of `train`, `val` and `test` must meet, such as `confidence >= 0.6` or
            `lang == 'en'`.
        duplicates: `drop` leaves out further copies of a row in `train`, `keep` keeps them, all in one split.
        bad_rows: `refuse` stops at the first broken row; `skip` skips broken rows, counts them, and writes them to
            `bad_rows.jsonl` in the run's folder.
        too_long: Treatment of a row longer than the maximum: `cut` at its end, `drop`, or `split` into several.
        cache: Whether rows and tokens may be kept in the cache folder; False for private data.
        train_size: Number (int) or share (float) of the rows to train on; None means all that the others leave.
        val_size: Number or share of the rows to validate on, where no source is given; None means 0.1, and 0 none.
        test_size: Number or share of the rows to test on, where no source is given; None means 0.1, and 0 none.
        group_by_length: Batch rows of similar length, which reduces padding.
        seed: Seed of the split and of the order of training, at least 0.
        num_workers: Processes that make batches; 0 makes them in the main one, which is fast enough for texts.
        tokenizer: Hub name, folder, or `pkg://package/folder` of the tokenizer; None means the backbone's own. After
            `setup`, the attribute of this name is the tokenizer itself.

    Attributes:
        counts: Number of rows by outcome: `rows_read`, `rows_filtered` (by `where`), `rows_incomplete` (nothing to
            train on), `rows_bad` (broken, skipped), `duplicates_dropped`, `contradictions_dropped` (texts with
            different labels), `train`, `val`, `test`, `unused`, and `leaked` (rows of sources for `val` and `test` that
            are also in the training rows); of each named validation set also `val/<name>` and `val/<name>/leaked`.
        ignored_fields: How many records hold each field that nothing reads.
        fingerprint: SHA-256 of the rows and their splits.

    Raises:
        ConfigError: A setting is out of its range, or contradicts another.
    """

    shared: ClassVar[str] = "text"
    """What rows of one group have in common, for messages."""
    needed: ClassVar[str] = "a text"
    """What a row must have, for messages."""
    lengths_allowed: ClassVar[tuple[str, ...]] = ("cut", "drop", "split")
    """Values of `too_long` that are allowed."""

    def __init__(
        self,
        train: Source | None = None,
        val: dict[str, Source] | Source | None = None,
        test: Source | None = None,
        predict: dict[str, Source] | Source | None = None,
        *,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        encoding: str = "utf-8",
        separator: str | None = None,
        subset: str | None = None,
        where: list[str] | None = None,
        duplicates: str = "drop",
        bad_rows: str = "refuse",
        too_long: str = "cut",
        cache: bool = True,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        group_by_length: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            group_by_length=group_by_length,
            seed=seed,
            num_workers=num_workers,
            tokenizer=tokenizer,
        )
        given = named_by_text({"train": train, "val": val, "test": test, "predict": predict})
        sources = split_sources(given)
        # The settings of the subclass are found too. Data would not fit into a checkpoint; settings do.
        in_memory = {kind_of(split) for split, source in sources.items() if is_in_memory(source)}
        self.save_hyperparameters(logger=False, ignore=sorted(in_memory))
        self.hparams.update({kind: source for kind, source in given.items() if kind in self.hparams})
        self.too_long = too_long
        self._require_one_of(too_long=self.lengths_allowed)
        self.cache = cache
        self.label_names: list[str] = []
        self.plan = Plan(
            sources=sources,
            sizes={"train": train_size, "val": val_size, "test": test_size},
            settings=ReadSettings(encoding=encoding, separator=separator, subset=subset),
            seed=seed,
            conditions=tuple(map(parse_condition, where or [])),
            duplicates=duplicates,
            bad_rows=bad_rows,
            shared=self.shared,
            needed=self.needed,
        )
        self._about = About()
        self._told: set[str] = set()
        self._folder: Path | None = None
        self._encoded_by: Any = None
        self._tokenizer_key = self._data_key = ""

    # What a subclass defines.

    @abc.abstractmethod
    def columns_read(self, split: str) -> Mapping[str, str]:
        """Return for each column that the records of a split must have the setting that names it."""

    @abc.abstractmethod
    def row_of(self, record: Record, split: str) -> Row | None:
        """Check a record and return its row; None if there is nothing to train on.

        Raises:
            DataError: The record is malformed.
        """

    @abc.abstractmethod
    def load_tokenizer(self, name: str) -> Any:  # noqa: ANN401 - tokenizers share no public base class
        """Return the tokenizer of this name, ready to encode."""

    @abc.abstractmethod
    def encode(self, rows: list[StoredRow], split: str, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        """Encode rows, each into one or several.

        Args:
            rows: The rows.
            split: Their split; rows of `predict` have no target.
            counts: Counts what is dropped or cut, by name.

        Returns:
            For each encoded row its columns, lists and numbers; the column `row` is the index of its row in `rows`.
        """

    @abc.abstractmethod
    def describe_content(self, content: list[Any]) -> tuple[str, Any]:
        """Return the text of a row and what is to be learnt of it, for `examples`."""

    def reading_key(self) -> list[Any]:
        """Return what determines how records are read besides their content, in plain types.

        That is every setting except those of tokens and loaders; a subclass adds what it takes from the model.
        """
        return sorted((name, repr(value)) for name, value in self.hparams.items() if name not in _NOT_FOR_READING)

    def encoding_key(self) -> list[Any]:
        """Return the settings that decide how rows are encoded, beside the tokenizer, in plain types."""
        return []

    def tell_lost(self, split: str, lost: Mapping[str, int]) -> None:
        """Warn of rows of a split that encoding dropped or cut."""

    def check_labels(self, labels: Mapping[str, tuple[int, str]], num_rows: int) -> None:
        """Refuse labels of the training source that cannot be learnt."""

    # The public view.

    def examples(self, split: str) -> Iterator[Example]:
        """Iterate over the encoded rows of a split, in the order of their source.

        Args:
            split: `train`, `val`, `test` or `predict`; of named validation sets also `val/<name>`, and `val` is all.

        Raises:
            ConfigError: `setup` has not run for this split.
        """
        for one in self._splits_of(split) or [split]:
            yield from self._examples_of(one)

    def _examples_of(self, split: str) -> Iterator[Example]:
        encoded = self._documents(split)
        rows = self._rows(split)
        for index in range(len(encoded)):
            columns = encoded[index]
            row = int(encoded.origins[index])
            source, _, line = rows.place(row)
            text, label = self.describe_content(rows.content(row))
            has_target = kind_of(split) != "predict"
            yield self._example(columns, text, label if has_target else None, source, line)

    def _example(self, columns: Mapping[str, Any], text: str, label: Any, source: str, line: int) -> Example:  # noqa: ANN401 - a label of any kind
        return Example(text, columns["input_ids"], columns.get("labels"), label, source, line)

    @property
    def ignored_fields(self) -> dict[str, int]:
        """How many records hold each field that nothing reads."""
        return dict(self._about.ignored)

    @property
    def label_counts(self) -> dict[str, int]:
        """How many training rows have each label."""
        return self._about.train_labels

    # What Lightning calls.

    def prepare_data(self) -> None:
        """Download Hub data sets, in one process."""
        for split in filter(self.plan.has_own_source, self.plan.sources):
            for source in filter(is_hub_name, self.plan.parts(split)):
                download(source, self.plan.settings, kind_of(split))

    def setup(self, stage: str | None = None) -> None:
        """Read, divide and encode rows (see `TokenizedData`), and name the fields that nothing reads."""
        if stage == "fit":
            self.plan.check_trains()
        self._choose_reading(stage)
        super().setup(stage)
        self._tell_ignored()

    # The road.

    def read_row(self, record: Record, split: str, ignored: Counter[str]) -> Row | None:
        """Return what is learnt from a record, and count its fields that nothing reads."""
        read = self._fields_read(split)
        ignored.update(name for name, value in record.fields.items() if name not in read and not is_empty(value))
        return self.row_of(record, split)

    def _fields_read(self, split: str) -> Collection[str]:
        return {*self.columns_read("train"), *(one.column for one in self.plan.conditions)}

    def _read(self) -> None:
        """Read and divide the rows, or find them in the cache."""
        with keeping():  # reading the rows warns of the same
            self._data_key = rows_key(type(self), self._plan_read, self.reading_key())
        self._folder = self._kept(f"rows-{self._data_key}", self._lay)
        self._about = load_about(self._folder)
        self.counts = dict(self._about.counts)
        self.fingerprint = self._as_drawn(self._about.fingerprint)
        is_alone = self._reads_alone
        rank_zero_info(
            predicted_message(self.plan, self._about.num_rows) if is_alone else read_message(self.counts, self.needed)
        )
        if self._about.bad:
            write_bad_rows(self._about.bad, bad_rows_file(self.trainer))

    def _as_drawn(self, fingerprint: str) -> str:
        """Return the fingerprint of rows together with the weights by which they are drawn."""
        return drawn_fingerprint(fingerprint, self.plan.weights())

    def _lay(self, folder: Path) -> None:
        # Not at the top: what only starts a parser does without Arrow.
        from lora_lightning.data.rows.road import lay

        save_about(lay(self._plan_read, folder, self), folder)

    def _tell_ignored(self) -> None:
        """Name the fields that nothing reads, each once."""
        new = {name: count for name, count in self.ignored_fields.items() if f"field {name}" not in self._told}
        if new and not self._reads_alone:  # a file of predictions holds all fields
            self._announce(ignored_message(self.plan.source_name("train"), new))
            self._told.update(f"field {name}" for name in new)

    def _announce(self, message: str) -> None:
        # Tables have columns for many purposes: no reason to warn.
        rank_zero_info(message)

    def _prepare(self) -> None:
        """Load the tokenizer and set the label names; discard rows that were encoded by others."""
        self._settle_labels()
        name = self._name_of_tokenizer()
        by = [name, self.label_names, self._backbone()]
        if by != self._encoded_by:
            self.tokenizer = self.load_tokenizer(name)
            self._tokenizer_key = tokenizer_key(self.tokenizer)
            self._encoded_by = by
            self._encoded.clear()

    def _settle_labels(self) -> None:
        """Set the label names of a data module that has labels."""

    def _backbone(self) -> str | None:
        backbone = getattr(self._module(), "backbone", None)
        return backbone if isinstance(backbone, str) else None

    def _encode(self, split: str) -> EncodedRows:
        """Encode a split, or find it in the cache; report what was dropped or cut."""
        rows = self._rows(split)
        key = key_of(self._data_key, split, self._tokenizer_key, self.label_names, self.encoding_key())
        folder = self._kept(f"tokens-{key}", lambda folder: self._write_encoded(rows, split, folder))
        lost = json.loads((folder / "lost.json").read_text("utf-8"))
        if not (split == "predict" and rows.split != split):  # of the test rows, it was told already
            counted = {name: count for name, count in lost.items() if name.isidentifier()}
            for name, count in counted.items():
                self.counts[name] = self.counts.get(name, 0) + count
            self.tell_lost(split, lost)
        return EncodedRows(folder / "tokens.arrow")

    def _write_encoded(self, rows: SplitRows, split: str, folder: Path) -> None:
        lost: Counter[str] = Counter()
        write_columns(folder / "tokens.arrow", self._batches(rows, split, lost))
        if not (folder / "tokens.arrow").exists():
            raise self._nothing_left(split, len(rows), lost)
        (folder / "lost.json").write_text(json.dumps(lost), "utf-8")

    def _batches(self, rows: SplitRows, split: str, lost: Counter[str]) -> Iterable[Mapping[str, list[Any]]]:
        for start, some in rows.batches():
            encoded = list(self.encode(some, split, lost))
            if encoded:
                columns = {name: [one[name] for one in encoded] for name in encoded[0]}
                columns["row"] = [start + row for row in columns["row"]]
                yield columns

    def _nothing_left(self, split: str, num_rows: int, lost: Mapping[str, int]) -> DataError:
        """Return the error for a split of which every row was dropped."""
        return DataError(
            f"All {num_rows} {split} rows of {self.plan.source_name(split)} are longer than the maximum and were "
            "dropped; set a larger max_length, or too_long to cut."
        )

    def _mixture(self) -> Mixture | None:
        return self._mixture_of(self._documents("train"))

    def _mixture_of(self, encoded: EncodedRows) -> Mixture | None:
        names = list(map(describe, self.plan.parts("train")))
        return mixture_of(encoded.origins, self._about.parts, names, self.plan.weights())

    # The cache.

    def _kept(self, name: str, build: Callable[[Path], None]) -> Path:
        """Return the folder of a result that is built once: in the cache, or a temporary one of this object."""
        is_kept = self.cache and code_digest(type(self)) is not None
        folder = built(name if is_kept else None, noting(build), owner=self)
        tell_noted(folder, self._told)
        return folder
