"""Bottleneck adapters against the formula in float64, at the places of every architecture."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_lightning.adapters import iter_adapters, iter_hosts
from lora_lightning.backbones.attach import attach
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.methods import BottleneckAdapter
from tests import models

PLACES = {
    "bert": ("attention.output.dense", "output.dense"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "roberta": ("attention.output.dense", "output.dense"),
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "qwen2": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma3": ("self_attn.o_proj", "mlp.down_proj"),
    "t5": ("Attention.o", "DenseReluDense.wo"),
    "camembert": ("attention.output.dense", "output.dense"),
    "electra": ("attention.output.dense", "output.dense"),
    "gemma": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma2": ("self_attn.o_proj", "mlp.down_proj"),
    "mistral": ("self_attn.o_proj", "mlp.down_proj"),
    "mt5": ("Attention.o", "DenseReluDense.wo"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj"),
    "vit": ("attention.o_proj", "mlp.fc2"),
    "xlm-roberta": ("attention.output.dense", "output.dense"),
}
STYLES = ("houlsby", "pfeiffer", "parallel")


def formula(adapter: nn.Module, h: torch.Tensor, function, scaling: float) -> torch.Tensor:
    inner = function(h @ adapter.down_weight.t() + adapter.down_bias)
    return scaling * (inner @ adapter.up_weight.t() + adapter.up_bias)


@torch.no_grad()
def with_formula(base: nn.Module, adapted: nn.Module, style: str, places: tuple[str, str], factor: float) -> nn.Module:
    """Return the base with the formula hooked into it by hand, `factor` times as strong as it should be."""
    model = copy.deepcopy(base)
    function, scaling = {"houlsby": (F.silu, 1), "pfeiffer": (F.relu, 1), "parallel": (F.relu, 4)}[style]
    adapters = {path: adapter for path, _, adapter in iter_adapters(adapted)}

    def after(adapter):
        return lambda _module, _args, output: output + formula(adapter, output, function, scaling * factor)

    def beside(adapter):
        return lambda _, args, output: output + formula(adapter, args[0], function, scaling * factor)

    def replaced(adapter, host):  # the forward of BERT's output module, written out
        def forward(hidden_states, input_tensor):
            update = formula(adapter, input_tensor, function, scaling * factor)
            return host.LayerNorm(host.dense(hidden_states) + update + input_tensor)

        return forward

    for path, module in list(model.named_modules()):
        in_attention = "ttention" in path or "attn" in path
        if not path.endswith(places[0] if in_attention else places[1]) or (in_attention and style != "houlsby"):
            continue
        parent = path.rpartition(".")[0]
        host = model.get_submodule(parent)
        if style != "parallel":
            module.register_forward_hook(after(adapters.pop(path)))
        elif hasattr(host, "LayerNorm"):
            host.forward = replaced(adapters.pop(parent), host)
        else:
            host.register_forward_hook(beside(adapters.pop(parent)))
    assert not adapters, f"adapters at places that the test does not know: {list(adapters)}"
    return model


@pytest.mark.parametrize("architecture", PLACES)
@pytest.mark.parametrize("style", STYLES)
def test_equals_the_formula(architecture, style):
    base = models.build(architecture).double()
    model = copy.deepcopy(base)
    attach(model, BottleneckAdapter(style=style, width=4))
    before = models.logits(base)
    assert models.gap(models.logits(model), before) <= 1e-14
    models.perturb(model)
    actual = models.logits(model)
    assert models.gap(actual, before) > 1e-3
    for factor, equal in ((1.0, True), (1.1, False)):
        gap = models.gap(actual, models.logits(with_formula(base, model, style, PLACES[architecture], factor)))
        assert gap <= 1e-12 if equal else gap > 1e-4


@pytest.mark.parametrize(("style", "hosts", "width"), [("houlsby", 4, 2), ("pfeiffer", 2, 2), ("parallel", 2, 16)])
def test_usual_sizes(style, hosts, width):
    report = attach(models.build("llama"), BottleneckAdapter(style=style))
    assert len(report.hosts) == hosts
    assert report.num_trainable == hosts * (2 * 32 * width + width + 32)


def test_places_by_setting():
    model = models.build("bert")
    attach(model, BottleneckAdapter(style="pfeiffer", mh_adapter=True, output_adapter=False, leave_out=[0]))
    assert [path for path, _ in iter_hosts(model)] == ["bert.encoder.layer.1.attention.output.dense"]


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "tanh", "relu"])
def test_functions(name):
    model = models.build("llama").double()
    attach(model, BottleneckAdapter(style="pfeiffer", non_linearity=name, scaling=0.5, width=4))
    models.perturb(model)
    _, host, adapter = next(iter_adapters(model))
    x = torch.randn(3, 48, dtype=torch.float64)
    h = x @ host.weight.t()
    function = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "tanh": torch.tanh, "relu": F.relu}[name]
    assert models.gap(host(x), h + formula(adapter, h, function, 0.5)) <= 1e-12
    assert models.gap(host(x), h + formula(adapter, h, torch.sin, 0.5)) > 1e-4


def test_dropout_acts_in_training_only():
    model = models.build("llama")
    attach(model, BottleneckAdapter(dropout=0.5, width=4))
    models.perturb(model)
    assert torch.equal(models.logits(model), models.logits(model))
    model.train()
    assert models.gap(models.logits(model), models.logits(model)) > 1e-3


def test_a_reduction_factor_above_the_hidden_size():
    with pytest.raises(ConfigError, match="reduction_factor=64 is larger than the hidden size 32"):
        attach(models.build("bert"), BottleneckAdapter(reduction_factor=64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"style": "serial"}, "style must be one of"),
        ({"non_linearity": "sin"}, "non_linearity must be one of"),
        ({"reduction_factor": 0}, "reduction_factor must be"),
        ({"width": 0}, "width must be"),
        ({"width": 4, "reduction_factor": 2}, "give one"),
        ({"style": "pfeiffer", "output_adapter": False}, "nothing would train"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        BottleneckAdapter(**settings)


@pytest.mark.parametrize("leave_out", [[7], [0, 1]])
def test_leave_out_names_layers_that_are_there(leave_out):
    with pytest.raises(TargetError, match="the model's layers are 0, 1"):
        attach(models.build("gpt2"), BottleneckAdapter(leave_out=leave_out))


def test_a_model_without_the_usual_names_is_refused():
    model = models.build("llama")
    model.config.model_type = "vit"
    with pytest.raises(TargetError, match=r"LlamaForCausalLM has no modules called attention.o_proj or mlp.fc2, where"):
        attach(model, BottleneckAdapter())
