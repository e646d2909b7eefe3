"""Every exported folder has a model card that the Hub parses, that names nothing private, and whose examples run."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from lora_lightning import attach
from lora_lightning.adapters import adapter_state_dict
from lora_lightning.checkpoint import load_adapter, write_adapter_folder
from lora_lightning.checkpoint.base_name import name_for_others
from lora_lightning.checkpoint.folder import RunFacts
from lora_lightning.checkpoint.pair import write_pair
from lora_lightning.commands.export import export
from lora_lightning.commands.merge import merge
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import BottleneckAdapter, LoRA
from lora_lightning.tasks import SequenceClassification
from lora_lightning.texts.model_card import CARD_NAME, FOLDER, is_untouched
from tests import models
from tests.checkpoint.runs import rebuild_task, save_backbone, save_checkpoint
from tests.commands.language_models import save_language_model, save_lm_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it

METRICS = {
    "val/loss": 0.25,
    "val/accuracy": 0.875,
    "test/clean/f1": 0.5,
    "train/loss": 0.125,
    "val/broken": float("nan"),
}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private") / "home"
    save_language_model(folder / "base")
    save_lm_checkpoint(folder / "base", folder / "x.ckpt")
    return folder


def adapter_of(name="llama", method=None):
    model = models.build(name)
    attach(model, method or LoRA(r=2, target_modules="all-linear"))
    return models.perturb(model)


def card_of(folder):
    return ModelCard.load(folder / CARD_NAME, ignore_metadata_errors=False)


def test_the_front_matter_is_that_of_the_run(tmp_path):
    facts = RunFacts(base="org/base-1.5", metrics=METRICS, epoch=3, step=1200)
    model = adapter_of()
    manifest = write_adapter_folder(tmp_path / "a", model, facts)
    data = card_of(tmp_path / "a").data
    assert (data.base_model, data["base_model_relation"], data.library_name) == ("org/base-1.5", "adapter", "peft")
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["lora_lightning", "lora", "base_model:adapter:org/base-1.5"]
    assert data.model_name == "base-1.5-lora"
    found = {(one.dataset_split, one.dataset_name, one.metric_type): one.metric_value for one in data.eval_results}
    assert found == {
        ("validation", "the data of the training", "loss"): 0.25,
        ("validation", "the data of the training", "accuracy"): 0.875,
        ("test", "the data of the training/clean", "f1"): 0.5,
    }
    text = card_of(tmp_path / "a").text
    count = sum(tensor.numel() for tensor in adapter_state_dict(model).values())
    assert f"{count:,} trained parameters, 1,200 optimizer steps, epoch 3." in text
    assert "| `r` | `2` |" in text
    assert f"torch {manifest.versions['torch']}" in text


@pytest.mark.parametrize(
    ("base", "known"),
    [
        ("org/base", "org/base"),
        ("gpt2", "gpt2"),
        ("pkg://some_package/model.gguf", "pkg://some_package/model.gguf"),
        ("/home/me/.cache/huggingface/hub/models--org--base/snapshots/0a1b", "org/base"),
        ("/home/me/models/base", None),
        ("models/of/mine", None),
        ("../base", None),
        ("tests/texts", None),  # a folder that is there
        ("C:\\models\\base", None),
        (None, None),
    ],
)
def test_only_names_that_others_can_load_are_named(base, known):
    assert name_for_others(base) == known


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_an_export_names_no_private_path(lm, tmp_path, to):
    export(str(lm / "x.ckpt"), str(tmp_path / "out"), to=to)
    card = card_of(tmp_path / "out")
    assert "base_model" not in card.data.to_dict()
    assert card.data.library_name == {"peft": "peft", "merged": "transformers"}[to]
    for private in (str(lm), "private", "home"):
        assert private not in card.content
    if to == "peft":  # negative control: the folder itself knows where its base lies
        assert str(lm) in (tmp_path / "out" / "adapter_config.json").read_text()


def test_settings_that_are_paths_are_left_out(tmp_path):
    folder = tmp_path / "a"
    write_adapter_folder(folder, adapter_of(), RunFacts(base="org/base"))
    manifest = json.loads((folder / "manifest.json").read_text())
    from lora_lightning.texts import model_card

    method = manifest["methods"][0]
    for value, is_shown in (("query", True), (str(tmp_path), False), ([str(tmp_path / "x")], False), ("a/b", True)):
        assert ("start" in model_card._settings({**method, "init_args": {"start": value}})) is is_shown


def examples(folder):
    blocks = re.findall(r"```python\n(.*?)```", (folder / CARD_NAME).read_text(), re.DOTALL)
    return [block.replace(FOLDER, str(folder)) for block in blocks]


def run(code, **names):
    exec(code, names)
    return names["model"].eval()


IDS = torch.tensor([[1, 9, 10, 11, 12, 13]])


@torch.no_grad()
def logits_of(model, ids=IDS):
    return model(input_ids=ids).logits


def test_the_examples_of_an_adapter_run(lm, tmp_path):
    export(str(lm / "x.ckpt"), str(tmp_path / "out"))
    codes = [code.replace("path/of/the/base", str(lm / "base")) for code in examples(tmp_path / "out")]
    assert len(codes) == 2
    expected = logits_of(rebuild_task(lm / "x.ckpt").eval().adapted)
    for code in codes:
        torch.testing.assert_close(logits_of(run(code)), expected)
    bare = transformers.AutoModelForCausalLM.from_pretrained(lm / "base")
    assert (logits_of(bare) - expected).abs().max() > 0.1  # negative control


def test_the_example_of_a_merged_model_runs(lm, tmp_path):
    merge(str(lm / "x.ckpt"), str(tmp_path / "out"))
    (code,) = examples(tmp_path / "out")
    torch.testing.assert_close(logits_of(run(code)), logits_of(rebuild_task(lm / "x.ckpt").eval().adapted))


def test_the_examples_of_a_classifier_run_and_its_labels_stand_in_the_card(tmp_path):
    base = save_backbone(tmp_path / "bert")
    names = ["good", "bad", "ugly"]
    task = SequenceClassification(backbone=str(base), method=LoRA(r=2), label_names=names)
    save_checkpoint(task, tmp_path / "x.ckpt")
    export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"))
    assert card_of(tmp_path / "out").data.pipeline_tag == "text-classification"
    assert "Labels: `good`, `bad`, `ugly`." in card_of(tmp_path / "out").text
    expected = logits_of(rebuild_task(tmp_path / "x.ckpt").eval().adapted)
    codes = [code.replace("path/of/the/base", str(base)) for code in examples(tmp_path / "out")]
    assert len(codes) == 2
    for code in codes:
        torch.testing.assert_close(logits_of(run(code)), expected)


def test_an_adapter_that_peft_does_not_know_names_this_library_alone(tmp_path):
    write_adapter_folder(tmp_path / "a", adapter_of(method=BottleneckAdapter(width=4)), RunFacts(base="org/base"))
    card = card_of(tmp_path / "a")
    assert card.data.library_name == "lora_lightning"
    assert card.data.tags[1] == "bottleneckadapter"
    assert "PeftModel" not in card.text
    write_adapter_folder(tmp_path / "b", adapter_of(), RunFacts(base="org/base"))
    assert "PeftModel" in card_of(tmp_path / "b").text  # negative control


def test_a_model_without_transformers_has_a_card_too(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    attach(model, LoRA(r=2, target_modules=["0"]))
    write_adapter_folder(tmp_path / "a", models.perturb(model))
    card = card_of(tmp_path / "a")
    assert card.data.tags == ["lora_lightning", "lora"]
    assert "on a `Sequential` of the trainer's own" in card.text


def test_a_card_that_was_edited_stays_and_does_not_keep_the_folder_from_loading(tmp_path):
    model, folder = adapter_of(), tmp_path / "a"
    card = folder / CARD_NAME
    write_adapter_folder(folder, model, RunFacts(base="org/base"))
    assert is_untouched(card)
    write_adapter_folder(folder, model, RunFacts(base="org/other"))
    assert card_of(folder).data.base_model == "org/other"  # negative control: one of ours is written anew
    card.write_text(card.read_text() + "Trained by me.\n")
    assert not is_untouched(card)
    load_adapter(model, folder)
    with pytest.warns(UserWarning, match=r"README\.md was edited and stays as it is"):
        write_adapter_folder(folder, model, RunFacts(base="org/base"))
    assert card_of(folder).data.base_model == "org/other"
    assert card.read_text().endswith("Trained by me.\n")


def test_a_card_beside_a_checkpoint_stays_too(tmp_path):
    def fill(folder, record):
        (folder / "manifest.json").write_text("{}")

    write_pair(tmp_path / "x.ckpt", {}, fill)
    (tmp_path / "x" / CARD_NAME).write_text("Mine.")
    with pytest.warns(UserWarning, match="was edited"):
        write_pair(tmp_path / "x.ckpt", {}, fill)
    assert (tmp_path / "x" / CARD_NAME).read_text() == "Mine."


def test_a_merge_over_an_edited_card_is_refused(lm, tmp_path):
    folder = tmp_path / "out"
    merge(str(lm / "x.ckpt"), str(folder))
    merge(str(lm / "x.ckpt"), str(folder))  # negative control
    text = (folder / CARD_NAME).read_text()
    edited = text.replace("# Llama", "# llama")
    assert len(edited) == len(text)
    assert edited != text
    (folder / CARD_NAME).write_text(edited)
    with pytest.raises(CheckpointError, match="exists already"):
        merge(str(lm / "x.ckpt"), str(folder))
    assert (folder / CARD_NAME).read_text() == edited
