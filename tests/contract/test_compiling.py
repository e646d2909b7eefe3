"""Compiled models."""

import shutil

import pytest
import torch
from torch import nn

from lora_lightning.adapters import fold, iter_roles
from tests import models
from tests.contract.examples import ON_PLAIN
from tests.contract.steps import adapted, largest_gap, step, with_dropout


# torch.compile itself makes an instance of each autograd function that has a setup_context.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_in_one_graph(architecture, base, method, example):
    if architecture == "llama":  # with dropout; the other architecture goes without
        method = with_dropout(method)
    adapted(base, method).train()
    if example.compiles_folded:
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
            step(base, torch.compile(base, fullgraph=True, backend="aot_eager"))
        fold(base)
    torch.manual_seed(5)
    expected = step(base)
    torch.compiler.reset()
    torch.manual_seed(5)
    actual = step(base, torch.compile(base, fullgraph=True, backend="aot_eager"))
    assert largest_gap(actual, expected, example) <= 1e-5


# torch.compile itself makes an instance of each autograd function that has a setup_context.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # its own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default compiler backend needs a C++ compiler")
@pytest.mark.parametrize("method", ON_PLAIN.values(), ids=list(ON_PLAIN))
def test_default_compiler_backend(method):
    """What the backend fuses must still be right, so small layers on which every fusion applies are enough."""
    model = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 8, bias=False))
    adapted(model, with_dropout(method)).train()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, options={"fallback_random": True})
    x = torch.randn(6, 24, requires_grad=True)
    results = []
    for called in (model, compiled):
        torch.manual_seed(5)
        output = called(x)
        wanted = [x, *(parameter for _, parameter, _ in iter_roles(model))]
        results.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
    assert all(models.gap(*both) <= 1e-5 for both in zip(*results, strict=True))
