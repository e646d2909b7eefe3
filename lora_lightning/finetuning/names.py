"""Which names a fine-tuned LightningModule's tensors have in memory, and which in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from lora_lightning.adapters import iter_adapters
from lora_lightning.adapters.walk import join
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
    names, own = Names(), module.state_dict()
    tensors = {name: tensor for name, tensor in _all_tensors(module).items() if name in own}
    shown: dict[int, str] = {}
    base: set[int] = set()
    prefixes = []
    for part, submodule in attached_parts(module):
        prefixes.append(prefix_of(module, part))
        shown |= _shown_names(part, submodule)
        base |= {id(tensor) for name, tensor in _all_tensors(submodule).items() if not is_of_adapter(name)}
    # By identity: what is tied, or reached by a second attribute of the module, has several names.
    names.public = {name: shown[id(tensor)] for name, tensor in tensors.items() if id(tensor) in shown}
    names.inside = {name for name, tensor in tensors.items() if id(tensor) in base}
    # State that is not a tensor has no identity.
    names.inside |= {
        name
        for name in module.state_dict()
        if not is_of_adapter(name) and any(_is_inside(name, one) for one in prefixes)
    }
    # A buffer of the LightningModule itself is the user's own, even where the whole module is adapted.
    names.inside -= module._buffers.keys()
    record = record_of(module)
    frozen = {} if record is None else record.frozen
    outside = {name for name, tensor in tensors.items() if name in frozen and not tensor.requires_grad}
    names.outside = outside - names.inside
    return names


def frozen_parameters(module: nn.Module, parts: list[Part]) -> dict[str, Tensor]:
    """Return the frozen parameters that lie in none of the parts, by name."""
    prefixes = [prefix_of(module, part) for part in parts if part.exists_in(module)]
    return {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad and not any(_is_inside(name, prefix) for prefix in prefixes)
    }


def is_of_adapter(name: str) -> bool:
    """Return whether a name in a module's own `state_dict` is that of an adapter's tensor."""
    return RESERVED in name.split(".")


def _all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by each of its names: a tied one has several."""
    named = dict(module.named_parameters(remove_duplicate=False))
    return {**named, **dict(module.named_buffers(remove_duplicate=False))}


def _is_inside(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


def _shown_names(part: Part, submodule: nn.Module) -> dict[int, str]:
    """Return the name in a checkpoint of each adapter tensor, by its identity; one that several share has the first."""
    shown: dict[int, str] = {}
    for path, _, adapter in iter_adapters(submodule):
        for name, tensor in adapter.state_dict(keep_vars=True).items():
            shown.setdefault(id(tensor), join(join(part.path, path), adapter.public_name(name)))
    return shown
