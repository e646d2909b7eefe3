"""Draw rows of several sources in the proportion of their weights."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

if TYPE_CHECKING:
    import numpy.typing as npt

_Item = TypeVar("_Item")
_DRAWN_TOGETHER = 1024


class Mixture:
    """Draws as many rows as there are, each source's share by its weight.

    A source with more rows than its share contributes a different part of them in each epoch. A source with fewer is
    repeated: every row equally often, except for the remainder of the division.

    Args:
        parts: Index of the source of each row `[rows]`.
        weights: Weight of each source, greater than 0; only their proportion counts.

    Example:
        >>> mixture = Mixture(np.array([0, 0, 0, 1]), [1.0, 1.0])
        >>> sorted(mixture.draw(np.random.default_rng(0)).tolist())[-2:]
        [3, 3]
    """

    def __init__(self, parts: npt.NDArray[Any], weights: Sequence[float]) -> None:
        self._rows_of = [np.flatnonzero(parts == part) for part in range(len(weights))]
        self.quotas = quotas(weights, len(parts))

    def draw(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return the indices of the rows of an epoch, source by source `[rows]`.

        Args:
            generator: Decides which rows of a source are left out or repeated once more.
        """
        drawn = [_draw(rows, quota, generator) for rows, quota in zip(self._rows_of, self.quotas, strict=True)]
        return np.concatenate(drawn)

    def describe(self, names: Sequence[str]) -> str:
        """Return how many rows an epoch draws of each source.

        Args:
            names: The names of the sources.
        """
        shares = [f"{quota} of {name}" for quota, name in zip(self.quotas, names, strict=True)]
        return f"an epoch draws {sum(self.quotas)} rows: {', '.join(shares)}."


def mixture_of(
    rows: npt.NDArray[Any], num_rows: Sequence[int], names: Sequence[str], weights: Sequence[float] | None
) -> Mixture | None:
    """Return a sampler of encoded rows by the weights of their sources, and log the numbers; None without weights.

    Args:
        rows: For each encoded row the index of its row `[encoded rows]`.
        num_rows: Number of rows of each source.
        names: The names of the sources.
        weights: Weight of each source.
    """
    if weights is None:
        return None
    mixture = Mixture(source_of_rows(rows, num_rows), weights)
    rank_zero_info(f"Data: {mixture.describe(names)}")
    return mixture


def drawn_fingerprint(fingerprint: str, weights: Sequence[float] | None) -> str:
    """Return the fingerprint of rows and of the weights of their sources; without weights it is unchanged."""
    if weights is None:
        return fingerprint
    return hashlib.sha256(json.dumps([fingerprint, list(weights)]).encode()).hexdigest()


def source_of_rows(rows: npt.NDArray[Any], num_rows: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the index of the source of each row, where rows stand in the order of their sources.

    Args:
        rows: Indices of rows.
        num_rows: Number of rows of each source.

    Example:
        >>> source_of_rows(np.array([0, 1, 2]), [2, 1]).tolist()
        [0, 0, 1]
    """
    return np.searchsorted(np.cumsum(num_rows), rows, side="right")


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """Divide a number of rows in the proportion of weights, by largest remainder.

    Example:
        >>> quotas([0.7, 0.3], 10), quotas([1, 1, 1], 4)
        ([7, 3], [2, 1, 1])
    """
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    whole = np.floor(exact).astype(int)
    by_remainder = np.argsort(whole - exact, kind="stable")
    whole[by_remainder[: total - whole.sum()]] += 1
    return whole.tolist()


def _draw(rows: npt.NDArray[np.int64], quota: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    num_repeats, num_more = divmod(quota, len(rows))
    more = generator.permutation(rows)[:num_more]
    return np.concatenate([np.tile(rows, num_repeats), more])


def interleave(
    sources: Sequence[Callable[[bool], Iterator[_Item]]], weights: Sequence[float], generator: np.random.Generator
) -> Iterator[_Item]:
    """Draw from several streams by weight until each has been read once; a stream that ends earlier restarts.

    Args:
        sources: Each starts a new stream; the argument is whether this is the first one.
        weights: Weight of each stream, greater than 0.
        generator: Decides which stream is next.
    """
    streams = [begin(True) for begin in sources]
    is_open = [True] * len(streams)
    shares = np.asarray(weights, dtype=np.float64)
    for part in _choices(shares / shares.sum(), generator):
        item = next(streams[part], None)
        if item is None:
            is_open[part] = False
            if not any(is_open):
                return
            streams[part] = sources[part](False)
            item = next(streams[part], None)
        # A stream of which this worker has no share stays empty.
        if item is not None:
            yield item


def _choices(shares: npt.NDArray[np.float64], generator: np.random.Generator) -> Iterator[int]:
    """Return indices drawn by their shares, without end."""
    return itertools.chain.from_iterable(
        generator.choice(len(shares), size=_DRAWN_TOGETHER, p=shares).tolist() for _ in itertools.repeat(None)
    )
