"""Report the outcome of reading records, and keep those that were skipped as broken."""

from __future__ import annotations

import json
import os
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


def bad_rows_file(trainer: Any) -> Path | None:  # noqa: ANN401 - a Trainer, or None
    """Return the file in the run's folder for rows that are left out as broken; None where this process writes none.

    A logger that claims the run's folder (`claim`) does so now, since rows are read before training starts.

    All ranks must call this together: the main process broadcasts the path of the run's folder.
    """
    folder = getattr(trainer, "log_dir", None) or getattr(trainer, "default_root_dir", None)
    if folder is None or not trainer.is_global_zero:
        return None
    claim = getattr(getattr(trainer, "logger", None), "claim", None)
    if claim is not None:
        claim()
    return Path(folder) / "bad_rows.jsonl"


def write_bad_rows(bad: Sequence[tuple[str, str]], path: Path | None) -> None:
    """Write the rows that were left out as broken to a file, and warn of them.

    Args:
        bad: For each its error and its text.
        path: The file; None only warns.
    """
    where = ""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"reason": reason, "text": text}) + "\n" for reason, text in bad]
        path.write_text("".join(lines), "utf-8")
        where = f" They are written to {path}."
    rank_zero_warn(f"{len(bad)} broken rows are left out; the first: {bad[0][0]}{where}")


def note(folder: Path | None, **entry: Any) -> None:  # noqa: ANN401 - whatever JSON takes
    """Append a note in a folder that several processes share; each process writes a separate file."""
    if folder is not None:
        with (folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def noted(folder: Path) -> list[dict[str, Any]]:
    """Return the notes of all processes without repetitions."""
    lines = [line for path in sorted(folder.iterdir()) for line in path.read_text("utf-8").splitlines()]
    return [json.loads(line) for line in dict.fromkeys(lines)]
