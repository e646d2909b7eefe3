"""PEFT itself reads our adapter folders and computes what our running model computes."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from lora_lightning.adapters import adapter_state_dict, attach, iter_adapters
from lora_lightning.backbones.attach import attach as attach_to_backbone
from lora_lightning.checkpoint import write_adapter_folder
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.methods.low_rank import LowRankAdapter
from lora_lightning.peft_format.decode import from_peft
from lora_lightning.peft_format.encode import to_peft
from tests.models import ARCHITECTURES, build, perturb

CASES: dict[str, tuple[str, LoRA, list[str]]] = {
    "bert": ("bert", LoRA(r=3, alpha=5, target_modules=["query", "value"]), ["classifier"]),
    "bert-all": ("bert", LoRA(r=3, alpha=5, target_modules=r"bert\.encoder.*dense", dropout=0.1), ["classifier"]),
    "bert-dora": ("bert", DoRA(r=3, alpha=5, target_modules=["query", "output.dense"]), ["classifier"]),
    "bert-no-head": ("bert", LoRA(r=2, target_modules=["query"]), []),
    "bert-rslora": ("bert", LoRA(r=3, scaling="rslora", target_modules=["query"]), ["classifier"]),
    "bert-plain-alpha": ("bert", LoRA(r=3, alpha=1.7, scaling="alpha", target_modules=["query"]), ["classifier"]),
    "bert-patterns": (
        "bert",
        LoRA(
            r=3,
            alpha=5,
            target_modules=["query", "value", "key"],
            rank_pattern={"value": 2, "0.attention.self.key": 4},
            alpha_pattern={"key": 9},
        ),
        ["classifier"],
    ),
    "bert-plain-alpha-patterns": (
        "bert",
        LoRA(r=3, alpha=0.3, scaling="alpha", target_modules=["query", "value"], rank_pattern={"value": 2}),
        [],
    ),
    "bert-embedding": ("bert", LoRA(r=3, target_modules=["word_embeddings", "query"]), ["classifier"]),
    "bert-embedding-dora": ("bert", DoRA(r=3, target_modules=["word_embeddings", "query"]), ["classifier"]),
    "bert-adapted-head": ("bert", LoRA(r=2, target_modules=["query", "classifier"]), []),
    "distilbert": ("distilbert", LoRA(r=3, target_modules=["q_lin"]), ["pre_classifier", "classifier"]),
    "distilbert-half": ("distilbert", LoRA(r=3, target_modules=["q_lin"]), ["classifier"]),
    "gpt2": ("gpt2", LoRA(r=3, target_modules=["c_attn", "c_proj"]), []),
    "gpt2-dora": ("gpt2", DoRA(r=3, target_modules=["c_attn", "c_fc"]), []),
    "llama": ("llama", LoRA(r=3, target_modules=["q_proj", "down_proj"]), []),
    "llama-dora": ("llama", DoRA(r=3, target_modules=["q_proj", "down_proj"], scaling="rslora"), []),
    "conv": ("conv", LoRA(r=1, target_modules=["conv"]), ["classifier"]),
    "conv-dora": ("conv", DoRA(r=1, target_modules=["conv"]), []),
}


def low_rank_matters(model: nn.Module, logits: Callable[..., torch.Tensor]) -> bool:
    """Negative control: the outputs depend on the low-rank part, and on its scaling."""
    before = logits(model)
    for _, _, adapter in iter_adapters(model):
        if isinstance(adapter, LowRankAdapter):
            adapter.scaling *= 1.3
    return bool((logits(model) - before).abs().max() > 1e-3)


def load_with_peft(model: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own hints about fan_in_fan_out and tied weights
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same(
    case: str,
    tmp_path: Path,
    build_model: Callable[..., nn.Module],
    logits: Callable[..., torch.Tensor],
) -> None:
    name, method, saved = CASES[case]
    model = build_model(name)
    attach(model, method, modules_to_save=saved)
    perturb(model)
    manifest = write_adapter_folder(tmp_path / "adapter", model)
    assert manifest.adapter_format == "peft"

    torch.manual_seed(99)
    fresh = load_with_peft(build_model(name), tmp_path / "adapter")

    torch.testing.assert_close(logits(fresh), logits(model), atol=1e-5, rtol=0)
    assert low_rank_matters(model, logits)


@pytest.mark.parametrize("method", [LoRA(r=3, target_modules="all-linear"), DoRA(r=3, target_modules="all-linear")])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(
    architecture: str, method: LoRA, tmp_path: Path, logits: Callable[..., torch.Tensor]
) -> None:
    model = build(architecture)
    attach_to_backbone(model, method)
    perturb(model)
    assert write_adapter_folder(tmp_path / "adapter", model).adapter_format == "peft"
    fresh = load_with_peft(build(architecture), tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), logits(model), atol=1e-5, rtol=0)
    assert low_rank_matters(model, logits)


def test_another_alpha_is_noticed(
    tmp_path: Path,
    build_model: Callable[..., nn.Module],
    logits: Callable[..., torch.Tensor],
) -> None:
    model = build_model("bert")
    attach(model, LoRA(r=3, alpha=5, target_modules=["query", "value", "dense"]), modules_to_save=["classifier"])
    perturb(model)
    write_adapter_folder(tmp_path / "adapter", model)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 6}))
    fresh = load_with_peft(build_model("bert"), tmp_path / "adapter")
    assert (logits(fresh) - logits(model)).abs().max() > 1e-4


class Names(nn.Module):
    """Modules whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"score": nn.Linear(4, 4), "wrap": nn.ModuleDict({"score": nn.Linear(4, 4)})})
        self.deep = nn.ModuleDict({"inner": nn.ModuleDict({"score": nn.Linear(4, 4)})})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner["wrap"]["score"](self.inner["score"](self.score(x)))
        return self.deep["inner"]["score"](x)


@pytest.mark.parametrize("target", [r"score", r"inner\.score", r"deep\.inner\.score"])
def test_peft_takes_exactly_our_hosts(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Names()
    base, x = copy.deepcopy(model), torch.randn(3, 4)
    report = attach(model, LoRA(r=2, target_modules=target))
    perturb(model)
    write_adapter_folder(tmp_path / "adapter", model)
    fresh = load_with_peft(base, tmp_path / "adapter")
    hosts = [name for name, module in fresh.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert hosts == list(report.hosts) == [target.replace("\\", "")]
    torch.testing.assert_close(fresh(x), model(x), atol=1e-5, rtol=0)


def test_config_keeps_the_users_words(build_model: Callable[..., nn.Module]) -> None:
    model = build_model("bert")
    attach(
        model,
        LoRA(r=3, alpha=5, dropout=0.1, scaling="rslora", target_modules=["query"]),
        modules_to_save=["classifier"],
    )
    adapter = to_peft(model)
    assert adapter is not None
    expected = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "use_dora": False,
        "modules_to_save": ["classifier"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)],
    }
    assert {key: adapter.config[key] for key in expected} == expected


def test_names_go_there_and_back(build_model: Callable[..., nn.Module]) -> None:
    model = build_model("distilbert")
    attach(model, DoRA(r=2, target_modules=["q_lin", "word_embeddings"]), modules_to_save=["classifier"])
    adapter = to_peft(model)
    assert adapter is not None
    assert "base_model.model.pre_classifier.weight" in adapter.state  # PEFT copies it for its name's ending
    own = from_peft(adapter.config, adapter.state)
    expected = adapter_state_dict(model)
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)


class Subclassed(LowRankAdapter):
    """Computes something else from the same tensors."""


def grouped() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    attach(model, LoRA(r=1, target_modules=["0"]))
    return model


def heads_only_in_name() -> nn.Module:
    model = nn.ModuleDict({"model": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    attach(model, LoRA(r=1, target_modules=["body"]), modules_to_save=["model"])
    return model


def host_below_a_like_name() -> nn.Module:
    """PEFT reads names as patterns: the dot of `a.score` matches the underscore of `a_score`."""
    parts = {"a": nn.ModuleDict({"score": nn.Linear(4, 4)}), "a_score": nn.ModuleDict({"body": nn.Linear(4, 4)})}
    model = nn.ModuleDict(parts)
    attach(model, LoRA(r=1, target_modules=["body"]), modules_to_save=["a.score"])
    return model


def root() -> nn.Module:
    model = nn.Linear(4, 4)
    attach(model, LoRA(r=1, target_modules="all-linear"))
    return model


def subclass() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    attach(model, LoRA(r=1, target_modules=["0"]))
    for _, _, adapter in iter_adapters(model):
        adapter.__class__ = Subclassed
    return model


@pytest.mark.parametrize("make", [grouped, heads_only_in_name, host_below_a_like_name, root, subclass])
def test_what_peft_would_misread_gets_our_own_format(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    assert to_peft(model) is None
    assert write_adapter_folder(tmp_path / "adapter", model).adapter_format == "lora_lightning"
