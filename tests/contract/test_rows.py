"""Rows of one batch with adapters of every method: each row is computed as under its adapter alone."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from lora_lightning import per_row
from lora_lightning.adapters import adapter_state_dict, iter_adapters, load_adapter_state_dict
from lora_lightning.adapters.head import HeadAdapter
from lora_lightning.backbones.attach import attach
from lora_lightning.errors import ConfigError
from lora_lightning.methods import LoRA
from tests import models
from tests.contract.crowd import ARCHITECTURES, Crowd, crowd, real_logits, row_of, rows_for

PADDING = ("left", "right")
DECODERS = ("llama", "gpt2", "t5")


def owners(found: Crowd) -> list[str | None]:
    """Return a name for each row: all of them, some twice and apart from each other, and the base's."""
    return [*found.names, None, *found.names[:3], None]


def largest_gap(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(models.gap(*both) for both in zip(actual, expected, strict=True))


@torch.no_grad()
def answers_alone(found: Crowd, rows: list[str | None], batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the logits of each row from the model that has its adapter alone, called with this row alone."""
    return [real_logits(found.alone[name], row_of(batch, row))[0] for row, name in enumerate(rows)]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward(architecture, padding):
    found = crowd(architecture)
    rows = owners(found)
    batch = rows_for(architecture, len(rows), padding)
    expected = answers_alone(found, rows, batch)
    with torch.no_grad(), per_row(found.model, rows):
        actual = real_logits(found.model, batch)
    assert largest_gap(actual, expected) <= 1e-10
    # Control: with the next row's name, each row is another one.
    with torch.no_grad(), per_row(found.model, [*rows[1:], rows[0]]):
        moved = real_logits(found.model, batch)
    assert min(models.gap(*both) for both in zip(moved, expected, strict=True)) > 1e-4


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients(architecture, padding):
    """One step of all rows gives each adapter the sum of the gradients of its rows, each computed alone."""
    found = crowd(architecture)
    rows = owners(found)
    batch = rows_for(architecture, len(rows), padding, seed=2)
    found.forget_gradients()
    for row, name in enumerate(rows[:-1]):
        if name is not None:
            real_logits(found.alone[name], row_of(batch, row))[0].square().sum().backward()
    with per_row(found.model, rows):
        torch.cat([own.flatten() for own in real_logits(found.model, batch)]).square().sum().backward()
    for name in found.names:
        reference, actual = found.gradients_alone(name), found.gradients(name)
        assert actual.keys() == reference.keys() != set()
        assert max(models.gap(actual[own], reference[own]) for own in reference) <= 1e-8, name
    assert all(parameter.grad is None for parameter in found.alone[None].parameters())


def generate(model: nn.Module, batch: dict[str, Tensor], num_beams: int) -> Tensor:
    """Return the ids that a model appends by searching with its cache; the end of the text does not end it."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": num_beams, "pad_token_id": 0}
    return model.generate(**given, **settings, use_cache=True)[:, -6:]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("architecture", DECODERS)
def test_generation(architecture, num_beams):
    found = crowd(architecture)
    rows = owners(found)
    batch = rows_for(architecture, len(rows), "right" if architecture == "t5" else "left", seed=3)
    expected = [generate(found.alone[name], row_of(batch, row), num_beams)[0] for row, name in enumerate(rows)]
    with per_row(found.model, rows):
        actual = generate(found.model, batch, num_beams)
    assert actual.tolist() == [own.tolist() for own in expected]
    with per_row(found.model, [*rows[1:], rows[0]]):
        moved = generate(found.model, batch, num_beams)
    num_others = sum(not torch.equal(*both) for both in zip(moved, expected, strict=True))
    assert num_others > len(rows) / 2


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_on_a_base_in_four_bits(architecture):
    found = crowd(architecture, torch.float32, is_quantized=True)
    rows = owners(found)
    batch = rows_for(architecture, len(rows), "left", seed=4)
    expected = answers_alone(found, rows, batch)
    found.forget_gradients()
    with per_row(found.model, rows):
        actual = real_logits(found.model, batch)
    assert largest_gap(actual, expected) <= 1e-5
    with torch.no_grad(), per_row(found.model, [*rows[1:], rows[0]]):
        assert largest_gap(real_logits(found.model, batch), expected) > 1e-2
    torch.cat([own.flatten() for own in actual]).square().sum().backward()
    for row, name in enumerate(rows):
        if name is not None:
            real_logits(found.alone[name], row_of(batch, row))[0].square().sum().backward()
    for name in found.names:
        reference, gradients = found.gradients_alone(name), found.gradients(name)
        assert max(models.gap(gradients[own], reference[own]) for own in reference) <= 1e-4, name


# Experts, whose tokens of all rows are routed together


@pytest.mark.parametrize("target", ["experts", "router"])
@pytest.mark.parametrize("architecture", models.MIXTURES)
def test_experts_and_their_routers(architecture, target):
    """Routers fold the length into the rows; that of each model in another way."""
    router = "router.weight" if architecture == "gpt_oss" else "gate.weight"
    method = LoRA(r=2, target_modules=["experts" if target == "experts" else router])
    base = models.build(architecture)
    shared, alone = copy.deepcopy(base), {None: base}
    for seed, name in enumerate(("de", "fr")):
        alone[name] = copy.deepcopy(base)
        attach(alone[name], method)
        models.perturb(alone[name], seed=seed, std=0.3)
        attach(shared, method, name=name)
        load_adapter_state_dict(shared, adapter_state_dict(alone[name]), name=name)
    rows = ["fr", None, "fr", "de"]
    batch = rows_for(architecture, len(rows), "left")
    found = Crowd(shared, alone, {})
    expected = answers_alone(found, rows, batch)
    with torch.no_grad(), per_row(shared, rows):
        actual = real_logits(shared, batch)
    assert largest_gap(actual, expected) <= 1e-5
    with torch.no_grad(), per_row(shared, [*rows[1:], rows[0]]):
        moved = real_logits(shared, batch)
    assert min(models.gap(*both) for both in zip(moved, expected, strict=True)) > 1e-3


# What is refused


def two_named(model: nn.Module, **settings) -> nn.Module:
    for name in ("de", "fr"):
        attach(model, LoRA(r=2, **settings), name=name)
    return models.perturb(model)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_loss_for_the_balance_of_experts_is_refused_in_training(architecture):
    model = two_named(models.build(architecture), target_modules=["q_proj"])
    batch = models.inputs(model)
    rows = ["fr", None, "de"]
    with torch.no_grad(), per_row(model.train(), rows):
        expected = models.logits(model, batch)
    model.config.output_router_logits = True
    message = r"balance of experts \(output_router_logits\) is computed over all rows"
    with pytest.raises(ConfigError, match=message), per_row(model, rows):
        pass
    around = nn.Module()  # as in models of text and images, whose config holds that of the text
    around.inner, around.config = model, transformers.PretrainedConfig()
    with pytest.raises(ConfigError, match=message), per_row(around, rows):
        pass
    with torch.no_grad(), per_row(model.eval(), rows):  # evaluation has no loss to train with
        assert models.gap(models.logits(model, batch), expected) <= 1e-6


@pytest.mark.parametrize("is_training", [False, True])
def test_experts_of_limited_capacity_are_refused(is_training):
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=4, expert_capacity=8
    )
    model = two_named(transformers.SwitchTransformersForConditionalGeneration(config), target_modules=["q"])
    message = r"have a capacity for the whole batch \(expert_capacity\)"
    with pytest.raises(ConfigError, match=message), per_row(model.train(is_training), ["de", "fr"]):
        pass


def test_copies_of_what_writes_into_a_cache_are_refused():
    """A copied layer is computed anew for its rows, and would write them into the cache of all rows again."""
    model = two_named(models.build("llama"), target_modules=["lm_head"], modules_to_save=["layers.1"])
    batch = models.inputs(model)
    rows = ["fr", None, "de"]
    with torch.no_grad(), per_row(model, rows):
        with pytest.raises(ConfigError, match=r"'model.layers.1' writes keys and values of all rows into one cache"):
            models.logits(model, batch, use_cache=True)
        output = models.logits(model, batch, use_cache=False)
    assert output.shape[0] == 3


def test_what_returns_no_rows_is_refused():
    model = two_named(models.build("t5"), target_modules=["lm_head"], modules_to_save=["EncDecAttention"])
    with per_row(model, ["fr", None, "de"]), pytest.raises(ConfigError, match="has no entry for each of 3 rows"):
        models.logits(model, use_cache=False)


def test_heads_of_several_widths_are_refused():
    model = two_named(models.build("bert"), target_modules=["query"], modules_to_save=["classifier"])
    heads = {adapter.name: adapter for _, _, adapter in iter_adapters(model) if isinstance(adapter, HeadAdapter)}
    batch = models.inputs(model)
    rows = ["fr", None, "de"]
    with per_row(model, rows):
        assert models.logits(model, batch).shape == (3, models.NUM_LABELS)
    heads["de"].module = nn.Linear(32, 5)
    with per_row(model, rows), pytest.raises(ConfigError, match=r"have shapes \[3\] and \[5\] by row, which no batch"):
        models.logits(model, batch)
