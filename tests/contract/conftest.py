"""Fixtures: one case of `CASES`, its parts, and its base."""

import pytest
from torch import nn

from lora_lightning.adapters import Method
from tests import models
from tests.contract.examples import CASES, Example


@pytest.fixture(params=CASES)
def case(request) -> tuple[Example, str]:
    return CASES[request.param]


@pytest.fixture
def example(case) -> Example:
    return case[0]


@pytest.fixture
def architecture(case) -> str:
    return case[1]


@pytest.fixture
def method(example) -> Method:
    return example.method


@pytest.fixture
def base(architecture) -> nn.Module:
    return models.build(architecture)
