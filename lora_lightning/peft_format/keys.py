"""Mapping from the tensors of a PEFT file to ours, with the key formats of all versions of PEFT."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_lightning.errors import CheckpointError
from lora_lightning.peft_format.names import PREFIX

_COPY = re.compile(r"(.+?)\.modules_to_save\.(.+)")
_BASE = re.compile(r"(.+)\.base_layer\.(.+)")
_ORIGINAL = re.compile(r".+\.(?:original_module\..+|trainable_tokens_original.*)")
_NAME = r"(?:\.[^.]+)?"  # the adapter's name (`default`), which a state dict taken from a running PEFT model has


@dataclass(frozen=True)
class Spelling:
    """The key format of one tensor of an adapter.

    Args:
        pattern: Regular expression for the whole key, without PEFT's prefix; its first group is the host's path.
        name: Our name, with references to its groups.
        convert: Gives the tensor our shape.
    """

    pattern: str
    name: str
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a factor as `[r, in]` or `[out, r]`: a convolution's has its kernel's dimensions too."""
    return tensor.flatten(1) if tensor.dim() > 2 else tensor


def as_vector(tensor: Tensor) -> Tensor:
    """Return a tensor in one dimension."""
    return tensor.flatten()


TOKENS = Spelling(rf"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta{_NAME}", r"\1.tokens")
LORA = (
    Spelling(rf"(.+)\.(lora_A|lora_B){_NAME}\.weight", r"\1.\2", as_matrix),
    Spelling(rf"(.+)\.lora_embedding_(A|B){_NAME}", r"\1.lora_\2", as_matrix),
    Spelling(rf"(.+)\.lora_magnitude_vector{_NAME}(?:\.weight)?", r"\1.magnitude", as_vector),
    Spelling(rf"(.+)\.lora_B{_NAME}\.bias", r"\1.lora_bias"),
)
ADALORA = (
    Spelling(rf"(.+)\.(lora_A|lora_B){_NAME}", r"\1.\2", as_matrix),
    Spelling(rf"(.+)\.lora_E{_NAME}", r"\1.lora_E", as_vector),
    Spelling(rf"(.+)\.ranknum{_NAME}", r"\1.ranknum"),
)
VERA = (Spelling(rf"(.+)\.vera_lambda_(b|d){_NAME}", r"\1.lambda_\2"),)
IA3 = (Spelling(rf"(.+)\.ia3_l{_NAME}", r"\1.ia3_l", as_vector),)


@dataclass(frozen=True)
class SortedTensors:
    """The tensors of a PEFT file, sorted.

    Args:
        own: The adapter's, by the names and in the shapes of `adapter_state_dict`.
        copies: Parameters of modules trained as copies, by their names in the base model.
        base: Parameters of the base model that PEFT stored with the adapter (embeddings, biases).
        tokens: Rows of embeddings that were trained individually, by the paths of the embeddings.
    """

    own: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)

    @property
    def hosts(self) -> list[str]:
        """Paths of the modules that the adapter's tensors belong to."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.own))


def sort_tensors(
    tensors: Mapping[str, Tensor],
    spellings: Sequence[Spelling],
    saved: Sequence[str],
    base_names: Collection[str],
    source: str,
) -> SortedTensors:
    """Sort the tensors of a PEFT file by their owner.

    Args:
        tensors: By the file's own keys.
        spellings: Key formats of the type of adapter.
        saved: Paths of the modules that are trained as copies.
        base_names: Names of the base model's parameters and buffers.
        source: The file, for messages.

    Returns:
        The tensors by our names.

    Raises:
        CheckpointError: A key is of no known kind, or two keys give the same tensor different values.
    """
    result, unknown = SortedTensors(), []
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        if _ORIGINAL.fullmatch(path):
            continue
        target, name, value = _place(path, tensor, spellings, saved, base_names, result)
        if target is None:
            unknown.append(key)
        elif name in target and not _is_equal(target[name], value):
            raise CheckpointError(
                f"{source} holds {name!r} twice, under two spellings and with different values; save one adapter alone."
            )
        else:
            target[name] = value
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} of {len(tensors)} keys belong to nothing in this model "
            f"({', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''}); load the base that it was trained on."
        )
    return result


def _is_equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _place(
    path: str,
    tensor: Tensor,
    spellings: Sequence[Spelling],
    saved: Sequence[str],
    base_names: Collection[str],
    result: SortedTensors,
) -> tuple[dict[str, Tensor] | None, str, Tensor]:
    """Return the group of a tensor, its name there, and the tensor in our shape; no group if it is unknown."""
    if match := re.fullmatch(TOKENS.pattern, path):
        return result.tokens, match[1], tensor
    for spelling in spellings:
        if match := re.fullmatch(spelling.pattern, path):
            return result.own, match.expand(spelling.name), spelling.convert(tensor)
    if match := _COPY.fullmatch(path):
        inside = f"{match[1]}.{match[2]}"
        without_adapter = f"{match[1]}.{match[2].partition('.')[2]}"
        return result.copies, inside if inside in base_names else without_adapter, tensor
    if any(path.startswith(f"{module}.") for module in saved):
        return result.copies, path, tensor
    if match := _BASE.fullmatch(path):
        path = f"{match[1].removesuffix('.token_adapter')}.{match[2]}"
    return (result.base if path in base_names else None), path, tensor
