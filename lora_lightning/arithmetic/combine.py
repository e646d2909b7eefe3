"""Add, subtract and mix adapters of one base into a new one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lora_lightning.arithmetic.adapter import Layer, LowRankAdapters
from lora_lightning.arithmetic.agreement import (
    check_agreement,
    check_corrections,
    common_facts,
    common_files,
    common_fingerprint,
    common_sample,
    kept_tensors,
)
from lora_lightning.arithmetic.budget import rank_for_error
from lora_lightning.arithmetic.elementwise import dense_sum
from lora_lightning.arithmetic.factors import (
    Decomposed,
    Factors,
    add,
    decompose,
    decompose_dense,
    distance_squared,
)
from lora_lightning.arithmetic.reading import read_adapter
from lora_lightning.arithmetic.report import ArithmeticReport, LayerCut, derived_record
from lora_lightning.arithmetic.writing import Computed, copies_in, write_computed
from lora_lightning.checkpoint.folder import refuse_taken
from lora_lightning.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["combine"]

CombineMethod = Literal["sum", "task", "ties", "dare", "dare_ties", "peft_linear"]
DEFAULT_DENSITY = 0.2
"""Share of the elements that TIES keeps in its paper."""

_DENSE = ("ties", "dare", "dare_ties")
_RANDOM = ("dare", "dare_ties")


def combine(
    adapters: Mapping[str, float | tuple[str | Path, float]],
    *,
    output_dir: str | Path,
    rank: int | None = None,
    max_error: float | None = None,
    method: CombineMethod = "sum",
    density: float | None = None,
    seed: int | None = None,
    heads: str | None = None,
    model: nn.Module | None = None,
) -> ArithmeticReport:
    """Add the updates of several adapters of one base, with weights, into a new adapter folder.

    What is added are the updates s B A of the weights, layer by layer, and not the factors: for LoRA and what it
    computes the same as, of any ranks and scalings (rsLoRA, LoRA-FA, PiSSA, OLoRA, EVA, AdaLoRA, VeRA, Delta-LoRA).
    Without `rank` and `max_error` the sum is exact, of the lowest rank that it has. With them it is cut to the best
    update of its rank by QR of both factors and an SVD of the small core, in float64; no dense update is built. The
    folder is in PEFT's format; its manifest holds the errors.

    Args:
        adapters: Weights by adapter folder or `.ckpt`, `{"runs/de": 1.0, "runs/fr": -0.5}`, or `(folder, weight)` by
            name, or weights by the names of adapters that are attached to `model`, `{"de": 1.0, "fr": -0.5}`. Weights
            may be negative or 0.
        output_dir: The folder to write; it must not exist, or be empty.
        rank: Rank of every layer, where the sum has more.
        max_error: Largest relative error of each layer, at least 0 and below 1; each gets the lowest rank for it.
        method: `sum`, also known as task arithmetic, `task` (Ilharco et al. 2023, arXiv 2212.04089). `ties` keeps of
            each update the elements with the largest magnitudes, elects a sign for each and takes the mean of the
            updates that agree (Yadav et al. 2023, arXiv 2306.01708). `dare` drops elements at random and rescales the
            others before adding (Yu et al. 2024, arXiv 2311.03099); `dare_ties` elects signs among these. These work
            layer by layer on the dense update, which has full rank: give `rank` or `max_error`. `peft_linear` is PEFT's
            `linear`: it adds A's and B's apart, which is not the sum of the updates, and reports its error against it.
        density: For `ties`, `dare` and `dare_ties`: share of the elements of each update that is kept, above 0 and at
            most 1; 0.2 by default.
        seed: For `dare` and `dare_ties`: seed of the draws, 0 by default.
        heads: The adapter whose trained copies of modules (heads), labels and tokenizer are kept where they differ.
        model: The model whose adapters are named; or the bare base, needed only for adapters whose folder does not say
            the update by itself; see `lora_lightning.arithmetic.reading.read_adapter`.

    Returns:
        The folder, and the errors of each layer and of all.

    Raises:
        ConfigError: A setting is out of its range or does not go with the method.
        CheckpointError: An adapter cannot be read, is not a low-rank update (DoRA), or they differ in their base or in
            what does not add; or the folder is taken. Nothing is written then.
    """
    sources = {name: _source(name, value) for name, value in adapters.items()}
    weights = {name: weight for name, (_, weight) in sources.items()}
    settings = CombineSettings.of(method, rank, max_error, density, seed, weights)
    output_dir = Path(output_dir)
    refuse_taken(output_dir)
    found = {name: read_adapter(source, model) for name, (source, _) in sources.items()}
    check_agreement(found)
    check_corrections(found, weights)
    rest = kept_tensors(found, weights, heads)
    facts, files = common_facts(found, weights, heads), common_files(found, weights, heads)
    updates, cuts = combine_updates(found, weights, settings)
    operation = {
        "operation": "combine",
        **settings.plain(),
        "adapters": {name: {"source": str(source), "weight": weight} for name, (source, weight) in sources.items()},
    }
    computed = Computed(
        updates=updates,
        layout={path: layer for one in found.values() for path, layer in one.layers.items()},
        targets=[one.targets for one in found.values()],
        rest=rest,
        copies=copies_in(list(found.values()), rest),
        facts=facts,
        base_fingerprint=common_fingerprint(found),
        base_sample=common_sample(found),
        files=files,
    )
    write_computed(output_dir, computed, derived_record(operation, cuts))
    return ArithmeticReport(output_dir=output_dir, operation=operation, layers=tuple(cuts), what=settings.what)


@dataclass(frozen=True, kw_only=True)
class CombineSettings:
    """How to combine; for each see `combine`."""

    method: CombineMethod
    rank: int | None
    max_error: float | None
    density: float
    seed: int

    @classmethod
    def of(
        cls,
        method: CombineMethod,
        rank: int | None,
        max_error: float | None,
        density: float | None,
        seed: int | None,
        weights: Mapping[str, float],
    ) -> CombineSettings:
        """Check the settings.

        Raises:
            ConfigError: One is out of its range, or does not go with another.
        """
        known = get_args(CombineMethod)
        if method not in known:
            raise ConfigError(f"method is {method!r}, which is unknown; it must be one of {', '.join(known)}.")
        if not weights:
            raise ConfigError("There is no adapter to combine; name at least one.")
        wrong = [name for name, weight in weights.items() if not _is_number(weight)]
        if wrong:
            raise ConfigError(f"The weight of {wrong[0]} is {weights[wrong[0]]!r}; it must be a finite number.")
        check_cut(rank, max_error)
        if density is not None and method not in _DENSE:
            raise ConfigError(f"density is for {', '.join(_DENSE)}; {method} keeps every element. Leave it out.")
        if density is not None and not (_is_number(density) and 0 < density <= 1):
            raise ConfigError(f"density is {density!r}; it must be above 0 and at most 1.")
        if seed is not None and method not in _RANDOM:
            raise ConfigError(f"seed is for {', '.join(_RANDOM)}; {method} draws nothing. Leave it out.")
        if method in _DENSE and rank is None and max_error is None:
            raise ConfigError(
                f"{method} gives updates of full rank; set rank or max_error to say how far they are cut."
            )
        if method == "peft_linear" and (rank is not None or max_error is not None):
            raise ConfigError(
                "peft_linear adds A's and B's and so keeps the rank that the adapters have; leave rank and max_error "
                "out, or use sum."
            )
        return cls(
            method=method,
            rank=rank,
            max_error=max_error,
            density=DEFAULT_DENSITY if density is None else density,
            seed=seed or 0,
        )

    @property
    def what(self) -> str:
        """What the errors are relative to."""
        return f"the full {self.method} update" if self.method in _DENSE else "the sum of the updates"

    def plain(self) -> dict[str, Any]:
        """Return the settings that count, in plain types."""
        every = {"method": self.method, "rank": self.rank, "max_error": self.max_error}
        if self.method in _DENSE:
            every["density"] = self.density
        if self.method in _RANDOM:
            every["seed"] = self.seed
        return every


def check_cut(rank: int | None, max_error: float | None) -> None:
    """Refuse a rank or an error that is out of its range, and both at once.

    Raises:
        ConfigError: They are.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank is {rank!r}; it must be a whole number from 1.")
    if max_error is not None and not (_is_number(max_error) and 0 <= max_error < 1):
        raise ConfigError(f"max_error is {max_error!r}; it must be at least 0 and below 1.")
    if rank is not None and max_error is not None:
        raise ConfigError("rank and max_error both say how far to cut; give one of them.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _source(name: str, value: Any) -> tuple[str | Path, float]:  # noqa: ANN401 - checked here
    """Return the folder and the weight of one entry.

    Raises:
        ConfigError: It is neither a weight nor a pair.
    """
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ConfigError(f"{name} is given as {value!r}; it must be a weight, or a pair (folder, weight).")
        source, weight = value
        return source, weight
    return name, value


def combine_updates(
    adapters: Mapping[str, LowRankAdapters], weights: Mapping[str, float], settings: CombineSettings
) -> tuple[dict[str, Factors], list[LayerCut]]:
    """Return the combined update of every layer by its path, and what each cost.

    Args:
        adapters: Adapters of one base, by name.
        weights: Their weights, by name.
        settings: How to combine.
    """
    paths = dict.fromkeys(path for one in adapters.values() for path in one.layers)
    found = {path: _combine_layer(path, adapters, weights, settings) for path in paths}
    return {path: factors for path, (factors, _) in found.items()}, [cut for _, cut in found.values()]


def _combine_layer(
    path: str, adapters: Mapping[str, LowRankAdapters], weights: Mapping[str, float], settings: CombineSettings
) -> tuple[Factors, LayerCut]:
    """Return the combined update of one layer, and what it cost."""
    layers = {name: one.layers[path] for name, one in adapters.items() if path in one.layers}
    weighted = {name: layer.factors.times(weights[name]) for name, layer in layers.items()}
    if settings.method == "peft_linear":
        return _peft_linear(path, layers, weights, add(weighted.values()))
    if settings.method in _DENSE:
        dense = dense_sum(
            weighted,
            path,
            drops=settings.method in _RANDOM,
            elects=settings.method in ("ties", "dare_ties"),
            density=settings.density,
            seed=settings.seed,
        )
        return cut_layer(path, decompose_dense(dense), settings.rank, settings.max_error)
    total = add(weighted.values())
    decomposed = decompose(total)
    is_exact = settings.rank is None and settings.max_error is None
    if is_exact and total.rank == decomposed.rank:  # then the factors stay as they were trained
        squared = decomposed.energy
        return total, _layer_cut(path, total, total.rank, squared, 0.0)
    return cut_layer(path, decomposed, settings.rank, settings.max_error)


def cut_layer(path: str, update: Decomposed, rank: int | None, max_error: float | None) -> tuple[Factors, LayerCut]:
    """Cut a decomposed update to a rank or an error; with neither, to the rank that it has."""
    kept = update.rank if rank is None else min(rank, update.rank)
    if max_error is not None:
        kept = rank_for_error(update.energies, update.rank, max_error)
    error_squared = update.discarded(kept) if kept < update.rank else 0.0
    factors = update.cut(kept)
    return factors, _layer_cut(path, factors, update.rank, update.energy, error_squared)


def _layer_cut(path: str, factors: Factors, full_rank: int, squared: float, error_squared: float) -> LayerCut:
    return LayerCut(
        path=path,
        rank=factors.rank,
        full_rank=full_rank,
        num_parameters=factors.rank * factors.cost,
        squared=squared,
        error_squared=error_squared,
    )


def _peft_linear(
    path: str, layers: Mapping[str, Layer], weights: Mapping[str, float], total: Factors
) -> tuple[Factors, LayerCut]:
    """Add A's and B's apart, each times the root of weight and scaling, as PEFT's `linear` does.

    Raises:
        CheckpointError: The ranks differ.
    """
    ranks = {name: layer.factors.rank for name, layer in layers.items()}
    if len(set(ranks.values())) > 1:
        listed = ", ".join(f"{name}: {rank}" for name, rank in ranks.items())
        raise CheckpointError(
            f"peft_linear adds A's and B's, which takes equal ranks, and {path!r} has others ({listed}); use sum."
        )
    first = next(iter(layers.values())).factors
    a, b = torch.zeros_like(first.a), torch.zeros_like(first.b)
    for name, layer in layers.items():
        root = math.sqrt(abs(weights[name]) * layer.scaling)
        a += math.copysign(root, weights[name]) * layer.factors.a
        b += root / layer.scaling * layer.factors.b  # the scaling is folded into B
    factors = Factors(a, b)
    exact = decompose(total)
    return factors, _layer_cut(path, factors, exact.rank, exact.energy, distance_squared(factors, total))
