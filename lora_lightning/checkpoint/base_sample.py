"""Sampled values of the base in each checkpoint and adapter folder, which identify the base even if it is quantized."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_lightning.adapters import iter_adapters
from lora_lightning.adapters.weights import RESERVED, Host, HostKind, codec_of
from lora_lightning.backbones.storage.samples import sample_positions
from lora_lightning.errors import CheckpointError
from lora_lightning.methods.trainable_tokens import TrainableTokensAdapter

BASE_SAMPLE_NAME = "base_sample.safetensors"
NUM_VALUES = 64
_KEPT = "_lora_lightning_base_sample"
_QUANTIZED = "quantized"
_DENSE = 32

# By the bits: how far a weight may be from another one that is the same but for quantizing, relative to its size (root
# mean square), over all weights and for each. Measured: NF4 9 % and FP4 12 %, 13 and 21 % with heavy tails, up to 33 %
# for one weight and two ways of quantizing; 8 bits 1 and 2 %. Weights that have nothing in common differ by 140 %.
# What is not quantized beside may have been loaded in bfloat16.
MAX_ERRORS = {4: (0.5, 0.8), 8: (0.1, 0.2), _DENSE: (0.02, 0.02)}


@dataclass
class BaseSample:
    """Sampled values of each base weight under an adapter.

    Args:
        values: By the weight's path, up to 64 values as float32.
        quantized: Bits of the weights whose values come from a quantized weight instead of the files, by path.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    quantized: dict[str, int] = field(default_factory=dict)

    @property
    def is_quantized(self) -> bool:
        """Whether some values are those of a quantized weight."""
        return bool(self.quantized)

    def of(self, paths: Collection[str]) -> BaseSample:
        """Return the values of some weights alone."""
        return BaseSample(
            values={path: one for path, one in self.values.items() if path in paths},
            quantized={path: bits for path, bits in self.quantized.items() if path in paths},
        )

    def add(self, path: str, values: Tensor, bits: int | None) -> None:
        """Add evenly strided values of a weight's larger sample, with the bits of their quantization, if any."""
        count = min(NUM_VALUES, len(values))
        chosen = torch.arange(count) * (len(values) - 1) // max(count - 1, 1)
        self.values[path] = values[chosen].clone()
        if bits is not None:
            self.quantized[path] = bits

    @classmethod
    def from_plain(cls, data: object, source: str) -> BaseSample | None:
        """Build a sample from the result of `plain`; None for a checkpoint of an older version without one.

        Raises:
            CheckpointError: It was changed since it was written.
        """
        if data is None:
            return None
        parts = data if isinstance(data, dict) else {}
        values, quantized = parts.get("values"), parts.get(_QUANTIZED)
        if not isinstance(values, dict) or not all(isinstance(one, Tensor) for one in values.values()):
            raise CheckpointError(f"{source} holds no values of its base where they belong; use another checkpoint.")
        if not isinstance(quantized, dict) or not all(bits in MAX_ERRORS for bits in quantized.values()):
            raise CheckpointError(f"{source} does not say which values of its base are quantized; use another one.")
        return cls(values={path: one.float().cpu() for path, one in values.items()}, quantized=dict(quantized))

    def plain(self) -> dict[str, Any]:
        """Return the sample as tensors and plain types, for checkpoints."""
        return {"values": dict(self.values), _QUANTIZED: dict(self.quantized)}

    def metadata(self) -> dict[str, str]:
        """Return the metadata of the safetensors file."""
        return {_QUANTIZED: json.dumps(self.quantized, sort_keys=True)}


def keep_base_sample(model: nn.Module, sampled: BaseSample) -> None:
    """Store the sample of the base with a model's adapters when its fingerprint is taken: later it may be sharded."""
    for _, _, adapter in iter_adapters(model):
        adapter.__dict__[_KEPT] = sampled
        return


def base_sample_of(model: nn.Module) -> BaseSample | None:
    """Return the sample that `keep_base_sample` stored, or None."""
    kept = (adapter.__dict__.get(_KEPT) for _, _, adapter in iter_adapters(model))
    return next((one for one in kept if one is not None), None)


def read_base_sample(folder: Path) -> BaseSample | None:
    """Read the sample of an adapter folder; None in a folder that PEFT or an older version of this library wrote.

    Raises:
        CheckpointError: It is damaged.
    """
    path = folder / BASE_SAMPLE_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            quantized = json.loads((file.metadata() or {}).get(_QUANTIZED, "{}"))
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}); get the adapter again.") from error
    if not isinstance(quantized, dict) or not all(bits in MAX_ERRORS for bits in quantized.values()):
        raise CheckpointError(f"{path} does not say which of its values are quantized; get the adapter again.")
    return BaseSample(values=values, quantized=quantized)


def why_another_base(mine: BaseSample, theirs: BaseSample) -> str | None:
    """Return why two bases are not the same up to quantizing, as the end of a sentence, or None.

    Args:
        mine: The base of the model at hand.
        theirs: The base that an adapter was trained on.
    """
    if mine.values.keys() != theirs.values.keys():
        return "its adapters stand on other weights"
    errors, powers, coarsest = torch.zeros(()), torch.zeros(()), _DENSE
    for path, own in mine.values.items():
        other = theirs.values[path]
        if own.shape != other.shape:
            return f"the weight of {path!r} has another size"
        bits = min(mine.quantized.get(path, _DENSE), theirs.quantized.get(path, _DENSE))
        error, power = (own - other).square().sum(), torch.maximum(own.square().sum(), other.square().sum())
        if _relative(error, power) > MAX_ERRORS[bits][1]:
            return _too_far(f"values of {path!r}", _relative(error, power))
        errors, powers, coarsest = errors + error, powers + power, min(coarsest, bits)
    total = _relative(errors, powers)
    return _too_far("values of its weights", total) if total > MAX_ERRORS[coarsest][0] else None


def _too_far(what: str, relative: float) -> str:
    return f"{what} differ by {relative:.0%} of their size, more than quantizing makes them differ"


def _relative(error: Tensor, power: Tensor) -> float:
    """Return the root of an error relative to a power; both are sums of squares."""
    return float((error / power.clamp_min(1e-30)).sqrt())


def without_trained_rows(host: Host, shape: tuple[int, ...], values: Tensor) -> Tensor:
    """Return a weight's sample with zeros for those rows of an embedding that are trained alone.

    The adapter replaces these rows, so that their values do not matter; after an extension of the vocabulary they are
    random.

    Args:
        host: The host.
        shape: Its weight's, `(out, in)`.
        values: Its sample.
    """
    stack = host._modules.get(RESERVED)
    trained = [] if stack is None else stack.of_kind(TrainableTokensAdapter)
    if not trained:
        return values
    num_out, num_in = shape
    positions = sample_positions(num_out * num_in)
    is_embedding = codec_of(host).kind is HostKind.EMBEDDING
    tokens = positions % num_in if is_embedding else positions // num_in
    replaced = torch.isin(tokens, torch.tensor(trained[0].rows.token_indices))
    return torch.where(replaced, torch.zeros(()), values)
