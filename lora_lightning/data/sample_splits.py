"""Read samples from their sources and divide them into training, validation and test samples."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.data.conversations import COLUMNS, Sample, sample_from
from lora_lightning.data.records import read_records
from lora_lightning.data.splits import Size, check_size, count_rows, group_split
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.paths import nearest


@dataclass(frozen=True, kw_only=True)
class SampleSplits:
    """Where samples come from and how they are divided.

    Args:
        sources: The source of `train`, and of `val` and `test` where they have one of their own (else None).
        sizes: Sizes of `train`, `val` and `test`; None takes all that the others leave.
        columns: For our names of fields, the names that the files have instead.
        subset: The configuration of Hub data sets that have several.
        seed: Seed of the split.

    Raises:
        ConfigError: A size is out of its range, or given for a split that has a source of its own.
    """

    sources: Mapping[str, str | None]
    sizes: Mapping[str, Size | None]
    columns: Mapping[str, str] = field(default_factory=dict)
    subset: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the sizes and the columns."""
        for split, size in self.sizes.items():
            check_size(f"{split}_size", size, zero=split != "train")
            if split != "train" and size and self.sources[split] is not None:
                raise ConfigError(f"{split}_size is {size}, but {split} names rows of its own; give one of the two.")
        unknown = next((name for name in self.columns if name not in COLUMNS), None)
        if unknown is not None:
            near = nearest(unknown, COLUMNS, count=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"columns names the field {unknown!r}; expected {', '.join(COLUMNS)}.{hint}")

    def load(self) -> tuple[dict[str, list[Sample]], dict[str, int]]:
        """Read every source and divide the samples; copies of a sample in `train` are dropped.

        Returns:
            The samples of each split that has any, and counts.

        Raises:
            DataError: A source is missing, malformed, or does not hold what is needed.
        """
        counts: Counter[str] = Counter(rows_read=0, rows_incomplete=0, duplicates_dropped=0)
        kept = self._without_copies(self.read("train", counts), counts)
        groups = [sample.group for sample in kept]
        own = {split: size for split, size in self.sizes.items() if split == "train" or self.sources[split] is None}
        sizes = count_rows(own, len(kept))
        if own["train"] is None:
            del sizes["train"]
        places = group_split(groups, sizes, "train", self.seed)
        samples = {split: [kept[place] for place in places[split]] for split in self.sizes if split in places}
        given = {split: self.read(split, counts) for split in ("val", "test") if self.sources[split] is not None}
        samples.update(given)
        counts.update({split: len(samples.get(split, ())) for split in self.sizes})
        counts["unused"] = len(kept) - sum(map(len, places.values()))
        counts["leaked"] = self._count_leaked(samples["train"], given)
        return samples, dict(counts)

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

    def _without_copies(self, samples: list[Sample], counts: Counter[str]) -> list[Sample]:
        kept: dict[str, Sample] = {}
        for sample in samples:
            kept.setdefault(json.dumps(sample.content, sort_keys=True, default=str), sample)
        counts["duplicates_dropped"] = len(samples) - len(kept)
        return list(kept.values())

    def _count_leaked(self, train: list[Sample], given: Mapping[str, list[Sample]]) -> int:
        """Count the samples of sources for validation and test whose first question is trained on, and warn of them."""
        trained = {sample.group for sample in train}
        leaked = {split: sum(sample.group in trained for sample in those) for split, those in given.items()}
        for split, count in leaked.items():
            if count:
                rank_zero_warn(
                    f"{count} of {len(given[split])} rows of {self.sources[split]} begin with a question or text that "
                    f"is trained on too: the figures for {split} will be too good. Remove them from one of the two."
                )
        return sum(leaked.values())


def fingerprint_of(samples: Mapping[str, list[Sample]]) -> str:
    """Return the SHA-256 of samples and the splits they are in, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for split in sorted(samples):
        for sample in samples[split]:
            digest.update(json.dumps([split, *sample.content], sort_keys=True, default=str).encode())
    return digest.hexdigest()
