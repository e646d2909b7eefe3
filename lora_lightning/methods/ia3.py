"""IA3: learned scales on keys, values and the inner activations of the feed-forward network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.adapters.about import About
from lora_lightning.adapters.arguments import by_position
from lora_lightning.adapters.base import Adapter, InputAdapter, OutputAdapter, Role, TargetedMethod
from lora_lightning.adapters.targets import select_hosts
from lora_lightning.adapters.view import ModelView
from lora_lightning.adapters.weights import Host, HostKind, codec_of, overwrite
from lora_lightning.errors import ConfigError, TargetError

__all__ = ["IA3"]


@dataclass(frozen=True, kw_only=True)
class IA3(TargetedMethod):
    """k' = l_k * k, v' = l_v * v and FFN(x) = W_2 (l_ff * act(W_1 x)) (Liu et al. 2022, arXiv 2205.05638, section 3.3).

    The scales start at one, so the first forward equals the base model's exactly. Of a fused projection (GPT-2,
    ModernBERT) only the keys and values are scaled. Hosts: linear layers (4-bit and 8-bit ones too), GPT-2's Conv1D.

    Args:
        target_modules: Modules whose output is scaled; None takes the architecture's key and value projections, an
            empty list takes none.
        feedforward_modules: Modules whose input is scaled, named likewise; None takes the second layer of the
            architecture's feed-forward networks, an empty list takes none.
        scale_queries: Whether of a fused projection the queries are scaled too, as in PEFT.
        exclude_modules: Path suffixes or a regular expression of target modules to leave out.
    """

    name: ClassVar[str] = "ia3"
    about: ClassVar[About] = About(
        trains="scales of keys, values and the FFN's inner activations",
        where="attention and FFN",
        principle="scales keys, values and FFN inputs",
        suits="few examples, fewest parameters",
        difficulty="easy; high rates",
    )
    usual_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)

    feedforward_modules: list[str] | str | None = None
    scale_queries: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that scale nothing; an empty list of targets leaves the inputs alone to be scaled."""
        if self.target_modules == [] and self.feedforward_modules != []:
            replace(self, target_modules=None)  # checks the rest
        else:
            super().__post_init__()

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        """Build one vector of scales per host; see `Method.adapters`."""
        outputs, inputs = self._outputs(view), self._inputs(view)
        twice = sorted({path for path, _ in outputs} & {path for path, _ in inputs})
        if twice:
            raise ConfigError(
                f"IA3: {twice[0]!r} is both in target_modules, whose output is scaled, and in feedforward_modules, "
                "whose input is scaled; name it in one of them."
            )
        for path, host in [*outputs, *inputs]:
            if codec_of(host).kind is not HostKind.LINEAR:
                raise TargetError(f"IA3 scales linear layers, and {path!r} is a {type(host).__name__}; leave it out.")
        for path, host in outputs:
            share = 0.0 if self.scale_queries else view.query_share(path)
            yield path, ScaledOutput(host, query_share=share)
        for path, host in inputs:
            yield path, ScaledInput(host)

    def _outputs(self, view: ModelView) -> list[tuple[str, nn.Module]]:
        if self.target_modules is not None and not self.target_modules:
            return []
        usual = None if self.target_modules is not None else _pattern(view.block_places().keys_values)
        return select_hosts(view, replace(self, target_modules=self.target_modules or usual))

    def _inputs(self, view: ModelView) -> list[tuple[str, nn.Module]]:
        if self.feedforward_modules is not None and not self.feedforward_modules:
            return []
        usual = None if self.feedforward_modules is not None else _pattern(view.block_places().ffn_outputs)
        targets = self.feedforward_modules or usual
        return select_hosts(view, replace(self, target_modules=targets, exclude_modules=None))


class ScaledOutput(OutputAdapter):
    """Scales what a linear layer returns.

    Args:
        host: The linear layer, `[out, in]`.
        query_share: Share of its outputs, the first ones, that are queries and stay as they are.

    Attributes:
        ia3_l: The scales, one for each output that is not a query; ones at the start.
    """

    roles: ClassVar[Mapping[str, Role]] = {"ia3_l": Role.VECTOR}

    def __init__(self, host: Host, query_share: float = 0.0) -> None:
        super().__init__()
        num_out, _ = codec_of(host).shape(host)
        self.num_queries = round(num_out * query_share)
        self.ia3_l = _ones(host, num_out - self.num_queries)

    def scales(self) -> Tensor:
        """Return the factor of each output, `[out]`."""
        return F.pad(self.ia3_l, (self.num_queries, 0), value=1.0)

    def why_not_added(self) -> str:
        """Accept: scales of several adapters multiply."""
        return ""

    def forward(self, host: Host, args: Any, kwargs: Any, output: Tensor) -> Tensor:  # noqa: ANN401 - the host's own
        """Scale the host's output, `[..., out]`; in float32, since bfloat16 holds no factor near one."""
        del host, args, kwargs
        return (output * self.scales()).to(output.dtype)

    def merged_weight(self, host: nn.Module, weight: Tensor) -> Tensor:
        """Return W with each row scaled, `[out, in]`."""
        del host
        return weight * self.scales().to(weight.dtype).unsqueeze(1)

    def merge_into(self, host: Host) -> None:
        """Scale the weight's rows and the bias."""
        super().merge_into(host)
        if host.bias is not None:
            overwrite(host.bias, host.bias.to(self.ia3_l.dtype) * self.scales())


class ScaledInput(InputAdapter):
    """Scales what a linear layer is called with.

    Args:
        host: The linear layer, `[out, in]`.

    Attributes:
        ia3_l: The scales, `[in]`; ones at the start.
    """

    roles: ClassVar[Mapping[str, Role]] = {"ia3_l": Role.VECTOR}

    def __init__(self, host: Host) -> None:
        super().__init__()
        _, num_in = codec_of(host).shape(host)
        self.ia3_l = _ones(host, num_in)

    def why_not_added(self) -> str:
        """Accept: scales of several adapters multiply."""
        return ""

    def forward(self, host: Host, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ANN401 - the host's own
        """Scale the host's input, `[..., in]`; in float32, since bfloat16 holds no factor near one."""
        del host
        (x, *rest), kwargs = by_position(self.argument_names, args, kwargs)
        return ((x * self.ia3_l).to(x.dtype), *rest), kwargs

    def merged_weight(self, host: nn.Module, weight: Tensor) -> Tensor:
        """Return W with each column scaled, `[out, in]`."""
        del host
        return weight * self.ia3_l.to(weight.dtype)


def _ones(host: Host, size: int) -> nn.Parameter:
    weight = next(host.parameters(recurse=False))
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    return nn.Parameter(torch.ones(size, device=weight.device, dtype=dtype))


def _pattern(places: tuple[str, ...]) -> str:
    return rf"(.*\.)?({'|'.join(places)})"
