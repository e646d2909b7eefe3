import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn

import lora_lightning.backbones.storage.codecs  # noqa: F401 - registers the 4-bit codec
from lora_lightning.adapters import attach
from lora_lightning.adapters.weights import (
    HostKind,
    check_writable,
    codec_of,
    find_codec,
    original_class,
    read_weight,
    write_weight,
)
from lora_lightning.errors import NotMergeable, TargetError
from lora_lightning.methods import LoRA

HOSTS = {
    "linear": (lambda: nn.Linear(3, 5), HostKind.LINEAR, (5, 3)),
    "embedding": (lambda: nn.Embedding(7, 4), HostKind.EMBEDDING, (4, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), HostKind.CONV, (6, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2)), HostKind.CONV, (6, 24)),
}


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_and_write(name, dtype):
    build, kind, shape = HOSTS[name]
    host = build().to(dtype)
    parameter, pointer = host.weight, host.weight.data_ptr()
    codec = codec_of(host)
    assert codec.kind is kind
    assert codec.is_view
    assert codec.shape(host) == shape
    assert read_weight(host).shape == shape
    assert read_weight(host).data_ptr() == pointer
    weight = torch.randn(shape)
    write_weight(host, weight)
    assert host.weight is parameter
    assert parameter.data_ptr() == pointer
    assert torch.equal(read_weight(host), weight.to(dtype))


def test_the_weight_is_what_the_layer_multiplies_with():
    linear, embedding = nn.Linear(3, 5, bias=False), nn.Embedding(7, 4)
    x, ids = torch.randn(2, 3), torch.tensor([1, 5])
    torch.testing.assert_close(linear(x), x @ read_weight(linear).t())
    torch.testing.assert_close(embedding(ids), nn.functional.one_hot(ids, 7).float() @ read_weight(embedding).t())
    conv = nn.Conv1d(4, 6, 3, bias=False)
    patches = torch.randn(1, 4, 3)
    torch.testing.assert_close(conv(patches).flatten(), read_weight(conv) @ patches.flatten())


def test_a_four_bit_host_is_read_and_not_written():
    host = Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    weight = dequantize_4bit(host.weight.data, host.weight.quant_state)
    assert torch.equal(read_weight(host), weight)
    assert not codec_of(host).is_view
    assert codec_of(host).shape(host) == (32, 64)
    with pytest.raises(NotMergeable, match="Linear4bit stores its weight quantized"):
        write_weight(host, weight)
    with pytest.raises(NotMergeable, match="merge into the base in its full precision"):
        check_writable(host)


@pytest.mark.parametrize("host", [nn.LayerNorm(4), nn.ReLU(), nn.Sequential(), nn.ConvTranspose1d(4, 4, 3)])
def test_unknown_hosts(host):
    assert find_codec(host) is None
    with pytest.raises(TargetError, match=rf"{type(host).__name__} is no layer that adapters know how to read"):
        read_weight(host)


class Loud(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class ScaledEmbedding(nn.Embedding):
    embed_scale = 2.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class OddEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) ** 2


def test_an_override_of_forward_is_no_known_host():
    assert find_codec(Loud(3, 3)) is None
    assert find_codec(OddEmbedding(3, 3)) is None
    assert find_codec(ScaledEmbedding(3, 3)) is codec_of(nn.Embedding(3, 3))


def test_a_computed_weight_is_no_known_host():
    host = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    assert find_codec(host) is None


def test_an_adapted_host_keeps_its_codec():
    model = nn.Sequential(nn.Linear(3, 3))
    codec = codec_of(model[0])
    attach(model, LoRA(r=1))
    assert type(model[0]) is not nn.Linear
    assert original_class(model[0]) is nn.Linear
    assert codec_of(model[0]) is codec
