"""LoRA on parameters of a module that is not a layer of a known kind, such as the router of a mixture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import ForwardAdapter, Role
from lora_lightning.adapters.parameters import with_parameters
from lora_lightning.adapters.weights import RESERVED, Host, overwrite


class ParameterLoRAAdapter(ForwardAdapter):
    """P' = P + s B A for named parameters P of a host, which then computes with P'.

    P' is built in each forward, as large as P: meant for parameters that are small or few. A 3-D parameter gets an A
    and a B for each index of its first dimension.

    Args:
        host: The module that holds the parameters.
        ranks: Rank of each adapted parameter, by its name.
        scalings: The factor s of each, likewise.
        init: How A starts: `kaiming`, `gaussian` or `gaussian_sqrt`. B starts at zero.

    Attributes:
        `<parameter>_lora_A`: `[r, in]` or `[count, r, in]`, in states `<parameter>.lora_A`.
        `<parameter>_lora_B`: `[out, r]` or `[count, out, r]`, in states `<parameter>.lora_B`.
    """

    def __init__(
        self, host: Host, *, ranks: Mapping[str, int], scalings: Mapping[str, float], init: str = "kaiming"
    ) -> None:
        super().__init__()
        self.ranks, self.scalings, self.init = dict(ranks), dict(scalings), init
        for name, r in self.ranks.items():
            weight = host.get_parameter(name)
            *count, num_out, num_in = weight.shape
            dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
            for part, shape in (("A", (*count, r, num_in)), ("B", (*count, num_out, r))):
                empty = torch.empty(shape, device=weight.device, dtype=dtype)
                self.register_parameter(f"{name}_lora_{part}", nn.Parameter(empty))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A and B anew; the update is zero afterwards."""
        for name, r in self.ranks.items():
            a, b = self.factors(name)
            nn.init.zeros_(b)
            for matrix in a if a.dim() == 3 else [a]:
                if self.init == "kaiming":
                    nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
                else:
                    nn.init.normal_(matrix, std=1 / r if self.init == "gaussian" else 1 / math.sqrt(r))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A `[..., r, in]` and B `[..., out, r]` of the parameter called `name`."""
        return getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")

    def role_of(self, name: str) -> Role:
        """Return A or B by the last letter of the parameter's name."""
        return {"A": Role.A, "B": Role.B}[name[-1]]

    def public_name(self, name: str) -> str:
        """Return `weight.lora_A` for `weight_lora_A`."""
        return f"{name[: -len('_lora_A')]}.{name[-len('lora_A') :]}"

    def why_not_added(self) -> str:
        """Refuse: its host's forward is computed whole."""
        return "adapts single parameters, which are computed with one adapter at a time"

    def why_not_mixed(self, host: Host) -> str:
        """Refuse modules of several parts: not all that they are called with has rows."""
        parts = [name for name, _ in host.named_children() if name != RESERVED]
        return "the parameters of a module of several parts are changed for the whole batch" if parts else ""

    def forward(self, host: Host, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the host's own signature
        """Compute the host's forward with the adapted parameters."""
        changed = {name: merged.to(host._parameters[name].dtype) for name, _, merged in self.merged_weights(host)}
        return self.base_forward(with_parameters(host, changed), *args, **kwargs)

    def merged_weights(self, host: Host) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Iterate over each adapted parameter, see `Adapter.merged_weights`."""
        for name in self.ranks:
            stored: Tensor = host._parameters[name]
            weight = stored.to(torch.promote_types(stored.dtype, torch.float32))
            a, b = (factor.to(weight.dtype) for factor in self.factors(name))
            yield name, weight, weight + self.scalings[name] * (b @ a)

    def merge_into(self, host: Host) -> None:
        """Write P + s B A into each adapted parameter, cast once."""
        for name, _, merged in self.merged_weights(host):
            overwrite(host._parameters[name], merged)

    def check_mergeable(self, host: nn.Module) -> None:
        """Do nothing: parameters are adapted only where they are stored dense, and then they merge."""

    def extra_repr(self) -> str:
        """Tell ranks and scalings."""
        return ", ".join(f"{name}: r={r}, scaling={self.scalings[name]:g}" for name, r in self.ranks.items())
