"""Load a backbone by Hub name, by folder, or from inside an installed package."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_lightning.adapters.targets import is_within
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.backbones.reasons import reason_of
from lora_lightning.backbones.skeleton import build_skeleton, is_without_weights
from lora_lightning.backbones.storage.gguf import gguf_folder, gguf_parts
from lora_lightning.backbones.storage.quantized import load_quantized
from lora_lightning.backbones.view import view_of
from lora_lightning.errors import BackboneError
from lora_lightning.paths import nearest_in_folder, resolve

log = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Backbone:
    """A loaded model and what its files did not hold.

    Args:
        model: The model, in evaluation mode as transformers returns it.
        new_modules: Paths of the modules whose weights were not in the files and were drawn at random: the head of a
            model that was pretrained without one. They must be trained.
        storage: How the weights are stored and computed with, in a line for the log; None where they are dense.
    """

    model: nn.Module
    new_modules: tuple[str, ...]
    storage: str | None = None


def locate(name: str) -> str:
    """Return what transformers should load: a folder's path, or the Hub name unchanged.

    Args:
        name: `pkg://package/sub/folder`, a folder, a Hub name (`owner/model`), or a GGUF file, which is converted to a
            folder the first time (see `lora_lightning.backbones.storage.gguf`).

    Raises:
        BackboneError: A folder was meant and is not there, or the Hub does not give that name.
    """
    parts = gguf_parts(name)
    if parts is not None:
        return str(gguf_folder(parts))
    looks_local = name.startswith(("pkg://", ".", "/", "~")) or name.count("/") > 1 or name.endswith("/")
    folder = resolve(name) if looks_local else Path(name)
    if folder.is_dir():
        return str(folder)
    if looks_local:
        raise BackboneError(f"The backbone folder {name!r} does not exist; {nearest_in_folder(folder)}.")
    _require_reachable(name)
    return name


def load_backbone(
    name: str,
    auto_class: str,
    *,
    dtype: str = "auto",
    quantization: Quantization | None = None,
    keep_dense: Sequence[str] = (),
    **config: Any,  # noqa: ANN401 - overrides of any type
) -> Backbone:
    """Load a transformers model.

    Args:
        name: Hub name, folder, `pkg://package/folder` or GGUF file; as `locate` takes it.
        auto_class: Name of transformers' class, such as `AutoModelForSequenceClassification`.
        dtype: `auto` keeps the files' own, else `float32`, `bfloat16` or `float16`.
        quantization: Store the linear layers in 4 or 8 bits, on torch's default device; None stores them dense.
        keep_dense: Modules (path suffixes) to leave out of quantization, beside heads and poolers.
        **config: Overrides of the model's config, such as `id2label`.

    Returns:
        The model and the modules whose weights are new.

    Raises:
        BackboneError: It is not there, cannot be reached, or is of a kind that `auto_class` does not know.
    """
    if dtype not in DTYPES:
        raise BackboneError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if is_without_weights():
        return Backbone(*build_skeleton(name, auto_class, dtype, config))
    source = locate(name)
    if Path(source).is_dir() and not Path(source, "config.json").is_file():
        raise BackboneError(f"The folder {name!r} holds no model: it has no config.json.")
    import transformers

    cls, storage = getattr(transformers, auto_class), None
    try:
        with quiet(transformers.utils.logging):
            if quantization is None:
                model, info = cls.from_pretrained(
                    source, dtype=dtype, trust_remote_code=False, output_loading_info=True, **config
                )
            else:
                model, info, storage = load_quantized(
                    cls, source, quantization, dtype=dtype, keep_dense=keep_dense, **config
                )
    except BackboneError:
        raise
    except OSError as error:
        raise BackboneError(f"The backbone {name!r} cannot be loaded: {reason_of(error)}") from error
    except (ValueError, RuntimeError) as error:
        raise BackboneError(f"{auto_class} cannot load {name!r}: {reason_of(error)}") from error
    new = tuple(dict.fromkeys(key.rpartition(".")[0] for key in sorted(info["missing_keys"])))
    _refuse_missing_body(name, model, new)
    if new:
        log.info("Not in %s, so drawn at random and trained: %s", name, ", ".join(new))
    return Backbone(model, new, storage)


def load_tokenizer(name: str, **options: Any) -> Any:  # noqa: ANN401 - tokenizers share no public base class
    """Load the tokenizer of a backbone.

    Args:
        name: Hub name, folder, `pkg://package/folder` or GGUF file; as `locate` takes it.
        **options: Settings of the tokenizer, such as `add_prefix_space`.

    Raises:
        BackboneError: It is not there or cannot be reached.
    """
    source = locate(name)
    if Path(source).is_dir() and not any(Path(source, file).is_file() for file in _TOKENIZER_FILES):
        # transformers would build a tokenizer with an empty vocabulary from config.json alone
        raise BackboneError(
            f"The folder {name!r} holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); name one."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise BackboneError(f"The tokenizer of {name!r} cannot be loaded: {reason_of(error)}") from error


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Make a transformers model recompute activations in backward.

    Raises:
        BackboneError: The model has no gradient checkpointing.
    """
    # transformers 5.20 renamed it; 5.5 to 5.19 know the old name only.
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable: Any = getattr(model, name, None)
        if enable is not None:
            try:
                enable()
            except ValueError as error:
                raise BackboneError(f"{reason_of(error)} Leave gradient_checkpointing off.") from error
            return
    raise BackboneError(f"{type(model).__name__} has no gradient checkpointing; leave it off.")


@contextmanager
def quiet(logging_module: Any) -> Iterator[None]:  # noqa: ANN401 - transformers.utils.logging
    """Hold back transformers' table of missing weights and its progress bars; we say what matters ourselves."""
    verbosity, has_bars = logging_module.get_verbosity(), logging_module.is_progress_bar_enabled()
    logging_module.set_verbosity_error()
    logging_module.disable_progress_bar()
    try:
        yield
    finally:
        logging_module.set_verbosity(verbosity)
        if has_bars:
            logging_module.enable_progress_bar()


def _refuse_missing_body(name: str, model: nn.Module, new: tuple[str, ...]) -> None:
    """Raise BackboneError where weights of the body are missing; a head, or a pooler below it, may be new."""
    heads = view_of(model).head_paths()
    body = [path for path in new if not is_within(path, heads) and "pooler" not in path.split(".")]
    if body:
        raise BackboneError(
            f"The files of {name!r} lack weights for {len(body)} modules inside {type(model).__name__} "
            f"({', '.join(body[:3])}{', …' if len(body) > 3 else ''}), which would stay random: they belong to another "
            "architecture than their config.json says."
        )


def _require_reachable(name: str) -> None:
    """Ask once whether the local cache or the Hub has a model, since transformers would retry for a minute.

    Raises:
        BackboneError: Neither has it.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=10)
    except HFValidationError as error:
        raise BackboneError(f"{name!r} is neither a folder here nor a Hub name: {reason_of(error)}") from error
    except RepositoryNotFoundError as error:
        raise BackboneError(
            f"{name!r} is neither a folder here nor a model on the Hub; check the name, and log in if it is private."
        ) from error
    except Exception as error:  # whatever the network raises: there is no common class
        raise BackboneError(
            f"{name!r} is neither a folder here nor in the local Hub cache, and the Hub cannot be reached. "
            "Give a folder, pkg://package/folder, or download it first."
        ) from error
