"""Specs and results of trials as files, so that no finished trial is repeated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lightning.checkpoint.files import write_atomically

Spec = dict[str, Any]
"""Specification of a trial, in plain JSON types."""
Result = dict[str, Any]
"""Result of a trial: its figures, or `error`."""


def digest(spec: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a spec, whatever the order of its keys.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
        True
    """
    text = json.dumps(spec, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_result(path: Path, spec: Spec, result: Result) -> None:
    """Write a trial's result atomically."""
    write_json(path, {"digest": digest(spec), "spec": spec, "result": result})


def read_result(path: Path, spec: Spec) -> Result | None:
    """Return the result of a trial, or None if there is none with exactly this spec."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    is_same = isinstance(content, dict) and content.get("digest") == digest(spec)
    return dict(content["result"]) if is_same else None


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401 - plain JSON types
    """Write plain types as JSON atomically; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
