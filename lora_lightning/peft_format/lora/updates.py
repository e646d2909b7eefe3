"""The low-rank update of one host, as PEFT's format for LoRA and DoRA holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.adapters import Adapter
from lora_lightning.adapters.walk import join
from lora_lightning.adapters.weights import HostKind
from lora_lightning.methods.dora import DoRAAdapter
from lora_lightning.methods.expert_lora import ExpertLoRAAdapter
from lora_lightning.methods.low_rank import LowRankAdapter
from lora_lightning.methods.parameter_lora import ParameterLoRAAdapter
from lora_lightning.peft_format.differences import why_another_convolution
from lora_lightning.peft_format.lora.parameters import parameters_of, swap

# Merged as s B A of `factors()`, or as DoRA of it: these can also be exported in this form.
_MERGES = (LowRankAdapter.merged_weight, DoRAAdapter.merged_weight)


@dataclass(frozen=True)
class Update:
    """The update s B A of one host, or of one parameter, and under DoRA its magnitude.

    Args:
        host: The host.
        kind: What kind of host it is; None for a single parameter.
        scaling: The factor s.
        dropout: Probability of dropping an element of A's input.
        a: A, `[rank, in]`, and `[experts, rank, in]` for a 3-D parameter.
        b: B, `[out, rank]`, and `[experts, out, rank]` for a 3-D parameter.
        magnitude: m, `[out]`, or None for LoRA.
    """

    host: nn.Module
    kind: HostKind | None
    scaling: float
    dropout: float
    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[-2]

    @property
    def is_wide(self) -> bool:
        """Whether the rank is larger than a side of the weight."""
        return self.rank > min(self.a.shape[-1], self.b.shape[-2])


def parameter_updates(
    path: str, host: nn.Module, adapter: ExpertLoRAAdapter | ParameterLoRAAdapter
) -> dict[str, Update]:
    """Return the updates of single parameters, by their paths, in the order in which the host lists them."""
    dropout = adapter.dropout if isinstance(adapter, ExpertLoRAAdapter) else 0.0
    swapped = {one.path for one in parameters_of({path: host}) if one.is_swapped}
    updates: dict[str, Update] = {}
    for name in host._parameters:
        if name in adapter.ranks:
            own = join(path, name)
            a, b = (factor.detach() for factor in adapter.factors(name))
            if own in swapped:
                a, b = swap(a, b)
            updates[own] = Update(host, None, adapter.scalings[name], dropout, a, b)
    return updates


def stored_update(path: str, host: nn.Module, adapter: Adapter, state: Mapping[str, Tensor]) -> Update | None:
    """Return the update of a plain LoRA or DoRA adapter, which consists only of its own tensors.

    Args:
        path: The host's path.
        host: The host.
        adapter: One of its adapters.
        state: Result of `adapter_state_dict`.

    Returns:
        The update; None for any other adapter, since its tensors could not be restored from PEFT's names.
    """
    if type(adapter) not in (LowRankAdapter, DoRAAdapter) or why_no_update(host, adapter):
        return None
    assert isinstance(adapter, LowRankAdapter)
    names = ["lora_A", "lora_B", *(["magnitude"] if isinstance(adapter, DoRAAdapter) else [])]
    is_shared = any(f"{path}.{name}" not in state for name in names)
    is_plain = all(one is own for one, own in zip(adapter.factors(), (adapter.lora_A, adapter.lora_B), strict=True))
    if is_shared or not is_plain or adapter.folded_state().keys() != set(names):
        return None
    a, b, magnitude = (state.get(f"{path}.{name}") for name in ("lora_A", "lora_B", "magnitude"))
    assert a is not None
    assert b is not None
    return Update(host, adapter.kind, adapter.scaling, adapter.dropout, a, b, magnitude)


@torch.no_grad()
def computed_update(host: nn.Module, adapter: Adapter) -> Update | None:
    """Return the update of any relative of LoRA, by its `factors()`; None for other adapters.

    Components that are zero (pruned by AdaLoRA) are removed, and a rank above the sides of the weight is reduced to the
    smaller side; both do not change B A.
    """
    if why_no_update(host, adapter):
        return None
    assert isinstance(adapter, LowRankAdapter)
    a, b = (factor.detach() for factor in adapter.factors())
    used = (a != 0).any(1) & (b != 0).any(0)
    used[0] |= ~used.any()  # PEFT wants a rank of at least 1
    a, b = a[used], b[:, used]
    (num_out, _), (_, num_in) = b.shape, a.shape
    if len(a) > min(num_out, num_in):
        product, unit = b @ a, torch.eye(min(num_out, num_in), dtype=a.dtype, device=a.device)
        a, b = (unit, product) if num_in <= num_out else (product, unit)
    magnitude = adapter.magnitude.detach() if isinstance(adapter, DoRAAdapter) else None
    return Update(host, adapter.kind, adapter.scaling, adapter.dropout, a, b, magnitude)


def why_no_update(host: nn.Module, adapter: Adapter) -> str | None:
    """Return why PEFT's LoRA or DoRA cannot compute an adapter's update, as the end of a sentence, or None."""
    if isinstance(adapter, ExpertLoRAAdapter | ParameterLoRAAdapter):
        return None
    if not isinstance(adapter, LowRankAdapter) or type(adapter).merged_weight not in _MERGES:
        return f"PEFT's format for LoRA and DoRA has no words for {adapter.method_name}"
    if getattr(adapter, "axis", "output") != "output":
        return "PEFT's DoRA has one magnitude per output, and this one has magnitude_axis='input'"
    return why_another_convolution(host)
