"""Calls of `attach` that mix up what goes where end in one sentence, and leave the model alone."""

import pytest
from torch import nn

from lora_lightning.adapters import adapter_names
from lora_lightning.adapters import attach as plain_attach
from lora_lightning.backbones.attach import attach
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.methods import LoRA, PromptTuning


@pytest.mark.parametrize("function", [attach, plain_attach])
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA, r"got class \(write LoRA\(\) with its settings\)"),
        ("lora", r"got str 'lora'"),
        ([], "got list"),
        ([LoRA(r=1), "lora"], "got list"),
        (None, "got NoneType None"),
    ],
)
def test_what_is_no_method(function, method, message):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TargetError, match=message):
        function(model, method)
    assert adapter_names(model) == ()
    function(model, LoRA(r=1))
    assert adapter_names(model) == ("default",)


@pytest.mark.parametrize("function", [attach, plain_attach])
def test_the_model_comes_first(function):
    with pytest.raises(TargetError, match="the model first and then the method; the first one is a LoRA"):
        function(LoRA(r=1), nn.Linear(4, 4))


@pytest.mark.parametrize("method", [LoRA, PromptTuning])
def test_settings_have_names(method):
    with pytest.raises(ConfigError, match=r"takes its settings by name, as in LoRA\(r=8\); got \(8, 16\)"):
        method(8, 16)
