"""What PEFT and transformers write is computed alike here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lightning.adapters import adapter_state_dict, attached_methods, detach, disabled, iter_adapters
from lora_lightning.backbones.attach import attach
from lora_lightning.checkpoint import export_peft, load_adapter, load_peft
from lora_lightning.errors import CheckpointError, TargetError
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.methods.low_rank import LowRankAdapter
from lora_lightning.peft_format.config import PEFT_WEIGHTS_NAME
from tests.checkpoint.peft_runs import answers, move, peft_model, reconfigure, rewrite, save, unchanged
from tests.checkpoint.runs import save_wide_base
from tests.models import build, inputs, perturb

# The tool's own hints, of tied weights, fan_in_fan_out and the like.
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:peft"), pytest.mark.filterwarnings("ignore:.*tie.*")]

ALL_LINEAR = "all-linear"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": (
        "bert",
        {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense"], "task_type": "SEQ_CLS"},
    ),
    "bert-embedding-dora": ("bert", {"target_modules": ["word_embeddings", "query"], "use_dora": True}),
    "bert-all": ("bert", {"target_modules": ALL_LINEAR, "task_type": "SEQ_CLS"}),
    "distilbert": ("distilbert", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),  # copies pre_classifier too
    "roberta": ("roberta", {"target_modules": r".*\.(query|value)", "modules_to_save": ["classifier"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-dora": ("gpt2", {"target_modules": ALL_LINEAR, "use_dora": True, "fan_in_fan_out": True}),
    "gpt2-embedding": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "llama": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True}),
    "llama-copy": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "qwen2": ("qwen2", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "gemma3": (
        "gemma3",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 5, "nothing": 3},
            "alpha_pattern": {r"1\..*": 7},
            "use_dora": True,
        },
    ),
    "t5": ("t5", {"target_modules": r".*SelfAttention\.(q|v)", "exclude_modules": r".*decoder.*"}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(peft_model("bert", target_modules=["query", "value"], task_type="SEQ_CLS"), tmp_path / "adapter")


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft(case: str, tmp_path: Path) -> None:
    architecture, settings = CASES[case]
    theirs = peft_model(architecture, **settings)
    folder = save(theirs, tmp_path / "adapter")
    torch.manual_seed(99)
    model = build(architecture)
    base = answers(model)
    report = load_peft(model, folder)

    expected = theirs(**inputs(model)).logits.detach()
    torch.testing.assert_close(answers(model), expected, atol=1e-5, rtol=0)
    assert (answers(model) - base).abs().max() > 1e-2  # negative control: the adapter matters
    assert report.num_trainable == sum(one.numel() for one in theirs.parameters() if one.requires_grad)
    with disabled(model):
        torch.testing.assert_close(answers(model), base, atol=0, rtol=0)
    detach(model)
    torch.testing.assert_close(answers(model), base, atol=0, rtol=0)


def test_another_scaling_is_noticed(folder: Path) -> None:
    model, other = build("bert"), build("bert")
    load_peft(model, folder)
    reconfigure(folder, lora_alpha=9)
    load_peft(other, folder)
    assert (answers(model) - answers(other)).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    """What was read from PEFT is written so that PEFT computes the same from it."""
    architecture, settings = CASES[case]
    save(peft_model(architecture, **settings), tmp_path / "theirs")
    model = build(architecture)
    load_peft(model, tmp_path / "theirs")
    perturb(model)
    export_peft(model, tmp_path / "ours")
    torch.manual_seed(99)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = peft.PeftModel.from_pretrained(build(architecture), tmp_path / "ours").eval()
    torch.testing.assert_close(back(**inputs(model)).logits, answers(model), atol=1e-5, rtol=0)
    for _, _, adapter in iter_adapters(model):  # negative control
        if isinstance(adapter, LowRankAdapter):
            adapter.scaling *= 1.3
    assert (back(**inputs(model)).logits - answers(model)).abs().max() > 1e-3


TRANSFORMERS = {
    "bert": LoRA(r=3, alpha=5, target_modules=["query"]),
    "distilbert": DoRA(r=3, alpha=5, target_modules=["q_lin"]),
    "gpt2": LoRA(r=3, alpha=5, target_modules=["c_attn", "c_proj"], rank_pattern={"c_attn": 2}),
    "llama": LoRA(r=3, alpha=5, target_modules=["q_proj", "down_proj"], alpha_pattern={"q_proj": 9}),
    "qwen2": LoRA(r=3, alpha=5, target_modules="all-linear", scaling="rslora"),
    "gemma3": DoRA(r=3, alpha=5, target_modules=["q_proj", "o_proj"], scaling="rslora"),
}


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_transformers_reads_ours(architecture: str, tmp_path: Path) -> None:
    model = build(architecture)
    attach(model, TRANSFORMERS[architecture])
    perturb(model)
    export_peft(model, tmp_path / "adapter")
    torch.manual_seed(99)
    theirs = build(architecture)
    base = answers(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(answers(theirs.eval()), answers(model), atol=1e-5, rtol=0)
    assert (answers(theirs) - base).abs().max() > 1e-3  # negative control


@pytest.mark.parametrize("architecture", TRANSFORMERS)
def test_reads_what_transformers_wrote(architecture: str, tmp_path: Path) -> None:
    method = TRANSFORMERS[architecture]
    theirs = build(architecture)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=method.target_modules,
        use_dora=isinstance(method, DoRA),
        use_rslora=method.scaling == "rslora",
        rank_pattern=method.rank_pattern or {},
        alpha_pattern=method.alpha_pattern or {},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_adapter(config)
    move(theirs)
    folder = save(theirs.eval(), tmp_path / "adapter")
    torch.manual_seed(99)
    model = build(architecture)
    base = answers(model)
    load_peft(model, folder)
    torch.testing.assert_close(answers(model), answers(theirs), atol=1e-5, rtol=0)
    assert (answers(model) - base).abs().max() > 1e-3  # negative control


def test_reads_our_own_folder(tmp_path: Path) -> None:
    model = build("distilbert")
    attach(model, DoRA(r=2, target_modules=["q_lin", "word_embeddings"]), modules_to_save=["classifier"])
    perturb(model)
    export_peft(model, tmp_path / "adapter")
    fresh = build("distilbert")
    load_peft(fresh, tmp_path / "adapter")
    torch.testing.assert_close(answers(fresh), answers(model), atol=1e-6, rtol=0)
    other = build("distilbert", seed=1)
    with unchanged(other), pytest.raises(CheckpointError, match="trained on another base model"):
        load_peft(other, tmp_path / "adapter")


SPELLINGS: dict[str, Callable[[str], str]] = {
    "with the adapter's name": lambda key: re.sub(r"(lora_[AB])\.weight$", r"\1.default.weight", key),
    "without the prefix": lambda key: key.removeprefix("base_model.model."),
    "copies in their wrapper": lambda key: key.replace("classifier.", "classifier.modules_to_save."),
    "copies with the adapter's name": lambda key: key.replace("classifier.", "classifier.modules_to_save.default."),
    "magnitude as transformers reads it": lambda key: key.replace("magnitude_vector", "magnitude_vector.weight"),
    "magnitude of an older version": lambda key: key.replace("magnitude_vector", "magnitude_vector.default"),
    "magnitude in full": lambda key: key.replace("magnitude_vector", "magnitude_vector.default.weight"),
    "embedding with the adapter's name": lambda key: re.sub(r"(lora_embedding_[AB])$", r"\1.default", key),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings(spelling: str, tmp_path: Path) -> None:
    targets = ["query", "word_embeddings"]
    theirs = peft_model("bert", target_modules=targets, use_dora=True, modules_to_save=["classifier"])
    folder = save(theirs, tmp_path / "adapter")
    before = load_file(folder / PEFT_WEIGHTS_NAME)
    rewrite(folder, lambda tensors: {SPELLINGS[spelling](key): one for key, one in tensors.items()})
    assert load_file(folder / PEFT_WEIGHTS_NAME).keys() != before.keys()
    model = build("bert")
    load_peft(model, folder)
    expected = theirs(**inputs(model)).logits.detach()
    torch.testing.assert_close(answers(model), expected, atol=1e-5, rtol=0)


def test_originals_of_copies_are_ignored(folder: Path) -> None:
    model, with_originals = build("bert"), build("bert")
    load_peft(model, folder)
    key = "base_model.model.classifier.original_module.weight"
    rewrite(folder, lambda tensors: {**tensors, key: torch.zeros(3, 32)})
    load_peft(with_originals, folder)
    torch.testing.assert_close(answers(with_originals), answers(model), atol=0, rtol=0)


def test_keeps_the_configs_own_words(folder: Path) -> None:
    model = build("bert")
    load_peft(model, folder)
    expected = LoRA(r=3, alpha=5, dropout=0.1, target_modules=["query", "value"], modules_to_save=["classifier"])
    assert attached_methods(model) == (expected,)


def test_names_paths_where_words_would_mean_more_here(tmp_path: Path) -> None:
    """PEFT leaves the pooler out by name; our suffixes have no such exception, so the paths are listed."""
    theirs = peft_model("bert", target_modules=["dense"], modules_to_save=["pooler"])
    folder = save(theirs, tmp_path / "adapter")
    model = build("bert")
    report = load_peft(model, folder)
    assert "bert.pooler.dense" not in report.hosts
    torch.testing.assert_close(answers(model), theirs(**inputs(model)).logits, atol=1e-5, rtol=0)


def test_targets_may_be_missing_from_the_config(folder: Path) -> None:
    model, other = build("bert"), build("bert")
    load_peft(model, folder)
    reconfigure(folder, target_modules=None)
    load_peft(other, folder)
    assert adapter_state_dict(other).keys() == adapter_state_dict(model).keys()


def test_never_attaches_twice(folder: Path) -> None:
    model = build("bert")
    load_peft(model, folder)
    before = adapter_state_dict(model)
    with pytest.raises(TargetError, match="has adapters already"):
        load_peft(model, folder)
    assert adapter_state_dict(model).keys() == before.keys()


def test_another_base_is_said(folder: Path) -> None:
    reconfigure(folder, base_model_name_or_path="somebody/bert-large")
    model = build("bert")
    model.config._name_or_path = "/models/bert-base"
    with pytest.warns(UserWarning, match="names 'somebody/bert-large' as its base"):
        load_peft(model, folder)
    model.config._name_or_path = "/elsewhere/BERT-large"
    detach(model)
    load_peft(model, folder)  # the folder alone moved


@pytest.mark.parametrize("cls", [LoRA, DoRA])
def test_on_a_quantized_base(tmp_path: Path, cls: type[LoRA]) -> None:
    """PEFT on the same 4-bit base gives the logits of our running model, and so does what it wrote here."""
    from lora_lightning.backbones.load import load_backbone
    from lora_lightning.backbones.quantization import Quantization

    base = save_wide_base("llama", tmp_path / "base")
    quantization = Quantization(compute_dtype="float32")

    def quantized() -> nn.Module:
        return load_backbone(str(base), "AutoModelForCausalLM", quantization=quantization).model.eval()

    model = quantized()
    attach(model, cls(r=3, alpha=5, target_modules=["q_proj", "down_proj"]))
    perturb(model)
    export_peft(model, tmp_path / "ours")
    torch.manual_seed(99)
    plain = quantized()
    untouched = answers(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(**inputs(model)).logits, answers(model), atol=1e-5, rtol=0)
    assert (untouched - answers(model)).abs().max() > 1e-2  # negative control

    save(theirs, tmp_path / "theirs")
    again = quantized()
    load_peft(again, tmp_path / "theirs")
    torch.testing.assert_close(answers(again), answers(model), atol=1e-5, rtol=0)


def test_load_adapter_reads_the_exported_folder(tmp_path: Path) -> None:
    method = LoRA(r=2, target_modules=["query"])
    model, fresh = build("bert"), build("bert")
    attach(model, method)
    perturb(model)
    export_peft(model, tmp_path / "adapter")
    attach(fresh, method)
    load_adapter(fresh, tmp_path / "adapter")
    torch.testing.assert_close(answers(fresh), answers(model), atol=0, rtol=0)
