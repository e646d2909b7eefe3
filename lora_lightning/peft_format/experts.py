"""How PEFT spells LoRA on the 3-D parameters of experts: its `target_parameters`, written against PEFT 0.21.

PEFT wraps a module of experts once for each parameter, one wrapper inside the other in the order in which the module
lists its parameters, so that the last one is outermost. A wrapper's A is `[experts * r, in]`, expert by expert, and its
B is `[out, r * experts]`, component by component.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lora_lightning.adapters.attach import join
from lora_lightning.adapters.experts import expert_weights
from lora_lightning.errors import CheckpointError

_WRAPPED = ".base_layer"


def parameter_paths(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the paths of all 3-D parameters of experts, in the order in which PEFT comes across them."""
    return [
        join(path, name)
        for path, module in modules.items()
        for name in module._parameters
        if name in expert_weights(module)
    ]


def wrapper_paths(parameters: Sequence[str]) -> dict[str, str]:
    """Return the path of each parameter's wrapper inside PEFT's model, without PEFT's prefix.

    Args:
        parameters: The paths of the adapted parameters, in the order of `parameter_paths`.

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
    """Return PEFT's A and B of our `[experts, r, in]` and `[experts, out, r]`."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def unflatten(name: str, factor: Tensor, r: int) -> Tensor:
    """Return our A or B, which `name` ends in, of PEFT's.

    Raises:
        CheckpointError: The tensor's size is no multiple of the rank.
    """
    is_a = name.endswith("lora_A")
    num_rows = factor.shape[0 if is_a else -1] if factor.dim() == 2 else 0
    if not num_rows or num_rows % r:
        raise CheckpointError(
            f"{name!r} has shape {list(factor.shape)}, which does not hold a whole number of experts at rank {r}; get "
            "the adapter again."
        )
    return factor.view(-1, r, factor.shape[1]) if is_a else factor.view(len(factor), r, -1).permute(2, 0, 1)


def own_names(tensors: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Give the low-rank tensors of experts our names and shapes; leave the others as they are.

    Args:
        tensors: By `<path in PEFT's model>.lora_A` or `.lora_B`.
        ranks: The rank of each adapted parameter by its path, in the order of `parameter_paths`.

    Raises:
        CheckpointError: See `unflatten`.
    """
    owners = {wrapper: path for path, wrapper in wrapper_paths(list(ranks)).items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        wrapper, _, factor = name.rpartition(".")
        if wrapper in owners and factor in ("lora_A", "lora_B"):
            path = owners[wrapper]
            renamed[f"{path}.{factor}"] = unflatten(f"{path}.{factor}", tensor, ranks[path])
        else:
            renamed[name] = tensor
    return renamed
