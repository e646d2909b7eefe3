"""An adapter beside those of every other method, under names of their own, does what it does alone."""

import pytest
import torch

from lora_lightning.adapters import active
from lora_lightning.backbones.attach import attach
from lora_lightning.errors import TargetError
from tests import models
from tests.contract.crowd import ARCHITECTURES, NAMES, WITHOUT_BIASES, Crowd, crowd, examples_on
from tests.contract.examples import EXAMPLES

EVERY = [(architecture, name) for architecture in ARCHITECTURES for name in NAMES[architecture]]
LLAMA = [(architecture, name) for architecture, name in EVERY if architecture == "llama"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_method_is_in_the_crowd(architecture):
    """What is left out is refused, so it is not forgotten."""
    found = set(examples_on(architecture))
    missing = {name for examples in EXAMPLES.values() for name in examples} - found
    assert missing == ({"bitfit"} if architecture in WITHOUT_BIASES else set())
    for name in missing:
        method = next(examples[name].method for examples in EXAMPLES.values() if name in examples)
        with pytest.raises(TargetError, match="has none outside its head"):
            attach(models.build(architecture), method)


def assert_as_alone(found: Crowd, name: str, tolerance: float) -> None:
    """Compare forward and gradients under one name with the model that has the adapter alone."""
    found.forget_gradients()
    batch = models.inputs(found.model)
    expected = models.logits(found.alone[name], batch)
    expected.square().sum().backward()
    with active(found.model, name):
        actual = models.logits(found.model, batch)
    actual.square().sum().backward()
    assert models.gap(actual, expected) <= tolerance

    reference, gradients = found.gradients_alone(name), found.gradients(name)
    assert gradients.keys() == reference.keys() != set()
    assert max(models.gap(gradients[own], reference[own]) for own in reference) <= 100 * tolerance
    others = {other: found.gradients(other) for other in found.names if other != name}
    assert all(gradient is None for own in others.values() for gradient in own.values())


def assert_differs(found: Crowd, name: str) -> None:
    """Require that the base and the next name answer otherwise, so that an equality is not one of all names."""
    following = found.names[(found.names.index(name) + 1) % len(found.names)]
    with torch.no_grad():
        expected = models.logits(found.alone[name])
        for other in (None, following):
            with active(found.model, other):
                assert models.gap(models.logits(found.model), expected) > 1e-3


@pytest.mark.parametrize(("architecture", "name"), EVERY)
def test_a_name_beside_others_is_what_it_is_alone(architecture, name):
    found = crowd(architecture)
    assert_as_alone(found, name, tolerance=1e-10)
    assert_differs(found, name)


@pytest.mark.parametrize(("architecture", "name"), LLAMA)
def test_in_single_precision(architecture, name):
    assert_as_alone(crowd(architecture, torch.float32), name, tolerance=1e-6)


@pytest.mark.parametrize(("architecture", "name"), LLAMA)
def test_on_a_base_in_four_bits(architecture, name):
    assert_as_alone(crowd(architecture, torch.float32, is_quantized=True), name, tolerance=1e-5)
