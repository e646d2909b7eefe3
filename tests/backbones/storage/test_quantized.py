import copy
import json

import pytest
import torch
import transformers
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from lora_lightning import DoRA, LoRA
from lora_lightning.adapters import iter_roles
from lora_lightning.adapters.weights import read_weight
from lora_lightning.backbones import quantization as settings_module
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.backbones.load import load_backbone
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.backbones.storage import quantized as quantized_module
from lora_lightning.backbones.storage.quantized import (
    cpu_needs_whole_blocks,
    dense_modules,
    is_quantized,
    quantized_modules,
    settle,
)
from lora_lightning.checkpoint.fingerprint import fingerprint
from lora_lightning.checkpoint.folder import write_adapter_folder
from lora_lightning.errors import BackboneError, NotMergeable, TargetError
from lora_lightning.optim import Optim, build_optimizer
from tests import models, quantizable

CLASSIFIER, CAUSAL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
EXACT = Quantization(compute_dtype="float32")
FORMATS = [
    EXACT,
    Quantization(quant_type="fp4", double_quant=False, compute_dtype="float32", storage_dtype="bfloat16"),
    Quantization(bits=8),
]
METHODS = [LoRA(r=4, target_modules="all-linear"), DoRA(r=4, target_modules="all-linear")]
ALL_LINEAR = METHODS[0]


@pytest.fixture
def folder_of(tmp_path):
    """Write a tiny model's folder, and return its path."""

    def write(architecture, *, body=False):
        model = quantizable.build(architecture)
        (model.base_model if body else model).save_pretrained(tmp_path / architecture)
        return str(tmp_path / architecture)

    return write


def quantized(folder, auto_class=CAUSAL, quantization=EXACT, **settings):
    return load_backbone(folder, auto_class, quantization=quantization, **settings).model


def large_llama(folder):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def bits_per_weight(model):
    """Count packed data and constants of all 4-bit layers, without the code tables."""
    bits = weights = 0
    for _, layer in quantized_modules(model):
        state = layer.weight.quant_state
        parts = [layer.weight, state.absmax]
        if state.nested:
            parts += [state.state2.absmax, state.offset]
        bits += 8 * sum(part.numel() * part.element_size() for part in parts)
        weights += layer.in_features * layer.out_features
    return bits / weights


def test_nf4_with_double_quantization_costs_4_127_bits_a_weight(tmp_path):
    folder = large_llama(tmp_path)
    assert Quantization().bits_per_weight <= bits_per_weight(quantized(folder)) <= 4.13
    plain = Quantization(double_quant=False, compute_dtype="float32")
    assert bits_per_weight(quantized(folder, quantization=plain)) == plain.bits_per_weight == 4.5


@pytest.mark.parametrize(
    ("architecture", "auto_class", "expected"),
    [
        ("bert", CLASSIFIER, ["classifier", "bert.pooler"]),
        ("distilbert", CLASSIFIER, ["pre_classifier", "classifier"]),
        ("roberta", CLASSIFIER, ["classifier"]),
        ("modernbert", CLASSIFIER, ["head", "classifier"]),
        ("llama", CLASSIFIER, ["score"]),
        ("gpt2", CAUSAL, ["lm_head"]),
        ("gemma3", CAUSAL, ["lm_head"]),
        ("t5", "AutoModelForSeq2SeqLM", ["lm_head"]),
    ],
)
def test_heads_and_poolers_stay_dense_and_the_rest_does_not(folder_of, architecture, auto_class, expected):
    model = quantized(folder_of(architecture, body=auto_class == CLASSIFIER), auto_class)
    assert dense_modules(quantizable.build(architecture) if auto_class != CLASSIFIER else model) == expected
    packed = {path for path, _ in quantized_modules(model)}
    dense = [path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and path not in packed]
    kept_wide = [path for path in dense if architecture == "t5" and path.endswith(".wo")]  # as transformers wants it
    assert packed
    assert all(any(path.startswith(name) for name in expected) for path in dense if path not in kept_wide)


def test_what_a_method_copies_stays_dense(folder_of):
    folder = folder_of("llama")
    names = ["layers.1.mlp.down_proj", "o_proj"]
    packed = {path for path, _ in quantized_modules(quantized(folder, keep_dense=names))}
    everything = {path for path, _ in quantized_modules(quantized(folder))}
    expected = {f"model.layers.{index}.self_attn.o_proj" for index in (0, 1)} | {"model.layers.1.mlp.down_proj"}
    assert everything - packed == expected
    for quantization in FORMATS:  # packed bits may be stored as floating-point numbers
        with pytest.raises(TargetError, match="stored quantized"):
            attach(quantized(folder, quantization=quantization), METHODS[0], modules_to_save=names)


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda one: one.label)
@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
def test_a_layer_stands_for_its_weight_in_the_files(folder_of, architecture, quantization):
    folder = folder_of(architecture)
    auto_class = CLASSIFIER if architecture == "bert" else CAUSAL
    dense = load_backbone(folder, auto_class).model
    kinds = {type(layer) for _, layer in quantized_modules(quantized(folder, auto_class, quantization))}
    assert kinds == {Linear8bitLt if quantization.bits == 8 else Linear4bit}
    for path, layer in quantized_modules(quantized(folder, auto_class, quantization)):
        weight, expected = read_weight(layer), read_weight(dense.get_submodule(path))
        assert weight.shape == expected.shape
        error = float((weight - expected).detach().norm() / expected.detach().norm())
        assert 1e-4 < error < (0.02 if quantization.bits == 8 else 0.15)


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda one: one.label)
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_the_fingerprint_is_that_of_the_dense_base(folder_of, architecture, quantization):
    folder = folder_of(architecture)
    auto_class = CLASSIFIER if architecture == "bert" else CAUSAL
    dense = load_backbone(folder, auto_class).model
    packed = quantized(folder, auto_class, quantization)
    for model in (dense, packed):
        attach(model, ALL_LINEAR)
    assert fingerprint(packed) == fingerprint(copy.deepcopy(packed)) == fingerprint(dense)
    _, host = next(iter(quantized_modules(packed)))
    del host._dense_sample  # as if somebody else had quantized it
    assert fingerprint(packed) != fingerprint(dense)


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda one: one.label)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_train_and_start_at_the_base(folder_of, architecture, method, quantization):
    model = quantized(folder_of(architecture), CAUSAL, quantization)
    expected = models.logits(model).detach()
    attach(model, method)
    assert models.gap(models.logits(model), expected) <= 1e-5
    before = {path: read_weight(layer).clone() for path, layer in quantized_modules(model)}
    models.perturb(model).train()
    optimizer = torch.optim.SGD([parameter for _, parameter, _ in iter_roles(model)], lr=0.05)
    losses = []
    for _ in range(5):
        loss = models.logits(model).float().square().mean()
        loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for _, parameter, _ in iter_roles(model))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(read_weight(layer), before[path]) for path, layer in quantized_modules(model))
    with pytest.raises(NotMergeable, match="stores its weight quantized"):
        merge(model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_peft_reads_the_adapter_on_the_same_base(folder_of, tmp_path, architecture, method):
    from peft import PeftModel

    folder, auto_class = folder_of(architecture), CLASSIFIER if architecture == "bert" else CAUSAL
    model = quantized(folder, auto_class)
    base_logits = models.logits(model).detach()
    attach(model, method)
    expected = models.logits(models.perturb(model)).detach()
    write_adapter_folder(tmp_path / "adapter", model)
    config = model.config.quantization_config
    cls = getattr(transformers, auto_class)
    base = cls.from_pretrained(folder, quantization_config=config, dtype="float32", device_map="cpu")
    for layer in base.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # that kernel computes in bfloat16
    torch.manual_seed(3)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert models.gap(models.logits(peft, models.inputs(model)), expected) <= 1e-5
    assert models.gap(base_logits, expected) > 1e-2


def test_layers_that_this_cpu_would_misread_stay_dense(tmp_path, monkeypatch, caplog):
    config = quantizable.build("llama").config
    config.intermediate_size = 96
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr(quantized_module, "cpu_needs_whole_blocks", lambda: True)
    packed = [path for path, _ in quantized_modules(quantized(str(tmp_path)))]
    assert len(packed) == 12
    assert not any(path.endswith("down_proj") for path in packed)
    assert "2 linear layers (the first: model.layers.0.mlp.down_proj) stay dense" in caplog.text
    monkeypatch.setattr(quantized_module, "cpu_needs_whole_blocks", lambda: False)
    assert len(list(quantized_modules(quantized(str(tmp_path))))) == 14


def test_whether_this_cpu_misreads_partial_blocks_is_found_out():
    layer = Linear4bit(96, 64, bias=False, quant_type="nf4", compress_statistics=False)
    layer.weight.data = weight = torch.randn(64, 96)
    error = float((read_weight(layer.to("cpu")) - weight).norm() / weight.norm())
    assert (error > 0.15) is cpu_needs_whole_blocks()


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_layout_of_the_inference_kernel_is_read_and_undone(double_quant):
    torch.manual_seed(0)
    layer = Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=double_quant).to("cpu")
    expected = read_weight(layer)
    # what bitsandbytes does in the first evaluation on a CPU with avx512_bf16
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    wrong = dequantize_4bit(layer.weight.data, copy.copy(layer.weight.quant_state))
    assert wrong.shape != expected.shape or models.gap(wrong, expected) > 0.1
    assert models.gap(read_weight(layer), expected) <= 5e-3
    model = torch.nn.Sequential(layer)
    attach(model, DoRA(r=2, target_modules=["0"]))
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert models.gap(read_weight(layer), expected) <= 5e-3
    model(torch.randn(2, 128)).sum().backward()


def test_evaluation_leaves_a_layer_as_it_was_loaded(folder_of):
    model = quantized(folder_of("bert"), CLASSIFIER, Quantization(compute_dtype="bfloat16"))
    layers = [layer for _, layer in quantized_modules(model)]
    before = [(layer.weight.data_ptr(), layer.weight.clone(), layer.bias.dtype) for layer in layers]
    with torch.inference_mode():
        models.logits(model)
    for layer, (pointer, weight, dtype) in zip(layers, before, strict=True):
        assert layer.weight.data_ptr() == pointer
        assert torch.equal(layer.weight, weight)
        assert layer.bias.dtype is dtype is torch.bfloat16
        assert not layer.bias.is_inference()


def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so(folder_of, monkeypatch):
    folder = folder_of("llama")
    quantizable.build("llama").bfloat16().save_pretrained(folder)
    monkeypatch.setattr(settings_module, "cpu_has_bfloat16", lambda: False)
    loaded = load_backbone(folder, CAUSAL, quantization=Quantization())
    assert "in nf4 on cpu and compute in float32, since this CPU has no instructions for bfloat16" in loaded.storage
    assert "Dense stay the embeddings, the norms and lm_head." in loaded.storage
    assert loaded.model.dtype is torch.float32
    assert models.logits(loaded.model).dtype is torch.float32
    monkeypatch.setattr(settings_module, "cpu_has_bfloat16", lambda: True)
    loaded = load_backbone(folder, CAUSAL, quantization=Quantization())
    assert "compute in bfloat16." in loaded.storage
    assert models.logits(loaded.model).dtype is torch.bfloat16
    assert load_backbone(folder, CAUSAL).storage is None


def test_files_that_are_quantized_already_are_used_as_they_are(folder_of, tmp_path):
    model = quantized(folder_of("llama"))
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(BackboneError, match=r"stored quantized already.*leave quantization out"):
        quantized(str(tmp_path / "packed"))
    again = load_backbone(str(tmp_path / "packed"), CAUSAL).model
    assert is_quantized(again)
    settle(again)
    assert models.gap(models.logits(again), models.logits(model)) <= 1e-5
    attach(again, ALL_LINEAR)
    attach(model, ALL_LINEAR)
    assert fingerprint(again) != fingerprint(model)


def test_a_model_without_linear_layers_is_refused(tmp_path):
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_channels=1
    )
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="no linear layer that nf4 could store"):
        quantized(str(tmp_path), "AutoModel")


def test_half_of_a_body_is_still_refused(folder_of):
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    folder = Path(folder_of("bert"))
    state = load_file(folder / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if "layer.1.output.dense" not in name}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
    with pytest.raises(BackboneError, match=r"lack weights for 1 modules.*layer\.1\.output\.dense"):
        quantized(str(folder), CLASSIFIER)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_on_a_gpu_it_is_loaded_there_and_computes_in_bfloat16(folder_of, method):
    folder = folder_of("llama")
    with torch.device("cuda", 0):
        loaded = load_backbone(folder, CAUSAL, quantization=Quantization())
    assert {parameter.device for parameter in loaded.model.parameters()} == {torch.device("cuda", 0)}
    assert "compute in bfloat16" in loaded.storage
    dense = load_backbone(folder, CAUSAL).model
    for model in (dense, loaded.model):
        attach(model, method)
    assert fingerprint(dense) == fingerprint(loaded.model)
    optimizer = build_optimizer(loaded.model, Optim(optimizer="PagedAdamW8bit"))
    batch = {name: tensor.cuda() for name, tensor in models.inputs(loaded.model).items()}
    before = models.logits(loaded.model, batch)
    before.float().square().mean().backward()
    optimizer.step()
    assert not torch.equal(models.logits(loaded.model, batch), before)
