"""The command `lora-lightning combine`."""

from __future__ import annotations

from pathlib import Path

from lora_lightning.arithmetic.combine import CombineMethod
from lora_lightning.arithmetic.combine import combine as combine_adapters
from lora_lightning.checkpoint.folder import refuse_taken
from lora_lightning.commands._arithmetic import measurement_on, tell
from lora_lightning.errors import ConfigError


def combine(
    adapter: list[str],
    output_dir: str,
    rank: int | None = None,
    max_error: float | None = None,
    method: CombineMethod = "sum",
    density: float | None = None,
    seed: int | None = None,
    heads: str | None = None,
    ckpt_path: str | None = None,
) -> None:
    """Add, subtract or mix adapters of one base into a new adapter, and tell the error.

    The updates of the weights are added, and not the factors. Without --rank and --max_error the sum is exact.

    Args:
        adapter: An adapter as name=FOLDER:WEIGHT, such as de=runs/de/adapter:1.0 or fr=runs/fr/last.ckpt:-0.5; give it
            once for each adapter. Without :WEIGHT the weight is 1. Folders are ours or PEFT's.
        output_dir: The folder to write; it must not exist, or be empty.
        rank: Rank of every layer; left out, the sum is not cut.
        max_error: Largest relative error of each layer, in the Frobenius norm; each layer gets the lowest rank for it.
        method: sum (or task), ties, dare, dare_ties, or peft_linear (PEFT's linear, which does not add the updates).
        density: For ties, dare and dare_ties: share of the elements of each update that is kept; 0.2 by default.
        seed: For dare and dare_ties: seed of the draws; 0 by default.
        heads: Name of the adapter whose trained head is kept, where several have one.
        ckpt_path: A checkpoint whose task and validation data measure the result, beside its own adapter.
    """
    adapters = _parse(adapter)
    refuse_taken(Path(output_dir))
    measurement = measurement_on(ckpt_path)
    report = combine_adapters(
        adapters,
        output_dir=output_dir,
        rank=rank,
        max_error=max_error,
        method=method,
        density=density,
        seed=seed,
        heads=heads,
    )
    tell(f"Combined {', '.join(adapters)} into {report.output_dir}.", report, measurement)


def _parse(texts: list[str]) -> dict[str, tuple[str, float]]:
    """Return folder and weight of each adapter by its name.

    Raises:
        ConfigError: A text is not name=FOLDER:WEIGHT, or a name is given twice.

    Example:
        >>> _parse(["de=runs/de:1.5", "fr=C:/fr"])
        {'de': ('runs/de', 1.5), 'fr': ('C:/fr', 1.0)}
    """
    adapters: dict[str, tuple[str, float]] = {}
    for text in texts:
        name, is_named, rest = text.partition("=")
        folder, has_weight, weight = rest.rpartition(":")
        if not has_weight or not _is_number(weight):
            folder, weight = rest, "1"
        if not (is_named and name and folder):
            raise ConfigError(f"--adapter is {text!r}; it must be name=FOLDER:WEIGHT, such as de=runs/de/adapter:1.0.")
        if name in adapters:
            raise ConfigError(f"--adapter names {name!r} twice; give each adapter a name of its own.")
        adapters[name] = (folder, float(weight))
    return adapters


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
