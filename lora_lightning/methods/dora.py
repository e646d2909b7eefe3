"""DoRA: magnitude and direction of a weight learn apart."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lora_lightning.adapters.about import About
from lora_lightning.adapters.base import Adapter, Role, check_choice
from lora_lightning.adapters.functional import (
    adapted_dora_linear,
    dora_norm,
    forget_kept_norms,
    is_exporting,
    kept_norm_squared,
)
from lora_lightning.adapters.functional.norms import MIN_NORM
from lora_lightning.adapters.weights import Host, HostKind, codec_of, read_weight
from lora_lightning.errors import ConfigError
from lora_lightning.methods.lora import LoRA
from lora_lightning.methods.low_rank import LowRankAdapter

__all__ = ["DoRA"]

MagnitudeAxis = Literal["output", "input"]


class DoRAAdapter(LowRankAdapter):
    """W' = m V / ‖V‖ with V = W + s B A on one host; arguments as in `LowRankAdapter`.

    Args:
        host: The host module.
        axis: `output` takes one norm and magnitude per output row, `input` one per input column (linear hosts only).
        **settings: Those of `LowRankAdapter`.

    Attributes:
        magnitude: m, `[out]` or `[in]` by the axis; starts at ‖W‖, so the first forward equals the base's.
    """

    adds_to_base: ClassVar[bool] = False

    magnitude: nn.Parameter

    def __init__(self, host: Host, *, axis: MagnitudeAxis = "output", **settings: Any) -> None:  # noqa: ANN401 - see `LowRankAdapter`
        super().__init__(host, **settings)
        self.axis = axis
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        self.magnitude = nn.Parameter(kept_norm_squared(self._rows(host), host.weight, wide).sqrt())

    def role_of(self, name: str) -> Role:
        """Return MAGNITUDE for the magnitude, else as LoRA."""
        return Role.MAGNITUDE if name == "magnitude" else super().role_of(name)

    def why_not_added(self) -> str:
        """Refuse: the magnitude scales the base's share too."""
        return "has a magnitude, which scales the base's share too"

    def forward(
        self,
        host: Host,
        x: Tensor,
        *args: Any,  # noqa: ANN401 - the host's own signature
        base_output: Tensor | None = None,
        **kwargs: Any,  # noqa: ANN401 - the same
    ) -> Tensor:
        """Compute m V / ‖V‖ applied to x, plus the host's bias; see `LowRankAdapter.forward`."""
        if self.axis == "input":  # the base's own part is of another input
            return super().forward(host, x * (self.magnitude / self.norm(host)).to(x.dtype), *args, **kwargs)
        form = None if base_output is not None else self.form_on(host, x, both_or_neither=True)
        if form is not None:
            norm, dropout = partial(self.norm, host), self.draw_dropout()
            return adapted_dora_linear(x, form, *self.factors(), self.magnitude, norm, self.scaling, *dropout)
        output = self.base_forward(host, x, *args, **kwargs) if base_output is None else base_output
        return self._scale_output(host, x, output)

    def _scale_output(self, host: Host, x: Tensor, output: Tensor) -> Tensor:
        """Add the update to what the host computes, and scale what is not its bias."""
        ratio, bias = self.magnitude / self.norm(host), getattr(host, "bias", None)
        if self.kind is HostKind.CONV:
            trailing = [1] * (host.weight.dim() - 2)
            ratio = ratio.view(-1, *trailing)
            bias = None if bias is None else bias.view(-1, *trailing)
        direction = (output if bias is None else output - bias.to(output.dtype)) + self.update(host, x).to(output.dtype)
        scaled = direction * ratio.to(direction.dtype)
        return scaled if bias is None else scaled + bias.to(scaled.dtype)

    @torch.no_grad()
    def norm(self, host: Host) -> Tensor:
        """Return ‖W + s B A‖ along the axis, without a gradient (section 4.3 of the paper).

        ‖W‖ is kept, and follows the host's weight: see `kept_norm_squared`.
        """
        a, b = self.factors()
        if self.axis == "input":
            a, b = b.t(), a.t()
        if is_exporting():
            rows = self._rows(host).to(a.dtype) + self.scaling * (b @ a)
            return torch.linalg.vector_norm(rows, dim=1).clamp_min(MIN_NORM)
        return dora_norm(self._rows(host), a, b, self.scaling, None, host.weight)

    def _rows(self, host: Host) -> Tensor:
        """Return W with one norm for each row, `[out, in]` or `[in, out]` by the axis."""
        weight = read_weight(host).detach()
        return weight if self.axis == "output" else weight.t()

    def merged_weight(self, host: Host, weight: Tensor) -> Tensor:
        """Return m V / ‖V‖, `[out, in]`."""
        direction = super().merged_weight(host, weight)
        axis = 1 if self.axis == "output" else 0
        norm = torch.linalg.vector_norm(direction, dim=axis, keepdim=True).clamp_min(1e-30)
        return direction * (self.magnitude.to(weight.dtype).unsqueeze(axis) / norm)

    def refresh(self, host: Host) -> None:
        """Forget ‖W‖ of the host; with it goes that of others, which is only computed anew."""
        del host
        forget_kept_norms()


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """W' = m V / ‖V‖ with V = W + s B A (Liu et al. 2024, arXiv 2402.09353, equation 5).

    m starts at ‖W‖ and B at zero, so the first forward equals the base model's. The gradient through ‖V‖ is cut
    (section 4.3). On an embedding the magnitude is per embedding dimension, on a convolution per output channel.
    Dropout acts on the input of A only. Since the backward pass reads the layer's output, no in-place activation may
    overwrite it (torch says so if one does).

    Args:
        magnitude_axis: `output` takes one magnitude per output row, `m: [out]`, as the published code and other tools
            do; `input` takes one per input column, `m: [in]`, as the paper's notation has it (linear hosts only).

    Raises:
        ConfigError: A value is out of its range.
    """

    name: ClassVar[str] = "dora"
    about: ClassVar[About] = About(
        trains="magnitude and direction of `W + s·BA`, per output row or input column",
        where="as `LoRA`, without experts",
        principle="LoRA on the direction, a magnitude apart",
        suits="low ranks; closer to full fine-tuning",
        difficulty="easy; slower steps",
    )
    takes_experts: ClassVar[bool] = False

    magnitude_axis: MagnitudeAxis = "output"

    def __post_init__(self) -> None:
        """Check every value's range."""
        super().__post_init__()
        check_choice(type(self).__name__, "magnitude_axis", self.magnitude_axis, ("output", "input"))
        if self.init == "loftq":
            raise ConfigError(
                "DoRA: init='loftq' is defined for LoRA: its correction would change the norm that the magnitude "
                "starts at. Use LoRA, or another init."
            )

    def build(self, path: str, host: Host) -> Adapter:
        """Build the adapter of one host."""
        kind = codec_of(host).kind
        if self.magnitude_axis == "input" and kind is not HostKind.LINEAR:
            raise ConfigError(
                f"DoRA: magnitude_axis='input' is defined for linear layers, and {path!r} is an {kind}; "
                "use magnitude_axis='output' or leave it out of the targets."
            )
        r, scaling = self.rank_and_scaling(path)
        return DoRAAdapter(host, axis=self.magnitude_axis, r=r, scaling=scaling, dropout=self.dropout, init=self.init)
