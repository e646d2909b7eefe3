"""Which modules of a transformers model see the rows of a batch in their first dimension, as `per_row` needs it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.backbones.trials.trial import Call, Rows, Trial, has_values, is_same, quiet, recording

_NUM_ROWS, _LENGTH = 3, 5
"""Neither divides the other, so that a length is not taken for a number of rows."""


def find_shared(model: Any, paths: Collection[str]) -> frozenset[str]:  # noqa: ANN401 - a transformers model
    """Return those of a model's modules that do not see the rows of a batch, each on its own, in their first dimension.

    Such as an embedding of positions, called once for all rows, and layers that put the length first. A call with three
    rows is compared with a call for each of them. Where the model cannot be called with token ids alone, or has no
    values, nothing is known and nothing is returned.

    Args:
        model: A transformers model.
        paths: The modules to look at.
    """
    if not has_values(model):
        return frozenset()
    trial = Trial.of(model)
    ids = [trial.ids[start : start + _LENGTH] for start in range(_NUM_ROWS)]
    together = _inputs(model, trial, ids, paths)
    alone = [_inputs(model, trial, [row], paths) for row in ids]
    if together is None or any(one is None for one in alone):
        return frozenset()
    return frozenset(path for path in paths if not _sees_rows(together[path], [one[path] for one in alone if one]))


def _inputs(model: Any, trial: Trial, ids: list[list[int]], paths: Collection[str]) -> dict[str, list[Any]] | None:  # noqa: ANN401 - a transformers model
    """Return the first tensors that modules are called with in a call of the model; None where that fails."""
    device = next(model.parameters()).device
    tokens = torch.tensor(ids, device=device)
    rows = Rows(tokens, torch.ones_like(tokens), torch.ones_like(tokens, dtype=torch.bool))
    with quiet(model), recording(model) as calls:
        outer = trial.call(model, rows)
    if outer.problem:
        return None
    names = {id(model.get_submodule(path)): path for path in paths}
    found: dict[str, list[Any]] = {path: [] for path in paths}
    for call in calls:
        path = names.get(id(call.module))
        if path is not None:
            found[path].append(_first_input(call))
    return found


def _first_input(call: Call) -> Tensor | None:
    given = (*call.args, *call.kwargs.values())
    return next((value for value in given if isinstance(value, Tensor) and value.dim()), None)


def _sees_rows(together: list[Any], alone: list[list[Any]]) -> bool:
    """Return whether the inputs of all calls are those of each row in succession."""
    counts = {len(together), *map(len, alone)}
    if len(counts) > 1:
        return True  # experts and the like are called as often as rows need them; their inputs are by row
    for position, whole in enumerate(together):
        parts = [calls[position] for calls in alone]
        if whole is None or any(part is None for part in parts):
            continue
        if not _is_same(whole, parts):
            return False
    return True


def _is_same(whole: Tensor, parts: list[Tensor]) -> bool:
    joined = torch.cat(parts) if len({part.shape[1:] for part in parts}) == 1 else None
    if joined is None or joined.shape != whole.shape:
        return False
    return is_same(whole, joined) if whole.is_floating_point() else torch.equal(whole, joined)


def has_batch_second(model: nn.Module, path: str) -> bool:
    """Return whether a module lies in one of torch's that put the length before the batch (`batch_first=False`)."""
    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    return any(getattr(module, "batch_first", True) is False for module in around)
