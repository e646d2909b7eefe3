"""LoRA on the 3-D parameters of experts, against the formula in float64 and against PEFT."""

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lora_lightning import DoRA, LoRA, adapter_state_dict, disabled, load_adapter_state_dict
from lora_lightning.adapters import detach, iter_adapters, iter_roles, require_calls
from lora_lightning.adapters.experts import expert_weights
from lora_lightning.adapters.targets import select_weights
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.backbones.load import load_backbone
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.backbones.view import view_of
from lora_lightning.checkpoint.fingerprint import fingerprint
from lora_lightning.errors import ConfigError, TargetError
from lora_lightning.merging.merge import merge_and_measure
from lora_lightning.methods import IA3, AdaLoRA, DeltaLoRA, LoRADrop, LoRAFA, VeRA
from tests import models

EXPERTS = LoRA(r=4, alpha=8, target_modules=["experts"])
BOTH = ("gate_up_proj", "down_proj")


def adapted(name: str = "mixtral", method: LoRA = EXPERTS) -> nn.Module:
    """Return a tiny mixture with adapters off their start."""
    model = models.build(name)
    attach(model, method)
    return models.perturb(model)


def experts_of(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return the experts modules with their adapters."""
    return [(host, adapter) for _, host, adapter in iter_adapters(model) if expert_weights(host)]


def routed(host: nn.Module, experts: list[int], num_tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Return random inputs of an experts module in float64, two experts a token, chosen among `experts`."""
    generator = torch.Generator().manual_seed(3)
    width = host.down_proj.shape[2 if host.is_transposed else 1]
    x = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    picks = [torch.randperm(len(experts), generator=generator)[:2] for _ in range(num_tokens)]
    chosen = torch.tensor(experts)[torch.stack(picks)] if picks else torch.empty(0, 2, dtype=torch.int64)
    return x, chosen, torch.rand(num_tokens, 2, generator=generator, dtype=torch.float64)


def formula(host: nn.Module, adapter: nn.Module, x: Tensor, chosen: Tensor, shares: Tensor, scaling: float) -> Tensor:
    """Compute every token with every one of its experts on its own, from dense weights W_e + s B_e A_e."""

    def project(name: str, expert: int, row: Tensor) -> Tensor:
        weight = getattr(host, name)[expert]
        weight = weight.T if host.is_transposed else weight
        if f"{name}_lora_A" in dict(adapter.named_parameters()):
            a, b = (getattr(adapter, f"{name}_lora_{part}")[expert] for part in "AB")
            weight = weight + scaling * b @ a
        return weight @ row + (getattr(host, f"{name}_bias")[expert] if host.has_bias else 0)

    rows = []
    for row, experts, weights in zip(x, chosen.tolist(), shares, strict=True):
        outputs = []
        for expert in experts:
            hidden = project("gate_up_proj" if host.has_gate else "up_proj", expert, row)
            if not host.has_gate:
                hidden = host.act_fn(hidden)
            elif host.is_concatenated:
                hidden = host.act_fn(hidden[: len(hidden) // 2]) * hidden[len(hidden) // 2 :]
            else:  # GPT-OSS interleaves gate and up
                gate, up = hidden[::2].clamp(max=host.limit), hidden[1::2].clamp(-host.limit, host.limit)
                hidden = (up + 1) * gate * torch.sigmoid(gate * host.alpha)
            outputs.append(project("down_proj", expert, hidden))
        rows.append(weights @ torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("targets", [["experts"], ["experts.down_proj"]])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_output_and_gradients_are_those_of_the_formula(name: str, targets: list[str]) -> None:
    model = adapted(name, LoRA(r=4, alpha=8, target_modules=targets)).double()
    host, adapter = experts_of(model)[0]
    x, chosen, shares = routed(host, [0, 1, 3])
    x.requires_grad_()
    wanted = [x, *adapter.parameters()]
    ours, reference = host(x, chosen, shares), formula(host, adapter, x, chosen, shares, scaling=2)
    assert models.gap(ours, reference) <= 1e-12
    assert models.gap(ours, formula(host, adapter, x, chosen, shares, scaling=2.1)) > 1e-3
    assert models.gap(ours, formula(host, adapter, x, chosen.flip(1), shares, scaling=2)) > 1e-3
    direction = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, wanted, direction)
    expected = torch.autograd.grad(reference, wanted, direction)
    assert max(models.gap(*pair) for pair in zip(grads, expected, strict=True)) <= 1e-12
    assert models.gap(grads[1][0], expected[1][1]) > 1e-2


def test_an_expert_without_tokens_gets_gradients_of_zeros() -> None:
    model = adapted().double()
    host, adapter = experts_of(model)[0]
    for num_tokens in (9, 0):
        model.zero_grad()
        host(*routed(host, [0, 1, 3], num_tokens)).sum().backward()
        grads = [parameter.grad for parameter in adapter.parameters()]
        assert all(grad is not None and not grad[2].any() for grad in grads)
        assert all(bool(grad[0].any()) is (num_tokens > 0) for grad in grads if grad is not None)


@pytest.mark.parametrize("name", models.MIXTURES)
def test_whole_models(name: str) -> None:
    model = models.build(name)
    base, weights = models.logits(model).detach(), {key: value.clone() for key, value in model.state_dict().items()}
    report = attach(model, EXPERTS)
    assert report.hosts
    assert all(path.endswith("experts") for path in report.hosts)
    assert models.gap(models.logits(model), base) <= 1e-6
    with require_calls(model):
        moved = models.logits(models.perturb(model))
    assert models.gap(moved, base) > 1e-2
    moved.square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    with disabled(model):
        assert torch.equal(models.logits(model), base)
    merged = copy.deepcopy(model)
    merge(merged)
    assert models.gap(models.logits(merged), moved) <= 1e-5
    changed = {key for key, value in merged.state_dict().items() if not torch.equal(value, weights[key])}
    assert changed == {f"{path}.{name}" for path in report.hosts for name in expert_weights(model.get_submodule(path))}
    detach(model)
    assert model.state_dict().keys() == weights.keys()
    assert torch.equal(models.logits(model), base)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_peft_computes_the_same_with_copied_weights(name: str) -> None:
    ours = adapted(name)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=[f"experts.{one}" for one in BOTH])
    theirs = peft.get_peft_model(models.build(name), config).eval()
    for path, _, adapter in iter_adapters(ours):
        outer = theirs.base_model.model.get_submodule(path)  # the wrapper of down_proj, around that of gate_up_proj
        for wrapper, parameter in ((outer, "down_proj"), (outer.base_layer, "gate_up_proj")):
            a, b = adapter.factors(parameter)
            assert wrapper.parameter_name == parameter
            for part, value in (("lora_A", a.flatten(0, 1)), ("lora_B", b.permute(1, 2, 0).flatten(1))):
                getattr(wrapper, part)["default"].weight.data.copy_(value)
    result = models.logits(ours)
    assert models.gap(result, models.logits(theirs)) <= 1e-5
    outer.lora_B["default"].weight.data.mul_(1.1)
    assert models.gap(result, models.logits(theirs)) > 1e-3


def test_start_is_that_of_a_layer_for_each_expert() -> None:
    model = models.build("mixtral")
    attach(model, LoRA(r=4, target_modules=["experts"]))
    a, b = (one.detach() for one in experts_of(model)[0][1].factors("gate_up_proj"))
    assert (a.shape, b.shape) == ((4, 4, 32), (4, 96, 4))
    assert not b.any()
    assert float(a.abs().max()) == pytest.approx(32**-0.5, rel=0.05)  # kaiming's bound of a layer of 32 inputs
    assert len({round(float(one.sum()), 6) for one in a}) == 4
    assert {str(role) for _, _, role in iter_roles(model)} == {"A", "B"}
    wide = adapted(method=LoRA(r=16, target_modules=["experts"], init="gaussian"))
    attached = models.build("mixtral")
    attach(attached, LoRA(r=16, target_modules=["experts"], init="gaussian_sqrt"))
    stds = [float(experts_of(one)[0][1].factors("gate_up_proj")[0].detach().std()) for one in (attached, wide)]
    assert stds[0] == pytest.approx(1 / 4, rel=0.1)
    assert stds[1] < 0.15


def test_ranks_and_scalings_go_by_parameter_before_module() -> None:
    method = LoRA(
        r=4,
        alpha=8,
        scaling="rslora",
        target_modules=["experts"],
        rank_pattern={"experts": 3, "experts.down_proj": 2},
        alpha_pattern={r"layers\.0\..*gate_up_proj": 6},
    )
    adapters = [adapter for _, adapter in experts_of(adapted(method=method))]
    assert [adapter.ranks for adapter in adapters] == [{"gate_up_proj": 3, "down_proj": 2}] * 2
    assert adapters[0].scalings == pytest.approx({"gate_up_proj": 6 / 3**0.5, "down_proj": 8 / 2**0.5})
    assert adapters[1].scalings == pytest.approx({"gate_up_proj": 8 / 3**0.5, "down_proj": 8 / 2**0.5})


def chosen(name: str = "qwen2_moe", **settings: object) -> list[str]:
    """Return the last parts of what a method takes in the first layer."""
    view = view_of(models.build(name))
    places = select_weights(view, LoRA(layers_to_transform=0, **settings))  # type: ignore[arg-type]
    return [path.partition("layers.0.")[2] for path, _ in places]


def test_experts_are_taken_only_where_they_are_named() -> None:
    everything = [f"mlp.experts.{name}" for name in BOTH]
    assert chosen(target_modules=["experts"]) == everything
    assert chosen(target_modules=r".*\.experts") == everything
    assert chosen(target_modules=["experts.down_proj", "q_proj"]) == ["self_attn.q_proj", everything[1]]
    assert chosen(target_modules=["experts"], exclude_modules=["experts.down_proj"]) == everything[:1]
    assert chosen(target_modules=["experts", "q_proj"], exclude_modules=["mlp"]) == ["self_attn.q_proj"]
    assert chosen(target_modules=["down_proj"]) == ["mlp.shared_expert.down_proj"]
    assert not any(".experts" in path for path in chosen(target_modules="all-linear"))
    assert not any(".experts" in path for path in chosen(target_modules=r".*_proj"))
    with pytest.raises(
        TargetError, match=r"'gate_up_proj'. It is a parameter of a module of experts; write 'experts\."
    ):
        chosen(target_modules=["gate_up_proj"])


@pytest.mark.parametrize("method", [DoRA, LoRAFA, DeltaLoRA, LoRADrop, AdaLoRA, VeRA, IA3])
def test_other_methods_refuse_experts_by_name(method: type) -> None:
    settings = {"feedforward_modules": []} if method is IA3 else {}
    with pytest.raises(TargetError, match=rf"{method.__name__} does not adapt experts, and .*MixtralExperts"):
        attach(models.build("mixtral"), method(target_modules=["experts"], **settings))


def test_what_experts_cannot_have_is_refused() -> None:
    for init in ("pissa", "olora", "loftq", "eva"):
        with pytest.raises(ConfigError, match=f"init='{init}' is not defined for experts"):
            attach(models.build("mixtral"), LoRA(target_modules=["experts"], init=init))
    with pytest.raises(ConfigError, match=r"r=33 is larger than .*gate_up_proj' allows: its weight is 96 x 32"):
        attach(models.build("mixtral"), LoRA(r=33, target_modules=["experts"]))


def test_every_implementation_either_gives_the_same_or_is_refused() -> None:
    model = adapted()
    expected = models.logits(model)
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        assert models.gap(models.logits(model), expected) <= 1e-6
    model.set_experts_implementation("sonicmoe")
    with pytest.raises(TargetError, match=r"eager, batched_mm and grouped_mm do, and this model is set to 'sonicmoe'"):
        models.logits(model)
    fresh = models.build("mixtral")
    fresh.set_experts_implementation("deepgemm")
    with pytest.raises(TargetError, match="set to 'deepgemm'"):
        attach(fresh, EXPERTS)
    fresh.set_experts_implementation("eager")
    fresh.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(TargetError, match="expert parallelism"):
        attach(fresh, EXPERTS)


class Overridden(MixtralExperts):
    """Experts whose forward is not the one that transformers' interface governs."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states, top_k_index, top_k_weights)


def test_experts_of_another_layout_are_refused_by_name() -> None:
    model = models.build("mixtral")
    model.model.layers[1].mlp.experts = Overridden(model.config)
    with pytest.raises(TargetError, match=r"layers.1.mlp.experts' is a Overridden, which cannot be adapted; its 3-D"):
        attach(model, EXPERTS)
    packed = models.build("mixtral")
    packed.model.layers[0].mlp.experts.to(torch.float8_e4m3fn)
    with pytest.raises(
        TargetError, match="which cannot be adapted; its 3-D parameters are not laid out, stored or run"
    ):
        attach(packed, EXPERTS)


def test_experts_of_a_4bit_base_stay_dense_and_adapt(tmp_path: Path) -> None:
    wide = models.build("mixtral").config
    wide.update({"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1})
    MixtralForCausalLM(wide).save_pretrained(tmp_path)
    four_bits = Quantization(compute_dtype="float32")
    model = load_backbone(str(tmp_path), "AutoModelForCausalLM", quantization=four_bits).model
    attach(model, LoRA(r=4, target_modules=["q_proj", "experts"]))
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, Params4bit)
    assert model.model.layers[0].mlp.experts.down_proj.dtype is torch.float32
    models.logits(models.perturb(model)).square().mean().backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


def test_state_copies_and_pickles() -> None:
    model = adapted()
    expected = models.logits(model)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    first = "model.layers.0.mlp.experts"
    assert [name for name in state if name.startswith(first)] == [
        f"{first}.{name}.lora_{part}" for name in BOTH for part in "AB"
    ]
    fresh = models.build("mixtral")
    torch.manual_seed(11)
    attach(fresh, EXPERTS)
    assert models.gap(models.logits(fresh), expected) > 1e-2
    load_adapter_state_dict(fresh, state)
    assert torch.equal(models.logits(fresh), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(models.logits(other), expected)


def test_fingerprint_covers_the_experts() -> None:
    model = models.build("mixtral")
    attach(model, EXPERTS)
    before = fingerprint(model)
    models.perturb(model)
    model.model.layers[1].mlp.gate.weight.data.add_(1)
    assert fingerprint(model) == before
    model.model.layers[1].mlp.experts.down_proj.data[3].mul_(1.001)
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_merging_half_precision_casts_once_and_is_reported(name: str) -> None:
    model = models.build(name).bfloat16()
    attach(model, EXPERTS)
    models.perturb(model)
    assert models.logits(model).dtype is torch.bfloat16
    host, adapter = experts_of(model)[0]
    (a, b), weight = (one.detach() for one in adapter.factors("down_proj")), host.down_proj.detach().clone()
    product = torch.stack([2 * right @ left for left, right in zip(a, b, strict=True)])
    product = product.mT if host.is_transposed else product
    dtypes = dict.fromkeys(model.state_dict(), torch.bfloat16)
    layers = merge_and_measure(model, dtypes)
    assert torch.equal(host.down_proj, (weight.float() + product).bfloat16())
    assert not torch.equal(host.down_proj, weight + product.bfloat16())
    assert [layer.path for layer in layers][:2] == [f"model.layers.0.mlp.experts.{one}" for one in BOTH]
    assert 0.5 < layers[1].kept < 1
    assert layers[1].update_squared == pytest.approx(float(product.double().square().sum()), rel=0.01)


def test_dropout_acts_in_training_alone_and_is_redrawn_alike() -> None:
    model = adapted(method=LoRA(r=4, alpha=8, dropout=0.5, target_modules=["experts"]))
    quiet = models.logits(model)
    assert torch.equal(models.logits(model), quiet)
    model.train()
    torch.manual_seed(5)
    dropped = models.logits(model)
    dropped.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert models.gap(dropped, quiet) > 1e-2
    model.zero_grad()
    torch.manual_seed(5)
    again = checkpoint(lambda: models.logits(model), use_reentrant=False)
    again.square().mean().backward()
    assert torch.equal(again, dropped)
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if p.grad is not None)
