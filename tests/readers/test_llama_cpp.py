"""llama.cpp computes with merged folders and exported adapters what we compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_lightning.adapters import disabled
from lora_lightning.commands.export import export
from lora_lightning.tasks.generation import generate
from tests import models
from tests.checkpoint.runs import rebuild_task
from tests.commands.language_models import save_language_model, save_lm_checkpoint
from tests.readers.gguf_files import write_lora, write_model

xllamacpp: Any = pytest.importorskip("xllamacpp", reason="not installed; pip install 'lora-lightning[readers]'")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*SwigPy.*:DeprecationWarning")]
END = 2
PROMPTS = [[1, 8, 9, 10], [1, 30, 7], [1, *range(40, 60)]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Return a folder with a base, its checkpoint, exports and GGUF files, and the adapted model."""
    folder = tmp_path_factory.mktemp("llama")
    save_language_model(folder / "base")
    ckpt = save_lm_checkpoint(folder / "base", folder / "x.ckpt")
    export(str(ckpt), str(folder / "merged"), to="merged")
    export(str(ckpt), str(folder / "adapter"))
    write_model(folder / "base", folder / "base.gguf")
    write_model(folder / "merged", folder / "merged.gguf")
    write_lora(folder / "adapter", json.loads((folder / "base/config.json").read_text()), folder / "adapter.gguf")
    return folder, rebuild_task(ckpt).eval().adapted


def served(model: Path, lora: Path | None = None) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads, params.warmup = str(model), 64, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    return xllamacpp.Server(params)


def answers(server: Any, count: int = 1) -> tuple[list[Tensor], list[list[int]]]:
    """Return of each prompt the log probabilities `[vocabulary]` after it, and the tokens that llama.cpp adds."""
    probabilities, tokens = [], []
    for prompt in PROMPTS:
        asked = {"prompt": prompt, "max_tokens": count, "n_probs": models.VOCABULARY, "temperature": -1}
        steps = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        first = torch.full((models.VOCABULARY,), torch.nan)
        for one in steps[0]["top_logprobs"]:
            first[one["id"]] = one["logprob"]
        probabilities.append(first)
        tokens.append([step["id"] for step in steps if step["id"] != END])
    return probabilities, tokens


@torch.no_grad()
def expected(model: nn.Module) -> list[Tensor]:
    return [model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in PROMPTS]


def largest_difference(ones: list[Tensor], others: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ones, others, strict=True))


def test_a_merged_folder(run: tuple[Path, nn.Module]) -> None:
    folder, model = run
    found, tokens = answers(served(folder / "merged.gguf"), count=6)
    assert largest_difference(found, expected(model)) < 1e-4
    assert tokens == [generate(model, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    base, _ = answers(served(folder / "base.gguf"))
    assert largest_difference(base, expected(model)) > 0.1  # negative control
    with disabled(model):
        assert largest_difference(base, expected(model)) < 1e-4


def test_an_adapter_on_its_base(run: tuple[Path, nn.Module]) -> None:
    folder, model = run
    found, _ = answers(served(folder / "base.gguf", folder / "adapter.gguf"))
    assert largest_difference(found, expected(model)) < 1e-4
