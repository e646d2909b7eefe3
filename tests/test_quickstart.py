"""The quickstart's last check counts right answers, whatever a metric rounds them to."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "scripts" / "quickstart.py"


@pytest.mark.parametrize("num_right", [0, 1611, 1625, 2000])
def test_an_accuracy_in_float32_is_that_of_its_count_alone(num_right: int) -> None:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    accuracy = (torch.tensor(num_right) / 2000).item()
    assert [count for count in (num_right - 1, num_right, num_right + 1) if script.is_share(accuracy, count, 2000)] == [
        num_right
    ]
