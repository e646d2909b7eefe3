"""The comparison as rows of values, as Markdown and as a table for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from lora_lightning.commands._compare.records import Result
from lora_lightning.commands._compare.report.reach import speed_ups, steps_to_reach
from lora_lightning.commands._compare.report.words import words_of
from lora_lightning.commands._compare.runner import Outcome

_NOT_ON_TERMINAL = (
    *("share", "val_loss", "optimizer_bytes", "train_seconds"),
    *("principle", "suits", "difficulty", "notes"),
)
Value = float | int | str | bool | None


@dataclass(frozen=True)
class Column:
    """A column.

    Args:
        key: Its name in CSV.
        title: Its heading.
        show: Formats a value.
        is_measured: Whether it holds measurements of the runs, which have a standard deviation over seeds.
    """

    key: str
    title: str
    show: Callable[[Any], str] = str
    is_measured: bool = False


@dataclass(kw_only=True)
class Row:
    """A row: values by the keys of the columns, None if missing.

    Args:
        label: Its name.
        kind: `method`, `frozen` or `full`.
        values: The values; means over several seeds.
        spreads: Standard deviations over several seeds.
        notes: Remarks.
    """

    label: str
    kind: str
    values: dict[str, Value] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def rows_of(outcomes: Sequence[Outcome], reference: str | None) -> list[Row]:
    """Return a row for each complete outcome.

    Args:
        outcomes: The outcomes.
        reference: Label of the method whose final validation loss is the goal for the others, or None.
    """
    finals = next((one.finals for one in outcomes if one.entry.label == reference), {})
    return [_row(one, finals if reference else None) for one in outcomes if one.is_complete]


def columns_of(rows: Sequence[Row], reference: str | None) -> list[Column]:
    """Return the columns: the test metrics are those that the rows have."""
    metrics = list(dict.fromkeys(key for row in rows for key in row.values if key.startswith("test_")))
    metrics.sort(key=lambda key: key == "test_loss")
    reach = [
        Column("steps_to_reach", f"steps to {reference}'s loss"),
        Column("sooner", "times sooner", _times, is_measured=True),
    ]
    return [
        Column("method", "method"),
        Column("size", "size"),
        Column("trainable", "trainable", _count),
        Column("share", "share", _share),
        *(
            Column(key, key.removeprefix("test_") if key != "test_loss" else "test loss", _figure, is_measured=True)
            for key in metrics
        ),
        Column("val_loss", "val loss", _figure, is_measured=True),
        *(reach if reference else []),
        Column("rate", "rate", lambda value: f"{value:g}"),
        Column("peak_memory", "peak memory", _bytes, is_measured=True),
        Column("saved_bytes", "kept for backward", _bytes, is_measured=True),
        Column("optimizer_bytes", "optimizer + gradients", _bytes, is_measured=True),
        Column("step_seconds", "time a step", _seconds, is_measured=True),
        Column("train_seconds", "training", _seconds, is_measured=True),
        Column("checkpoint_bytes", "checkpoint", _bytes, is_measured=True),
        Column("merges", "merges"),
        Column("inference_overhead", "inference", _times, is_measured=True),
        Column("principle", "principle"),
        Column("suits", "suits"),
        Column("difficulty", "difficulty"),
        Column("notes", "notes"),
    ]


def cell(row: Row, column: Column) -> str:
    """Return a formatted value, with its standard deviation over the seeds if there is one."""
    if column.key == "notes":
        return "; ".join(row.notes)
    value = row.values.get(column.key)
    if value is None or value == "":
        return "-"
    spread = row.spreads.get(column.key)
    is_score = column.show is _figure or column.show is _times
    return f"{column.show(value)} ± {column.show(spread)}" if spread is not None and is_score else column.show(value)


def to_markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return a Markdown table."""
    lines = [[column.title for column in columns], ["---"] * len(columns)]
    lines += [[cell(row, column).replace("|", "\\|") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def to_terminal(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """Return the measured columns as a table for the terminal."""
    shown = [column for column in columns if column.key not in _NOT_ON_TERMINAL]
    table = Table(box=None, pad_edge=False)
    for column in shown:
        is_text = column.key in ("method", "size")
        table.add_column(column.title, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell(row, column) for column in shown))
    return table


def _row(outcome: Outcome, reference: dict[int, Result] | None) -> Row:
    entry, results = outcome.entry, list(outcome.finals.values())
    notes = [note for note in (entry.note, entry.error, *outcome.errors) if note]
    row = Row(label=entry.label, kind=entry.kind, notes=notes)
    words = words_of(entry.name)
    row.values = {
        "method": entry.label,
        "size": entry.size,
        "rate": outcome.rate if entry.kind != "frozen" else None,
        "principle": words.principle,
        "suits": words.suits,
        "difficulty": words.difficulty,
    }
    if entry.error:
        return row
    row.values["trainable"] = entry.num_trainable
    if len(entry.rates) > 2 and outcome.rate in (min(entry.rates), max(entry.rates)):
        row.notes.append(
            f"{outcome.rate:g} is the {'lowest' if outcome.rate == min(entry.rates) else 'highest'} rate tried"
        )
    if not results:
        return row
    row.notes += list(dict.fromkeys(note for result in results for note in result["notes"]))
    first = results[0]
    row.values |= {"trainable": first["num_trainable"], "share": first["num_trainable"] / max(first["num_base"], 1)}
    row.values["merges"] = None if first["merges"] is None else "yes" if first["merges"] else "no"
    _add_means(row, results)
    if reference is not None and entry.kind == "method":
        _add_reach(row, outcome.finals, reference)
    return row


def _add_means(row: Row, results: Sequence[Result]) -> None:
    """Average the values over the seeds."""
    measured = (
        *("peak_memory", "saved_bytes", "optimizer_bytes", "step_seconds", "train_seconds"),
        *("checkpoint_bytes", "inference_overhead"),
    )
    figures = [
        {
            **{key: result.get(key) for key in measured},
            **{f"test_{name}": value for name, value in result["test"].items()},
            "val_loss": result["val"].get("loss"),
        }
        for result in results
    ]
    for key in dict.fromkeys(key for one in figures for key in one):
        known = [one[key] for one in figures if one.get(key) is not None]
        if known:
            row.values[key] = statistics.fmean(known)
        if len(known) > 1:
            row.spreads[key] = statistics.stdev(known)
    if any(one.get("val_loss") is None for one in figures):
        row.notes.append("diverged: no finite validation loss at the end")


def _add_reach(row: Row, finals: dict[int, Result], reference: dict[int, Result]) -> None:
    """Add the steps until the row reaches the reference's final loss, and the speed-up over the reference."""
    steps = steps_to_reach(finals, reference)
    ratios = speed_ups(steps, steps_to_reach(reference, reference))
    row.values["steps_to_reach"] = ", ".join("never" if step is None else str(step) for step in steps.values())
    known = [ratio for ratio in ratios.values() if ratio is not None]
    if known:
        row.values["sooner"] = statistics.fmean(known)
    if len(known) > 1:
        row.spreads["sooner"] = statistics.stdev(known)
    each = ", ".join(f"{ratio:.2f} (seed {seed})" for seed, ratio in ratios.items() if ratio is not None)
    if each and len(ratios) > 1:
        row.notes.append(f"times sooner by seed: {each}")
    if len(known) < len(ratios):
        row.notes.append(f"reached that loss with {len(known)} of {len(ratios)} seeds")


# Formats of values.


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{value:.3%}" if value < 0.1 else f"{value:.1%}"


def _figure(value: float) -> str:
    return f"{value:.4f}"


def _times(value: float) -> str:
    return f"{value:.2f}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{1000 * value:.0f} ms"


def _bytes(value: float) -> str:
    """Write a number of bytes.

    Example:
        >>> _bytes(1536), _bytes(3 * 2**20)
        ('1.5 KiB', '3.0 MiB')
    """
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:.2f} {unit}" if unit == "GiB" else f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"
