"""Load a backbone by Hub name, by folder, or from inside an installed package."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_lightning.errors import BackboneError
from lora_lightning.paths import resolve

log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Backbone:
    """A loaded model and what its files did not hold.

    Args:
        model: The model, in evaluation mode as transformers returns it.
        new_modules: Paths of the modules whose weights were not in the files and were drawn at random: the head of a
            model that was pretrained without one. They must be trained.
    """

    model: nn.Module
    new_modules: tuple[str, ...]


def locate(name: str) -> str:
    """Return what transformers should load: a folder's path, or the Hub name unchanged.

    Args:
        name: `pkg://package/sub/folder`, a folder, or a Hub name (`owner/model`).

    Raises:
        BackboneError: A folder was meant and is not there, or holds no model.
    """
    looks_local = name.startswith(("pkg://", ".", "/", "~")) or name.count("/") > 1 or name.endswith("/")
    folder = resolve(name) if looks_local else Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BackboneError(f"The folder {name!r} holds no model: it has no config.json.")
        return str(folder)
    if looks_local:
        near = _nearest_folders(folder)
        raise BackboneError(f"The backbone folder {name!r} does not exist{near}.")
    return name


def load_backbone(name: str, auto_class: str, *, dtype: str = "auto", **config: Any) -> Backbone:  # noqa: ANN401
    """Load a transformers model.

    Args:
        name: See `locate`.
        auto_class: Name of transformers' class, such as `AutoModelForSequenceClassification`.
        dtype: `auto` keeps the files' own, else `float32`, `bfloat16` or `float16`.
        **config: Overrides of the model's config, such as `id2label`.

    Returns:
        The model and the modules whose weights are new.

    Raises:
        BackboneError: It is not there, cannot be reached, or is of a kind that `auto_class` does not know.
    """
    if dtype not in DTYPES:
        raise BackboneError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    source = locate(name)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    cls = getattr(transformers, auto_class)
    try:
        model, info = cls.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, output_loading_info=True, **config
        )
    except OSError as error:
        raise BackboneError(_why_not_loaded(name, source, error)) from error
    except ValueError as error:
        raise BackboneError(f"{auto_class} cannot load {name!r}: {_first_line(error)}") from error
    new = dict.fromkeys(key.rpartition(".")[0] for key in sorted(info["missing_keys"]))
    if new:
        log.info("Not in %s, so drawn at random and trained: %s", name, ", ".join(new))
    return Backbone(model, tuple(new))


def load_tokenizer(name: str) -> Any:  # noqa: ANN401 - transformers' tokenizers share no public base class
    """Load the tokenizer of a backbone.

    Raises:
        BackboneError: It is not there or cannot be reached.
    """
    source = locate(name)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BackboneError(f"The tokenizer of {name!r} cannot be loaded: {_first_line(error)}") from error


def _why_not_loaded(name: str, source: str, error: OSError) -> str:
    if source != name or Path(source).is_dir():
        return f"The backbone {name!r} cannot be loaded: {_first_line(error)}"
    return (
        f"The backbone {name!r} is neither a folder here nor in the local Hub cache, and the Hub did not give it "
        "(offline, misspelt, or private). Give a folder, pkg://package/folder, or download it first."
    )


def _nearest_folders(folder: Path) -> str:
    try:
        names = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    except OSError:
        return f", nor does {str(folder.parent)!r}"
    near = difflib.get_close_matches(folder.name, names, n=3) or sorted(names)[:3]
    return f"; nearest there: {', '.join(near)}" if near else ""


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
