"""The adapter-only state dict, and loading it with exact keys and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import Adapter
from lora_lightning.adapters.sharded import is_shard
from lora_lightning.adapters.walk import adapter_names, attached_methods, check_names, iter_adapters, join, only
from lora_lightning.errors import CheckpointError

__all__ = ["adapter_state_dict", "load_adapter_state_dict", "refresh"]


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Return the tensors that adapters own, and nothing of the base model.

    Args:
        model: A model with adapters.
        name: The name of the adapter; None for all that the model has.

    Returns:
        Detached tensors (sharing memory with the model) by `<host path in the base model>.<name>`, such as
        `encoder.layer.0.attention.self.query.lora_A`; a trained copy's parameters under the original's own names, and
        a tensor that several adapters share under the first host's. Where the model has several adapters and none is
        named, `<adapter's name>:` stands before each.

    Raises:
        ConfigError: No adapter has this name.

    Example:
        >>> from lora_lightning.adapters import attach
        >>> from lora_lightning.methods import LoRA
        >>> model = nn.Sequential(nn.Linear(8, 2))
        >>> _ = attach(model, LoRA(r=2))
        >>> {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items()}
        {'0.lora_A': (2, 8), '0.lora_B': (2, 2)}
    """
    return _named(model, name, lambda adapter: adapter.state_dict(keep_vars=True))


def folded_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Return what `adapter_state_dict` returns after `fold`, without changing the model."""
    return _named(model, name, lambda adapter: adapter.folded_state())


def gathered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state whose tensors are whole; where some are sharded, all processes must call this together."""
    return {name: tensor.full_tensor() if is_shard(tensor) else tensor for name, tensor in state.items()}  # type: ignore[attr-defined]  # a DTensor's


def fold(model: nn.Module, name: str | None = None) -> None:
    """Drop what only training needs, such as the encoders of prompt methods; the model answers as before.

    Optimizers that hold the dropped parameters no longer train the model, so this comes after training.

    Args:
        model: A model with adapters.
        name: The name of the adapter to fold; None for all.
    """
    for _, _, adapter in iter_adapters(model, name):
        adapter.fold()


def refresh(model: nn.Module) -> None:
    """Have a model's adapters look at the base's weights again.

    What an adapter keeps of a weight (DoRA its norm) follows in-place writes, an assigned `.data`, loaded states and
    moves by itself. In-place writes through `.data` (`weight.data.mul_(2)`) leave no trace in torch: call this after
    them.

    Args:
        model: A model with adapters.
    """
    for _, host, adapter in iter_adapters(model):
        adapter.refresh(host)


def _named(
    model: nn.Module, name: str | None, state_of: Callable[[Adapter], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the tensors of adapters by their public names; one that several share, by its first."""
    if name is not None:
        check_names(model, [name])
    has_several = name is None and len(adapter_names(model)) > 1
    seen: dict[int, Tensor] = {}  # with the tensors themselves: the identity of one that is gone may be given again
    named: dict[str, Tensor] = {}
    for path, _, adapter in iter_adapters(model, name):
        for own, tensor in state_of(adapter).items():
            if id(tensor) not in seen:
                seen[id(tensor)] = tensor
                key = join(path, adapter.public_name(own))
                named[f"{adapter.name}:{key}" if has_several else key] = tensor.detach()
    return named


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str | None = None) -> None:
    """Load what `adapter_state_dict` returned into a model with the same adapters.

    Args:
        model: A model to which the same methods are attached.
        state: The tensors, whole; cast to the dtype of the model's own, and sharded where those are.
        name: The name of the adapter that the state is of; None for what `adapter_state_dict` returned without one.

    Raises:
        ConfigError: No adapter has this name.
        CheckpointError: Keys are missing or unknown, or a shape differs; no value is changed, but a prompt that came
            folded may have lost its encoder already, which changes no output.
    """
    _fit_to(model, state, name)
    own = adapter_state_dict(model, name)
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    if missing or unknown:
        raise CheckpointError(
            f"The adapter's keys do not fit this model: of {len(own)} expected, {len(missing)} are missing"
            f"{_first(missing)} and {len(unknown)} are unknown{_first(unknown)}. Attach the method that it was trained "
            f"with, on the same base and targets{_statistics_hint(unknown)}."
        )
    wrong = [
        f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if state[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(own)} adapter tensors have another shape{_first(wrong)}. Attach the method with the "
            "settings (rank, targets) that it was trained with."
        )
    for name, tensor in own.items():
        tensor.copy_(_spread_like(tensor, state[name]))


def _fit_to(model: nn.Module, state: Mapping[str, Tensor], name: str | None) -> None:
    """Give the adapters the structure of a state, each name that of its own."""
    names = adapter_names(model) if name is None else (name,)
    for one in names:
        prefix = f"{one}:" if name is None and len(names) > 1 else ""
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        with only(model, one):
            for method in attached_methods(model):
                method.fit_to_state(model, own)


def _statistics_hint(unknown: Sequence[str]) -> str:
    is_of_norm = any(name.endswith(("running_mean", "running_var")) for name in unknown)
    return ", with train_norm_statistics=True" if is_of_norm else ""


def _spread_like(own: Tensor, value: Tensor) -> Tensor:
    """Return a whole value as this process's shard of it, where its place in the model is sharded."""
    if not is_shard(own) or is_shard(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    place: Any = own
    return distribute_tensor(value.to(own.device), place.device_mesh, place.placements)


def _first(names: Sequence[str], count: int = 3) -> str:
    return f" ({', '.join(names[:count])}{', …' if len(names) > count else ''})" if names else ""
