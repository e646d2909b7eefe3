"""Bottleneck adapters: small feed-forward networks inside, or beside, the blocks of a frozen model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.adapters.about import About
from lora_lightning.adapters.arguments import by_position
from lora_lightning.adapters.base import (
    Adapter,
    InputAdapter,
    Method,
    OutputAdapter,
    Role,
    check_choice,
    check_dropout,
    check_positive,
    check_positive_int,
)
from lora_lightning.adapters.functional import draw_seed, seeded_dropout
from lora_lightning.adapters.targets import ends_with_any, has_suffix, is_within, layer_index
from lora_lightning.adapters.view import ModelView
from lora_lightning.adapters.weights import RESERVED, Host, codec_of
from lora_lightning.errors import ConfigError, NotMergeable, TargetError

__all__ = ["BottleneckAdapter"]

Style = Literal["houlsby", "pfeiffer", "parallel"]
NonLinearity = Literal["relu", "silu", "swish", "gelu", "tanh"]

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class _Usual:
    """What a style leaves to its name."""

    mh_adapter: bool
    reduction_factor: float
    non_linearity: str
    scaling: float


_USUAL: Mapping[str, _Usual] = {
    "houlsby": _Usual(mh_adapter=True, reduction_factor=16, non_linearity="swish", scaling=1.0),
    "pfeiffer": _Usual(mh_adapter=False, reduction_factor=16, non_linearity="relu", scaling=1.0),
    "parallel": _Usual(mh_adapter=False, reduction_factor=2, non_linearity="relu", scaling=4.0),
}


@dataclass(frozen=True, kw_only=True)
class BottleneckAdapter(Method):
    """h + s (f(h W_down^T + b_down) W_up^T + b_up) with W_down: [width, hidden] and W_up: [hidden, width].

    W_up and b_up start at zero, so the first forward equals the base model's exactly. The styles say where:
    `houlsby` (2019, arXiv 1902.00751, figure 2) after the attention and after the feed-forward network (FFN), each
    inside its residual branch; `pfeiffer` (2021, arXiv 2005.00247) after the FFN alone; `parallel` (He et al. 2022,
    arXiv 2110.04366, table 1) beside the FFN: fed by its input, added to its output.

    Args:
        style: `houlsby`, `pfeiffer` or `parallel`.
        mh_adapter: Whether to adapt the (multi-head) attention's output; None goes by the style.
        output_adapter: Whether to adapt the FFN; None means yes.
        reduction_factor: Hidden size divided by the bottleneck's width; None takes 16, or 2 for `parallel`.
        width: Width of the bottleneck, instead of a reduction factor.
        non_linearity: The function f; None takes `swish` for `houlsby`, else `relu`. `silu` is another name of swish.
        scaling: The factor s; None takes 1, or 4 for `parallel`.
        dropout: Probability of zeroing an element of what is added, in training, in [0, 1).
        leave_out: Indices of the layers (blocks) without adapters.

    Raises:
        ConfigError: A value is out of its range, or both `reduction_factor` and `width` are given.
    """

    name: ClassVar[str] = "bottleneck"
    about: ClassVar[About] = About(
        trains="a small MLP after attention and FFN (`houlsby`), after the FFN (`pfeiffer`), beside it (`parallel`)",
        where="every block",
        principle="small networks after sub-layers",
        suits="many tasks, modular reuse",
        difficulty="easy; slows inference",
    )
    training_settings: ClassVar[frozenset[str]] = Method.training_settings | {"dropout"}
    size_setting: ClassVar[str | None] = "width"
    usual_rates: ClassVar[tuple[float, ...]] = (3e-4, 1e-3, 3e-3)

    style: Style = "houlsby"
    mh_adapter: bool | None = None
    output_adapter: bool | None = None
    reduction_factor: float | None = None
    width: int | None = None
    non_linearity: NonLinearity | None = None
    scaling: float | None = None
    dropout: float = 0.0
    leave_out: list[int] | None = None

    def __post_init__(self) -> None:
        """Check every value's range."""
        super().__post_init__()
        owner = type(self).__name__
        check_choice(owner, "style", self.style, tuple(_USUAL))
        check_dropout(owner, self.dropout)
        if self.non_linearity is not None:
            check_choice(owner, "non_linearity", self.non_linearity, tuple(_FUNCTIONS))
        for name, value in (("reduction_factor", self.reduction_factor), ("scaling", self.scaling)):
            if value is not None:
                check_positive(owner, name, value)
        if self.width is not None:
            check_positive_int(owner, "width", self.width)
            if self.reduction_factor is not None:
                raise ConfigError(f"{owner}: width and reduction_factor both set the bottleneck's width; give one.")
        if self.output_adapter is False and not self._at_attention:
            raise ConfigError(f"{owner}: neither mh_adapter nor output_adapter is on, so nothing would train.")

    @property
    def _at_attention(self) -> bool:
        return _USUAL[self.style].mh_adapter if self.mh_adapter is None else self.mh_adapter

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        """Build the adapters of every block; see `Method.adapters`."""
        places = view.block_places()
        left_out = self._left_out(view, [*places.attention_outputs, *places.ffn_outputs])
        for path, module in view.model.named_modules():
            if RESERVED in path.split(".") or is_within(path, left_out):
                continue
            if self._at_attention and ends_with_any(path, places.attention_outputs):
                yield path, AfterModule(module, **self._settings(path, module))
            elif self.output_adapter is not False and ends_with_any(path, places.ffn_outputs):
                settings = self._settings(path, module)
                if self.style == "parallel":
                    kind = BesideResidual if places.ffn_adds_residual else BesideModule
                    yield path.rpartition(".")[0], kind(module, **settings)
                else:
                    yield path, AfterModule(module, **settings)

    def _left_out(self, view: ModelView, places: list[str]) -> list[str]:
        """Return the paths of the places without adapters: in layers to leave out, and in modules trained as copies."""
        paths = [path for path, _ in view.model.named_modules()]
        inside = [path for path in paths if ends_with_any(path, places)]
        if not inside:
            raise TargetError(
                f"{type(view.model).__name__} has no modules called {' or '.join(places)}, where models of type "
                f"{view.model_type!r} take bottleneck adapters; another version of transformers may have renamed them. "
                "Use a method that takes target_modules."
            )
        layers, leave_out = {layer_index(path) for path in inside}, set(self.leave_out or [])
        if not leave_out <= layers or (leave_out and leave_out == layers):
            numbers = ", ".join(str(layer) for layer in sorted(layers - {None}, key=lambda layer: layer or 0))
            raise TargetError(
                f"leave_out={self.leave_out!r}: the model's layers are {numbers}; leave out some of these."
            )
        saved = [path for path in paths if any(has_suffix(path, name) for name in self.modules_to_save or [])]
        return [path for path in inside if layer_index(path) in leave_out or is_within(path, saved)]

    def _settings(self, path: str, module: nn.Module) -> dict[str, Any]:
        usual = _USUAL[self.style]
        hidden, _ = codec_of(module).shape(module)
        factor = usual.reduction_factor if self.reduction_factor is None else self.reduction_factor
        width = math.floor(hidden / factor) if self.width is None else self.width
        if width < 1:
            raise ConfigError(
                f"BottleneckAdapter: reduction_factor={factor:g} is larger than the hidden size {hidden} at {path!r}, "
                f"which leaves the bottleneck no width; lower it to at most {hidden}, or set width."
            )
        return {
            "width": width,
            "non_linearity": self.non_linearity or usual.non_linearity,
            "scaling": usual.scaling if self.scaling is None else self.scaling,
            "dropout": self.dropout,
        }


class Bottleneck(Adapter):
    """The network that bottleneck adapters share; subclasses say what it reads and where its output is added.

    Args:
        sized_by: The linear layer that has the hidden size as its output.
        width: Width of the bottleneck.
        non_linearity: Name of the function f.
        scaling: The factor s.
        dropout: Probability of zeroing an element of the output, in training only.

    Attributes:
        down_weight: `[width, hidden]`.
        down_bias: `[width]`.
        up_weight: `[hidden, width]`; zero at the start.
        up_bias: `[hidden]`; zero at the start.
    """

    roles: ClassVar[Mapping[str, Role]] = {
        "down_weight": Role.WEIGHT,
        "down_bias": Role.BIAS,
        "up_weight": Role.WEIGHT,
        "up_bias": Role.BIAS,
    }

    def __init__(self, sized_by: Host, *, width: int, non_linearity: str, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        hidden, _ = codec_of(sized_by).shape(sized_by)
        self.non_linearity, self.scaling, self.dropout = non_linearity, scaling, dropout
        like = next(sized_by.parameters(recurse=False))
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        self.down_weight = nn.Parameter(torch.empty(width, hidden, device=like.device, dtype=dtype))
        self.down_bias = nn.Parameter(torch.zeros(width, device=like.device, dtype=dtype))
        self.up_weight = nn.Parameter(torch.zeros(hidden, width, device=like.device, dtype=dtype))
        self.up_bias = nn.Parameter(torch.zeros(hidden, device=like.device, dtype=dtype))
        nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))

    def added(self, h: Tensor) -> Tensor:
        """Return s (f(h W_down^T + b_down) W_up^T + b_up), shape and dtype of `h`, `[..., hidden]`."""
        inner = F.linear(h.to(self.down_weight.dtype), self.down_weight, self.down_bias)
        update = F.linear(_FUNCTIONS[self.non_linearity](inner), self.up_weight, self.up_bias) * self.scaling
        if self.training and self.dropout > 0:
            update = seeded_dropout(update, self.dropout, draw_seed())
        return update.to(h.dtype)

    def check_mergeable(self, host: nn.Module) -> None:
        """Refuse: a function that is not linear lies between the adapter's weights."""
        del host
        raise NotMergeable(
            "A bottleneck adapter is a network of its own, not linear in its input, and cannot be merged into a "
            "weight; keep it attached."
        )

    def extra_repr(self) -> str:
        """Tell sizes, function, scaling and dropout."""
        width, hidden = self.down_weight.shape
        sizes = f"hidden={hidden}, width={width}, non_linearity={self.non_linearity}"
        return f"{sizes}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class AfterModule(Bottleneck, OutputAdapter):
    """Reads the host's output and adds to it."""

    def forward(self, host: Host, args: Any, kwargs: Any, output: Tensor) -> Tensor:  # noqa: ANN401 - the host's own
        """Return h + added(h) of the host's output h, `[..., hidden]`."""
        del host, args, kwargs
        return output + self.added(output)


class BesideModule(Bottleneck, OutputAdapter):
    """Reads the host's input and adds to its output."""

    def forward(self, host: Host, args: Any, kwargs: Any, output: Tensor) -> Tensor:  # noqa: ANN401 - the host's own
        """Return the host's output plus added(x) of its first argument x, both `[..., hidden]`."""
        del host
        (x, *_), _ = by_position(self.argument_names, args, kwargs)
        return output + self.added(x).to(output.dtype)


class BesideResidual(Bottleneck, InputAdapter):
    """Reads the residual that its host adds to the FFN's output, which is the FFN's input, and adds to it.

    BERT's `output` module computes LayerNorm(dropout(dense(hidden_states)) + input_tensor), and no module of it
    returns the sum; what is added to `input_tensor` is added to that sum.
    """

    def forward(self, host: Host, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ANN401 - the host's own
        """Return the arguments with x + added(x) for `input_tensor`, x `[..., hidden]`."""
        del host
        (hidden_states, x, *rest), kwargs = by_position(self.argument_names, args, kwargs)
        return (hidden_states, x + self.added(x), *rest), kwargs
