"""What adding and cutting adapters costs: the error of each layer and of all, and the parameters that are left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_LAYERS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """What became of one layer's update.

    Args:
        path: The layer's path in the base model.
        rank: Rank that is written.
        full_rank: Rank of the exact update.
        num_parameters: Elements of both factors.
        squared: Squared Frobenius norm of the exact update; of its outputs, where inputs weigh it.
        error_squared: Squared norm of what is written minus the exact update, likewise.
    """

    path: str
    rank: int
    full_rank: int
    num_parameters: int
    squared: float
    error_squared: float

    @property
    def error(self) -> float:
        """Relative error."""
        return relative_error(self.error_squared, self.squared)


def relative_error(error_squared: float, squared: float) -> float:
    """Return ‖error‖ / ‖exact‖; 0 where both are 0, and infinity where the exact one alone is."""
    if error_squared <= 0:
        return 0.0
    return math.sqrt(error_squared / squared) if squared > 0 else math.inf


def total_error(layers: Iterable[LayerCut]) -> float:
    """Return the relative error of all layers together."""
    cuts = list(layers)
    return relative_error(sum(cut.error_squared for cut in cuts), sum(cut.squared for cut in cuts))


@dataclass(frozen=True, kw_only=True)
class ArithmeticReport:
    """What `combine` or `shrink` wrote.

    Args:
        output_dir: The folder.
        operation: `combine` or `shrink`, with its settings; as in the manifest.
        layers: Every layer.
        what: What the errors are relative to, such as `the sum of the updates`.
        nested: For nested ranks, the relative error of all layers at each.
    """

    output_dir: Path
    operation: Mapping[str, Any]
    layers: tuple[LayerCut, ...]
    what: str
    nested: Mapping[int, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Relative error of all layers together, in the Frobenius norm."""
        return total_error(self.layers)

    @property
    def num_parameters(self) -> int:
        """Elements of all factors; copies (heads) do not count."""
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer by its path."""
        return {layer.path: layer.rank for layer in self.layers}

    def lines(self) -> list[str]:
        """Tell the result in a few lines: in total, and the layers with the largest errors."""
        ranks = sorted(self.ranks.values())
        span = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        lines = [
            f"{len(self.layers)} layers, rank {span}, {self.num_parameters:,} parameters; relative error against "
            f"{self.what}: {self.error:.3g}."
        ]
        worst = sorted((layer for layer in self.layers if layer.error > 0), key=lambda layer: -layer.error)
        lines += [
            f"  {layer.path}: rank {layer.rank} of {layer.full_rank}, error {layer.error:.3g}"
            for layer in worst[:MAX_LAYERS_SHOWN]
        ]
        if len(worst) > MAX_LAYERS_SHOWN:
            lines.append(f"  … and {len(worst) - MAX_LAYERS_SHOWN} more layers with smaller errors")
        lines += [f"  at rank {rank}: error {error:.3g}" for rank, error in self.nested.items()]
        return lines


def derived_record(
    operation: Mapping[str, Any], layers: Iterable[LayerCut], nested: Mapping[int, float] | None = None
) -> dict[str, Any]:
    """Return what the manifest keeps of an operation and its errors, in plain types."""
    cuts = list(layers)
    record: dict[str, Any] = {
        **operation,
        "error": total_error(cuts),
        "layers": {cut.path: {"rank": cut.rank, "error": cut.error} for cut in cuts},
    }
    return {**record, "nested": {str(rank): error for rank, error in nested.items()}} if nested else record
