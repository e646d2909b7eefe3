"""The architectures to draw from: small random models that read text, images, audio or both, and what to feed them."""

from __future__ import annotations

import inspect
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.fuzz import plain
from tests.fuzz.shrink import FRAMES, IMAGE, small
from tests.prompts import zoo

Batch = dict[str, Tensor]
PLAIN = "plain"
"""Models of torch alone."""
MAX_PARAMETERS = 8_000_000
MAX_VALUES = 50_000
"""Values of an image, a recording or a series; models that take nothing smaller are left out."""
OTHER_HEADS = {
    "image": "AutoModelForImageClassification",
    "audio": "AutoModelForAudioClassification",
    "ctc": "AutoModelForCTC",
    "speech": "AutoModelForSpeechSeq2Seq",
    "video": "AutoModelForVideoClassification",
    "segments": "AutoModelForSemanticSegmentation",
    "image-text": "AutoModelForImageTextToText",
    "zero-shot": "AutoModelForZeroShotImageClassification",
    "bare": "AutoModel",
}
"""Heads beside those of `zoo.KINDS`, as transformers' automatic classes."""

_SPECIAL: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class Architecture:
    """One architecture with one head.

    Args:
        name: The model type.
        kind: The head, a key of `zoo.KINDS` or of `OTHER_HEADS`.
    """

    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.name}/{self.kind}"


class UnbuildableError(ValueError):
    """An architecture does not become small, or does not compute, by the settings that most share."""


def build(architecture: Architecture, dtype: torch.dtype) -> tuple[Any, Batch]:
    """Return a small model in eval mode, nothing of it at zero, and a batch for it.

    Raises:
        UnbuildableError: It does not become small, or does not compute the same twice.
    """
    if architecture.kind == PLAIN:
        return plain.build(architecture.name).to(dtype), plain.batch(architecture.name, dtype)
    try:
        model = zoo.build(architecture.name, architecture.kind) if is_text(architecture) else _other(architecture)
        model = model.to(dtype)
    except Exception as error:
        raise UnbuildableError(f"{architecture}: {type(error).__name__}: {error}") from error
    for batch in _candidates(model):
        if _computes(model, batch):
            return model, batch
    raise UnbuildableError(f"{architecture}: computes nothing of the known inputs")


def vary(model: Any, batch: Batch, rng: random.Random) -> None:
    """Change what users change of a model before they adapt it: ties, attention, what trains already.

    Raises:
        UnbuildableError: It does not compute any more.
    """
    if not hasattr(model, "config"):
        return
    try:
        if rng.random() < 0.2 and not getattr(model.config, "tie_word_embeddings", True):
            model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = True
            model.tie_weights()
        if rng.random() < 0.2:
            parts = list(model.config.sub_configs)[1:]  # the others keep theirs
            model.set_attn_implementation(dict.fromkeys(parts, "eager") if parts else "eager")
    except Exception as error:
        raise UnbuildableError(f"{type(model).__name__} does not take it: {error}") from error
    frozen = rng.random() < 0.2
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(not (frozen and index % 2))
    if not _computes(model, batch):
        raise UnbuildableError(f"{type(model).__name__} computes no more")


def is_text(architecture: Architecture) -> bool:
    """Return whether an architecture is one of the language models of the prompts' sweep."""
    return architecture.kind in zoo.KINDS


def _other(architecture: Architecture) -> nn.Module:
    cls = transformers.CONFIG_MAPPING[architecture.name]
    config = cls(**small(cls(), _SPECIAL.get(architecture.name)))
    auto = getattr(transformers, OTHER_HEADS[architecture.kind])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise UnbuildableError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _computes(model: nn.Module, batch: Batch) -> bool:
    """Return whether a model gives the same numbers, and finite ones, twice."""
    try:
        with torch.no_grad():
            first, second = outputs(model, batch), outputs(model, batch)
    except Exception:
        return False
    return bool(first) and all(map(torch.equal, first, second)) and all(bool(one.isfinite().all()) for one in first)


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return all floating-point tensors of a model's output, caches left out; the main one comes first."""
    return list(_floats(model(**batch)))


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, dict):
        inside = [value for key, value in output.items() if "past_key" not in key and "cache" not in key]
        yield from itertools.chain.from_iterable(_floats(value) for value in inside)
    elif isinstance(output, list | tuple):
        yield from itertools.chain.from_iterable(_floats(value) for value in output)


def _candidates(model: Any) -> Iterator[Batch]:
    """Iterate over batches that a model may take, going by the names of what its forward takes."""
    taken = list(inspect.signature(model.forward).parameters)
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    choices: list[list[Batch]] = []
    for name in taken:
        if name in _SHAPES:
            shapes = [shape for shape in _SHAPES[name](model.config) if math.prod(shape) <= MAX_VALUES]
            choices.append([{name: torch.randn(shape, generator=generator).to(dtype)} for shape in shapes])
        elif name in ("input_ids", "decoder_input_ids"):
            ids = torch.randint(5, 40, (2, 7 if name == "input_ids" else 4), generator=generator)
            choices.append([{name: ids}])
    for chosen in itertools.islice(itertools.product(*choices), 24):
        yield {key: value for one in chosen for key, value in one.items()}
    of_text = [some[0] for some in choices if some and next(iter(some[0])).endswith("input_ids")]
    if of_text:  # models of images and text read text alone too
        yield {key: value for one in of_text for key, value in one.items()}


def _images(config: Any) -> list[tuple[int, ...]]:
    channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
    side = getattr(getattr(config, "vision_config", config), "image_size", IMAGE)
    side = side if type(side) is int else IMAGE
    frames = getattr(config, "num_frames", FRAMES)
    return [(2, channels, side, side), (2, frames, channels, side, side), (2, 3, IMAGE, IMAGE), (2, 3, 64, 64)]


def _audio(config: Any) -> list[tuple[int, ...]]:
    mels = getattr(config, "num_mel_bins", 8)
    return [(2, 800), (2, 1, 800), (2, getattr(config, "max_length", 64), mels), (2, 64, mels)]


def _features(config: Any) -> list[tuple[int, ...]]:
    mels = getattr(config, "num_mel_bins", getattr(config, "feature_projection_input_dim", 8))
    length = 2 * getattr(config, "max_source_positions", 16)
    return [(2, mels, length), (2, length, mels), (2, 8, 32), (2, 32, 8)]


def _series(config: Any) -> list[tuple[int, ...]]:
    return [(2, getattr(config, "context_length", 16), getattr(config, "num_input_channels", 1))]


_SHAPES: dict[str, Callable[[Any], list[tuple[int, ...]]]] = {
    "pixel_values": _images,
    "input_values": _audio,
    "input_features": _features,
    "past_values": _series,
}


def every() -> list[Architecture]:
    """Return every architecture with every head that some mapping of transformers lists."""
    from transformers.models.auto import modeling_auto as auto

    text = [Architecture(name, kind) for kind, (_, known) in zoo.KINDS.items() for name in known]
    mappings = {
        "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "audio": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        "ctc": auto.MODEL_FOR_CTC_MAPPING_NAMES,
        "speech": auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        "video": auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
        "segments": auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
        "image-text": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "zero-shot": auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "bare": auto.MODEL_MAPPING_NAMES,
    }
    other = [Architecture(name, kind) for kind, known in mappings.items() for name in known]
    return text + other + [Architecture(name, PLAIN) for name in plain.MODELS]
