"""An adapter with an encoder that only training needs: its folder holds what is used, and loads everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters import (
    Adapter,
    InputAdapter,
    ModelView,
    Role,
    TargetedMethod,
    adapter_state_dict,
    iter_adapters,
)
from lora_lightning.adapters.targets import select_hosts
from lora_lightning.checkpoint import load_adapter, read_adapter_folder, write_adapter_folder
from lora_lightning.errors import CheckpointError
from tests.checkpoint.runs import PlainTask, rebuild_task, save_checkpoint
from tests.models import perturb


class EncodedShift(InputAdapter):
    """Adds a vector to its host's input; while training the vector comes out of an encoder."""

    def __init__(self, num_in: int, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(width))
        self.encoder: nn.Linear | None = nn.Linear(width, num_in)

    def role_of(self, name: str) -> Role:
        return Role.PROMPT if name == "shift" else Role.VECTOR

    def vector(self) -> Tensor:
        return self.shift if self.encoder is None else self.encoder(self.shift)

    def forward(self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return (args[0] + self.vector(), *args[1:]), kwargs

    def folded_state(self) -> dict[str, Tensor]:
        return {"shift": self.vector()}

    def fold(self) -> None:
        self.shift, self.encoder = nn.Parameter(self.vector().detach()), None


@dataclass(frozen=True, kw_only=True)
class Shift(TargetedMethod):
    """A trainable shift out of an encoder."""

    name: ClassVar[str] = "shift"
    training_settings: ClassVar[frozenset[str]] = TargetedMethod.training_settings | {"width"}

    width: int = 5

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        for path, host in select_hosts(view, self):
            yield path, EncodedShift(host.in_features, self.width)

    def fit_to_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        for path, _, adapter in iter_adapters(model):
            if isinstance(adapter, EncodedShift) and f"{path}.encoder.weight" not in state:
                adapter.fold()


X = {"x": torch.randn(3, 8, generator=torch.Generator().manual_seed(0))}


def task_of(seed: int = 0, **settings: Any) -> PlainTask:
    torch.manual_seed(seed)
    task = PlainTask(**settings)
    task.configure_model()
    return task


@pytest.fixture
def trained() -> PlainTask:
    task = task_of(method=Shift(target_modules=["0"]))
    perturb(task.adapted)
    return task


@pytest.fixture
def folder(trained: PlainTask, tmp_path: Path) -> Path:
    write_adapter_folder(tmp_path / "adapter", trained.adapted)
    return tmp_path / "adapter"


def test_folder_holds_what_is_used(folder: Path, trained: PlainTask) -> None:
    assert {name: tuple(one.shape) for name, one in read_adapter_folder(folder)[1].items()} == {"0.shift": (8,)}
    assert adapter_state_dict(trained.adapted).keys() == {"0.shift", "0.encoder.weight", "0.encoder.bias"}  # unchanged


@pytest.mark.parametrize("width", [5, 7])  # another encoder folds to the same
def test_load_adapter(folder: Path, trained: PlainTask, width: int) -> None:
    fresh = task_of(1, method=Shift(target_modules=["0"], width=width))
    assert not torch.allclose(fresh(X), trained(X), atol=1e-3)  # negative control
    load_adapter(fresh.adapted, folder)
    torch.testing.assert_close(fresh(X), trained(X), atol=1e-6, rtol=0)


def test_a_run_starts_from_it(folder: Path, trained: PlainTask) -> None:
    fresh = task_of(1, adapter=str(folder))
    torch.testing.assert_close(fresh(X), trained(X), atol=1e-6, rtol=0)
    assert [name for name, one in fresh.adapted.named_parameters() if one.requires_grad] == [
        "0._lora_lightning.shift.shift"
    ]


@pytest.mark.parametrize("is_folded", [False, True])
def test_checkpoints_rebuild(trained: PlainTask, tmp_path: Path, is_folded: bool) -> None:
    if is_folded:
        trained.fold()
    ckpt = save_checkpoint(trained, tmp_path / "x.ckpt", moved=False)
    torch.manual_seed(1)
    again = rebuild_task(ckpt, PlainTask)
    torch.testing.assert_close(again(X), trained(X), atol=1e-6, rtol=0)
    assert adapter_state_dict(again.adapted).keys() == adapter_state_dict(trained.adapted).keys()


def test_an_unfolded_state_does_not_fit_a_folded_model(trained: PlainTask, folder: Path, tmp_path: Path) -> None:
    ckpt = save_checkpoint(trained, tmp_path / "x.ckpt", moved=False)
    folded = task_of(1, adapter=str(folder))
    state = torch.load(ckpt, weights_only=True)["state_dict"]
    with pytest.raises(CheckpointError, match=r"2 are unknown \(0.encoder.weight, 0.encoder.bias\)"):
        folded.load_state_dict(state)
