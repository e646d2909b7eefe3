"""What LoRA and its relatives share: the factors A and B of one host, and how the update is applied to it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.adapters.base import ForwardAdapter, Role
from lora_lightning.adapters.functional import (
    Form,
    adapted_linear,
    choose_form,
    draw_seed,
    is_exporting,
    low_rank_update,
    seeded_dropout,
)
from lora_lightning.adapters.weights import Host, HostKind, codec_of, read_weight
from lora_lightning.methods.starts import WEIGHT_STARTS


class LowRankAdapter(ForwardAdapter):
    """W' = W + s B A on one host: linear, embedding or convolution.

    An embedding counts as a linear layer on one-hot vectors and a convolution as one on patches, so `W` is `[out, in]`
    for all of them. On an embedding there is no input to drop, so dropout has no effect there.

    Args:
        host: The host module.
        r: Rank.
        scaling: The factor s.
        dropout: Probability of zeroing an element of A's input, in training only.
        init: How A starts: `kaiming`, `gaussian` (std 1/r) or `gaussian_sqrt` (std 1/sqrt r). B starts at zero. On an
            embedding A starts at zero and B Gaussian (std 1), as in the reference implementation. `pissa` and `olora`
            start both at a part of W, which is then taken out again: W' = W + s (B A - B0 A0). `eva` draws as
            `kaiming`, and sees data later.

    Attributes:
        lora_A: `[r, in]`.
        lora_B: `[out, r]`.
        start_a: A0, `[r, in]`, where A and B start at a part of W; else None.
        start_b: B0, `[out, r]`, likewise.
        recomputes_input: Whether backward computes the input again where that came out of an activation or a product,
            instead of keeping it (linear hosts that store a dense weight).
    """

    extends_base: ClassVar[bool] = True
    adds_to_base: ClassVar[bool] = True

    lora_A: Tensor
    lora_B: Tensor
    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(self, host: Host, *, r: int, scaling: float, dropout: float = 0.0, init: str = "kaiming") -> None:
        super().__init__()
        codec = codec_of(host)
        num_out, num_in = codec.shape(host)
        self.kind, self.scaling, self.dropout, self.init, self.r = codec.kind, scaling, dropout, init, r
        self.recomputes_input = False
        weight = next(host.parameters(recurse=False))
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        self.register_buffer("start_a", None)
        self.register_buffer("start_b", None)
        self.create_parameters(num_out, num_in, weight.device, dtype)
        if init in WEIGHT_STARTS:
            self._start_in_weight(host)

    def create_parameters(self, num_out: int, num_in: int, device: torch.device, dtype: torch.dtype) -> None:
        """Create the trainable tensors; a relative with others than A and B overrides this."""
        self.lora_A = nn.Parameter(torch.empty(self.r, num_in, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(num_out, self.r, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A and B anew; the update is zero afterwards."""
        if self.start_a is not None and self.start_b is not None:
            self.lora_A.copy_(self.start_a)
            self.lora_B.copy_(self.start_b)
            return
        random, zero = (self.lora_B, self.lora_A) if self.kind is HostKind.EMBEDDING else (self.lora_A, self.lora_B)
        nn.init.zeros_(zero)
        if self.kind is HostKind.EMBEDDING:
            nn.init.normal_(random)
        elif self.init in ("gaussian", "gaussian_sqrt"):
            nn.init.normal_(random, std=1 / self.r if self.init == "gaussian" else 1 / math.sqrt(self.r))
        else:
            nn.init.kaiming_uniform_(random, a=math.sqrt(5))

    @torch.no_grad()
    def _start_in_weight(self, host: Host) -> None:
        """Start A and B at a part of the host's weight, and keep that part to be taken out again."""
        if self.lora_A.is_meta:
            self.start_a, self.start_b = (torch.empty_like(tensor.detach()) for tensor in (self.lora_A, self.lora_B))
            return
        weight = read_weight(host).detach().to(self.lora_A.dtype)
        a, b = WEIGHT_STARTS[self.init](weight, self.r, self.scaling)
        self.start_a, self.start_b = a.contiguous(), b.contiguous()
        self.reset_parameters()

    def role_of(self, name: str) -> Role:
        """Return A or B by the parameter's name, or EMBEDDING for both on an embedding."""
        if self.kind is HostKind.EMBEDDING:
            return Role.EMBEDDING
        return {"lora_A": Role.A, "lora_B": Role.B}[name]

    def why_not_added(self) -> str:
        """Accept: updates of one weight add up."""
        return ""

    def forward(
        self,
        host: Host,
        x: Tensor,
        *args: Any,  # noqa: ANN401 - the host's own signature
        base_output: Tensor | None = None,
        update_only: bool = False,
        **kwargs: Any,  # noqa: ANN401 - the same
    ) -> Tensor:
        """Compute host and update together.

        Args:
            host: The host.
            x: Its input: `[..., in]`, token ids of any shape, or `[batch, channels, ...]`.
            *args: Further arguments of the host's forward; passed on where the host computes its own part.
            base_output: What the update is added to; None computes the host's own part.
            update_only: Return the update alone.
            **kwargs: As `args`.

        Returns:
            What the host returns, with the update in it.
        """
        if update_only:
            return self.update(host, x)
        form = None if base_output is not None else self.form_on(host, x)
        if form is not None:
            return adapted_linear(x, form, *self.factors(), self.scaling, *self.draw_dropout())
        output: Tensor = self.base_forward(host, x, *args, **kwargs) if base_output is None else base_output
        return output + self.update(host, x).to(output.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A `[rank, in]` and B `[out, rank]` of the update s B A, differentiable.

        Relatives of LoRA whose update is low-rank override this alone; forward, merging and export go by it.
        """
        if self.start_a is None or self.start_b is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_a]), torch.cat([self.lora_B, -self.start_b], 1)

    @property
    def is_dropping(self) -> bool:
        """Whether dropout acts."""
        return self.training and self.dropout > 0

    def draw_dropout(self) -> tuple[float, Tensor | None]:
        """Return the dropout probability and a fresh seed, or None for no dropout."""
        return self.dropout, draw_seed() if self.is_dropping else None

    def form_on(self, host: Host, x: Tensor, *, both_or_neither: bool = False) -> Form | None:
        """Return the form to compute a dense layer in, see `choose_form`; None where the host computes its own part.

        In a graph that is exported it always does: others know no autograd functions.
        """
        if self.kind is not HostKind.LINEAR or is_exporting():
            return None
        # With A frozen the point is not to keep the input, which rebuilding takes.
        may_rebuild = "lora_A" not in self._buffers and not self.is_dropping
        return choose_form(
            host, x, may_rebuild=may_rebuild, recompute=self.recomputes_input, both_or_neither=both_or_neither
        )

    def update(self, host: Host, x: Tensor) -> Tensor:
        """Compute the update's share of the output alone, shape of the host's output."""
        p, seed = self.draw_dropout()
        a, b = self.factors()
        if self.kind is HostKind.LINEAR:
            return low_rank_update(x, a, b, self.scaling, p, seed)
        if self.kind is HostKind.EMBEDDING:
            rows = F.linear(F.embedding(x, a.t(), host.padding_idx), b) * self.scaling
            return rows * getattr(host, "embed_scale", 1.0)  # transformers' scaled embeddings, as in Gemma
        if seed is not None:
            x = seeded_dropout(x, p, seed)
        return self._convolve(host, x, a.to(x.dtype), b.to(x.dtype))

    def _convolve(self, host: Host, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Convolve with s B A: through its rank in channels, or, where the host has groups, with the product itself."""
        weight = host.weight
        assert isinstance(weight, Tensor)
        if host.groups > 1:
            return host._conv_forward(x, (b @ a).view_as(weight) * self.scaling, None)
        hidden = host._conv_forward(x, a.view(a.shape[0], *weight.shape[1:]), None)
        point = F.conv1d if weight.dim() == 3 else F.conv2d
        return point(hidden * self.scaling, b.view(*b.shape, *[1] * (weight.dim() - 2)))

    def merged_weight(self, host: Host, weight: Tensor) -> Tensor:
        """Return W + s B A, `[out, in]`."""
        del host
        a, b = self.factors()
        return weight + self.scaling * (b.to(weight.dtype) @ a.to(weight.dtype))

    def extra_repr(self) -> str:
        """Tell rank, scaling and dropout."""
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"
