"""Data sets from the Hub, and those that `datasets` saved in a folder."""

from __future__ import annotations

import re
from typing import Any

from lora_lightning.data.sources.files import CONLL, SUFFIXES
from lora_lightning.data.sources.text import COMPRESSED
from lora_lightning.errors import DataError
from lora_lightning.paths import nearest_in_folder, resolve

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# Each folder that `datasets` saves contains one of these.
_SAVED = ("state.json", "dataset_dict.json")
# The names under which data sets keep the rows for each use, the usual one first.
_SPLITS = {
    "train": ("train",),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test",),
    "predict": ("test",),
}


def is_hub_name(source: object) -> bool:
    """Return whether a source is the name of a Hub data set: `name` or `owner/name`, without a local file of this name.

    Example:
        >>> is_hub_name("stanfordnlp/imdb"), is_hub_name("data/tweets.csv"), is_hub_name("./tweets")
        (True, False, False)
    """
    if not isinstance(source, str) or not _HUB_NAME.fullmatch(source):
        return False
    is_file = source.lower().endswith((*SUFFIXES, *CONLL, *COMPRESSED))
    return not is_file and not resolve(source).exists()


def hub_rows(name: str, subset: str | None, role: str) -> Any:  # noqa: ANN401 - a datasets.Dataset
    """Load the rows of a Hub data set for a role.

    Args:
        name: The data set's name.
        subset: Its configuration, if it has several.
        role: `train`, `val`, `test` or `predict`.

    Raises:
        DataError: It cannot be loaded, or has no rows for the role.
    """
    import datasets

    try:
        splits = datasets.load_dataset(name, subset)
    except Exception as error:  # every storage and network library below raises its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"{name!r} is neither a file or folder here nor a data set that could be had from the Hub: {reason} "
            f"If a local path was meant: {nearest_in_folder(resolve(name))}."
        ) from error
    return _for_role(splits, role, f"Hub data set {name!r}")


def is_saved_dataset(source: str) -> bool:
    """Return whether a source is a folder that `datasets` saved."""
    folder = resolve(source)
    return any((folder / name).is_file() for name in _SAVED)


def saved_rows(folder: str, role: str) -> Any:  # noqa: ANN401 - a datasets.Dataset
    """Load the rows of a folder that `datasets` saved.

    Raises:
        DataError: It has several splits, and none for the role.
    """
    import datasets

    found = datasets.load_from_disk(str(resolve(folder)))
    return _for_role(found, role, f"folder {folder!r}") if isinstance(found, datasets.DatasetDict) else found


def _for_role(splits: Any, role: str, whose: str) -> Any:  # noqa: ANN401 - a datasets.DatasetDict
    found = next((split for split in _SPLITS[role] if split in splits), None)
    if found is None:
        raise DataError(
            f"The {whose} has no split {_SPLITS[role][0]!r} to use for {role}; it has: {', '.join(splits)}."
        )
    return splits[found]
