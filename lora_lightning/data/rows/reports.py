"""Say what became of the records that were read, and keep those that were left out as broken."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn


def read_message(counts: Mapping[str, int], needed: str) -> str:
    """Return the line that says how many rows were read, left out and divided.

    Args:
        counts: What became of the rows.
        needed: What a row must have.
    """
    return (
        f"Data: {counts['rows_read']} rows read, {counts['rows_filtered']} filtered out by where, "
        f"{counts['rows_incomplete']} without {needed}, {counts['rows_bad']} broken and skipped, "
        f"{counts['duplicates_dropped']} duplicates and {counts['contradictions_dropped']} rows with "
        f"contradictory labels dropped; {counts['train']} train, {counts['val']} val, {counts['test']} test, "
        f"{counts['unused']} not used."
    )


def write_bad_rows(bad: Sequence[tuple[str, str]], trainer: Any) -> None:  # noqa: ANN401 - a Trainer, or None
    """Write the rows that were left out as broken to `bad_rows.jsonl` in the run's folder, and warn of them.

    Args:
        bad: For each its error and its text.
        trainer: The trainer, whose main process writes; None only warns.
    """
    if not bad:
        return
    folder = getattr(trainer, "log_dir", None) or getattr(trainer, "default_root_dir", None)
    where = ""
    if folder is not None and trainer.is_global_zero:
        path = Path(folder) / "bad_rows.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"reason": reason, "text": text}) + "\n" for reason, text in bad]
        path.write_text("".join(lines), "utf-8")
        where = f" They are written to {path}."
    rank_zero_warn(f"{len(bad)} broken rows are left out; the first: {bad[0][0]}{where}")
