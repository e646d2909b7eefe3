"""Which names a fine-tuned LightningModule's tensors have in memory, and which in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_lightning.adapters import iter_adapters
from lora_lightning.adapters.attach import join
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.finetuning.record import Part, attached_parts, prefix_of, record_of


@dataclass
class Names:
    """The names in a module's own `state_dict`, sorted by what a checkpoint does with them.

    Args:
        public: Each adapter tensor's name, to its name in a checkpoint: `<submodule>.<host>.lora_A`.
        inside: Parameters and buffers of the adapted submodules that belong to no adapter.
        outside: Frozen parameters of the other submodules.
    """

    public: dict[str, str] = field(default_factory=dict)
    inside: set[str] = field(default_factory=set)
    outside: set[str] = field(default_factory=set)

    @property
    def base(self) -> set[str]:
        """What a checkpoint does not hold unless it was changed."""
        return self.inside | self.outside


def names_of(module: nn.Module) -> Names:
    """Sort the names of a module's tensors, as its parts and `requires_grad` are now."""
    record = record_of(module)
    names = Names()
    prefixes = []
    for part, submodule in attached_parts(module):
        prefix = prefix_of(module, part)
        prefixes.append(prefix)
        names.public.update(_public_names(part, submodule, prefix))
    for name in module.state_dict():
        if is_of_adapter(name):
            continue
        if any(_is_inside(name, prefix) for prefix in prefixes):
            names.inside.add(name)
    frozen = {} if record is None else record.frozen
    outside = {name for name, parameter in _all_parameters(module) if name in frozen and not parameter.requires_grad}
    names.outside = outside - names.inside
    # A buffer of the LightningModule itself is the user's own, even where the whole module is adapted.
    names.inside -= module._buffers.keys()
    return names


def frozen_parameters(module: nn.Module, parts: list[Part]) -> dict[str, Tensor]:
    """Return the frozen parameters that lie in none of the parts, by name."""
    prefixes = [prefix_of(module, part) for part in parts if part.exists_in(module)]
    return {
        name: parameter
        for name, parameter in _all_parameters(module)
        if not parameter.requires_grad and not any(_is_inside(name, prefix) for prefix in prefixes)
    }


def is_of_adapter(name: str) -> bool:
    """Return whether a name in a module's own `state_dict` is that of an adapter's tensor."""
    return RESERVED in name.split(".")


def _all_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return every parameter by each of its names: a tied one has several."""
    return list(module.named_parameters(remove_duplicate=False))


def _is_inside(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


def _public_names(part: Part, submodule: nn.Module, prefix: str) -> dict[str, str]:
    """Return the name in a checkpoint of each adapter tensor; those that share one tensor share the name."""
    public: dict[str, str] = {}
    first: dict[int, str] = {}
    for path, host, adapter in iter_adapters(submodule):
        stack = host._modules[RESERVED]
        assert stack is not None
        method = next(name for name, other in stack._modules.items() if other is adapter)
        for name, tensor in adapter.state_dict(keep_vars=True).items():
            own = join(join(prefix, path), f"{RESERVED}.{method}.{name}")
            shown = join(join(part.path, path), adapter.public_name(name))
            public[own] = first.setdefault(id(tensor), shown)
    return public
