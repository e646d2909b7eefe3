"""Activations that are computed again or kept elsewhere."""

import pytest
import torch

from tests.contract.steps import adapted, largest_gap, step, takes_dropout, with_dropout
from tests.host_memory import Store, offloading


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(base, method, example, use_reentrant):
    adapted(base, with_dropout(method)).train()
    torch.manual_seed(5)
    expected = step(base)
    base.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    actual = step(base)
    assert largest_gap(actual, expected, example) <= 1e-6
    if takes_dropout(method):
        torch.manual_seed(6)
        other = step(base)
        assert largest_gap(other, expected, example) > 1e-3


def test_offloaded_activations(base, method, example):
    adapted(base, with_dropout(method)).train()
    torch.manual_seed(5)
    expected = step(base)
    store = Store()
    for damage in (0, 1):
        store.damage = damage
        torch.manual_seed(5)
        with offloading(base, store, min_bytes=1024):
            actual = step(base)
        assert sum(copied.num_restored for copied in store.copies) > 5
        assert (largest_gap(actual, expected, example) > 0) == bool(damage)
