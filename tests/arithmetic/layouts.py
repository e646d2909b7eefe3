"""Random layouts of adapters on one small base, their folders, and their updates by the published formulas alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lightning import attach, export_peft
from lora_lightning.adapters import Method, adapter_state_dict
from lora_lightning.methods import AdaLoRA, DeltaLoRA, LoRA, LoRAFA, VeRA
from tests.models import perturb

LINEAR = ("first", "second", "third")
SHAPES = {"first": (12, 8), "second": (10, 12), "third": (6, 10), "table": (8, 20), "conv": (4, 18)}
"""`[out, in]` of each layer's weight; an embedding is a linear layer on one-hot vectors, a convolution on patches."""


class Base(nn.Module):
    """Two kinds of layers of everything: linear ones of different shapes, an embedding and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.first, self.second, self.third = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 6)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.third(self.second(self.first(self.table(ids)).tanh()).tanh())
        return hidden.sum() + self.conv(hidden[:, :2, :].unsqueeze(-1).expand(-1, -1, -1, 6)).tanh().sum()


def base(seed: int = 0) -> Base:
    torch.manual_seed(seed)
    return Base().eval()


@dataclass(frozen=True)
class Layout:
    """One adapter: its method, and the seed of its values."""

    method: Method
    seed: int


@st.composite
def layouts(draw: Any) -> Layout:
    """Draw an adapter: a relative of LoRA, its rank, scaling and layers."""
    kind = draw(st.sampled_from(["lora", "rslora", "alpha", "pissa", "olora", "lora_fa", "adalora", "delta", "vera"]))
    alpha = draw(st.floats(0.5, 20))
    rank = draw(st.integers(1, 6))
    layers = draw(st.lists(st.sampled_from(LINEAR), min_size=1, max_size=3, unique=True))
    common: dict[str, Any] = {"target_modules": layers}
    if kind in ("lora", "rslora", "alpha"):
        others = draw(st.lists(st.sampled_from(["table", "conv"]), max_size=2, unique=True))
        scaling = {"lora": "standard"}.get(kind, kind)
        ranks = {layers[0]: draw(st.integers(1, 6))}
        common["target_modules"] = layers + others
        method: Method = LoRA(r=min(rank, 4), alpha=alpha, scaling=scaling, rank_pattern=ranks, **common)
    elif kind in ("pissa", "olora"):
        method = LoRA(r=rank, alpha=alpha, init=kind, **common)
    elif kind == "lora_fa":
        method = LoRAFA(r=rank, alpha=alpha, **common)
    elif kind == "adalora":
        method = AdaLoRA(target_r=1, init_r=rank, alpha=alpha, **common)
    elif kind == "delta":
        method = DeltaLoRA(r=rank, alpha=alpha, delta_ratio=draw(st.floats(0.1, 3)), start_step=0, **common)
    else:
        method = VeRA(r=draw(st.integers(1, 16)), **common)
    return Layout(method, draw(st.integers(0, 1000)))


def attached(layout: Layout) -> nn.Module:
    """Return the base with an adapter whose values are all moved off their start."""
    model = base()
    torch.manual_seed(layout.seed)
    attach(model, layout.method)
    return perturb(model, seed=layout.seed, std=0.3)


def write(layout: Layout, folder: Path) -> Path:
    """Write an adapter for PEFT."""
    export_peft(attached(layout), folder)
    return folder


def dense(layout: Layout) -> dict[str, Tensor]:
    """Return an adapter's updates by the formulas of the papers, from its tensors, dense and in float64."""
    model = attached(layout)
    state = {name: tensor.double() for name, tensor in adapter_state_dict(model).items()}
    paths = dict.fromkeys(name.partition(".")[0] for name in state)
    return {path: _formula(layout.method, path, _own(state, path), state) for path in paths}


def _own(state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    return {name.partition(".")[2]: one for name, one in state.items() if name.startswith(f"{path}.")}


def _formula(method: Any, path: str, own: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
    if isinstance(method, VeRA):
        generator = torch.Generator().manual_seed(method.projection_seed)
        sizes = [SHAPES[layer] for layer in method.target_modules]
        a = torch.empty(method.r, max(num_in for _, num_in in sizes))
        b = torch.empty(max(num_out for num_out, _ in sizes), method.r)
        for matrix in (a, b):
            bound = (6 / matrix.shape[1]) ** 0.5
            matrix.uniform_(-bound, bound, generator=generator)
        num_out, num_in = SHAPES[path]
        left = own["lambda_b"][:, None] * b.double()[:num_out]
        return left @ (own["lambda_d"][:, None] * a.double()[:, :num_in])
    a, b = own["lora_A"], own["lora_B"]
    if isinstance(method, AdaLoRA):
        return method.alpha / method.init_r * (b * own["lora_E"]) @ a
    rank = (method.rank_pattern or {}).get(path, method.r)
    divisors = {"standard": rank, "rslora": rank**0.5, "alpha": 1}
    scaling = method.alpha / divisors[method.scaling]
    product = b @ a
    if "start_a" in own:
        product = product - own["start_b"] @ own["start_a"]
    if isinstance(method, DeltaLoRA):
        product = product + method.delta_ratio * (b @ a - own["anchor_b"] @ own["anchor_a"])
    return scaling * product


def weighted(layouts_and_weights: list[tuple[Layout, float]]) -> dict[str, Tensor]:
    """Return the weighted sum of the updates, dense."""
    total: dict[str, Tensor] = {}
    for layout, weight in layouts_and_weights:
        for path, update in dense(layout).items():
            total[path] = total.get(path, torch.zeros_like(update)) + weight * update
    return total


def read_dense(folder: Path) -> dict[str, Tensor]:
    """Return the updates of a folder in PEFT's format, dense, by PEFT's own formula for its scaling."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    updates: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        path = key.removeprefix("base_model.model.")
        is_a = ".lora_A." in path or path.endswith("lora_embedding_A")
        if not is_a:
            continue
        host = path.partition(".lora_")[0]
        other = key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        a, b = tensor.flatten(1).double(), tensors[other].flatten(1).double()
        exactly = f"^{re.escape(host)}"
        rank = config["rank_pattern"].get(exactly, config["r"])
        alpha = config["alpha_pattern"].get(exactly, config["lora_alpha"])
        assert len(a) == rank
        updates[host] = alpha / rank * b @ a
    return updates


def distance(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Return the Frobenius norm of the difference of all layers, relative to the reference."""
    assert ours.keys() == reference.keys()
    error = sum(float((ours[path] - reference[path]).square().sum()) for path in reference)
    return (error / sum(float(one.square().sum()) for one in reference.values())) ** 0.5
