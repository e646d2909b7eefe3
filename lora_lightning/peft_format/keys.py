"""Which tensor of a PEFT file belongs where: the spellings that PEFT and its users have written over the years."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lora_lightning.errors import CheckpointError

PREFIX = "base_model.model."

# With or without the adapter's name (`default`), which a state dict taken from a running PEFT model has.
_LINEAR = re.compile(r"(.+)\.(lora_A|lora_B)(?:\.[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_(A|B)(?:\.[^.]+)?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?")
_COPY = re.compile(r"(.+?)\.modules_to_save\.(.+)")
_BASE = re.compile(r"(.+)\.base_layer\.(.+)")
_ORIGINAL = re.compile(r"(.+)\.original_module\.(.+)")


@dataclass(frozen=True)
class SortedTensors:
    """The tensors of a PEFT file, sorted.

    Args:
        low_rank: `<host path>.lora_A`, `.lora_B` or `.magnitude` -> tensor, as `adapter_state_dict` names and shapes
            them.
        copies: Parameters of modules trained as copies, by their names in the base model.
        base: Parameters of the base model that PEFT put into the file beside the adapter (embedding layers).
    """

    low_rank: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)

    @property
    def hosts(self) -> list[str]:
        """Paths of the modules that low-rank tensors belong to."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.low_rank))


def sort_tensors(
    tensors: Mapping[str, Tensor], saved: Sequence[str], base_names: Collection[str], source: str
) -> SortedTensors:
    """Sort the tensors of a PEFT file by what they belong to.

    Args:
        tensors: By the file's own keys.
        saved: Paths of the modules that are trained as copies.
        base_names: Names of the base model's parameters and buffers.
        source: The file, for messages.

    Returns:
        The tensors by our names.

    Raises:
        CheckpointError: A key is of no known kind, or two keys mean the same tensor.
    """
    result, unknown = SortedTensors(), []
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        if _ORIGINAL.fullmatch(path):
            continue
        target, name, value = _place(path, tensor, saved, base_names, result)
        if target is None:
            unknown.append(key)
        elif name in target:
            raise CheckpointError(f"{source} holds {name!r} twice, under two spellings; save one adapter alone.")
        else:
            target[name] = value
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} of {len(tensors)} keys belong to nothing in this model "
            f"({', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''}); load the base that it was trained on."
        )
    return result


def _place(
    path: str, tensor: Tensor, saved: Sequence[str], base_names: Collection[str], result: SortedTensors
) -> tuple[dict[str, Tensor] | None, str, Tensor]:
    """Return where a tensor goes, its name there, and the tensor in our shape; no place where it has none."""
    if match := _LINEAR.fullmatch(path):
        return result.low_rank, f"{match[1]}.{match[2]}", _as_matrix(tensor)
    if match := _EMBEDDING.fullmatch(path):
        return result.low_rank, f"{match[1]}.lora_{match[2]}", _as_matrix(tensor)
    if match := _MAGNITUDE.fullmatch(path):
        return result.low_rank, f"{match[1]}.magnitude", tensor.flatten()
    if match := _COPY.fullmatch(path):
        inside = f"{match[1]}.{match[2]}"
        without_adapter = f"{match[1]}.{match[2].partition('.')[2]}"
        return result.copies, inside if inside in base_names else without_adapter, tensor
    if any(path.startswith(f"{module}.") for module in saved):
        return result.copies, path, tensor
    if match := _BASE.fullmatch(path):
        path = f"{match[1]}.{match[2]}"
    return (result.base if path in base_names else None), path, tensor


def _as_matrix(tensor: Tensor) -> Tensor:
    """Return a factor as `[r, in]` or `[out, r]`: a convolution's has its kernel's dimensions too."""
    return tensor.flatten(1) if tensor.dim() > 2 else tensor
