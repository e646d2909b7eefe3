"""Two ranks with DDP end where one process ends, and resume exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.callbacks.runs import LIGHTNING_WARNINGS
from tests.finetuning.ranks_script import fit
from tests.finetuning.runs import MODULES, same

pytestmark = LIGHTNING_WARNINGS
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two ranks ended with: of a whole run and of a resumed one, by module."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("ranks_script.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def distance(state: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference; the counter of rows is each rank's own."""
    assert state.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in state.items() if name != "num_seen")


@pytest.mark.parametrize("cls", MODULES)
def test_two_ranks_end_where_one_process_ends(cls, ends, tmp_path):
    first, second = (rank[cls.__name__][0] for rank in ends)
    assert same(first, second)
    assert distance(first, fit(cls, tmp_path / "one")) < 1e-8
    assert distance(first, fit(cls, tmp_path / "half", batch_size=2)) > 1e-4


@pytest.mark.parametrize("cls", MODULES)
def test_two_ranks_resume_exactly(cls, ends):
    for rank in ends:
        exact, whole, resumed = rank[cls.__name__]
        assert same(whole, resumed)
        assert not same(exact, whole)
