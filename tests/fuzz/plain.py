"""Models of plain torch that hold what transformers' models seldom do: recurrent layers, shared and normed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

WIDTH, LENGTH, TOKENS = 16, 6, 64


class _Of(nn.Module):
    """A model that applies its parts in turn."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.parts(x))
        return output


class _Called(nn.Module):
    """Applies a function of a module and its input, so that a module may be called in any way."""

    def __init__(self, module: nn.Module, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = module, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner, x)


def _first(layer: Any, x: Tensor) -> Tensor:
    output: Tensor = layer(x)[0]
    return output


def _plainly(layer: Any, x: Tensor) -> Tensor:
    output: Tensor = layer(x)
    return output


def _with_itself(layer: Any, x: Tensor) -> Tensor:
    output: Tensor = layer(x, x)
    return output


def _by_keyword(layer: Any, x: Tensor) -> Tensor:
    output: Tensor = layer(input=x)
    return output


def _read_past(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight)


def _twice(layer: Any, x: Tensor) -> Tensor:
    output: Tensor = layer(torch.tanh(layer(x)))
    return output


def _in_place(layer: Any, x: Tensor) -> Tensor:
    return torch.relu_(layer(x))


def _recomputed(layer: Any, x: Tensor) -> Tensor:
    output: Tensor = checkpoint(layer, x, use_reentrant=False)
    return output


def _attend(layer: Any, x: Tensor) -> Tensor:
    output: Tensor = layer(x, x, x, need_weights=False)[0]
    return output


class _Tied(nn.Module):
    """A language model whose output layer shares the embeddings by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.mix(self.embed(ids))))
        return output


class _Images(nn.Module):
    """A convolutional network with a norm that keeps statistics."""

    def __init__(self, norm: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, WIDTH, 3, padding=1, **settings)
        self.norm, self.up = norm, nn.ConvTranspose2d(WIDTH, WIDTH, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.up(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))
        return output


class _Codes(nn.Module):
    """A layer with a codebook that moves in training mode, as vector quantizers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.inner(x)
        if self.training:
            self.mean.lerp_(inside.detach().mean((0, 1)), 0.1)
        output: Tensor = (inside - self.mean) * self.scale
        return output


class _Loose(nn.Module):
    """Parameters of its own in lists and dicts, and a product of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH) / 4) for _ in range(2)])
        self.layers = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH), "b": nn.Linear(WIDTH, WIDTH, bias=False)})
        self.pair = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.pair(self.layers["a"](x @ self.list[0]), self.layers["b"](x) @ self.list[1])
        return output


def _series() -> nn.Module:
    return _Called(nn.Conv1d(LENGTH, LENGTH, 3, padding=1, padding_mode="circular"), _plainly)


def _norm_of_series() -> nn.Module:
    return nn.BatchNorm1d(LENGTH, momentum=None)


def _encoder(**settings: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, batch_first=True, dropout=0.1, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(WIDTH, 4, 24, batch_first=True)
    return _Called(nn.TransformerDecoder(layer, 2), _with_itself)


_LAYER = (WIDTH, WIDTH)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: _Of(nn.Linear(*_LAYER), nn.GELU(), nn.LayerNorm(WIDTH), nn.Dropout(0.1)),
    "lstm": lambda: _Of(_Called(nn.LSTM(*_LAYER, batch_first=True, bidirectional=False), _first)),
    "gru": lambda: _Of(nn.Linear(*_LAYER), _Called(nn.GRU(*_LAYER, batch_first=True), _first)),
    "attention": lambda: _Of(_Called(nn.MultiheadAttention(WIDTH, 4, batch_first=True), _attend)),
    "encoder": lambda: _Of(_encoder()),
    "encoder-norm-first": lambda: _Of(_encoder(norm_first=True, activation="gelu")),
    "decoder": lambda: _Of(_decoder()),
    "keyword": lambda: _Of(_Called(nn.Linear(*_LAYER), _by_keyword)),
    "read-past": lambda: _Of(_Called(nn.Linear(*_LAYER), _read_past), nn.Linear(*_LAYER)),
    "twice": lambda: _Of(_Called(nn.Linear(*_LAYER), _twice)),
    "in-place": lambda: _Of(_Called(nn.Linear(*_LAYER), _in_place)),
    "recomputed": lambda: _Of(_Called(nn.Sequential(nn.Linear(*_LAYER), nn.Tanh()), _recomputed)),
    "weight-norm": lambda: _Of(parametrizations.weight_norm(nn.Linear(*_LAYER)), nn.Linear(*_LAYER)),
    "spectral-norm": lambda: _Of(parametrizations.spectral_norm(nn.Linear(*_LAYER)), nn.Linear(*_LAYER)),
    "orthogonal": lambda: _Of(parametrizations.orthogonal(nn.Linear(*_LAYER)), nn.Linear(*_LAYER)),
    "old-spectral-norm": lambda: _Of(nn.utils.spectral_norm(nn.Linear(*_LAYER)), nn.Linear(*_LAYER)),
    "series": lambda: _Of(_series(), _norm_of_series(), nn.Linear(*_LAYER)),
    "instance-norm": lambda: _Of(nn.Linear(*_LAYER), nn.InstanceNorm1d(LENGTH, track_running_stats=True)),
    "codes": lambda: _Of(_Codes()),
    "loose": lambda: _Of(_Loose()),
    "tied": _Tied,
    "images": lambda: _Images(nn.BatchNorm2d(WIDTH)),
    "images-grouped": lambda: _Images(nn.GroupNorm(2, WIDTH), groups=2),
    "images-reflected": lambda: _Images(nn.BatchNorm2d(WIDTH, affine=False), padding_mode="reflect", bias=False),
}


def build(name: str) -> nn.Module:
    """Build a model in eval mode, with random norms and biases."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def batch(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a model takes."""
    generator = torch.Generator().manual_seed(1)
    if name == "tied":
        return {"ids": torch.randint(1, TOKENS, (3, LENGTH), generator=generator)}
    shape = (3, 4, 8, 8) if name.startswith("images") else (3, LENGTH, WIDTH)
    return {"x": torch.randn(shape, generator=generator).to(dtype)}
