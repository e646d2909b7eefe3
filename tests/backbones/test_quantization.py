import dataclasses

import pytest
import torch

from lora_lightning.backbones import quantization as module
from lora_lightning.backbones.quantization import Quantization, cpu_has_bfloat16, require_packages
from lora_lightning.errors import BackboneError, ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 3}, ["bits", "4, 8", "3"]),
        ({"bits": True}, ["bits", "True"]),
        ({"quant_type": "int4"}, ["quant_type", "nf4, fp4", "int4"]),
        ({"double_quant": 1}, ["double_quant", "True, False", "1"]),
        ({"compute_dtype": "bf16"}, ["compute_dtype", "bfloat16", "bf16"]),
        ({"storage_dtype": "int4"}, ["storage_dtype", "uint8"]),
        ({"bits": 8, "quant_type": "fp4"}, ["quant_type", "for 4 bits"]),
        ({"bits": 8, "compute_dtype": "bfloat16"}, ["compute_dtype", "for 4 bits"]),
    ],
)
def test_values_that_are_none_are_refused_by_name(settings, words):
    with pytest.raises(ConfigError) as caught:
        Quantization(**settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_settings_are_plain_and_come_back():
    quantization = Quantization(quant_type="fp4", compute_dtype="float16")
    assert Quantization(**dataclasses.asdict(quantization)) == quantization


@pytest.mark.parametrize("has", [True, False])
def test_layers_compute_in_bfloat16_where_the_device_has_it(monkeypatch, has):
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: has)
    assert Quantization().compute_dtype_on(CPU) is (torch.bfloat16 if has else torch.float32)
    assert Quantization().compute_dtype_on(GPU) is torch.bfloat16
    assert Quantization(compute_dtype="float16").compute_dtype_on(CPU) is torch.float16


@pytest.mark.parametrize(("avx512", "amx"), [(True, False), (False, True), (False, False)])
def test_a_cpu_is_asked_for_its_instructions(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert cpu_has_bfloat16() is (avx512 or amx)


@pytest.mark.parametrize(("flags", "expected"), [("fpu avx512_bf16 sse", True), ("fpu avx512f", False), (None, False)])
def test_without_torchs_answer_the_systems_flags_count(monkeypatch, tmp_path, flags, expected):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    monkeypatch.setattr(module, "Path", lambda _: tmp_path / "cpuinfo")
    if flags:
        (tmp_path / "cpuinfo").write_text(f"flags\t: {flags}\n")
    assert cpu_has_bfloat16() is expected


@pytest.mark.parametrize("absent", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_said_with_the_extra_that_brings_it(monkeypatch, absent):
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    with pytest.raises(BackboneError, match=rf"needs {absent}, which is not.*pip install 'lora-lightning\[quant\]'"):
        require_packages()


def test_settings_reach_transformers():
    config = Quantization(double_quant=False, storage_dtype="bfloat16").to_transformers(GPU, ["classifier"])
    assert config.load_in_4bit
    assert not config.bnb_4bit_use_double_quant
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert config.bnb_4bit_quant_storage is torch.bfloat16
    assert config.llm_int8_skip_modules == ["classifier"]
    assert Quantization().to_transformers(GPU, []).bnb_4bit_quant_storage is torch.uint8
    assert Quantization(bits=8).to_transformers(GPU, []).load_in_8bit
