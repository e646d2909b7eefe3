"""Two methods in one list: what merges equals what was adapted, whichever stands first; what cannot is refused."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from itertools import combinations, combinations_with_replacement

import pytest
import torch
from torch import nn

from lora_lightning.adapters import Method, attached_methods, is_attached, iter_adapters, selected
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.errors import ConfigError, NotMergeable, TargetError
from lora_lightning.methods import (
    IA3,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    DeltaLoRA,
    DoRA,
    LoRA,
    LoRADrop,
    LoRAFA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    VeRA,
)
from lora_lightning.methods.adalora import AdaLoRAAdapter
from tests import models

LOW_RANK = [
    LoRA(r=2, init="pissa"),
    DoRA(r=2, magnitude_axis="input"),
    AdaLoRA(target_r=2, init_r=3),
    VeRA(r=16, d_initial=0.5),
    LoRAFA(r=2),
    DeltaLoRA(r=2, start_step=0),
    LoRADrop(r=2),
]
AROUND = [IA3(), BitFit()]  # they act before or after what computes a host's forward, so they may share its hosts
UNMERGEABLE = [
    BottleneckAdapter(width=4),
    BottleneckAdapter(style="parallel", width=4),
    PromptTuning(num_virtual_tokens=2),
    PrefixTuning(num_virtual_tokens=2),
]
SOFT = [
    PromptTuning(num_virtual_tokens=2),
    PTuning(num_virtual_tokens=2),
    PrefixTuning(num_virtual_tokens=2),
    PTuningV2(num_virtual_tokens=2),
]
# Two parts of a model, each of modules that have a bias.
PARTS = {
    "bert": (["query", "output.dense"], ["value", "key"]),
    "llama": (["q_proj", "v_proj"], ["o_proj", "down_proj"]),
}


def build(architecture: str) -> nn.Module:
    """Return a model of one block in float64, a decoder with biases too: BitFit then has as much to do as others."""
    if architecture == "bert":
        model = models.build("bert")
        del model.bert.encoder.layer[1:]
    else:
        model = models.build(architecture)
        config = {**model.config.to_dict(), "num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True}
        torch.manual_seed(0)
        model = type(model)(type(model.config)(**config)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model.double()


@pytest.fixture(scope="module", params=PARTS)
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(architecture) -> nn.Module:
    return build(architecture)


def on(method: Method, targets: list[str] | str) -> Method:
    return dataclasses.replace(method, target_modules=targets)


def mergeable_pairs(architecture: str) -> Iterator[tuple[Method, Method]]:
    """Yield pairs of low-rank methods, two of a kind too, on two parts; and those that act around them on the same."""
    first, second = PARTS[architecture]
    for one, other in combinations_with_replacement(LOW_RANK, 2):
        yield on(one, first), on(other, second)
    for around in AROUND:
        for one in LOW_RANK:
            yield on(one, "all-linear"), around
    yield AROUND[0], AROUND[1]


def orders(pairs: Iterator[tuple[Method, Method]]) -> Iterator[list[Method]]:
    for one, other in pairs:
        yield [one, other]
        yield [other, one]


def names(methods: Sequence[Method]) -> str:
    return ", ".join(type(method).__name__ for method in methods)


@torch.no_grad()
def logits_without(model: nn.Module, method: Method) -> torch.Tensor:
    """Return the logits with the adapters of one method switched off."""
    others = [one for one in attached_methods(model) if one != method]
    with selected(model, others):
        return models.logits(model)


@torch.no_grad()
def assert_merges(model: nn.Module, methods: list[Method]) -> None:
    """Attach, perturb and merge; each method alone must miss what both together compute."""
    before = models.logits(model)
    attach(model, methods)
    expected = models.logits(models.perturb(model))
    for method in methods:
        assert models.gap(logits_without(model, method), expected) > 1e-4, names(methods)
    merge(model)
    assert not is_attached(model)
    assert models.gap(models.logits(model), expected) <= 1e-9, names(methods)
    assert models.gap(before, expected) > 1e-3, names(methods)


def test_a_merged_pair_equals_the_adapted_one_in_both_orders(base, architecture):
    for methods in orders(mergeable_pairs(architecture)):
        assert_merges(copy.deepcopy(base), methods)


def test_pairs_on_fused_projections_and_a_tied_embedding():
    """GPT-2: IA3 scales two thirds of what LoRA and BitFit change; the embedding's weight is the head's too."""
    targets = ["wte", "c_attn", "c_fc"]
    pairs = [(on(one, targets), around) for one in (LoRA(r=2), DoRA(r=2)) for around in AROUND]
    for methods in orders(iter(pairs)):
        assert_merges(models.build("gpt2").double(), methods)


@torch.no_grad()
def test_shared_and_pruned_parts_merge_beside_others():
    """LoRA-drop after it chose what to share, and AdaLoRA after it pruned, beside a second of their kind."""
    first, second = PARTS["bert"]
    methods = [
        *(LoRADrop(r=2, target_modules=targets, calibration_steps=2, threshold=0.3) for targets in (first[:1], second)),
        *(
            AdaLoRA(target_r=1, init_r=3, target_modules=[name])
            for name in ("attention.output.dense", "intermediate.dense")
        ),
        IA3(),
    ]
    model = build("bert")
    attach(model, methods)
    batch = models.inputs(model)
    for method in methods[:2]:
        method.calibrate(model, [batch], lambda batch: models.logits(model, batch).square().mean())
    models.perturb(model.eval())
    for _, _, adapter in iter_adapters(model):
        if isinstance(adapter, AdaLoRAAdapter):
            adapter.lora_E[1] = 0
    assert any(getattr(adapter, "shared", None) is not None for _, _, adapter in iter_adapters(model))
    expected = models.logits(model)
    assert all(models.gap(logits_without(model, method), expected) > 1e-4 for method in methods)
    merge(model)
    assert models.gap(models.logits(model), expected) <= 1e-9


@torch.no_grad()
def test_beside_a_method_that_does_not_merge_nothing_is_merged(base, architecture):
    for methods in orders((one, on(LOW_RANK[0], PARTS[architecture][0])) for one in UNMERGEABLE):
        model = copy.deepcopy(base)
        attach(model, methods)
        expected = models.logits(models.perturb(model))
        for method in methods:
            assert models.gap(logits_without(model, method), expected) > 1e-4, names(methods)
        with pytest.raises(NotMergeable, match=r"cannot be merged.*; "):
            merge(model)
        assert torch.equal(models.logits(model), expected)


def test_two_that_want_the_same_place_are_refused(base):
    keys = list(base.state_dict())
    low_rank = [on(method, "all-linear") for method in LOW_RANK]
    for methods in orders(combinations(low_rank, 2)):
        match = (
            rf"{methods[0].name} and {methods[1].name} both want to compute the forward of '.*'; give them different"
        )
        with pytest.raises(TargetError, match=match):
            attach(base, methods)
    for method in [*low_rank, *AROUND, UNMERGEABLE[0]]:
        with pytest.raises(TargetError, match=r"given twice for one module; give each its own target_modules"):
            attach(base, [method, dataclasses.replace(method)])
    for methods in orders(combinations_with_replacement(SOFT, 2)):
        one, other = (type(method).__name__ for method in methods)
        with pytest.raises(
            ConfigError, match=rf"{one} and {other} both provide the soft prompt, of which a model takes"
        ):
            attach(base, [methods[0], dataclasses.replace(methods[1])])
    assert list(base.state_dict()) == keys
