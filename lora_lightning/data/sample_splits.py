"""Read samples from their sources and divide them into training, validation and test samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.data.conversations import COLUMNS, Sample, sample_from
from lora_lightning.data.grouped_splits import GroupedSplits
from lora_lightning.data.records import read_records
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.paths import nearest


@dataclass(frozen=True, kw_only=True)
class SampleSplits(GroupedSplits[Sample]):
    """Where samples come from and how they are divided.

    Args:
        sources: See `GroupedSplits`.
        sizes: See `GroupedSplits`.
        seed: See `GroupedSplits`.
        columns: For our names of fields, the names that the files have instead.
        subset: The configuration of Hub data sets that have several.

    Raises:
        ConfigError: A size is out of its range, or given for a split that has a source of its own.
    """

    shared: ClassVar[str] = "first question"

    columns: Mapping[str, str] = field(default_factory=dict)
    subset: str | None = None

    def __post_init__(self) -> None:
        """Check the sizes and the columns."""
        super().__post_init__()
        unknown = next((name for name in self.columns if name not in COLUMNS), None)
        if unknown is not None:
            near = nearest(unknown, COLUMNS, count=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"columns names the field {unknown!r}; expected {', '.join(COLUMNS)}.{hint}")

    def read(self, split: str, counts: Counter[str]) -> list[Sample]:
        """Read the samples of a split's source, and count its rows.

        Raises:
            DataError: The source is missing, malformed, or nothing in it can be learnt from.
        """
        source = str(self.sources[split])
        read = [sample_from(record, self.columns) for record in read_records(source, split, self.subset)]
        samples = [sample for sample in read if sample is not None]
        counts.update(rows_read=len(read), rows_incomplete=len(read) - len(samples))
        if len(samples) < len(read):
            rank_zero_warn(
                f"{len(read) - len(samples)} of {len(read)} rows of {source} are left out: they have a blank answer or "
                "text, or are no question with an answer."
            )
        if not samples:
            raise DataError(f"{source}: none of the {len(read)} rows has an answer or a text to learn from.")
        return samples
