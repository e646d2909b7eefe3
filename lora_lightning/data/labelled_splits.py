"""Read labelled texts from their sources and divide them into training, validation and test rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lora_lightning.data.conditions import Condition
from lora_lightning.data.rows import Rows, drop_duplicates, rows_from, sorted_labels, unlabelled_rows
from lora_lightning.data.splits import Size, check_size, count_rows, stratified_split
from lora_lightning.data.tables import TableReader
from lora_lightning.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class LabelledSplits:
    """Where labelled texts come from and how they are divided.

    Args:
        sources: The source of `train`, and of `val`, `test` and `predict` where they have one of their own (else None).
        sizes: Sizes of `train`, `val` and `test`, None for the default; see `check_size`.
        reader: Reads the sources.
        conditions: What every row of `train`, `val` and `test` must meet.
        seed: Seed of the split.

    Raises:
        ConfigError: A size is out of its range, or given for a split that has a source of its own.
    """

    sources: Mapping[str, str | None]
    sizes: Mapping[str, Size | None]
    reader: TableReader
    conditions: tuple[Condition, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the sizes."""
        for split, size in self.sizes.items():
            check_size(f"{split}_size", size, zero=split != "train")
            if split != "train" and size is not None and self.sources[split] is not None:
                raise ConfigError(f"{split}_size is {size}, but {split} names rows of its own; give one of the two.")

    def load(self) -> tuple[dict[str, Rows], dict[str, int]]:
        """Read every source, clean the rows and divide them.

        Returns:
            The rows of each split that has any, and the counts that `TextClassificationData` describes.

        Raises:
            DataError: A source is missing, malformed, or does not hold what is needed.
        """
        counts: Counter[str] = Counter()
        kept, duplicates, contradictions = drop_duplicates(self._read("train", counts))
        self._require_classes(kept)
        places = stratified_split(kept.labels, count_rows(self._shares(), len(kept)), self.seed)
        rows = {split: kept.take(those) for split, those in places.items()}
        given = {split: self._read(split, counts) for split in ("val", "test") if self.sources[split] is not None}
        leaked = self._count_leaked(rows["train"], given)
        rows.update(given)
        if self.sources["predict"] is not None:
            table = self.reader.read(self.sources["predict"], "predict")
            rows["predict"] = unlabelled_rows(table, self.reader.text_column)
        elif "test" in rows:
            rows["predict"] = rows["test"]
        told = {
            **{name: counts[name] for name in ("rows_read", "rows_filtered", "rows_incomplete")},
            "duplicates_dropped": duplicates,
            "contradictions_dropped": contradictions,
            **{split: len(rows.get(split, ())) for split in ("train", "val", "test")},
            "unused": len(kept) - sum(map(len, places.values())),
            "leaked": leaked,
        }
        rank_zero_info(_summary(told))
        return rows, told

    def check_labels(self, rows: Mapping[str, Rows], names: list[str], whose: str) -> None:
        """Make sure that every label is among some names.

        Args:
            rows: The rows of each split.
            names: The labels that there may be.
            whose: Whose labels these are, for the message.

        Raises:
            DataError: There are others.
        """
        for split, those in rows.items():
            unseen = sorted_labels(set(those.labels) - set(names))
            if unseen:
                raise DataError(
                    f"{self._source_of(split)} has labels among its {split} rows that {whose} not have: "
                    f"{_shown(unseen)}; known are {_shown(names)}. "
                    "Leave these rows out by a condition in where, or train with them."
                )

    def _source_of(self, split: str) -> str:
        return self.sources[split] or str(self.sources["train"])

    def _shares(self) -> dict[str, Size | None]:
        """Return the sizes of the splits that are taken from the training source."""
        own = {split: size for split, size in self.sizes.items() if split == "train" or self.sources[split] is None}
        return {split: 0.1 if size is None and split != "train" else size for split, size in own.items()}

    def _read(self, split: str, counts: Counter[str]) -> Rows:
        table = self.reader.read(self._source_of(split), split)
        rows, became = rows_from(table, self.reader.text_column, self.reader.label_column, self.conditions)
        counts.update(rows_read=became.read, rows_filtered=became.filtered, rows_incomplete=became.incomplete)
        return rows

    def _require_classes(self, rows: Rows) -> None:
        if len(set(rows.labels)) < 2:
            only = f"only the label {rows.labels[0]!r}" if len(rows) else "no row left"
            raise DataError(
                f"{self.sources['train']} has {only} in the column {self.reader.label_column!r} (after conditions and "
                "duplicates); a classifier needs at least two."
            )

    def _count_leaked(self, train: Rows, given: Mapping[str, Rows]) -> int:
        """Count the rows of sources for validation and test whose text is trained on, and warn of them."""
        trained = set(train.texts)
        leaked = {split: sum(text in trained for text in rows.texts) for split, rows in given.items()}
        for split, count in leaked.items():
            if count:
                rank_zero_warn(
                    f"{count} of {len(given[split])} rows of {self.sources[split]} have a text that is trained on too: "
                    f"the figures for {split} will be too good. Remove these texts from one of the two."
                )
        return sum(leaked.values())


def _summary(counts: Mapping[str, int]) -> str:
    return (
        f"Data: {counts['rows_read']} rows read, {counts['rows_filtered']} filtered out by where, "
        f"{counts['rows_incomplete']} without a text or label, {counts['duplicates_dropped']} duplicates and "
        f"{counts['contradictions_dropped']} rows with contradictory labels dropped; "
        f"{counts['train']} train, {counts['val']} val, {counts['test']} test, {counts['unused']} not used."
    )


def _shown(names: list[str], count: int = 20) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(repr, names[:count])) + more
