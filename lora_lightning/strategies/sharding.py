"""Shard a frozen base over processes (FSDP2) and keep its adapters replicated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lora_lightning.adapters import iter_adapters
from lora_lightning.adapters.sharded import is_shard
from lora_lightning.adapters.walk import unwrap
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.errors import TargetError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_BUCKET = 16 * 2**20
"""Number of elements that are averaged in one collective."""


def shard_base(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the frozen weights of an adapted model over the processes of a mesh; the adapters stay replicated.

    Each block (an item of an outermost `nn.ModuleList`) is gathered just before it runs and freed afterwards, in
    forward and backward; weights outside of blocks are gathered with the model's own forward. Adapters are small, and
    their methods read and change them outside of any forward, so every process keeps all of them in their own
    precision; `average_gradients` keeps them equal. Weights that several blocks share are replicated, too.

    Args:
        model: A model with adapters, with the same weights on every process; changed in place.
        mesh: One dimension of processes.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    bare = unwrap(model)
    blocks = list(_blocks(bare))
    whole = _kept_whole(bare, blocks)
    for module in (*blocks, bare):
        fully_shard(module, mesh=mesh, ignored_params=whole)
    for module in bare.modules():
        if isinstance(module, FSDPModule):
            vars(module)["__deepcopy__"] = _refuse_deepcopy  # on the instance, where copy looks first


def broadcast_adapters(model: nn.Module) -> None:
    """Broadcast the adapters of rank 0 to every process, which may have used other seeds."""
    for tensor in _adapter_tensors(model):
        if not is_shard(tensor):
            dist.broadcast(tensor.detach(), 0)


def average_gradients(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Average the gradients of all whole trainable parameters over processes.

    A gradient that only some processes have counts as zero on the others; one that none has stays None.

    Args:
        module: Any module, with the same parameters on every process.
        group: The processes; None means all.
    """
    trained = [p for p in module.parameters() if p.requires_grad and not is_shard(p)]
    for parameters in _buckets(trained):
        _average(parameters, group)


def _average(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Average the gradients of parameters of one dtype and device, and the flags of who has one, in one collective."""
    here = [parameter.grad is not None for parameter in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    presence = torch.tensor(here, dtype=parameters[0].dtype, device=parameters[0].device)
    message = torch.cat([*(gradient.flatten() for gradient in gradients), presence])
    dist.all_reduce(message, group=group)
    message /= dist.get_world_size(group)
    *means, presence = torch.split(message, [*(gradient.numel() for gradient in gradients), len(parameters)])
    torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(means, gradients, strict=True)])
    if not all(here):  # only then, since asking makes the host wait for the device
        for parameter, gradient, share in zip(parameters, gradients, presence.tolist(), strict=True):
            parameter.grad = gradient if share else None


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield parameters of one dtype and device together, up to a bucket's size."""
    by_kind: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for alike in by_kind.values():
        bucket: list[nn.Parameter] = []
        for parameter in alike:
            if bucket and sum(other.numel() for other in bucket) + parameter.numel() > _BUCKET:
                yield bucket
                bucket = []
            bucket.append(parameter)
        yield bucket


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the items of the outermost module lists that have parameters of their own, each once."""
    inside: tuple[str, ...] = ()
    seen: set[nn.Module] = set()
    for path, module in model.named_modules():
        if RESERVED in path.split(".") or not isinstance(module, nn.ModuleList) or path.startswith(inside):
            continue
        inside = (*inside, f"{path}.")
        for block in module:
            if block not in seen and any(True for _ in block.parameters()):
                seen.add(block)
                yield block


def _kept_whole(model: nn.Module, blocks: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Return the parameters that are not to be sharded.

    Beside the adapters' own these are trainable ones, scalars, packed ones, and those that more than one block, or a
    block and the rest of the model, use.
    """
    whole = {tensor for tensor in _adapter_tensors(model) if isinstance(tensor, nn.Parameter)}
    uses: Counter[nn.Parameter] = Counter()
    for block in blocks:
        uses.update(set(block.parameters()))
    in_blocks = {module for block in blocks for module in block.modules()}
    outside = {
        parameter
        for module in model.modules()
        if module not in in_blocks
        for parameter in module.parameters(recurse=False)
    }
    uses.update(outside)
    for parameter, count in uses.items():
        if count > 1 or parameter.requires_grad or parameter.ndim == 0 or not parameter.is_floating_point():
            whole.add(parameter)
    return whole


def _adapter_tensors(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of all adapters, in the model's order, shared ones once."""
    found: dict[int, Tensor] = {}
    for _, _, adapter in iter_adapters(model):
        for tensor in (*adapter.parameters(), *adapter.buffers()):
            found.setdefault(id(tensor), tensor)
    return list(found.values())


def _refuse_deepcopy(memo: dict[int, Any]) -> NoReturn:
    """Raise TargetError: a copy would need the shards of all processes."""
    del memo
    raise TargetError(
        "A copy needs whole parameters, and this model's are sharded over several processes (FSDP); save a checkpoint "
        "and load it in one process."
    )
