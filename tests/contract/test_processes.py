"""Two processes give the gradients of one."""

import pytest
import torch
from torch import Tensor

from tests import distributed, models
from tests.contract.examples import CASES

DDP_CASES = {name: (architecture, example.method) for name, (example, architecture) in CASES.items()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, list[dict[str, Tensor]]]:
    """Run every case in the same two processes: starting them is what takes time."""
    by_rank = distributed.run(list(DDP_CASES.values()), tmp_path_factory.mktemp("ddp"))
    return {case: [results[index] for results in by_rank] for index, case in enumerate(DDP_CASES)}


@pytest.mark.parametrize("name", DDP_CASES)
def test_two_processes_equal_one(two_processes, name):
    first, second = two_processes[name]
    expected = distributed.gradients(DDP_CASES[name], rank=None)
    alone = distributed.gradients(DDP_CASES[name], rank=None, rows=2)
    assert expected.keys() == first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in expected)
    together = [torch.cat([grads[name].flatten() for name in expected]) for grads in (first, expected, alone)]
    assert models.gap(together[0], together[1]) <= 1e-12
    assert models.gap(together[2], together[1]) > 1e-2
