"""Rows of the result of `predict_step` for a batch, in plain types."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lora_lightning.errors import DataError


def rows_of(outputs: Any, num_rows: int) -> list[Any]:  # noqa: ANN401 - whatever a task returns
    """Return the prediction for each row of a batch, in plain types.

    Args:
        outputs: A list with one entry a row; a tensor or array whose first dimension counts the rows; or a mapping,
            named tuple or tuple of such tensors, arrays or lists, whose other entries are ignored.
        num_rows: Number of rows in the batch.

    Raises:
        DataError: It is of another type, or has another number of rows.

    Example:
        >>> rows_of({"score": np.array([0.5, 1.0]), "loss": 3.0}, 2)
        [{'score': 0.5}, {'score': 1.0}]
    """
    columns = _columns_of(outputs)
    if columns is not None:
        counted = {name: value for name, value in columns.items() if _num_rows(value) == num_rows}
        if counted:
            lists = [plain(value) for value in counted.values()]
            return [dict(zip(counted, row, strict=True)) for row in zip(*lists, strict=True)]
    elif _num_rows(outputs) == num_rows:
        return list(plain(outputs))
    raise DataError(
        f"predict_step returned {_shown(outputs)} for a batch of {num_rows} rows; expected a list with one entry a "
        "row, a tensor whose first dimension counts the rows, or a mapping of such tensors or lists."
    )


def plain(value: Any) -> Any:  # noqa: ANN401 - whatever a task or a record holds
    """Return a value in JSON types: text, numbers, lists and mappings; a non-finite number becomes None.

    Example:
        >>> plain({"tag": ("B", np.int64(3)), "score": float("nan")})
        {'tag': ['B', 3], 'score': None}
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return plain((value.float() if value.is_floating_point() else value).tolist())
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    return str(value)


def _columns_of(outputs: Any) -> dict[str, Any] | None:  # noqa: ANN401 - whatever a task returns
    """Return named entries, or the elements of a tuple, as columns; None for a list of rows."""
    if isinstance(outputs, Mapping):
        return {str(name): value for name, value in outputs.items()}
    if isinstance(outputs, tuple):
        names: Sequence[str] = getattr(outputs, "_fields", [str(index) for index in range(len(outputs))])
        return dict(zip(names, outputs, strict=True))
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return None


def _num_rows(value: Any) -> int | None:  # noqa: ANN401 - whatever a task returns
    if isinstance(value, Tensor | np.ndarray):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, list) else None


def _shown(outputs: Any) -> str:  # noqa: ANN401 - whatever a task returns
    if isinstance(outputs, Tensor | np.ndarray):
        return f"a tensor of shape {list(outputs.shape)}"
    columns = _columns_of(outputs)
    if columns is not None:
        return f"{type(outputs).__name__} ({', '.join(columns) or 'empty'})"
    return f"a list of {len(outputs)}" if isinstance(outputs, list) else type(outputs).__name__
