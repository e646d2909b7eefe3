"""A merged folder is loaded again and compared; wide weights lie in files."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lightning.errors import CheckpointError
from lora_lightning.merging.check import check_written
from lora_lightning.merging.spool import spooling

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
IDS = {"input_ids": torch.arange(3, 9)[None]}


@pytest.fixture
def model():
    return transformers.BertForMaskedLM(transformers.BertConfig(**CONFIG)).eval()


def test_what_comes_back_is_compared(model, tmp_path):
    model.save_pretrained(tmp_path)
    check_written(tmp_path, model, IDS, "model.safetensors")
    weights = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    save_file({**weights, name: weights[name] + 1e-3}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 weights differ, such as {name}"):
        check_written(tmp_path, model, IDS, "model.safetensors")


def test_a_weight_that_a_reload_ties_again_is_noticed(model, tmp_path):
    # Saved beside a config that says that they are tied, which leaves one of the two out of the file.
    model.save_pretrained(tmp_path)
    model.cls.predictions.decoder.weight = nn.Parameter(model.cls.predictions.decoder.weight + 1)
    with pytest.raises(CheckpointError, match=r"differ, such as cls\.predictions\.decoder\.weight"):
        check_written(tmp_path, model, IDS, "model.safetensors")


def test_a_setting_that_changes_the_answer_is_noticed(model, tmp_path):
    model.config.hidden_act = "relu"  # the model itself has been built with another one
    model.save_pretrained(tmp_path)
    check_written(tmp_path, model, None, "model.safetensors")
    with pytest.raises(CheckpointError, match="its outputs are off by"):
        check_written(tmp_path, model, IDS, "model.safetensors")


def test_plain_modules_are_compared_with_their_file(tmp_path):
    model = nn.Linear(3, 2)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    check_written(tmp_path, model, None, "weights.safetensors")
    with torch.no_grad():
        model.bias.add_(1)
    with pytest.raises(CheckpointError, match="1 weights differ, such as bias"):
        check_written(tmp_path, model, None, "weights.safetensors")


def test_a_class_that_needs_more_than_a_folder_is_not_checked(tmp_path):
    class Own(transformers.BertForMaskedLM):
        def __init__(self, config, more):
            super().__init__(config)
            self.more = more

    model = Own(transformers.BertConfig(**CONFIG), 1)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was not checked, since it could not be loaded"):
        check_written(tmp_path, model, IDS, "model.safetensors")


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def test_spooled_tensors_take_no_anonymous_memory(tmp_path):
    source = torch.randn(12_000_000).bfloat16()  # in float32 above what glibc takes from memory that was freed before
    with spooling(tmp_path) as spool:
        before = anonymous()
        kept = [spool.put(source, torch.float32) for _ in range(4)]
        in_files = anonymous() - before
        plain = [source.float() for _ in range(4)]
        in_memory = anonymous() - before - in_files
        assert all(torch.equal(one, source.float()) for one in kept + plain)
        kept[0].add_(1)
        assert torch.equal(kept[1], plain[1])
        assert spool.put(torch.empty(0, 3), torch.float32).shape == (0, 3)
        assert [len(list(path.iterdir())) for path in tmp_path.iterdir()] == [0]
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(kept[1], plain[1])  # the tensor outlives the folder
    assert in_memory > 96e6  # 192 MB, of which the system may have put pages aside
    assert in_files < 0.2 * in_memory
