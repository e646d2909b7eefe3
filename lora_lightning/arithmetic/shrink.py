"""Cut a wide adapter to a budget of parameters, an error or a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lora_lightning.arithmetic.adapter import LowRankAdapters
from lora_lightning.arithmetic.budget import Spectrum, ranks_for_error, ranks_within
from lora_lightning.arithmetic.combine import check_cut, cut_layer
from lora_lightning.arithmetic.factors import Decomposed, Factors, decompose
from lora_lightning.arithmetic.reading import read_adapter
from lora_lightning.arithmetic.report import ArithmeticReport, LayerCut, derived_record, relative_error
from lora_lightning.arithmetic.writing import Computed, write_computed
from lora_lightning.checkpoint.folder import refuse_taken
from lora_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["shrink"]


def shrink(
    adapter_dir: str | Path,
    *,
    output_dir: str | Path,
    num_parameters: int | None = None,
    max_error: float | None = None,
    rank: int | None = None,
    nested: Sequence[int] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    model: nn.Module | None = None,
) -> ArithmeticReport:
    """Cut an adapter to fewer parameters, and write it as a new folder in PEFT's format.

    Each layer's update B A is cut to its largest singular values (Eckart and Young: no update of that rank is nearer in
    the Frobenius norm). `num_parameters` and `max_error` deal ranks out over all layers at once: a rank of a layer
    costs `in + out` parameters and gains the square of its singular value, and every layer keeps at least one. The
    choice is the best for the Frobenius norm of all updates together; see `lora_lightning.arithmetic.budget` for the
    one exception. It need not be the best for a metric: measure that. Ranks go into the folder's `rank_pattern`.

    Args:
        adapter_dir: An adapter folder of this library or of PEFT, or a `.ckpt`; LoRA and what it computes the same as.
        output_dir: The folder to write; it must not exist, or be empty.
        num_parameters: Largest number of elements of all factors; copies (heads) do not count.
        max_error: Largest relative error of all layers together, at least 0 and below 1, with the fewest parameters.
        rank: Rank of every layer.
        nested: Ranks to serve at, such as `(4, 8, 16, 32)`: the largest is written, and the errors of all are reported.
            Components are in the order of their singular values, so that the first k are the best update of rank k;
            `at_rank` serves them.
        moments: Second moments of the hidden values A x of each layer, by path; see `input_moments`. With them,
            errors are those of the layers' outputs on these data, and not of the weights.
        model: The bare base, needed only for adapters whose folder does not say the update by itself.

    Returns:
        The folder, and the errors of each layer and of all.

    Raises:
        ConfigError: Not exactly one of the four budgets is given, one is out of its range, or `num_parameters` does not
            pay one rank a layer.
        CheckpointError: The adapter cannot be read or is not a low-rank update (DoRA), or the folder is taken. Nothing
            is written then.
    """
    ranks_nested = _check_budgets(num_parameters, max_error, rank, nested)
    output_dir = Path(output_dir)
    refuse_taken(output_dir)
    adapter = read_adapter(adapter_dir, model)
    decomposed = _decompose_all(adapter, moments)
    ranks = _choose(adapter, decomposed, num_parameters, max_error, max(ranks_nested) if ranks_nested else rank)
    updates: dict[str, Factors] = {}
    cuts: list[LayerCut] = []
    for path, one in decomposed.items():
        updates[path], cut = cut_layer(path, one, ranks[path], None)
        cuts.append(cut)
    errors = {one: _error_at(decomposed, one) for one in ranks_nested}
    operation = {
        "operation": "shrink",
        "source": str(adapter_dir),
        "num_parameters": num_parameters,
        "max_error": max_error,
        "rank": rank,
        "weighted_by_inputs": moments is not None,
    }
    _write(output_dir, adapter, updates, derived_record(operation, cuts, errors))
    what = "the outputs of the updates on the data" if moments is not None else "the adapter"
    return ArithmeticReport(output_dir=output_dir, operation=operation, layers=tuple(cuts), what=what, nested=errors)


def _check_budgets(
    num_parameters: int | None, max_error: float | None, rank: int | None, nested: Sequence[int] | None
) -> tuple[int, ...]:
    """Check the budgets, and return the nested ranks in order.

    Raises:
        ConfigError: Not exactly one is given, or one is out of its range.
    """
    budgets = {"num_parameters": num_parameters, "max_error": max_error, "rank": rank, "nested": nested}
    found = [name for name, value in budgets.items() if value is not None]
    if len(found) != 1:
        given = " and ".join(found) or "none"
        raise ConfigError(f"Give exactly one of num_parameters, max_error, rank and nested; got {given}.")
    check_cut(rank, max_error)
    counts = [num_parameters] if nested is None else list(nested)
    for value in counts:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{found[0]} is {budgets[found[0]]!r}; it takes whole numbers from 1.")
    if nested is not None and not counts:
        raise ConfigError("nested is empty; it takes ranks, such as (4, 8, 16, 32).")
    return tuple(sorted({value for value in counts if value is not None})) if nested is not None else ()


def _decompose_all(adapter: LowRankAdapters, moments: Mapping[str, Tensor] | None) -> dict[str, Decomposed]:
    """Decompose every layer's update.

    Raises:
        ConfigError: Moments are given, but not those of every layer.
    """
    missing = [] if moments is None else [path for path in adapter.layers if path not in moments]
    if missing:
        raise ConfigError(f"moments lacks {missing[0]!r}; give the moments of every layer (input_moments).")
    return {
        path: decompose(layer.factors, None if moments is None else moments[path])
        for path, layer in adapter.layers.items()
    }


def _choose(
    adapter: LowRankAdapters,
    decomposed: Mapping[str, Decomposed],
    num_parameters: int | None,
    max_error: float | None,
    rank: int | None,
) -> dict[str, int]:
    """Return the rank of each layer."""
    if rank is not None:
        return {path: min(rank, one.rank) for path, one in decomposed.items()}
    spectra = [Spectrum(one.energies, adapter.layers[path].factors.cost, one.rank) for path, one in decomposed.items()]
    if num_parameters is not None:
        ranks = ranks_within(spectra, num_parameters)
    else:
        assert max_error is not None
        ranks = ranks_for_error(spectra, max_error)
    return dict(zip(decomposed, ranks, strict=True))


def _error_at(decomposed: Mapping[str, Decomposed], rank: int) -> float:
    """Return the relative error of all layers together at one rank."""
    discarded = sum(one.discarded(rank) for one in decomposed.values() if rank < one.rank)
    return relative_error(discarded, sum(one.energy for one in decomposed.values()))


def _write(output_dir: Path, adapter: LowRankAdapters, updates: dict[str, Factors], derived: Mapping[str, Any]) -> None:
    computed = Computed(
        updates=updates,
        layout=adapter.layers,
        targets=[adapter.targets],
        rest=adapter.rest,
        copies=adapter.copies,
        facts=adapter.facts,
        base_fingerprint=adapter.base_fingerprint,
        base_sample=adapter.base_sample,
        files=adapter.files,
    )
    write_computed(output_dir, computed, derived)
