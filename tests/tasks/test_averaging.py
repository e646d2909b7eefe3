"""Averaged weights: what is validated is saved, the frozen base is not, and a stopped run resumes with its averages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from lora_lightning.checkpoint import read_adapter_folder
from tests.tasks.averaged_runs import Counted, build_task, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),  # each part saves into a folder of its own
]
BASE_SHAPES = {(32, 6), (3, 32)}


class EveryStep(WeightAveraging):
    """Averages all steps alike."""


AVERAGES = {"ema": lambda: EMAWeightAveraging(decay=0.8), "mean": EveryStep}


def checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.ckpt") if path.name != "last.ckpt")


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0, msg=name)


def shapes_in(data: Any) -> set[tuple[int, ...]]:
    if isinstance(data, Tensor):
        return {tuple(data.shape)}
    values = data.values() if isinstance(data, dict) else data if isinstance(data, list | tuple) else []
    return {shape for value in values for shape in shapes_in(value)}


@pytest.mark.parametrize("kind", AVERAGES)
def test_what_is_validated_is_saved(tmp_path: Path, kind: str) -> None:
    task, _ = fit(tmp_path, AVERAGES[kind]())
    found = checkpoints(tmp_path)
    assert len(found) == 3
    for path in found:
        content = read(path)
        validated = task.validated[content["global_step"]]
        assert_equal(content["state_dict"], validated)
        live = content["current_model_state"]
        assert any(not torch.equal(live[name], validated[name]) for name in live)  # negative control
        _, state = read_adapter_folder(path.with_suffix(""))
        assert_equal({f"model.{name}": tensor for name, tensor in state.items()}, validated)


@pytest.mark.parametrize("kind", [*AVERAGES, "swa"])
def test_no_frozen_base(tmp_path: Path, kind: str) -> None:
    callback = StochasticWeightAveraging(1e-2, swa_epoch_start=1) if kind == "swa" else AVERAGES[kind]()
    task, _ = fit(tmp_path, callback)
    for path in checkpoints(tmp_path):
        assert not shapes_in(read(path)) & BASE_SHAPES
    assert shapes_in(task.state_dict()) >= BASE_SHAPES  # negative control


@pytest.mark.parametrize("kind", AVERAGES)
def test_a_stopped_run_resumes_with_its_averages(tmp_path: Path, kind: str) -> None:
    whole, _ = fit(tmp_path / "whole", AVERAGES[kind](), max_epochs=4)
    fit(tmp_path / "first", AVERAGES[kind](), max_epochs=2)
    rest, _ = fit(tmp_path / "rest", AVERAGES[kind](), max_epochs=4, ckpt_path=tmp_path / "first" / "last.ckpt")
    assert_equal(rest.adapter_state(), whole.adapter_state())
    assert_equal(read(tmp_path / "rest/last.ckpt")["state_dict"], read(tmp_path / "whole/last.ckpt")["state_dict"])
    plain, _ = fit(tmp_path / "plain", None, max_epochs=4)
    name = next(iter(plain.adapter_state()))
    assert not torch.equal(plain.adapter_state()[name], whole.adapter_state()[name])  # negative control


def test_swa_averages_the_adapters(tmp_path: Path) -> None:
    task, _ = fit(tmp_path, StochasticWeightAveraging(5e-2, swa_epoch_start=2), max_epochs=4)
    states = [read(path)["state_dict"] for path in checkpoints(tmp_path)]
    # Lightning takes the weights at the start of the epochs 1 to 3, which are those at the end of 0 to 2.
    steps = sorted(range(len(states)), key=lambda index: read(checkpoints(tmp_path)[index])["global_step"])
    for name, tensor in task.adapter_state().items():
        mean = torch.stack([states[index][name] for index in steps[:3]]).mean(0)
        torch.testing.assert_close(tensor, mean, atol=1e-6, rtol=0)
        assert not torch.allclose(tensor, states[steps[-1]][name])  # negative control


def test_swa_resumes(tmp_path: Path) -> None:
    def swa() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(5e-2, swa_epoch_start=1)

    whole, _ = fit(tmp_path / "whole", swa(), max_epochs=4)
    first = checkpoints(tmp_path / "whole")
    middle = next(path for path in first if read(path)["global_step"] == 12)
    rest, _ = fit(tmp_path / "rest", swa(), max_epochs=4, ckpt_path=middle)
    assert_equal(rest.adapter_state(), whole.adapter_state())


def test_an_averaged_checkpoint_loads_anywhere(tmp_path: Path) -> None:
    task, _ = fit(tmp_path, AVERAGES["ema"]())
    loaded = Counted.load_from_checkpoint(tmp_path / "last.ckpt")
    assert_equal(loaded.adapter_state(), task.adapter_state())


def test_whole_states_load() -> None:
    task, other = build_task(), build_task()
    task.configure_model()
    torch.nn.init.normal_(next(iter(task.parameters())))
    other.load_state_dict(task.state_dict())
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in task.state_dict().items())
