"""What PEFT would read as something else: prefixes that a model changes in its cache, and names that end others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lightning.adapters import Method
from lora_lightning.backbones.attach import attach
from lora_lightning.backbones.trials.cached_keys import why_cache_is_changed
from lora_lightning.checkpoint import export_peft, load_peft
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import LoRA, PTuningV2, TrainableTokens
from lora_lightning.peft_format.names import PEFT_WEIGHTS_NAME
from tests.models import gap
from tests.peft_format.kinds import move
from tests.prompts import zoo

pytestmark = pytest.mark.filterwarnings("ignore")  # each architecture has its own

PREFIX = PTuningV2(num_virtual_tokens=2)
TOKENS = TrainableTokens(token_indices=[5, 7, 9])
IDS = torch.tensor([[5, 9, 8, 7, 6, 11], [13, 14, 5, 9, 21, 22]])


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    given = {"input_ids": IDS}
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = IDS.flip(1)
    return model(**given)[0][:, -IDS.shape[1] :]


def adapted(base: nn.Module, *methods: Method) -> Any:
    model = copy.deepcopy(base)
    attach(model, list(methods))
    move(model)
    return model.eval()


def read_by_peft(base: nn.Module, folder: Path) -> Tensor:
    return answers(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("diffllama", "its attention takes other keys and values than the cache holds"),
        ("deepseek_v3", "a cache, with which a call of the model fails"),
        ("jetmoe", "a cache, with which a call of the model fails"),
        ("gpt_bigcode", r"size of keys from the config \(num_key_value_heads=4, head_dim=8\)"),
    ],
)
def test_a_prefix_that_peft_computes_otherwise_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        export_peft(adapted(zoo.build(name, "causal"), PREFIX), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gpt_neox"])
def test_a_prefix_that_the_cache_passes_on_is_read(name: str, tmp_path: Path) -> None:
    base = zoo.build(name, "causal")
    model = adapted(base, PREFIX)
    export_peft(model, tmp_path)
    assert gap(read_by_peft(base, tmp_path), answers(model)) <= 1e-5
    assert gap(answers(base), answers(model)) > 1e-3


def test_peft_s_prefix_for_a_cache_that_is_changed_is_refused(tmp_path: Path) -> None:
    base = zoo.build("diffllama", "causal")
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="other keys and values than the cache holds"):
        load_peft(base, tmp_path)


def test_the_trial_of_a_cache_leaves_the_model_as_it_was() -> None:
    base = zoo.build("llama", "causal").train()
    model = adapted(base, PREFIX).train()
    state, before = torch.get_rng_state(), model.config._attn_implementation
    assert why_cache_is_changed(model) is None
    assert why_cache_is_changed(base) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == before
    assert model.training
    assert why_cache_is_changed(zoo.build("diffllama", "causal").to("meta")) is None  # which has no values to compare


def test_rows_of_modules_whose_paths_end_alike_are_written_for_each(tmp_path: Path) -> None:
    """ProphetNet has `word_embeddings`, `encoder.word_embeddings` and `decoder.word_embeddings` of one weight."""
    base = zoo.build("prophetnet", "body")
    for number, methods in enumerate([[LoRA(r=2, target_modules=["query_proj"]), TOKENS], [TOKENS]]):
        model, folder = adapted(base, *methods), tmp_path / str(number)
        export_peft(model, folder)
        assert gap(read_by_peft(base, folder), answers(model)) <= 1e-5
        ours = copy.deepcopy(base)
        load_peft(ours, folder)
        assert gap(answers(ours), answers(model)) <= 1e-5
        assert gap(answers(base), answers(model)) > 1e-3


def test_rows_that_are_missing_for_one_of_them_are_not_read(tmp_path: Path) -> None:
    base = zoo.build("prophetnet", "body")
    export_peft(adapted(base, LoRA(r=2, target_modules=["query_proj"]), TOKENS), tmp_path)
    tensors = load_file(tmp_path / PEFT_WEIGHTS_NAME)
    names = [name for name in tensors if name.endswith("trainable_tokens_delta")]
    assert len(names) == 3
    save_file({name: one for name, one in tensors.items() if name != names[0]}, tmp_path / PEFT_WEIGHTS_NAME)
    with pytest.raises(KeyError, match="word_embeddings"):
        read_by_peft(base, tmp_path)


class Pair(nn.Module):
    """Two embeddings, of which the path of one ends the other's."""

    def __init__(self, other: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = transformers.PretrainedConfig()
        self.embed, self.other = nn.Embedding(40, 8), other
        self.add_module(other, nn.Embedding(40, 8))
        self.head = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.head(self.embed(input_ids) * self.get_submodule(self.other)(input_ids.flip(1))),)


def test_rows_that_peft_would_train_elsewhere_too_are_refused(tmp_path: Path) -> None:
    methods = LoRA(r=2, target_modules=["head"]), TrainableTokens(token_indices=[5, 7, 9], target_modules=["embed"])
    with pytest.raises(CheckpointError, match="would train the same rows of 'pos_embed'"):
        export_peft(adapted(Pair("pos_embed"), *methods), tmp_path / "no")
    model = adapted(Pair("positions"), *methods)
    export_peft(model, tmp_path / "yes")
    assert gap(read_by_peft(Pair("positions"), tmp_path / "yes"), answers(model)) <= 1e-5
    assert gap(answers(Pair("positions")), answers(model)) > 1e-3
