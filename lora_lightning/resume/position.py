"""Where a run stands in its data, and what a data loader needs to go there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable


class Layout(NamedTuple):
    """How the rows of an epoch are shared out.

    Args:
        num_replicas: Ranks that share the rows.
        batch_size: Rows in a batch of one rank.
        num_workers: Processes of one rank that make batches; 1 also where the rank makes them itself.
    """

    num_replicas: int = 1
    batch_size: int = 1
    num_workers: int = 1


class Passed(NamedTuple):
    """Batches that each rank has trained on.

    Args:
        num_batches: Their number, on each rank.
        layout: How the rows were shared out meanwhile.
    """

    num_batches: int
    layout: Layout


@dataclass(frozen=True)
class Position:
    """A place in the data: an epoch, and what has passed of it, one entry for each layout in turn.

    Example:
        >>> position = Position(3).after(5, Layout(2, 8)).after(2, Layout(2, 8)).after(1, Layout(1, 16))
        >>> position.num_batches, [passed.num_batches for passed in position.passed]
        (8, [7, 1])
    """

    epoch: int = 0
    passed: tuple[Passed, ...] = ()

    @property
    def num_batches(self) -> int:
        """The batches of the epoch that each rank has trained on."""
        return sum(passed.num_batches for passed in self.passed)

    def after(self, num_batches: int, layout: Layout) -> Self:
        """Return the position after so many more batches."""
        earlier, last = self.passed, Passed(num_batches, layout)
        if earlier and earlier[-1].layout == layout:
            earlier, last = earlier[:-1], Passed(earlier[-1].num_batches + num_batches, layout)
        return type(self)(self.epoch, (*earlier, last) if last.num_batches else earlier)

    def plain(self) -> dict[str, Any]:
        """Return the position as numbers and lists."""
        return {"epoch": self.epoch, "passed": [[passed.num_batches, *passed.layout] for passed in self.passed]}

    @classmethod
    def from_plain(cls, state: dict[str, Any]) -> Self:
        """Build a position from what `plain` returned."""
        passed = (Passed(num_batches, Layout(*layout)) for num_batches, *layout in state["passed"])
        return cls(state["epoch"], tuple(passed))


@runtime_checkable
class SeekableLoader(Protocol):
    """A data loader whose batches depend on its settings and the epoch alone, and which can start at any of them."""

    @property
    def layout(self) -> Layout:
        """How it shares out the rows."""
        ...

    def seekable(self) -> bool:
        """Return whether `seek` works; not where something else took the place of its sampler."""
        ...

    def seek(self, position: Position) -> None:
        """Let the next iteration begin at a position; its length then counts what has passed too."""
        ...
