"""Adapter folders load back exactly, and nothing that is damaged or foreign loads at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lightning.adapters import Method, adapter_state_dict, attach
from lora_lightning.backbones.tokenizer_identity import tokenizer_fingerprint
from lora_lightning.checkpoint import RunFacts, load_adapter, read_adapter_folder, write_adapter_folder
from lora_lightning.checkpoint.base_sample import BASE_SAMPLE_NAME
from lora_lightning.checkpoint.files import sha256_file
from lora_lightning.checkpoint.folder import OWN_WEIGHTS_NAME
from lora_lightning.checkpoint.manifest import DIGEST_KEY, MANIFEST_NAME
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.peft_format.config import CONFIG_NAME, PEFT_WEIGHTS_NAME
from tests.models import perturb

BuildModel = Callable[..., nn.Module]
QUERY = LoRA(r=3, target_modules=["query", "word_embeddings"])


@pytest.fixture
def trained(build_model: BuildModel) -> nn.Module:
    model = build_model("bert")
    attach(model, QUERY, modules_to_save=["classifier"])
    perturb(model)
    return model


@pytest.fixture
def fresh(build_model: BuildModel) -> nn.Module:
    torch.manual_seed(123)
    model = build_model("bert")
    attach(model, QUERY, modules_to_save=["classifier"])
    return model


@pytest.fixture
def folder(tmp_path: Path, trained: nn.Module) -> Path:
    write_adapter_folder(tmp_path / "adapter", trained, RunFacts(base="tiny", label_names=["a", "b", "c"], step=5))
    return tmp_path / "adapter"


def unsealed(path: Path) -> dict[str, Any]:
    """Return the content of a manifest without its own digest, which one that was edited by hand does not have."""
    data = json.loads(path.read_text())
    del data[DIGEST_KEY]
    return data


def refresh_digest(folder: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed, as somebody who tampers with care would."""
    path = folder / MANIFEST_NAME
    data = unsealed(path)
    file = folder / name
    data["files"][name] = {"sha256": sha256_file(file), "num_bytes": file.stat().st_size}
    path.write_text(json.dumps(data))


def assert_refused(model: nn.Module, folder: Path, message: str) -> None:
    """Loading is refused with a message, and the model stays as it was."""
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, folder)
    for name, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, before[name]), name


MODELS: dict[str, tuple[str, Method | list[Method], list[str]]] = {
    "peft-lora": ("bert", QUERY, ["classifier"]),
    "peft-dora": ("bert", DoRA(r=2, target_modules=["query", "word_embeddings"]), ["classifier"]),
    "peft-conv": ("conv", DoRA(r=1, target_modules=["conv"]), ["classifier"]),
    "peft-gpt2": ("gpt2", LoRA(r=2, target_modules=["c_attn"]), []),
    "peft-distilbert": ("distilbert", LoRA(r=2, target_modules=["q_lin"]), ["classifier"]),
    "own-input-axis": ("bert", DoRA(r=2, magnitude_axis="input", target_modules=["query"]), ["classifier"]),
    "own-two-kinds": ("bert", [LoRA(r=2, target_modules=["query"]), DoRA(r=2, target_modules=["value"])], []),
}


@pytest.mark.parametrize("case", MODELS)
def test_round_trip(
    case: str,
    tmp_path: Path,
    build_model: BuildModel,
    logits: Callable[[nn.Module], torch.Tensor],
) -> None:
    name, method, saved = MODELS[case]
    model = build_model(name)
    attach(model, method, modules_to_save=saved)
    perturb(model)
    manifest = write_adapter_folder(tmp_path / "adapter", model)
    assert manifest.adapter_format == ("peft" if case.startswith("peft") else "lora_lightning")
    assert (tmp_path / "adapter" / CONFIG_NAME).exists() == case.startswith("peft")

    torch.manual_seed(123)
    other = build_model(name)
    attach(other, method, modules_to_save=saved)
    assert not torch.allclose(logits(other), logits(model), atol=1e-4)  # negative control
    assert load_adapter(other, tmp_path / "adapter") == manifest
    assert torch.equal(logits(other), logits(model))
    expected = adapter_state_dict(model)
    assert {key: tensor.tolist() for key, tensor in adapter_state_dict(other).items()} == {
        key: tensor.tolist() for key, tensor in expected.items()
    }


def test_manifest_tells_the_run(folder: Path) -> None:
    manifest, state = read_adapter_folder(folder)
    assert (manifest.base, manifest.label_names, manifest.step) == ("tiny", ["a", "b", "c"], 5)
    assert manifest.methods[0]["class_path"] == "lora_lightning.methods.lora.LoRA"
    assert manifest.methods[0]["init_args"]["r"] == 3
    assert sorted(manifest.files) == [CONFIG_NAME, PEFT_WEIGHTS_NAME, BASE_SAMPLE_NAME]
    assert "classifier.weight" in state


def test_folder_holds_no_base_weight(folder: Path, trained: nn.Module) -> None:
    names = set(load_file(folder / PEFT_WEIGHTS_NAME))
    assert len(names) == len(adapter_state_dict(trained)) == 8
    assert all("lora_" in name or ".classifier." in name for name in names)


@pytest.mark.parametrize("name", [CONFIG_NAME, PEFT_WEIGHTS_NAME])
def test_tampered_file(folder: Path, fresh: nn.Module, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-5] ^= 1
    (folder / name).write_bytes(data)
    assert_refused(fresh, folder, "SHA-256 mismatch")


def test_truncated_file(folder: Path, fresh: nn.Module) -> None:
    path = folder / PEFT_WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-7])
    assert_refused(fresh, folder, "cut short or changed")
    refresh_digest(folder, PEFT_WEIGHTS_NAME)
    assert_refused(fresh, folder, "not a readable safetensors file")


def test_missing_file(folder: Path, fresh: nn.Module) -> None:
    (folder / PEFT_WEIGHTS_NAME).unlink()
    assert_refused(fresh, folder, f"lacks {PEFT_WEIGHTS_NAME}")


def test_unlisted_file(folder: Path, fresh: nn.Module) -> None:
    path = folder / MANIFEST_NAME
    data = unsealed(path)
    del data["files"][PEFT_WEIGHTS_NAME]
    path.write_text(json.dumps(data))
    assert_refused(fresh, folder, f"does not name {PEFT_WEIGHTS_NAME}")


@pytest.mark.parametrize("text", ["{", '{"modules_to_save": "classifier"}', "[1]"])
def test_bad_config(folder: Path, fresh: nn.Module, text: str) -> None:
    (folder / CONFIG_NAME).write_text(text)
    refresh_digest(folder, CONFIG_NAME)
    assert_refused(fresh, folder, "not valid JSON|must hold a JSON object|must be a list of names")


def test_pickle_in_place_of_safetensors(folder: Path, fresh: nn.Module) -> None:
    torch.save({"x": torch.zeros(1)}, folder / PEFT_WEIGHTS_NAME)
    refresh_digest(folder, PEFT_WEIGHTS_NAME)
    assert_refused(fresh, folder, "not a readable safetensors file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(folder: Path, fresh: nn.Module, trained: nn.Module, value: float) -> None:
    tensors = load_file(folder / PEFT_WEIGHTS_NAME)
    key = next(key for key in tensors if key.endswith("query.lora_A.weight"))
    tensors[key][0, 0] = value
    save_file(tensors, folder / PEFT_WEIGHTS_NAME)
    refresh_digest(folder, PEFT_WEIGHTS_NAME)
    assert_refused(fresh, folder, "NaN or infinite values in 1 of 8 tensors")
    with torch.no_grad():
        trained.get_parameter("classifier._lora_lightning.head.module.bias")[0] = value
    before = sha256_file(folder / PEFT_WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=r"NaN or infinite.*classifier\.bias"):
        write_adapter_folder(folder, trained)
    assert sha256_file(folder / PEFT_WEIGHTS_NAME) == before


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_missing_and_extra_keys(folder: Path, fresh: nn.Module, change: str) -> None:
    tensors = load_file(folder / PEFT_WEIGHTS_NAME)
    key = next(key for key in tensors if key.endswith("query.lora_A.weight"))
    if change == "missing":
        del tensors[key]
    else:
        tensors[key.replace("query", "value")] = tensors[key].clone()
    save_file(tensors, folder / PEFT_WEIGHTS_NAME)
    refresh_digest(folder, PEFT_WEIGHTS_NAME)
    assert_refused(fresh, folder, "1 are missing" if change == "missing" else "1 are unknown")


class Words:
    """What a tokenizer is here: a vocabulary."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}


def test_another_tokenizer(folder: Path, trained: nn.Module, fresh: nn.Module) -> None:
    facts = RunFacts(tokenizer_fingerprint=tokenizer_fingerprint(Words("a", "b")))
    write_adapter_folder(folder, trained, facts)
    other = Words("b", "a")
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(fresh).items()}
    with pytest.raises(CheckpointError, match=r"adapter was trained with another tokenizer: its vocabulary"):
        load_adapter(fresh, folder, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state_dict(fresh).items())
    for tokenizer in (Words("a", "b"), None):
        load_adapter(fresh, folder, tokenizer)
    path = folder / MANIFEST_NAME  # one of an older version does not say
    data = unsealed(path)
    del data["tokenizer_fingerprint"]
    path.write_text(json.dumps(data))
    assert load_adapter(fresh, folder, other).tokenizer_fingerprint is None


def test_wrong_base(folder: Path, build_model: BuildModel) -> None:
    model = build_model("bert", seed=1)
    attach(model, QUERY, modules_to_save=["classifier"])
    assert_refused(model, folder, "trained on another base model")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(r=3, alpha=17, target_modules=["query", "word_embeddings"]), "alpha=16.0, and the model has alpha=17"),
        (LoRA(r=3, scaling="rslora", target_modules=["query", "word_embeddings"]), "scaling='standard'"),
        (LoRA(r=2, target_modules=["query", "word_embeddings"]), "r=3, and the model has r=2"),
        (DoRA(r=3, target_modules=["query", "word_embeddings"]), "trained with .*LoRA.*DoRA"),
        (LoRA(r=3, target_modules=["query"]), "trained on another base model"),
    ],
)
def test_other_settings(folder: Path, build_model: BuildModel, method: Method, message: str) -> None:
    model = build_model("bert")
    attach(model, method, modules_to_save=["classifier"])
    assert_refused(model, folder, message)


def test_settings_of_training_may_differ(folder: Path, build_model: BuildModel) -> None:
    model = build_model("bert")
    regex = r".*\.(query|word_embeddings)"
    attach(model, LoRA(r=3, dropout=0.5, init="gaussian", target_modules=regex), modules_to_save=["classifier"])
    load_adapter(model, folder)


@dataclass(frozen=True, kw_only=True)
class Annealed(LoRA):
    """A method of one's own with a setting that only training reads, and one that changes what is computed."""

    name: ClassVar[str] = "annealed"
    training_settings: ClassVar[frozenset[str]] = LoRA.training_settings | {"num_steps"}

    num_steps: int = 10
    power: int = 1


def test_a_method_names_the_settings_that_only_training_reads(tmp_path: Path) -> None:
    def adapted(**settings: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4).requires_grad_(requires_grad=False))
        nn.init.ones_(model[0].weight)
        attach(model, Annealed(r=2, target_modules=["0"], **settings))
        return model

    write_adapter_folder(tmp_path / "adapter", adapted(num_steps=10))
    load_adapter(adapted(num_steps=20), tmp_path / "adapter")
    assert_refused(adapted(power=2), tmp_path / "adapter", "power=1, and the model has power=2; attach Annealed")


def test_a_setting_newer_than_the_folder_counts_as_its_default(folder: Path, fresh: nn.Module) -> None:
    path = folder / "manifest.json"
    data = unsealed(path)
    del data["methods"][0]["init_args"]["scaling"]  # its default is `standard`
    path.write_text(json.dumps(data))
    load_adapter(fresh, folder)
    del data["methods"][0]["init_args"]["r"]  # its default is 8, not 3
    path.write_text(json.dumps(data))
    assert_refused(fresh, folder, "r=8, and the model has r=3")


def test_foreign_folder_is_not_overwritten(tmp_path: Path, trained: nn.Module) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds no adapter; move it away"):
        write_adapter_folder(tmp_path, trained)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_own_format_uses_our_keys(tmp_path: Path, build_model: BuildModel) -> None:
    model = build_model("bert")
    attach(model, DoRA(r=2, magnitude_axis="input", target_modules=["query"]))
    write_adapter_folder(tmp_path / "adapter", model)
    assert load_file(tmp_path / "adapter" / OWN_WEIGHTS_NAME).keys() == adapter_state_dict(model).keys()
