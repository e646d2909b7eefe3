import copy

import pytest
import torch
from torch import nn

from lora_lightning.adapters import attach
from lora_lightning.errors import ConfigError
from lora_lightning.methods import LoRA
from lora_lightning.optim import Optim, build_optimizer, config


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(128, 128))
    attach(model, LoRA(r=64, target_modules=["0"]))
    return model


def step(model, optimizer):
    model(torch.ones(2, 128)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["AdamW8bit", "bitsandbytes.optim.AdamW8bit"])
def test_an_8_bit_optimizer_steps_keeps_8_bits_and_resumes(model, name):
    optim = Optim(lr=1e-2, optimizer=name, lora_plus_ratio=4, weight_decay=0.1)
    optimizer = build_optimizer(model, optim)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 4e-2]
    for _ in range(3):
        step(model, optimizer)
    adapter = next(parameter for group in optimizer.param_groups for parameter in group["params"])
    assert optimizer.state[adapter]["state1"].dtype is torch.uint8
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    step(model, optimizer)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter, value in zip(model.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    again = build_optimizer(model, optim)
    again.load_state_dict(saved)
    step(model, again)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize(
    ("name", "alternative"),
    [
        ("PagedAdamW", "optimizer=AdamW."),
        ("PagedAdamW8bit", "optimizer=AdamW8bit to keep its state in 8 bits, or AdamW."),
        ("PagedAdam32bit", "optimizer=Adam."),
        ("PagedLion", "optimizer=AdamW."),
    ],
)
def test_paging_on_a_cpu_is_refused_with_the_alternative(model, name, alternative):
    optim = Optim(optimizer=name)  # reading the settings is no error: a test of the checkpoint needs no optimizer
    with pytest.raises(ConfigError, match=f"{name} moves its state") as caught:
        build_optimizer(model, optim)
    assert alternative in str(caught.value)


def test_8_bits_without_a_kernel_for_cpus_are_refused(model, monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    with pytest.raises(ConfigError, match=r"Adam8bit .*runs on a GPU only.*optimizer=Adam,"):
        build_optimizer(model, Optim(optimizer="Adam8bit"))
    build_optimizer(model, Optim(optimizer="AdamW32bit"))


def test_a_missing_package_is_said_with_the_extra_and_the_alternative(model, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    optim = Optim(optimizer="AdamW8bit")
    monkeypatch.setattr(config.importlib, "import_module", fail)
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'lora-lightning\[quant\]'.*optimizer=AdamW\."):
        build_optimizer(model, optim)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("bitsandbytes.optim.AdamW9bit", ["has no class `AdamW9bit`", "did you mean `AdamW8bit`"]),
        ({"class_path": "AdamW8bit", "init_args": {"momentum": 0.9}}, ["AdamW8bit does not take momentum", "betas"]),
    ],
)
def test_mistakes_are_named_when_it_is_built(model, spec, words):
    with pytest.raises(ConfigError) as caught:
        build_optimizer(model, Optim(optimizer=spec))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_mistyped_short_name_is_told_the_nearest():
    with pytest.raises(ConfigError, match="PagedAdamW8bit"):
        Optim(optimizer="PagedAdmW8bit")
