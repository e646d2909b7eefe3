"""The comparison, the search for learning rates and the learning curves as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from lora_lightning.commands._compare.report.table import Column, Row
from lora_lightning.commands._compare.runner import Outcome


def to_csv(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return the rows as CSV: plain numbers in bytes and seconds, standard deviations in separate columns."""
    spread = [column.key for column in columns if any(column.key in row.spreads for row in rows)]
    head = [*(column.key for column in columns), *(f"{key}_sd" for key in spread)]
    lines = [
        [
            *("; ".join(row.notes) if column.key == "notes" else row.values.get(column.key) for column in columns),
            *(row.spreads.get(key) for key in spread),
        ]
        for row in rows
    ]
    return csv_text(head, lines)


def search_csv(outcomes: Sequence[Outcome]) -> str:
    """Return the search for learning rates as CSV, a line for each rate that was tried."""
    head = ["method", "rate", "val_loss", "steps", "seconds", "chosen", "error"]
    lines = [
        [
            one.entry.label,
            rate,
            (found.get("val") or {}).get("loss"),
            found.get("steps"),
            found.get("seconds"),
            "yes" if rate == one.rate else "",
            found.get("error", ""),
        ]
        for one in outcomes
        for rate, found in zip(one.entry.rates, one.searches, strict=False)
    ]
    return csv_text(head, lines)


def curves_csv(outcomes: Sequence[Outcome]) -> str:
    """Return the learning curves as CSV: training loss at each step, validation metrics if there are any."""
    runs = [(one.entry.label, seed, result) for one in outcomes for seed, result in one.finals.items()]
    names = list(
        dict.fromkeys(key for _, _, result in runs for at in result["validations"] for key in at if key != "step")
    )
    lines: list[list[Any]] = []
    for label, seed, result in runs:
        train = {int(step): loss for step, loss in result["losses"]}
        val = {int(at["step"]): at for at in result["validations"]}
        lines += [
            [label, seed, step, train.get(step), *(val.get(step, {}).get(name) for name in names)]
            for step in sorted({*train, *val})
        ]
    return csv_text(["method", "seed", "step", "train_loss", *(f"val_{name}" for name in names)], lines)


def csv_text(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return lines of values as CSV."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(lines)
    return stream.getvalue()
