"""LoRA on a module of experts: an A and a B for each expert and projection, applied to the tokens routed to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.adapters.base import ForwardAdapter, Role
from lora_lightning.adapters.experts import by_expert, check_experts, expert_bias, read_experts
from lora_lightning.adapters.functional import draw_seed, lora_linear
from lora_lightning.adapters.weights import Host, overwrite

EXPERT_INITS = ("kaiming", "gaussian", "gaussian_sqrt")
_Projection = Callable[[int, Tensor], Tensor]


class ExpertLoRAAdapter(ForwardAdapter):
    """W'_e = W_e + s B_e A_e for every expert e, on one or several projections of an experts module.

    The forward runs one expert after the other, as transformers' eager one does, on the tokens routed to it; no update
    is built as large as a weight. The host's own gate function, biases and norm are used. An expert to which no token
    is routed gets a gradient of zeros, so that every process of DDP has the same ones. The loop depends on the routing,
    so `torch.compile(fullgraph=True)` cannot take it.

    Args:
        host: The experts module.
        ranks: Rank of each adapted projection, by the name of its parameter.
        scalings: The factor s of each, likewise.
        dropout: Probability of zeroing an element of A's input, in training only.
        init: How A starts: `kaiming`, `gaussian` or `gaussian_sqrt`, drawn for each expert as for a layer of its own.
            B starts at zero.

    Attributes:
        `<parameter>_lora_A`: `[experts, r, in]`, in states `<parameter>.lora_A`.
        `<parameter>_lora_B`: `[experts, out, r]`, in states `<parameter>.lora_B`.
    """

    def __init__(
        self,
        host: Host,
        *,
        ranks: Mapping[str, int],
        scalings: Mapping[str, float],
        dropout: float = 0.0,
        init: str = "kaiming",
    ) -> None:
        super().__init__()
        self.ranks, self.scalings, self.dropout, self.init = dict(ranks), dict(scalings), dropout, init
        for name, r in self.ranks.items():
            weight = read_experts(host, name)
            num_experts, num_out, num_in = weight.shape
            dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
            # On the adapter itself, not on children: it alone is called, which is when sharding gathers parameters.
            for part, shape in (("A", (num_experts, r, num_in)), ("B", (num_experts, num_out, r))):
                empty = torch.empty(shape, device=weight.device, dtype=dtype)
                self.register_parameter(f"{name}_lora_{part}", nn.Parameter(empty))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A and B anew; the update is zero afterwards."""
        for name, r in self.ranks.items():
            a, b = self.factors(name)
            nn.init.zeros_(b)
            for expert in a:
                if self.init == "kaiming":
                    nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
                else:
                    nn.init.normal_(expert, std=1 / r if self.init == "gaussian" else 1 / math.sqrt(r))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A `[experts, r, in]` and B `[experts, out, r]` of the projection called `name`."""
        return getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")

    def role_of(self, name: str) -> Role:
        """Return A or B by the last letter of the parameter's name."""
        return {"A": Role.A, "B": Role.B}[name[-1]]

    def public_name(self, name: str) -> str:
        """Return `gate_up_proj.lora_A` for `gate_up_proj_lora_A`."""
        return f"{name[: -len('_lora_A')]}.{name[-len('lora_A') :]}"

    def why_not_added(self) -> str:
        """Refuse: its host's forward is computed whole."""
        return "adapts a module of experts, which computes with one adapter at a time"

    def forward(self, host: Host, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the experts with their updates.

        Args:
            host: The experts module.
            hidden_states: `[tokens, hidden]`.
            top_k_index: The experts of each token, `[tokens, k]`.
            top_k_weights: The weight of each of them, `[tokens, k]`.

        Returns:
            For each token the weighted sum over its experts, `[tokens, hidden]`.
        """
        check_experts(host)
        order, counts = by_expert(top_k_index, host.num_experts)
        num_tokens, num_chosen = top_k_index.shape
        inputs = torch.split(hidden_states[order // num_chosen], counts)
        up_name = "gate_up_proj" if host.has_gate else "up_proj"
        up, down = self._projection(host, up_name), self._projection(host, "down_proj")
        activate = host._apply_gate if host.has_gate else host.act_fn
        busy = [index for index, count in enumerate(counts) if count] or [0]  # one at least, so that gradients flow
        output = torch.cat([down(index, activate(up(index, inputs[index]))) for index in busy])
        if getattr(host, "has_post_expert_norm", False):
            output = host.post_expert_norm(output)
        weighted = output * top_k_weights.flatten()[order, None]
        by_token = weighted[order.argsort()].view(num_tokens, num_chosen, output.shape[1])
        return by_token.sum(1).to(hidden_states.dtype)

    def _projection(self, host: Host, name: str) -> _Projection:
        """Return the function that applies one expert's projection, with its update where it has one."""
        # unbind, not an index for each expert: its backward stacks all gradients once, zeros where there is none.
        weights = read_experts(host, name).unbind(0)
        bias = expert_bias(host, name)
        biases: Sequence[Tensor | None] = [None] * len(weights) if bias is None else bias.unbind(0)
        if name not in self.ranks:
            return lambda index, x: F.linear(x, weights[index], biases[index])
        a, b = (factor.unbind(0) for factor in self.factors(name))
        scaling, is_dropping = self.scalings[name], self.training and self.dropout > 0

        def project(index: int, x: Tensor) -> Tensor:
            seed = draw_seed() if is_dropping else None
            return lora_linear(x, weights[index], biases[index], a[index], b[index], scaling, self.dropout, seed)

        return project

    def merged_weights(self, host: Host) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Iterate over each adapted parameter, see `Adapter.merged_weights`; laid out as the host stores it."""
        for name in self.ranks:
            stored: Tensor = host._parameters[name]
            weight = stored.to(torch.promote_types(stored.dtype, torch.float32))
            a, b = (factor.to(weight.dtype) for factor in self.factors(name))
            left, right = (a.mT, b.mT) if host.is_transposed else (b, a)
            yield name, weight, torch.baddbmm(weight, left, right, alpha=self.scalings[name])

    def merge_into(self, host: Host) -> None:
        """Write W_e + s B_e A_e into each adapted parameter, cast once."""
        for name, _, merged in self.merged_weights(host):
            overwrite(host._parameters[name], merged)

    def check_mergeable(self, host: nn.Module) -> None:
        """Do nothing: experts are adapted only where they are stored dense, and then they merge."""

    def extra_repr(self) -> str:
        """Tell ranks, scalings and dropout."""
        parts = [f"{name}: r={r}, scaling={self.scalings[name]:g}" for name, r in self.ranks.items()]
        return ", ".join([*parts, f"dropout={self.dropout:g}"])
