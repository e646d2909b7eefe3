"""What vLLM and llama.cpp refuse or compute wrongly is said before they are asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_lightning.backbones.attach import attach
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.peft_format.encode import to_peft
from lora_lightning.peft_format.preflight import TOOLS, Preflight, Tool, preflight
from tests.models import build


def check(tool: Tool, method: LoRA, **saved: Any) -> Preflight:
    model = build("llama")
    attach(model, method, **saved)
    adapter = to_peft(model)
    assert adapter is not None
    return preflight(adapter.config, adapter.state, tool)


@pytest.mark.parametrize("tool", ["vllm", "llama.cpp"])
def test_plain_lora_is_taken(tool: Tool) -> None:
    result = check(tool, LoRA(r=8, target_modules=["q_proj", "down_proj"]))
    assert result.problems == ()
    assert result.lines() == [f"{'vLLM' if tool == 'vllm' else tool} takes this adapter."]


CASES: list[tuple[LoRA, dict[str, Any], str | None, str | None]] = [
    (DoRA(r=2, target_modules=["q_proj"]), {}, "DoRA", "DoRA"),
    (LoRA(r=2, target_modules=["q_proj"]), {"modules_to_save": ["lm_head"]}, "lm_head", "lm_head"),
    (LoRA(r=2, target_modules=["q_proj"], scaling="rslora"), {}, None, "rsLoRA"),
    (LoRA(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 1}), {}, "ranks or alphas", "other alphas"),
    (LoRA(r=2, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 3}), {}, "ranks or", "other alphas"),
    (LoRA(r=2, target_modules=["q_proj", "embed_tokens"]), {}, "model.embed_tokens", "model.embed_tokens"),
    (LoRA(r=2, target_modules=["q_proj", "lm_head"]), {}, None, "lm_head"),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("tool", ["vllm", "llama.cpp"])
def test_what_is_not_taken_is_listed(tool: Tool, case: int) -> None:
    method, saved, vllm, llama_cpp = CASES[case]
    expected = vllm if tool == "vllm" else llama_cpp
    result = check(tool, method, **saved)
    if method.rank_pattern is not None and tool == "llama.cpp":  # it reads each rank off the tensors
        assert result.problems == () or "other alphas" in result.problems[0]
    elif expected is None:
        assert result.problems == ()
    else:
        assert expected in " ".join(result.problems)
        assert "export --to merged" in result.lines()[0]


@pytest.mark.parametrize(("r", "hint"), [(16, None), (17, 32), (32, 32), (200, 256), (512, 512), (513, None)])
def test_ranks_of_vllm(r: int, hint: int | None) -> None:
    result = preflight({"r": 4, "rank_pattern": {}, "lora_alpha": 8}, {}, "vllm")
    assert result.hints == ()
    result = preflight({"r": r, "lora_alpha": 8}, {}, "vllm")
    assert result.hints == ((f"start it with --max-lora-rank {hint}",) if hint else ())
    assert bool(result.problems) is (r > 512)


@pytest.mark.parametrize("tool", ["vllm", "llama.cpp"])
@pytest.mark.parametrize(("kind", "can_merge"), [("IA3", True), ("PREFIX_TUNING", False), ("P_TUNING", False)])
def test_other_kinds(tool: Tool, kind: str, *, can_merge: bool) -> None:
    first, problem = preflight({"peft_type": kind}, {}, tool).lines()
    assert f"of the kind {kind}: it takes LORA alone" in problem
    assert ("export --to merged" in first) is can_merge


@pytest.mark.parametrize("setting", [{"bias": "all"}, {"lora_bias": True}, {"trainable_token_indices": [1]}])
def test_what_is_trained_beside(setting: dict[str, Any]) -> None:
    plain = {"r": 8, "lora_alpha": 16, "bias": "none", "lora_bias": False, "trainable_token_indices": None}
    for tool in TOOLS:
        assert preflight(plain, {}, tool).problems == ()
        assert "low-rank tensors alone" in preflight({**plain, **setting}, {}, tool).problems[0]


def test_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3))
    attach(model, LoRA(r=1, target_modules=["0"]))
    torch.manual_seed(0)
    adapter = to_peft(model)
    assert adapter is not None
    assert "convolutions: it adapts linear layers" in preflight(adapter.config, adapter.state, "llama.cpp").problems
