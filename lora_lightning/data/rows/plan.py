"""Where the rows of a data module come from, and how they are divided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lora_lightning.data.rows.conditions import Condition
from lora_lightning.data.rows.pool import kind_of
from lora_lightning.data.rows.splits import Size, check_size
from lora_lightning.data.sources import ReadSettings, Source, describe, is_mixture, parts_of
from lora_lightning.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where rows come from and how they are divided.

    Args:
        sources: The source of `train`, and of each other split that has one of its own. Several validation sets are
            the splits `val/<name>`.
        sizes: Sizes of `train`, `val` and `test`; None takes all that the others leave.
        settings: How files are read.
        seed: Seed of the split.
        conditions: What every record with a target must meet.
        duplicates: `drop` leaves out copies in `train`, `keep` keeps them, in one split.
        bad_rows: `refuse` ends with the first record that is broken, `skip` leaves it out.
        stratified: Whether each class gets its share of each split, and texts with contradictory labels are dropped;
            else rows of one group stay in one split.
        shared: What rows of one group have in common, for messages.
        needed: What a row must have, for messages.

    Raises:
        ConfigError: A setting is out of its range, or a size is given for a split that has a source of its own.
    """

    sources: Mapping[str, Source]
    sizes: Mapping[str, Size | None]
    settings: ReadSettings
    seed: int = 0
    conditions: tuple[Condition, ...] = ()
    duplicates: str = "drop"
    bad_rows: str = "refuse"
    stratified: bool = False
    shared: str = "text"
    needed: str = "a text"

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, known in (("duplicates", ("drop", "keep")), ("bad_rows", ("refuse", "skip"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: expected {' or '.join(known)}.")
        for split, source in self.sources.items():
            parts_of(source)
            if split != "train" and is_mixture(source):
                raise ConfigError(f"{split} gives weights to its sources, and only train draws rows; give it a list.")
        for split, size in self.sizes.items():
            check_size(f"{split}_size", size, zero=split != "train")
            if split != "train" and size and self.has_own_source(split):
                raise ConfigError(
                    f"{split}_size is {size}, but {split} names rows of its own; give one of the two "
                    f"({split}_size: null takes the size back)."
                )

    def check_trains(self) -> None:
        """Refuse a plan without a source to train on.

        Raises:
            ConfigError: `train` is None.
        """
        if self.sources["train"] is None:
            raise ConfigError("train names no source, so there are no rows to train on; give a file, or data.")

    def only(self, kind: str) -> Plan:
        """Return the plan with the sources of one kind of split alone."""
        sources = {split: source if kind_of(split) == kind else None for split, source in self.sources.items()}
        return replace(self, sources=sources, sizes=dict.fromkeys(self.sizes))

    def has_own_source(self, split: str) -> bool:
        """Return whether a split, or a set of it, has a source of its own."""
        given = [name for name, source in self.sources.items() if source is not None]
        return split in given or split in map(kind_of, given)

    def parts(self, split: str) -> list[Source]:
        """Return the sources that a split's own rows are read from: one, or those of a mixture."""
        return [part.source for part in parts_of(self.sources[split])]

    def weights(self) -> list[float] | None:
        """Return the weights of the training sources; None without a mixture."""
        train = self.sources["train"]
        return [part.weight for part in parts_of(train)] if is_mixture(train) else None

    def source_name(self, split: str) -> str:
        """Return the name of the source that a split's rows come from, for messages."""
        return describe(self.sources[split] if self.has_own_source(split) else self.sources["train"])

    def shares(self) -> dict[str, Size | None]:
        """Return the sizes of the splits that are taken from the training source."""
        shares: dict[str, Size | None] = {}
        for split, size in self.sizes.items():
            if split == "train":
                shares[split] = size
            elif not self.has_own_source(split):
                shares[split] = 0.1 if size is None else size
        return shares
