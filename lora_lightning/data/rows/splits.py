"""Divide rows into training, validation and test rows: each class in the same proportion, or groups kept together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_lightning.errors import ConfigError, DataError
from lora_lightning.paths import some_of

if TYPE_CHECKING:
    import numpy.typing as npt

Size = int | float
Indices = np.ndarray[Any, np.dtype[np.int64]]


def check_size(name: str, size: Size | None, *, zero: bool) -> None:
    """Refuse a size that is neither a number of rows nor a share.

    Args:
        name: The setting, for the message.
        size: A number of rows (int), a share of the rows (float between 0 and 1), or None for the default.
        zero: Whether no rows at all can be asked for.

    Raises:
        ConfigError: It is out of its range.
    """
    if size is None or (zero and size == 0):
        return
    if isinstance(size, bool) or (isinstance(size, int) and size < 1) or (isinstance(size, float) and not 0 < size < 1):
        raise ConfigError(
            f"{name} is {size}: expected a number of rows (a whole number of at least {0 if zero else 1}) "
            "or a share of them (a fraction between 0 and 1, such as 0.1)."
        )


def count_rows(sizes: Mapping[str, Size | None], total: int) -> dict[str, int]:
    """Turn sizes into numbers of rows.

    Args:
        sizes: The size of each split; None takes what the others leave.
        total: Number of rows to divide.

    Returns:
        The number of rows of each split that has any; a share gives at least one.

    Raises:
        DataError: More rows are asked for than there are.

    Example:
        >>> count_rows({"train": None, "val": 0.1, "test": 20}, 100)
        {'train': 70, 'val': 10, 'test': 20}
    """
    asked = {
        name: size if isinstance(size, int) else max(round(size * total), 1)
        for name, size in sizes.items()
        if size is not None
    }
    left = total - sum(asked.values())
    rest = [name for name, size in sizes.items() if size is None]
    if left < len(rest):
        wishes = ", ".join(f"{name} {count}" for name, count in asked.items())
        more = f" with at least one left for {rest[0]}" if rest else ""
        raise DataError(
            f"The sizes ask for {sum(asked.values())} rows ({wishes}){more}, but {total} are left after conditions and "
            "duplicates; ask for fewer."
        )
    counts = {name: left if name in rest else asked[name] for name in sizes}
    return {name: count for name, count in counts.items() if count}


def stratified_split(
    classes: npt.NDArray[np.int64], names: Sequence[str], counts: Mapping[str, int], seed: int
) -> dict[str, Indices]:
    """Draw splits in which every class has its share, and at least one row.

    Args:
        classes: The index of each row's class `[rows]`.
        names: The names of the classes.
        counts: Number of rows of each split; together at most all of them.
        seed: Seed of the draw.

    Returns:
        The indices of each split's rows, ascending.

    Raises:
        DataError: A class has fewer rows than there are splits, or a split fewer rows than there are classes.
    """
    # The draw iterates over the classes by name, so that it does not depend on their order in a file.
    by_name = sorted((names[index], index) for index in np.unique(classes).tolist())
    rows_of = {name: np.flatnonzero(classes == index) for name, index in by_name}
    _check_possible({name: len(rows) for name, rows in rows_of.items()}, counts)
    generator = np.random.default_rng(seed)
    pools = [generator.permutation(rows) for rows in rows_of.values()]
    drawn: dict[str, Indices] = {}
    # The largest comes last, so that the small ones get their exact proportions.
    order = sorted(counts, key=lambda name: counts[name])
    for position, name in enumerate(order):
        available = np.array([len(pool) for pool in pools])
        quotas = _quotas(available, counts[name], reserve=len(order) - position - 1)
        parts = [np.split(pool, [quota]) for pool, quota in zip(pools, quotas, strict=True)]
        drawn[name] = np.sort(np.concatenate([taken for taken, _ in parts]))
        pools = [left for _, left in parts]
    return {name: drawn[name] for name in counts}


def group_split(
    groups: npt.NDArray[Any], counts: Mapping[str, int], rest: str, seed: int, shared: str = "first question"
) -> dict[str, Indices]:
    """Draw splits such that rows of one group are never divided.

    Args:
        groups: The group of each row `[rows]`.
        counts: Number of rows of each split; whole groups come as near to it as they can without going over.
        rest: The split that gets every row that the others leave, where `counts` does not name it.
        seed: Seed of the draw.
        shared: What rows of one group have in common, for the message.

    Returns:
        The indices of each split's rows, ascending.

    Raises:
        DataError: A split would stay empty.

    Example:
        >>> groups = np.array(["a", "b", "a", "c"])
        >>> group_split(groups, {"val": 1}, rest="train", seed=0)["train"][::2].tolist()
        [0, 2]
    """
    numbers, sizes = _in_order_of_appearance(groups)
    pool = np.random.default_rng(seed).permutation(len(sizes)).tolist()
    groups_of: dict[str, list[int]] = {}
    for name in sorted(counts, key=lambda name: counts[name]):
        groups_of[name], pool = _fill(pool, sizes, counts[name])
    if rest not in counts:
        groups_of[rest] = pool
    drawn = {name: np.flatnonzero(np.isin(numbers, taken)) for name, taken in groups_of.items()}
    empty = [name for name, taken in drawn.items() if not len(taken)]
    if empty:
        raise DataError(
            f"No rows can be had for {empty[0]}: rows with the same {shared} stay together, and there are "
            f"{len(sizes)} different ones in {len(groups)} rows. Ask for other sizes, or give a file for {empty[0]}."
        )
    return drawn


def _fill(pool: Sequence[int], sizes: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """Return the groups of a pool that fit into a number of rows, taken in turn, and those that are left."""
    taken, left = [], []
    for group in pool:
        if sizes[group] <= room:
            taken.append(group)
            room -= sizes[group]
        else:
            left.append(group)
    return taken, left


def _in_order_of_appearance(groups: npt.NDArray[Any]) -> tuple[Indices, list[int]]:
    """Return the number of each row's group, counted as they appear, and the size of each group."""
    _, first, inverse, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    by_appearance = np.argsort(first)
    number_of = np.empty_like(by_appearance)
    number_of[by_appearance] = np.arange(len(first))
    return number_of[inverse], sizes[by_appearance].tolist()


def _check_possible(class_counts: Mapping[str, int], counts: Mapping[str, int]) -> None:
    rare = [f"{name!r} ({count})" for name, count in class_counts.items() if count < len(counts)]
    if rare:
        raise DataError(
            f"Too rare to be split into {', '.join(counts)}, which each need a row of every class: {some_of(rare)}. "
            "Leave these labels out by a condition in where, add rows of them, or give files for val and test."
        )
    for name, count in counts.items():
        if count < len(class_counts):
            raise DataError(
                f"{name} would have {count} rows for {len(class_counts)} classes; "
                f"ask for at least {len(class_counts)} ({name}_size), or check that label_column is right."
            )


def _quotas(available: npt.NDArray[np.int_], size: int, reserve: int) -> npt.NDArray[np.int_]:
    """Divide a size over the classes by largest remainder: at least one each, and a reserve of each left over."""
    exact: npt.NDArray[np.float64] = available * size / available.sum()
    limit = available - reserve
    quotas: npt.NDArray[np.int_] = np.clip(np.floor(exact).astype(int), 1, limit)
    while quotas.sum() < size:
        quotas[np.argmax(np.where(quotas < limit, exact - quotas, -np.inf))] += 1
    while quotas.sum() > size:
        quotas[np.argmax(np.where(quotas > 1, quotas - exact, -np.inf))] -= 1
    return quotas
