"""Which rows of a batch which adapter acts on, and what of a module's arguments and output belongs to some rows.

Modules see the rows of a batch in their first dimension: each row once, or several times in succession where a model
folds another dimension into it (`[batch * length, width]`) or searches with beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lora_lightning.adapters.selection.compiling import with_unknown_length
from lora_lightning.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a batch, by the adapter that acts on each.

    Args:
        owners: For each row the number of its adapter in `names`, or -1 for the base, `[rows]`.
        names: Names of the adapters, sorted.
        indices: The rows of each name, increasing, in the order of `names`.
        has_base: Whether no adapter acts on some row.
    """

    owners: Tensor
    names: tuple[str, ...]
    indices: tuple[Tensor, ...]
    has_base: bool

    @classmethod
    def of(cls, names: Sequence[str | None], device: torch.device) -> Rows:
        """Sort the rows of a batch.

        Args:
            names: For each row the name of its adapter, None for the base.
            device: Of the model.
        """
        distinct = tuple(sorted({name for name in names if name is not None}))
        numbers = {name: number for number, name in enumerate(distinct)}
        owners = [-1 if name is None else numbers[name] for name in names]
        indices = [[row for row, owner in enumerate(owners) if owner == number] for number in numbers.values()]
        moved = tuple(with_unknown_length(torch.tensor(index, device=device)) for index in indices)
        return cls(torch.tensor(owners, device=device), distinct, moved, has_base=-1 in owners)

    def count_in(self, total: int, path: str) -> int:
        """Return how often in succession each row stands in the first dimension of a module's arguments.

        Args:
            total: Size of that dimension.
            path: The module, for the message.

        Raises:
            ConfigError: It does not hold all rows equally often.
        """
        num_rows = self.owners.shape[0]
        if total % num_rows:
            raise ConfigError(
                f"per_row was given {num_rows} names, and {path!r} is called with {total} rows; give one name for each "
                "row of the batch, or leave this module out of the adapters' targets where it sees no rows."
            )
        return total // num_rows

    def index_of(self, name: str, count: int) -> Tensor:
        """Return where the rows of one name stand, each of which stands `count` times in succession."""
        return _repeated(self.indices[self.names.index(name)], count)


@dataclass(frozen=True, eq=False)
class Mixture:
    """The adapters of one host that act on rows of a batch, for adapters that mix by themselves.

    Args:
        adapters: Those that act, at most one of each name.
        rows: The rows of each.
        count: How often in succession each row stands in the host's arguments.
    """

    adapters: Sequence[Any]
    rows: Rows
    count: int

    def by_row(self, values: Sequence[int], other: int) -> Tensor:
        """Return a number for each row of the host's arguments, `[rows * count]`.

        Args:
            values: The number for each adapter.
            other: The number for rows on which none of them acts.
        """
        table = [other] * (len(self.rows.names) + 1)  # the last one is that of the base, whose owner is -1
        for adapter, value in zip(self.adapters, values, strict=True):
            table[self.rows.names.index(adapter.name)] = value
        owners = self.rows.owners
        return torch.tensor(table, device=owners.device)[owners].repeat_interleave(self.count)

    def index_of(self, adapter: Any) -> Tensor:  # noqa: ANN401 - an Adapter
        """Return where the rows of one adapter stand in the host's arguments."""
        return self.rows.index_of(adapter.name, self.count)


def first_size(arguments: Any) -> int:  # noqa: ANN401 - a module's arguments
    """Return the size of the first dimension of the first tensor in a module's arguments."""
    for leaf in tree_leaves(arguments):
        if _has_rows(leaf):
            size: int = leaf.shape[0]
            return size
    raise ConfigError("per_row needs modules that are called with tensors; this one is called without.")


def take_rows(tree: Any, index: Tensor, total: int) -> Any:  # noqa: ANN401 - a module's arguments or output
    """Return a module's arguments or output for some rows: of each tensor whose first dimension holds them all."""
    return tree_map(lambda leaf: leaf.index_select(0, index) if _holds(leaf, total) else leaf, tree)


def put_rows(tree: Any, rows: Any, index: Tensor, total: int, path: str) -> Any:  # noqa: ANN401 - a module's output
    """Return an output in which some rows are replaced.

    Args:
        tree: The output for all rows.
        rows: The output for these rows.
        index: Which they are.
        total: Size of the first dimension that holds all rows.
        path: The module, for the message.

    Raises:
        ConfigError: The rows have other shapes than the output, such as heads of several widths, or the output has a
            tensor that does not hold each row.
    """

    def put(leaf: Any, own: Any) -> Any:  # noqa: ANN401 - leaves of any type
        if not isinstance(leaf, Tensor) or own is leaf:  # handed through
            return leaf
        own_index = _index_in(leaf, own, index, total)
        if own_index is None:
            raise ConfigError(
                f"{path!r} returns a tensor of shape {list(leaf.shape)}, which has no entry for each of {total} rows, "
                "so adapters cannot act on some rows of a batch there; leave it out of the targets, or give each "
                "adapter batches of its own, inside active(model, name)."
            )
        if leaf.shape[1:] != own.shape[1:]:
            raise ConfigError(
                f"The outputs of {path!r} have shapes {list(leaf.shape[1:])} and {list(own.shape[1:])} by row, which "
                "no batch can hold together; use adapters whose heads have the same size, or one batch for each."
            )
        return leaf.index_copy(0, own_index, own.to(leaf.dtype))

    return tree_map(put, tree, rows)


def _index_in(leaf: Tensor, own: Tensor, index: Tensor, total: int) -> Tensor | None:
    """Return where some rows stand in an output, into whose first dimension further ones may be folded.

    Routers of experts fold the length: of `[rows, length, width]` they return `[rows * length, experts]`.

    Args:
        leaf: The output for all rows.
        own: The output for these rows.
        index: Which they are.
        total: How many rows there are.
    """
    if not leaf.dim() or leaf.shape[0] % total:
        return None
    count = leaf.shape[0] // total
    if own.shape[0] != index.shape[0] * count:
        return None
    return _repeated(index, count)


def _repeated(index: Tensor, count: int) -> Tensor:
    """Return the index of rows each of which stands `count` times in succession."""
    if count == 1:
        return index
    inside = torch.arange(count, device=index.device)
    return (index[:, None] * count + inside).flatten()


def _has_rows(leaf: Any) -> bool:  # noqa: ANN401 - leaves of any type
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _holds(leaf: Any, total: int) -> bool:  # noqa: ANN401 - leaves of any type
    return _has_rows(leaf) and leaf.shape[0] == total
