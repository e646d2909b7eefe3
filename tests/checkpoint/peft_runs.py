"""Models with adapters of PEFT, their folders, and what a folder that is refused must leave alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lightning.adapters import is_attached
from lora_lightning.checkpoint import load_peft
from lora_lightning.errors import CheckpointError, UserError
from lora_lightning.peft_format.config import CONFIG_NAME, PEFT_WEIGHTS_NAME
from tests.models import build, logits


def peft_model(architecture: str, **settings: Any) -> nn.Module:
    """Return a model with adapters of PEFT, none of whose trained parameters is zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            build(architecture), peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, **settings)
        ).eval()
    move(model)
    return model


@torch.no_grad()
def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return logits(model)


def save(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Check that nothing about a model is another in the end."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    yield
    assert not is_attached(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


def assert_refused(folder: Path, message: str, error: type[UserError] = CheckpointError) -> None:
    model = build("bert")
    with unchanged(model), pytest.raises(error, match=message) as caught:
        load_peft(model, folder)
    assert str(caught.value).count("\n") == 0


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = change(load_file(folder / PEFT_WEIGHTS_NAME))
    save_file({name: one.clone() for name, one in tensors.items()}, folder / PEFT_WEIGHTS_NAME)


def reconfigure(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
