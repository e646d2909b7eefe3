"""PEFT's format of LoRA on single parameters, its `target_parameters`; written against PEFT 0.21.

PEFT wraps a module once for each of its parameters, one wrapper inside the other in the order in which the module lists
its parameters, so that the last one is outermost. For a 3-D parameter a wrapper's A is `[experts * r, in]`, expert by
expert, and its B is `[out, r * experts]`, component by component; for a 2-D one they are those of a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lora_lightning.adapters.experts import expert_weights
from lora_lightning.adapters.parameters import bare_weights
from lora_lightning.adapters.walk import join
from lora_lightning.adapters.weights import find_codec, read_weight
from lora_lightning.errors import CheckpointError

_WRAPPED = ".base_layer"


@dataclass(frozen=True, kw_only=True)
class AdaptedParameter:
    """One parameter that PEFT can adapt by its name.

    Args:
        path: Its path, the module's included.
        target: Its target here: the path of its layer, or its own path.
        is_swapped: Whether our A and B are PEFT's B and A transposed, because rows and columns are exchanged.
    """

    path: str
    target: str
    is_swapped: bool = False

    @property
    def is_layer(self) -> bool:
        """Whether it is the weight of a layer, which is adapted here as a layer."""
        return self.target != self.path


def parameters_of(modules: Mapping[str, nn.Module]) -> list[AdaptedParameter]:
    """Return all parameters that can be adapted by their names, in the order in which PEFT visits them."""
    found: list[AdaptedParameter] = []
    for path, module in modules.items():
        if _is_dense_layer(module):
            found.append(
                AdaptedParameter(path=join(path, "weight"), target=path, is_swapped=_is_stored_transposed(module))
            )
            continue
        names, experts = expert_weights(module) or bare_weights(module), expert_weights(module)
        for name in module._parameters:
            if name in names:
                own = join(path, name)
                is_swapped = name not in experts and bool(getattr(module, "is_transposed", False))
                found.append(AdaptedParameter(path=own, target=own, is_swapped=is_swapped))
    return found


def _is_dense_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer with an unquantized 2-D weight."""
    codec = find_codec(module)
    weight = module._parameters.get("weight")
    return codec is not None and codec.write is not None and weight is not None and weight.dim() == 2


def _is_stored_transposed(module: nn.Module) -> bool:
    """Return whether a layer stores its weight `[in, out]`."""
    return read_weight(module).stride() != module._parameters["weight"].stride()  # type: ignore[union-attr]  # it has one


def wrapper_paths(parameters: Sequence[str]) -> dict[str, str]:
    """Return the path of each parameter's wrapper inside PEFT's model, without PEFT's prefix.

    Args:
        parameters: The paths of the adapted parameters, in the order of `parameters_of`.

    Example:
        >>> wrapper_paths(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
        {'mlp.experts.gate_up_proj': 'mlp.experts.base_layer', 'mlp.experts.down_proj': 'mlp.experts'}
    """
    hosts = [path.rpartition(".")[0] for path in parameters]
    return {
        path: host + _WRAPPED * hosts[index + 1 :].count(host)
        for index, (path, host) in enumerate(zip(parameters, hosts, strict=True))
    }


def flatten(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return PEFT's A and B of our `[experts, r, in]` and `[experts, out, r]`, or of one matrix each."""
    if a.dim() == 2:
        return a, b
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def swap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B of the transposed update."""
    return b.mT, a.mT


def unflatten(name: str, factor: Tensor, r: int) -> Tensor:
    """Return our A or B, which `name` ends in, of PEFT's for a 3-D parameter.

    Raises:
        CheckpointError: The tensor's size is not a multiple of the rank.
    """
    is_a = name.endswith("lora_A")
    num_rows = factor.shape[0 if is_a else -1] if factor.dim() == 2 else 0
    if not num_rows or num_rows % r:
        raise CheckpointError(
            f"{name!r} has shape {list(factor.shape)}, which does not hold a whole number of experts at rank {r}; get "
            "the adapter again."
        )
    return factor.view(-1, r, factor.shape[1]) if is_a else factor.view(len(factor), r, -1).permute(2, 0, 1)


def own_names(
    tensors: Mapping[str, Tensor],
    adapted: Sequence[AdaptedParameter],
    ranks: Mapping[str, int],
    dims: Mapping[str, int],
) -> dict[str, Tensor]:
    """Give the low-rank tensors of adapted parameters our names and shapes; leave the others as they are.

    Args:
        tensors: By `<path in PEFT's model>.lora_A` or `.lora_B`.
        adapted: The parameters, in the order of `parameters_of`.
        ranks: The rank of each by its path.
        dims: How many dimensions each has, likewise.

    Raises:
        CheckpointError: A tensor does not fit the parameter that it is for.
    """
    wrappers = wrapper_paths([one.path for one in adapted])
    renamed = dict(tensors)
    found: dict[str, Tensor] = {}
    for one in adapted:
        for factor, other in ("lora_A", "lora_B"), ("lora_B", "lora_A"):
            tensor = renamed.pop(f"{wrappers[one.path]}.{factor}", None)
            if tensor is None:
                continue
            if dims[one.path] == 3:
                tensor = unflatten(f"{one.path}.{factor}", tensor, ranks[one.path])
            name = other if one.is_swapped else factor
            found[f"{one.target}.{name}"] = (tensor.mT if one.is_swapped else tensor).contiguous()
    return {**renamed, **found}
