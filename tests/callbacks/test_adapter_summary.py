"""The summary counts each role, the base once, and packed weights by what they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary
from torch import nn

from lora_lightning.adapters import Adapter, ModelView, attach
from lora_lightning.adapters.targets import select_hosts
from lora_lightning.callbacks import AdapterSummary
from lora_lightning.callbacks.adapter_summary import build_table, count_roles, format_bytes
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.methods.low_rank import LowRankAdapter
from tests import models
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineTask, fit
from tests.callbacks.test_adapter_checkpoint import NoAdapters

pytestmark = LIGHTNING_WARNINGS


def test_counts_by_role() -> None:
    model = models.build("bert")
    num_base = sum(parameter.numel() for parameter in model.parameters())
    attach(model, DoRA(r=2, target_modules=["query"]), modules_to_save=["classifier"])
    counts = count_roles(model)
    assert {role: (count.num_tensors, count.num_parameters) for role, count in counts.items() if role != "base"} == {
        "A": (2, 2 * 2 * 32),
        "B": (2, 2 * 2 * 32),
        "magnitude": (2, 2 * 32),
        "head": (2, 3 * 32 + 3),
    }
    assert counts["base"].num_parameters == num_base
    assert counts["base"].num_bytes == 4 * num_base
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(count.num_parameters for role, count in counts.items() if role != "base") == trainable


def test_tied_weights_count_once_and_frozen_factors_apart() -> None:
    model = models.build("gpt2")
    num_base = sum(parameter.numel() for parameter in model.parameters())
    attach(model, LoRA(r=2, target_modules=["wte"]))
    assert count_roles(model)["base"].num_parameters == num_base
    for parameter in model.parameters():
        parameter.requires_grad_(requires_grad=False)
    assert set(count_roles(model)) == {"embedding (frozen)", "base"}


class Projected(LowRankAdapter):
    """Keeps a projection that all hosts share, and one frozen factor."""

    def __init__(self, host: nn.Module, projection: nn.Module) -> None:
        super().__init__(host, r=2, scaling=1.0)
        self.projection = projection
        self.lora_A.requires_grad_(requires_grad=False)


@dataclass(frozen=True, kw_only=True)
class Projecting(LoRA):
    name: ClassVar[str] = "projecting"

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        projection = nn.BatchNorm1d(5, affine=False, track_running_stats=True)
        for path, host in select_hosts(view, self):
            yield path, Projected(host, projection)


def test_shared_buffers_and_frozen_factors() -> None:
    model = models.build("bert")
    attach(model, Projecting(target_modules=["query"]))
    counts = count_roles(model)
    assert {role: (count.num_tensors, count.num_parameters) for role, count in counts.items() if role != "base"} == {
        "A (frozen)": (2, 2 * 2 * 32),
        "B": (2, 2 * 2 * 32),
        "buffer (frozen)": (3, 5 + 5 + 1),  # once for both hosts
    }
    trainable = build_table(counts).columns[2]
    assert list(trainable.cells)[3] == "128"


def test_packed_weights() -> None:
    import bitsandbytes

    weight = torch.randn(64, 128)
    plain = nn.Sequential(nn.Linear(128, 64, bias=False))
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=True)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    layer.weight = bitsandbytes.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4"
    )
    model = nn.Sequential(layer)
    attach(plain, LoRA(r=1, target_modules=["0"]))
    attach(model, LoRA(r=1, target_modules=["0"]))
    count, dense = count_roles(model)["base"], count_roles(plain)["base"]
    assert count.num_parameters == dense.num_parameters == 64 * 128
    assert packed.numel() == 64 * 128 // 2  # negative control: what a count of the storage gives
    constants = state.absmax.numel() + 4 * (
        state.state2.absmax.numel() + state.code.numel() + state.state2.code.numel()
    )
    assert count.num_bytes == 64 * 128 // 2 + constants + 4  # the offset
    assert (count.dtypes, dense.dtypes) == ({"nf4"}, {"float32"})


def test_replaces_lightnings_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(tmp_path, AdapterSummary(), enable_model_summary=True)
    text = capsys.readouterr().out
    for part in ("Parameters by role", "trainable", "base (frozen)", "float32"):
        assert part in text
    assert [type(callback) for callback in trainer.callbacks if isinstance(callback, ModelSummary)] == [AdapterSummary]


def test_tells_what_backward_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = LineTask()
    fit(tmp_path / "plain", AdapterSummary(), task=task, enable_model_summary=True)
    assert "backward" not in capsys.readouterr().out
    task = LineTask()
    task.configure_model()
    task.gradient_checkpointing = "activations"
    fit(tmp_path / "again", AdapterSummary(), task=task, enable_model_summary=True)
    assert "backward: activations before adapters computed again" in capsys.readouterr().out


def test_module_without_adapters_gets_lightnings_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, AdapterSummary(), task=NoAdapters())
    assert "Parameters by role" not in capsys.readouterr().out


def test_table_of_shares() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    attach(model, LoRA(r=1, target_modules=["0"]))
    table = build_table(count_roles(model))
    shares = list(table.columns[3].cells)
    assert shares == ["12.500%", "12.500%", "25.000%", "75.000%"]


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e9, "2.5 GB"), (3e12, "3.0 TB")]
)
def test_format_bytes(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text
