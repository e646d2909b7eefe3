"""Small methods and models for the tests of what hangs adapters on a model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.adapters import Adapter, InputAdapter, ModelView, OutputAdapter, Role, TargetedMethod
from lora_lightning.adapters.targets import select_hosts


class BiasDelta(OutputAdapter):
    """Adds a trainable delta to what its host returns, as a bias would."""

    roles: ClassVar[Mapping[str, Role]] = {"delta": Role.BIAS}

    def __init__(self, num_out: int) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(num_out))

    def forward(self, host: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return output + self.delta

    def check_mergeable(self, host: nn.Module) -> None:
        pass

    def merge_into(self, host: nn.Module) -> None:
        host.bias.data += self.delta


class InputScale(InputAdapter):
    """Scales what its host is called with; cannot be merged."""

    roles: ClassVar[Mapping[str, Role]] = {"scale": Role.VECTOR}

    def __init__(self, num_in: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_in))

    def forward(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return (args[0] * self.scale, *args[1:]), kwargs


@dataclass(frozen=True, kw_only=True)
class Bias(TargetedMethod):
    """A trainable bias delta on linear layers."""

    name: ClassVar[str] = "bias"

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        for path, host in select_hosts(view, self):
            yield path, BiasDelta(host.out_features)


@dataclass(frozen=True, kw_only=True)
class Scale(TargetedMethod):
    """A trainable scale on the input of linear layers."""

    name: ClassVar[str] = "scale"

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        for path, host in select_hosts(view, self):
            yield path, InputScale(host.in_features)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.value = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.value(self.query(x).tanh()))


class Model(nn.Module):
    """Embedding, two blocks, and a head of two layers: `embed`, `layer.N.{query,value,norm}`, `head.{dense,out}`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layer = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Sequential()
        self.head.add_module("dense", nn.Linear(8, 8))
        self.head.add_module("out", nn.Linear(8, 3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.layer:
            x = block(x)
        return self.head(x)


class TiedModel(nn.Module):
    """An output layer that shares its weight with the embedding, inside a container or not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Embedding(10, 8))
        self.body = nn.Linear(8, 8)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.embed[0].weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.body(self.embed(ids)))


def ids() -> Tensor:
    return torch.randint(10, (4, 5), generator=torch.Generator().manual_seed(0))


def fingerprint(model: nn.Module) -> list[object]:
    """Return everything that `attach` may change."""
    return [
        (
            path,
            type(module),
            sorted(module.__dict__),
            list(module._modules),
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks_with_kwargs,
            getattr(module, "use_nested_tensor", None),
            [(name, id(parameter)) for name, parameter in module._parameters.items()],
            [(name, parameter.requires_grad) for name, parameter in module.named_parameters(recurse=False)],
        )
        for path, module in model.named_modules()
    ]
