"""Models whose forward moves buffers in training: norms of several makers, and what is no norm at all."""

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class NormAct(nn.BatchNorm2d):
    """A norm with an activation, as timm writes it: a forward of its own, which asks for `self.training`."""

    def __init__(self, num: int) -> None:
        super().__init__(num)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        use_batch = self.training or self.running_mean is None
        args = self.running_mean, self.running_var, self.weight, self.bias, use_batch, self.momentum, self.eps
        return self.act(nn.functional.batch_norm(x, *args))


class HandWritten(nn.Module):
    """A norm by the usual names, whose statistics are new tensors after each batch."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num))
        self.register_buffer("running_mean", torch.zeros(num))
        self.register_buffer("running_var", torch.ones(num))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
            self.running_var = 0.9 * self.running_var + 0.1 * var.detach()
        return (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * self.scale[:, None, None]


class Whitened(nn.Module):
    """A norm by names that only its author knows, written through `.data`."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(num, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x - self.center
        center = x.mean((0, 2, 3))[:, None, None]
        self.center.data.lerp_(center.detach(), 0.1)
        return x - center


class Counted(nn.Module):
    """A wrapper that counts its training batches from the third on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.training and self.calls > 2:
            self.steps += 1
        return self.inner(x)


class ConvNet(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.mid, self.out = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.mid(self.norm(self.conv(x)))).mean((2, 3)))


def _resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return _Logits(transformers.ResNetForImageClassification(config))


def _mobilenet() -> nn.Module:
    config = transformers.MobileNetV2Config(
        image_size=32, depth_multiplier=0.25, num_labels=2, classifier_dropout_prob=0.0
    )
    return _Logits(transformers.MobileNetV2ForImageClassification(config))


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: ConvNet(nn.BatchNorm2d(8)),
    "batch by its average": lambda: ConvNet(nn.BatchNorm2d(8, momentum=None)),
    "instance": lambda: ConvNet(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    "with activation": lambda: ConvNet(NormAct(8)),
    "hand-written": lambda: ConvNet(HandWritten(8)),
    "resnet": _resnet,
    "mobilenet": _mobilenet,
}
"""Norms that are known by their buffers."""

OTHERS: dict[str, Callable[[], nn.Module]] = {
    "names of its own": lambda: ConvNet(Whitened(8)),
    "spectral norm": lambda: ConvNet(spectral_norm(nn.Conv2d(8, 8, 1))),
    "old spectral norm": lambda: ConvNet(nn.utils.spectral_norm(nn.Conv2d(8, 8, 1))),
    "counter": lambda: ConvNet(Counted(nn.Conv2d(8, 8, 1))),
}
"""What moves buffers and is found by that."""


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {**NORMS, **OTHERS}[name]()


def images(seed: int = 1) -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) + 1
