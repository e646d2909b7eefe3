"""Folders that are damaged, foreign or for another model are refused by name, and leave the model alone."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_lightning.backbones.attach import attach
from lora_lightning.checkpoint import export_peft, load_peft
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.peft_format.config import CONFIG_NAME, PEFT_WEIGHTS_NAME
from tests.checkpoint.peft_runs import assert_refused, peft_model, rewrite, save, unchanged
from tests.models import build

# The tool's own hints, of tied weights, fan_in_fan_out and the like.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore:.*tie.*")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(peft_model("bert", target_modules=["query", "value"], task_type="SEQ_CLS"), tmp_path / "adapter")


def without_a_key(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: one for key, one in tensors.items() if not key.endswith("0.attention.self.query.lora_A.weight")}


def without_a_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: one for key, one in tensors.items() if "0.attention.self.query" not in key}


def without_a_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: one for key, one in tensors.items() if not key.endswith("classifier.bias")}


def with_another_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {key.replace("query", "key"): one for key, one in tensors.items() if "0.attention.self.query" in key}
    return {**tensors, **own}


def with_a_foreign_key(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "base_model.model.encoder.layer.7.lora_A.weight": torch.zeros(3, 32)}


def with_an_unknown_tensor(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "base_model.model.something": torch.zeros(3)}


def with_another_rank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: one[:2] if key.endswith("lora_A.weight") else one for key, one in tensors.items()}


def with_another_width(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros(3, 16) if key.endswith("lora_A.weight") else one for key, one in tensors.items()}


def with_a_wrong_dimension(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: one.flatten() if key.endswith("lora_A.weight") else one for key, one in tensors.items()}


def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.full_like(one, float("nan")) if "lora_B" in key else one for key, one in tensors.items()}


def with_infinity(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.full_like(one, float("inf")) if "classifier" in key else one for key, one in tensors.items()}


def twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, **{key.replace("lora_A.", "lora_A.other."): one + 1 for key, one in tensors.items()}}


def nothing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: one for key, one in tensors.items() if "lora" not in key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_key, "1 are missing .*query.lora_A"),
        (without_a_host, "1 have no tensors .*layer.0.attention.self.query"),
        (without_a_copy, "1 are missing .*classifier.bias"),
        (with_another_host, "1 modules with tensors are not targets here .*self.key"),
        (with_a_foreign_key, r"not targets here \(encoder.layer.7\)"),
        (with_an_unknown_tensor, "1 of .* keys belong to nothing in this model .*something"),
        (with_another_rank, r"another shape .*\[2, 32\] instead of \[3, 32\]"),
        (with_another_width, r"another shape .*\[3, 16\] instead of \[3, 32\]"),
        (with_a_wrong_dimension, r"another shape .*\[96\] instead of \[3, 32\]"),
        (with_nan, "NaN or infinite"),
        (with_infinity, "NaN or infinite"),
        (twice, "twice, under two spellings"),
        (nothing, "holds no LoRA tensor"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[..., dict[str, Tensor]], message: str) -> None:
    rewrite(folder, change)
    assert_refused(folder, message)


def test_adapter_of_another_architecture(tmp_path: Path) -> None:
    folder = save(peft_model("llama", target_modules=["q_proj"]), tmp_path / "adapter")
    assert_refused(folder, "Load the base that it was trained on")


def test_resized_vocabulary(tmp_path: Path) -> None:
    theirs = build("llama")
    theirs.resize_token_embeddings(70)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    folder = save(theirs, tmp_path / "adapter")
    model = build("llama")
    with unchanged(model), pytest.raises(CheckpointError, match="vocabulary was resized"):
        load_peft(model, folder)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_cut_short(folder: Path, share: float) -> None:
    path = folder / PEFT_WEIGHTS_NAME
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert_refused(folder, "not a readable safetensors file")


def test_random_bytes(folder: Path) -> None:
    (folder / PEFT_WEIGHTS_NAME).write_bytes(bytes(range(256)) * 20)
    assert_refused(folder, "not a readable safetensors file")


def test_pickles_are_refused_unread(folder: Path) -> None:
    (folder / PEFT_WEIGHTS_NAME).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert_refused(folder, "a pickle, which could run code")


@pytest.mark.parametrize(
    ("name", "message"), [(CONFIG_NAME, "holds no adapter_config"), (PEFT_WEIGHTS_NAME, "holds no")]
)
def test_missing_files(folder: Path, name: str, message: str) -> None:
    (folder / name).unlink()
    assert_refused(folder, message)


def test_missing_folder(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent", "is not a directory")


def test_our_own_format_is_named(tmp_path: Path) -> None:
    from lora_lightning.checkpoint import write_adapter_folder

    model = build("bert")
    attach(model, DoRA(r=2, magnitude_axis="input", target_modules=["query"]))
    write_adapter_folder(tmp_path / "adapter", model)
    assert_refused(tmp_path / "adapter", "own format")
    with pytest.raises(CheckpointError, match="one magnitude per output, and this one has magnitude_axis='input'"):
        export_peft(model, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_a_changed_file_of_ours_is_noticed(tmp_path: Path) -> None:
    model = build("bert")
    attach(model, LoRA(r=2, target_modules=["query"]))
    export_peft(model, tmp_path / "adapter")
    rewrite(tmp_path / "adapter", lambda tensors: {key: one + 1 for key, one in tensors.items()})
    assert_refused(tmp_path / "adapter", "its manifest says .* cut short or changed")
    shutil.copytree(tmp_path / "adapter", tmp_path / "bare", ignore=shutil.ignore_patterns("manifest.json"))
    load_peft(build("bert"), tmp_path / "bare")


def test_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to export"):
        export_peft(build("bert"), tmp_path / "adapter")


def test_grouped_convolutions_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    attach(model, LoRA(r=1, target_modules=["0"]))
    with pytest.raises(CheckpointError, match="convolution with groups"):
        export_peft(model, tmp_path / "adapter")
