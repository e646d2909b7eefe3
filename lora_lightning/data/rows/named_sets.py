"""Sets of validation, or of rows to predict, with names: each has a source of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from lora_lightning.data.sources import Source
from lora_lightning.errors import ConfigError

# Values are logged as val/<metric> beside val/<name>/<metric>; loggers that write files cannot keep both apart if a
# name is a metric's.
_METRICS = (
    *("accuracy", "average_precision", "exact_match", "f1", "f1_micro", "loss", "mse", "pearson", "perplexity"),
    *("precision", "recall", "rouge1", "rouge2", "rougeL", "samples", "spearman", "threshold"),
)
_NAME = re.compile(r"[\w.+-]+")


def named_by_text(sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return sources with paths as texts, as checkpoints keep them, and tuples as lists.

    Example:
        >>> named_by_text({"train": (PurePath("a.csv"), "b.csv"), "test": None})
        {'train': ['a.csv', 'b.csv'], 'test': None}
    """
    return {kind: _by_text(source) for kind, source in sources.items()}


def split_sources(sources: Mapping[str, Any]) -> dict[str, Source]:
    """Return the source of each split; a mapping for `val` or `predict` becomes a split `<kind>/<name>` for each name.

    Args:
        sources: For each kind of split its source, a mapping of names to sources, or None.

    Raises:
        ConfigError: A name cannot be used, a named set has no source, or `train` or `test` is a mapping.

    Example:
        >>> split_sources({"train": "a.csv", "val": {"reviews": "b.csv", "tweets": "c.csv"}})
        {'train': 'a.csv', 'val/reviews': 'b.csv', 'val/tweets': 'c.csv'}
    """
    found: dict[str, Source] = {}
    for kind, source in sources.items():
        if not isinstance(source, Mapping):
            found[kind] = source
            continue
        if kind not in ("val", "predict"):
            raise ConfigError(
                f"{kind} is a mapping ({_shown(source)}), which only val and predict may be; give {kind} one source."
            )
        _check_names(kind, source)
        found |= {f"{kind}/{name}": one for name, one in source.items()}
    return found


def _by_text(source: Any) -> Any:  # noqa: ANN401 - a source of any kind
    if isinstance(source, PurePath):
        return str(source)
    if isinstance(source, list | tuple):
        return [_by_text(one) if isinstance(one, PurePath) or _is_part(one) else one for one in source]
    # Of Mapping's own classes, such as a DatasetDict, nothing is known.
    return {name: _by_text(one) for name, one in source.items()} if type(source) is dict else source


def _is_part(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("source"), PurePath | tuple | list)


def _check_names(kind: str, sources: Mapping[Any, Source]) -> None:
    if not sources:
        raise ConfigError(
            f"{kind} is a mapping without an entry; name at least one source, such as {{reviews: a.csv}}."
        )
    use = "its values are logged as val/<name>/loss" if kind == "val" else "its file is named by it"
    for name, source in sources.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(
                f"{kind} has a set named {name!r}; expected a text of letters, digits, '_', '-', '+' and '.', since "
                f"{use}."
            )
        if kind == "val" and name.casefold() in map(str.casefold, _METRICS):
            raise ConfigError(
                f"val has a set named {name!r}, which is the name of a metric: its values would mix with those of all "
                "sets together. Choose another name."
            )
        if source is None:
            raise ConfigError(f"{kind} has a set {name!r} without a source; give it one, or leave it out.")
    if len({name.casefold() for name in sources}) < len(sources):
        raise ConfigError(
            f"Two sets of {kind} differ in the case of their letters only ({_shown(sources)}); rename one."
        )


def _shown(sources: Mapping[Any, Source]) -> str:
    return ", ".join(map(str, sources))
