"""From sources to rows in splits: read, check, deduplicate, split, and write one file per split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from lora_lightning.data.batches.columns import TableWriter, read_batches
from lora_lightning.data.notices import warn
from lora_lightning.data.rows.columns import ColumnWatch
from lora_lightning.data.rows.plan import Plan
from lora_lightning.data.rows.pool import About, Pool, fingerprint, kind_of, split_file
from lora_lightning.data.rows.row import Row
from lora_lightning.data.rows.splits import Indices, count_rows, group_split, stratified_split
from lora_lightning.data.sources import Record, Source, describe, read_records
from lora_lightning.errors import DataError

_COUNTED = (
    "rows_read",
    "rows_filtered",
    "rows_incomplete",
    "rows_bad",
    "duplicates_dropped",
    "contradictions_dropped",
    "train",
    "val",
    "test",
    "unused",
    "leaked",
)


class Rules(Protocol):
    """How a data module reads its records."""

    def columns_read(self, split: str) -> Mapping[str, str]:
        """Return for each column that the records of a split must have the setting that names it."""

    def read_row(self, record: Record, split: str, ignored: Counter[str]) -> Row | None:
        """Return the row of a record, None if there is nothing to train on; count the fields that are ignored."""

    def check_labels(self, labels: Mapping[str, tuple[int, str]], num_rows: int) -> None:
        """Refuse labels of the training source that cannot be learnt."""


def lay(plan: Plan, folder: Path, rules: Rules) -> About:
    """Read every source and split the rows; write each split to a separate file in a folder.

    Args:
        plan: Where the rows come from and how they are divided.
        folder: The folder.
        rules: What the data module says of its records.

    Raises:
        DataError: A source is missing, malformed, or does not hold what is needed.
    """
    about = About()
    counts: Counter[str] = Counter(rows_read=0, rows_filtered=0, rows_incomplete=0, rows_bad=0)
    own = [split for split in plan.sources if plan.has_own_source(split)]
    pools = {split: _read(plan, split, folder, rules, about, counts) for split in own}
    trained = None
    if "train" in pools:
        trained = _divide_train(plan, folder, rules, pools.pop("train"), about, counts)
    about.num_rows |= {split: len(pool.copies) for split, pool in pools.items()}
    leaked = {} if trained is None else _count_leaked(plan, trained, pools)
    counts["leaked"] = sum(leaked.values())
    counts["rows_bad"] = len(about.bad)
    for split, num_rows in about.num_rows.items():
        counts[kind_of(split)] += num_rows if kind_of(split) != "predict" else 0
    about.counts = {name: counts[name] for name in _COUNTED}
    for split in about.num_rows:
        if split != kind_of(split) == "val":
            about.counts |= {split: about.num_rows[split], f"{split}/leaked": leaked.get(split, 0)}
    about.fingerprint = fingerprint(folder, about.num_rows)
    return about


# Reading.


def _read(plan: Plan, split: str, folder: Path, rules: Rules, about: About, counts: Counter[str]) -> Pool:
    """Read the rows of a split's own source into a file."""
    pool = Pool(folder / "all.arrow" if split == "train" else split_file(folder, split), about, split)
    for source in plan.parts(split):
        read = _read_source(plan, source, split, rules, pool)
        pool.end_source()
        if kind_of(split) != "predict":
            counts.update(read)
    pool.close()
    return pool


def _read_source(plan: Plan, source: Source, split: str, rules: Rules, pool: Pool) -> Counter[str]:
    """Read the rows of one source into a pool; return what became of its records."""
    name, about = describe(source), pool.about
    conditions = () if kind_of(split) == "predict" else plan.conditions
    watch = ColumnWatch(name, rules.columns_read(split), conditions)
    read: Counter[str] = Counter()
    num_rows, num_bad = len(pool.copies), len(about.bad)
    for record in _records(plan, source, split, about):
        read["rows_read"] += 1
        if not watch.admits(record):
            read["rows_filtered"] += 1
            continue
        try:
            row = rules.read_row(record, split, about.ignored)
        except DataError as error:
            if plan.bad_rows == "refuse":
                raise
            about.bad.append((str(error), json.dumps(record.fields, default=str)))
            continue
        if row is None:
            read["rows_incomplete"] += 1
        else:
            pool.add(row, record)
    bad = about.bad[num_bad:]
    if read["rows_read"] or not bad:
        watch.check()
    if len(pool.copies) == num_rows:
        is_filtered = bool(conditions) and read["rows_filtered"] == read["rows_read"]
        raise _no_rows(plan, name, read["rows_read"], bad, is_filtered=is_filtered)
    return read


def _no_rows(plan: Plan, name: str, num_read: int, bad: list[tuple[str, str]], *, is_filtered: bool) -> DataError:
    """Return the error for a source of which no row can be used."""
    if bad:
        return DataError(f"{name}: no row can be used: {len(bad)} are broken; the first: {bad[0][0]}")
    why = f"no row meets {' and '.join(map(str, plan.conditions))}" if is_filtered else f"none has {plan.needed}"
    return DataError(f"{name}: none of the {num_read} rows can be used: {why}.")


def _records(plan: Plan, source: Source, split: str, about: About) -> Iterator[Record]:
    """Return the records of a source; note broken ones if they are to be skipped."""

    def note(error: DataError, text: str) -> None:
        about.bad.append((str(error), text))

    on_bad = note if plan.bad_rows == "skip" else None
    return read_records(source, plan.settings, kind_of(split), on_bad=on_bad)


# Dividing.


def _divide_train(plan: Plan, folder: Path, rules: Rules, pool: Pool, about: About, counts: Counter[str]) -> Indices:
    """Divide the rows of the training source into files; return the groups of those that are trained on."""
    kept = _kept(plan, pool, counts)
    # A label that only contradictory rows had is no class.
    first_of = {name: place for name, (_, place) in about.labels["train"].items()}
    about.labels["train"] = {name: (count, first_of[name]) for name, count in pool.count_labels(kept).items()}
    rules.check_labels(about.labels["train"], len(kept))
    drawn = _divided(plan, pool, kept)
    counts["unused"] = len(kept) - sum(len(rows) for rows in drawn.values())
    about.num_rows.update({split: len(rows) for split, rows in drawn.items()})
    about.train_labels = pool.count_labels(drawn["train"])
    about.parts = pool.count_sources(drawn["train"])
    _check_parts(plan, about.parts)
    trained = pool.arrays()[1][drawn["train"]].copy()
    _write_splits(pool, drawn, folder)
    return trained


def _check_parts(plan: Plan, num_rows: list[int]) -> None:
    """Refuse a mixture of which a source has no row to train on."""
    for source, count in zip(plan.parts("train"), num_rows, strict=True):
        if not count:
            raise DataError(
                f"{describe(source)} has no rows left to train on: all are copies of rows of earlier sources, or went "
                "to other splits. Leave it out of train, or set duplicates to keep."
            )


def _kept(plan: Plan, pool: Pool, counts: Counter[str]) -> Indices:
    """Return the indices of the training source's rows that are left without copies and contradictions."""
    copies, groups, _ = pool.arrays()
    everything = np.arange(len(copies))
    counts.update(duplicates_dropped=0, contradictions_dropped=0)
    if plan.duplicates == "keep":
        return everything
    first = np.sort(np.unique(copies, return_index=True)[1])
    kept = first
    if plan.stratified:
        # Different rows of the same text have different labels; the correct one is unknown.
        texts, times = np.unique(groups[first], return_counts=True)
        contradictory = texts[times > 1]
        kept = first[~np.isin(groups[first], contradictory)]
        counts["contradictions_dropped"] = int(np.isin(groups, contradictory).sum())
    counts["duplicates_dropped"] = len(everything) - len(kept) - counts["contradictions_dropped"]
    return kept


def _divided(plan: Plan, pool: Pool, kept: Indices) -> dict[str, Indices]:
    """Return the indices of each split's rows."""
    _, groups, classes = pool.arrays()
    sizes = count_rows(plan.shares(), len(kept))
    if not plan.stratified:
        if plan.sizes["train"] is None:
            del sizes["train"]
        drawn = group_split(groups[kept], sizes, "train", plan.seed, plan.shared)
        return {split: kept[drawn[split]] for split in plan.sizes if split in drawn}
    if plan.duplicates == "drop":
        drawn = stratified_split(classes[kept], pool.class_names(), sizes, plan.seed)
        return {split: kept[rows] for split, rows in drawn.items()}
    return _with_copies(plan, pool, groups, classes)


def _with_copies(plan: Plan, pool: Pool, groups: Indices, classes: Indices) -> dict[str, Indices]:
    """Divide texts, each with all its copies; the sizes count different texts."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    sizes = count_rows(plan.shares(), len(first))
    drawn = stratified_split(classes[first], pool.class_names(), sizes, plan.seed)
    return {split: np.flatnonzero(np.isin(inverse, texts)) for split, texts in drawn.items()}


def _count_leaked(plan: Plan, trained: Indices, pools: Mapping[str, Pool]) -> dict[str, int]:
    """Count for each source for validation and test the rows whose group is trained on, and warn of them."""
    leaked: dict[str, int] = {}
    for split, pool in pools.items():
        if kind_of(split) == "predict":
            continue
        groups = pool.arrays()[1]
        count = int(np.isin(groups, trained).sum())
        leaked[split] = count
        if count:
            warn(
                f"{count} of {len(groups)} rows of {plan.source_name(split)} have a {plan.shared} that is trained on "
                f"too: the figures for {split} will be too good. Remove these rows from one of the two."
            )
    return leaked


def _write_splits(pool: Pool, drawn: Mapping[str, Indices], folder: Path) -> None:
    """Write each split's rows of the training source to a file of its own."""
    split_of = np.full(len(pool.copies), -1, dtype=np.int8)
    for code, rows in enumerate(drawn.values()):
        split_of[rows] = code
    writers: list[TableWriter] = []
    start = 0
    for batch in read_batches(pool.path):
        writers = writers or [TableWriter(split_file(folder, split), batch.schema) for split in drawn]
        codes = split_of[start : start + len(batch)]
        start += len(batch)
        for code, writer in enumerate(writers):
            writer.write(pa.Table.from_batches([batch.filter(pa.array(codes == code))]))
    for writer in writers:
        writer.close()
    pool.path.unlink()
