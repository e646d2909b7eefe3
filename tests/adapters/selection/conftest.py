from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Compile anew, and leave nothing compiled to the next test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
