"""The public `attach` has `save_pretrained` say what it leaves out."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch

from lora_lightning import LoRA, attach, detach, merge
from tests.models import build, logits, perturb


def saved_quietly(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    """Save without any warning, and return what is loaded from the folder answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(folder)
    with torch.no_grad():
        return logits(type(model).from_pretrained(folder).eval())


def test_saving_an_adapted_model_is_said(tmp_path: Path) -> None:
    model = build("llama")
    attach(model, LoRA(r=2))
    perturb(model)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(UserWarning, match=r"answers as the base does\. Merge .*export_peft"):
            one.save_pretrained(tmp_path / "adapted")


def test_a_model_without_adapters_saves_quietly(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        base = logits(model)
    attach(model, LoRA(r=2))
    perturb(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        adapted = logits(model)
    detach(other)
    torch.testing.assert_close(saved_quietly(other, tmp_path / "detached"), base)
    merge(model)
    torch.testing.assert_close(saved_quietly(model, tmp_path / "merged"), adapted)
    assert (adapted - base).abs().max() > 1e-3  # negative control
