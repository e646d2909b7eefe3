"""Adapters on experts, as PEFT's `target_parameters`, through adapter folders and back."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lightning import DoRA, LoRA, export_peft, load_adapter, load_peft
from lora_lightning.adapters import attached_methods
from lora_lightning.backbones.attach import attach
from lora_lightning.checkpoint import write_adapter_folder
from lora_lightning.checkpoint.folder import OWN_WEIGHTS_NAME
from lora_lightning.errors import CheckpointError
from lora_lightning.peft_format.config import CONFIG_NAME, PEFT_WEIGHTS_NAME
from lora_lightning.peft_format.preflight import preflight
from tests import models

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # PEFT's own use of transformers
    # PEFT applies a pattern for a parameter, and says nevertheless that it did not.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
MIXED = LoRA(r=4, alpha=8, target_modules=["q_proj", "experts"], rank_pattern={"experts.down_proj": 2})


def adapted(name: str = "mixtral", method: LoRA = MIXED) -> nn.Module:
    model = models.build(name)
    attach(model, method)
    return models.perturb(model)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("mixtral", ["q_proj", "experts"]),
        ("qwen3_moe", ["experts.gate_up_proj"]),
        ("gpt_oss", ["experts"]),
        ("nemotron_h", ["experts", "q_proj"]),
    ],
)
def test_peft_reads_what_is_exported_and_it_comes_back(tmp_path: Path, name: str, targets: list[str]) -> None:
    ours = adapted(name, LoRA(r=4, alpha=8, scaling="rslora", target_modules=targets, rank_pattern={targets[-1]: 2}))
    expected = models.logits(ours)
    export_peft(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(models.build(name), str(tmp_path / "ours")).eval()
    assert models.gap(models.logits(theirs), expected) <= 1e-5
    assert models.gap(models.logits(models.build(name)), expected) > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = models.build(name)
        torch.manual_seed(11)
        load_peft(again, tmp_path / folder)
        assert torch.equal(models.logits(again), expected)


def test_an_adapter_of_peft_alone_is_loaded_with_its_own_words(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["v_proj"], target_parameters=["experts.down_proj", "experts.gate_up_proj"]
    )
    theirs = peft.get_peft_model(models.build("mixtral"), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    model = models.build("mixtral")
    load_peft(model, tmp_path)
    assert attached_methods(model)[0].target_modules == ["experts.down_proj", "experts.gate_up_proj", "v_proj"]
    assert models.gap(models.logits(model), models.logits(theirs)) <= 1e-5
    state = load_file(tmp_path / PEFT_WEIGHTS_NAME)
    outer = next(name for name in state if "layers.0.mlp.experts.lora_B" in name)  # down_proj's
    state[outer] = state[outer].unflatten(1, (4, -1)).transpose(1, 2).flatten(1).contiguous()  # as if expert by expert
    save_file(state, tmp_path / PEFT_WEIGHTS_NAME)
    wrong = models.build("mixtral")
    load_peft(wrong, tmp_path)
    assert models.gap(models.logits(wrong), models.logits(theirs)) > 1e-2


def test_folders_beside_checkpoints_load_into_themselves(tmp_path: Path) -> None:
    dropping = LoRA(r=4, dropout=0.1, target_modules=["experts"])
    for index, (method, weights) in enumerate([(MIXED, PEFT_WEIGHTS_NAME), (dropping, OWN_WEIGHTS_NAME)]):
        model, folder = adapted(method=method), tmp_path / str(index)
        write_adapter_folder(folder, model)
        assert (folder / weights).is_file()  # PEFT has no dropout on experts, so it could not go on training
        again = models.build("mixtral")
        attach(again, method)
        load_adapter(again, folder)
        assert torch.equal(models.logits(again), models.logits(model))
    export_peft(model, tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / CONFIG_NAME).read_text())["lora_dropout"] == 0


def test_another_base_is_noticed(tmp_path: Path) -> None:
    model = adapted()
    write_adapter_folder(tmp_path, model)
    other = models.build("mixtral")
    other.model.layers[0].mlp.experts.gate_up_proj.data[2].mul_(1.01)
    attach(other, MIXED)
    with pytest.raises(CheckpointError, match="was trained on another base model"):
        load_adapter(other, tmp_path)
    bare = models.build("mixtral")
    bare.model.layers[0].mlp.experts.gate_up_proj.data[2].mul_(1.01)
    with pytest.raises(CheckpointError, match="was trained on another base model"):
        load_peft(bare, tmp_path)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = adapted()
    write_adapter_folder(tmp_path, model)
    (tmp_path / "manifest.json").unlink()
    path, config = tmp_path / PEFT_WEIGHTS_NAME, tmp_path / CONFIG_NAME
    state, words = load_file(path), config.read_text()
    inner = next(name for name in state if "layers.1.mlp.experts.base_layer.lora_A" in name)  # gate_up_proj's
    save_file({**state, inner: state[inner][:-1].contiguous()}, path)
    with pytest.raises(CheckpointError, match=r"gate_up_proj.lora_A' has shape \[15, 32\], .* whole number of experts"):
        load_peft(models.build("mixtral"), tmp_path)
    save_file({name: tensor for name, tensor in state.items() if name != inner}, path)
    with pytest.raises(CheckpointError, match="are missing"):
        load_peft(models.build("mixtral"), tmp_path)
    save_file(state, path)
    config.write_text(words.replace("gate_up_proj", "other"))
    with pytest.raises(
        CheckpointError, match=r"names 'model.layers.0.mlp.experts.other', .* no such parameter of two or three"
    ):
        load_peft(models.build("mixtral"), tmp_path)
    listed = json.loads(words)
    config.write_text(json.dumps({**listed, "target_parameters": listed["target_parameters"][1:]}))
    with pytest.raises(CheckpointError, match="do not fit its config"):
        load_peft(models.build("mixtral"), tmp_path)


def test_the_other_tools_are_told_of_experts(tmp_path: Path) -> None:
    write_adapter_folder(tmp_path, adapted())
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    for tool in ("vllm", "llama.cpp"):
        problems = preflight(config, load_file(tmp_path / PEFT_WEIGHTS_NAME), tool).problems
        assert any(problem.startswith("experts (target_parameters)") for problem in problems)


SHARED = {"target_modules": ["o_proj", "shared_experts.up_proj", "shared_experts.down_proj"], "r": 4, "alpha": 8}


@pytest.mark.parametrize(
    "method", [LoRA(**SHARED, dropout=0.1), LoRA(**SHARED, rank_pattern={"shared_experts.up_proj": 2})]
)
def test_layers_named_as_experts_are_exported_as_themselves(tmp_path: Path, method: LoRA) -> None:
    ours = adapted("deepseek_v3", method)
    expected = models.logits(ours.eval())
    export_peft(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(models.build("deepseek_v3"), str(tmp_path)).eval()
    assert models.gap(models.logits(theirs), expected) <= 1e-5
    again = models.build("deepseek_v3")
    load_peft(again, tmp_path)
    assert models.gap(models.logits(again), expected) <= 1e-5
    own = models.build("deepseek_v3")
    attach(own, method)
    load_adapter(own, tmp_path)
    assert torch.equal(models.logits(own), expected)


def test_peft_takes_their_names_for_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: under the names of the layers PEFT adapts experts."""
    monkeypatch.setattr("lora_lightning.peft_format.expert_names.is_named_as_experts", lambda *_: False)
    ours = adapted("deepseek_v3", LoRA(r=4, target_modules=["shared_experts.down_proj"]))
    export_peft(ours, tmp_path)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*mlp\.experts\.lora_A"):
        theirs = peft.PeftModel.from_pretrained(models.build("deepseek_v3"), str(tmp_path)).eval()
    assert models.gap(models.logits(theirs), models.logits(ours)) > 1e-3


def test_dora_on_layers_named_as_experts_is_refused(tmp_path: Path) -> None:
    ours = adapted("deepseek_v3", DoRA(r=4, target_modules=["shared_experts.down_proj"]))
    with pytest.raises(
        CheckpointError, match=r"takes the name for that of experts.*layers.0.mlp.shared_experts.down_proj"
    ):
        export_peft(ours, tmp_path)


def test_other_types_keep_the_names_of_their_layers(tmp_path: Path) -> None:
    export_peft(adapted("qwen2_moe", LoRA(r=4, target_modules=["shared_expert.down_proj"])), tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text(encoding="utf-8"))
    assert "target_parameters" not in config
    assert config["target_modules"] == [f"model.layers.{index}.mlp.shared_expert.down_proj" for index in (0, 1)]
