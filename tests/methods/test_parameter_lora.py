"""LoRA on parameters of modules that are not layers of a known kind."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters import adapter_state_dict, iter_adapters, load_adapter_state_dict
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.methods import IA3, DoRA, LoRA, VeRA
from tests import models
from tests.peft_format.test_scenarios import Around

TARGETS = ["bare.stacked", "bare.matrix"]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def reference(model: nn.Module) -> nn.Module:
    """Return the bare model with the updates written into its parameters, by the formula."""
    plain = Around()
    state = adapter_state_dict(model)
    with torch.no_grad():
        for name in ("stacked", "matrix"):
            a, b = state[f"bare.{name}.lora_A"], state[f"bare.{name}.lora_B"]
            rank = 4 if name == "matrix" else 2
            getattr(plain.bare, name).add_((16 / rank) * torch.einsum("...or,...ri->...oi", b, a))
    return plain


def adapted() -> nn.Module:
    model = Around()
    attach(model, LoRA(r=2, target_modules=TARGETS, rank_pattern={"matrix": 4}))
    return model


def test_the_formula() -> None:
    model = adapted()
    assert torch.equal(model(X), Around()(X))
    models.perturb(model)
    torch.testing.assert_close(model(X), reference(model)(X), atol=1e-5, rtol=1e-5)
    assert (model(X) - Around()(X)).abs().max() > 1e-2  # negative control
    fresh = adapted()
    load_adapter_state_dict(fresh, adapter_state_dict(model))
    assert torch.equal(fresh(X), model(X))
    merged = copy.deepcopy(model)
    merge(merged)
    torch.testing.assert_close(merged(X), model(X), atol=1e-5, rtol=1e-5)
    assert not list(iter_adapters(merged))


def test_gradients() -> None:
    model = models.perturb(adapted())
    model(X).square().sum().backward()
    plain = reference(model)
    plain(X).square().sum().backward()
    state = adapter_state_dict(model)
    for name, parameter in model.bare.named_parameters():
        if name.endswith("matrix_lora_A"):
            expected = 4.0 * state["bare.matrix.lora_B"].t() @ plain.bare.matrix.grad
            torch.testing.assert_close(parameter.grad, expected, atol=1e-3, rtol=1e-4)
    assert model.bare.matrix.grad is None


def test_other_threads_see_the_host_as_it_is() -> None:
    """The parameters of the host are never swapped, not even for the time of a call."""
    model = models.perturb(adapted())
    stored = dict(model.bare._parameters)
    expected, wrong = model(X), []

    def call() -> None:
        wrong.extend(not torch.equal(model(X), expected) for _ in range(50))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = [model.bare._parameters[name] is one for _ in range(500) for name, one in stored.items()]
    for thread in threads:
        thread.join()
    assert all(seen)
    assert not any(wrong)


def test_routers_of_mixtures() -> None:
    model = models.build("qwen3_moe")
    base = models.logits(model).detach()
    report = attach(model, LoRA(r=2, target_modules=["gate.weight", "q_proj"]))
    assert [path for path in report.hosts if path.endswith("gate")] == [f"model.layers.{n}.mlp.gate" for n in range(2)]
    assert torch.equal(models.logits(model), base)
    models.perturb(model)
    assert (models.logits(model) - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (LoRA(r=2, target_modules=["bare"]), TargetError, r"name its parameter instead, .* '...stacked'"),
        (LoRA(r=2, target_modules=["stacked"]), TargetError, "It is a parameter of a Bare; write 'bare.stacked'"),
        (LoRA(r=9, target_modules=["bare.stacked"]), ConfigError, "its weight is 8 x 4, so r is at most 4"),
        (LoRA(r=2, init="pissa", target_modules=["bare.stacked"]), ConfigError, "not defined for experts and other"),
        (DoRA(r=2, target_modules=["bare.stacked"]), TargetError, "DoRA does not adapt single parameters"),
        (VeRA(r=2, target_modules=["bare.matrix"]), TargetError, "VeRA does not adapt single parameters"),
        (IA3(target_modules=["bare.matrix"], feedforward_modules=[]), TargetError, "IA3 does not adapt single"),
    ],
)
def test_refused(method: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        attach(Around(), method)


def test_a_module_that_is_called_without_a_forward_of_its_own() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.holder = Holder()

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.holder.weight

    with pytest.raises(TargetError, match="no module is called"):
        attach(Net(), LoRA(r=2, target_modules=["holder.weight"]))
