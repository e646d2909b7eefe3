"""A run whose model has adapters of several names: its checkpoints hold all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_lightning.adapters import (
    active,
    adapter_names,
    adapter_state_dict,
    attach,
    per_row,
    require_calls,
    set_active,
)
from lora_lightning.callbacks import AdapterCheckpoint
from lora_lightning.checkpoint import write_adapter_folder
from lora_lightning.errors import AdapterNotCalled, ConfigError
from lora_lightning.methods import DoRA
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineTask, fit

pytestmark = LIGHTNING_WARNINGS


class TwoNames(LineTask):
    """Trains an adapter called `second` beside the unnamed one, which stays as it is."""

    def configure_model(self) -> None:
        super().configure_model()
        if adapter_names(self.adapted) == ("default",):
            attach(self.adapted, DoRA(r=1, target_modules=["2"]), name="second")
            set_active(self.adapted, "second")


def test_checkpoints_hold_all_names_and_no_folder_one_of_them(tmp_path: Path) -> None:
    task = TwoNames()
    with pytest.warns(UserWarning, match="the adapters default, second, which one adapter folder cannot hold"):
        fit(tmp_path, AdapterCheckpoint(), task=task)
    folder = tmp_path / "run" / "version_0" / "checkpoints"
    assert not [path.name for path in folder.iterdir() if path.is_dir()]
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert {key.split(":")[0] for key in state} == {"model.default", "model.second"}
    torch.manual_seed(9)
    again = TwoNames.load_from_checkpoint(folder / "last.ckpt")
    expected = adapter_state_dict(task.adapted)
    found = adapter_state_dict(again.adapted)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    fresh = TwoNames()
    fresh.configure_model()
    moved = [key for key, value in adapter_state_dict(fresh.adapted).items() if not torch.equal(value, found[key])]
    assert moved
    assert {key.split(":")[0] for key in moved} >= {"second"}


def test_names_chosen_in_the_loss_are_the_ones_that_must_act() -> None:
    task = TwoNames()
    task.configure_model()
    model, x = task.adapted, torch.randn(3, 8)
    with require_calls(model), active(model, "default"):
        model(x)
    with require_calls(model), per_row(model, ["default", "second", None]):
        model(x)
    with pytest.raises(AdapterNotCalled, match="'2'"), require_calls(model):
        pass


def test_a_folder_of_several_names_is_refused(tmp_path: Path) -> None:
    task = TwoNames()
    task.configure_model()
    with pytest.raises(ConfigError, match="has the adapters default, second"):
        write_adapter_folder(tmp_path / "adapter", task.adapted)
    assert not (tmp_path / "adapter").exists()
