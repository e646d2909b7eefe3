"""Divide rows of any kind into training, validation and test rows, like ones on one side."""

from __future__ import annotations

import abc
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.data.splits import Size, check_size, count_rows, group_split
from lora_lightning.errors import ConfigError


class GroupedRow(Protocol):
    """What a row must tell of itself to be divided."""

    @property
    def group(self) -> str:
        """What rows share that must stay on one side of a split."""

    @property
    def content(self) -> list[Any]:
        """All that the row says, in plain types: equal for copies."""


Row = TypeVar("Row", bound=GroupedRow)


@dataclass(frozen=True, kw_only=True)
class GroupedSplits(abc.ABC, Generic[Row]):
    """Where rows come from and how they are divided; a subclass says how they are read.

    Args:
        sources: The source of `train`, and of `val` and `test` where they have one of their own (else None).
        sizes: Sizes of `train`, `val` and `test`; None takes all that the others leave.
        seed: Seed of the split.

    Raises:
        ConfigError: A size is out of its range, or given for a split that has a source of its own.
    """

    shared: ClassVar[str] = "text"
    """What rows of one group have in common, for messages."""

    sources: Mapping[str, str | None]
    sizes: Mapping[str, Size | None]
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the sizes."""
        for split, size in self.sizes.items():
            check_size(f"{split}_size", size, zero=split != "train")
            if split != "train" and size and self.sources[split] is not None:
                raise ConfigError(f"{split}_size is {size}, but {split} names rows of its own; give one of the two.")

    @abc.abstractmethod
    def read(self, split: str, counts: Counter[str]) -> list[Row]:
        """Read the rows of a split's own source; count `rows_read` and `rows_incomplete`."""

    def load(self) -> tuple[dict[str, list[Row]], dict[str, int]]:
        """Read every source and divide the rows; copies of a row in `train` are dropped.

        Returns:
            The rows of each split that has any, and counts.

        Raises:
            DataError: A source is missing, malformed, or does not hold what is needed.
        """
        counts: Counter[str] = Counter(rows_read=0, rows_incomplete=0, duplicates_dropped=0)
        kept = _without_copies(self.read("train", counts), counts)
        own = {split: size for split, size in self.sizes.items() if split == "train" or self.sources[split] is None}
        sizes = count_rows(own, len(kept))
        if own["train"] is None:
            del sizes["train"]
        places = group_split([row.group for row in kept], sizes, "train", self.seed, self.shared)
        rows = {split: [kept[place] for place in places[split]] for split in self.sizes if split in places}
        given = {split: self.read(split, counts) for split in ("val", "test") if self.sources[split] is not None}
        rows.update(given)
        counts.update({split: len(rows.get(split, ())) for split in self.sizes})
        counts["unused"] = len(kept) - sum(map(len, places.values()))
        counts["leaked"] = self._count_leaked(rows["train"], given)
        return rows, dict(counts)

    def _count_leaked(self, train: Sequence[Row], given: Mapping[str, Sequence[Row]]) -> int:
        """Count the rows of sources for validation and test whose group is trained on, and warn of them."""
        trained = {row.group for row in train}
        leaked = {split: sum(row.group in trained for row in those) for split, those in given.items()}
        for split, count in leaked.items():
            if count:
                rank_zero_warn(
                    f"{count} of {len(given[split])} rows of {self.sources[split]} have a {self.shared} that is "
                    f"trained on too: the figures for {split} will be too good. Remove them from one of the two."
                )
        return sum(leaked.values())


def fingerprint_of(splits: Mapping[str, Sequence[GroupedRow]]) -> str:
    """Return the SHA-256 of rows and the splits they are in, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for split in sorted(splits):
        for row in splits[split]:
            digest.update(json.dumps([split, *row.content], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _without_copies(rows: list[Row], counts: Counter[str]) -> list[Row]:
    kept: dict[str, Row] = {}
    for row in rows:
        kept.setdefault(json.dumps(row.content, sort_keys=True, default=str), row)
    counts["duplicates_dropped"] = len(rows) - len(kept)
    return list(kept.values())
