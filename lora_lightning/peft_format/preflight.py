"""Checks whether vLLM and llama.cpp support an adapter.

Checked against vLLM's `vllm/lora/peft_helper.py` and llama.cpp's `convert_lora_to_gguf.py`. Both ignore unknown entries
of `adapter_config.json`, so with some of the problems an adapter would load but compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lora_lightning.peft_format.names import PREFIX

__all__ = ["preflight"]

Tool = Literal["vllm", "llama.cpp"]
TOOLS: tuple[Tool, ...] = ("vllm", "llama.cpp")

VLLM_USUAL_RANK = 16
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_COPIES = {"classifier", "score"}
_INPUTS = {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}  # which no weight can stand for
_LABELS = {"vllm": "vLLM", "llama.cpp": "llama.cpp"}


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Support of an adapter by one tool.

    Args:
        tool: The tool.
        problems: What it refuses, or would compute wrongly; empty if it supports the adapter.
        hints: Options of the tool that the adapter needs.
        can_merge: Whether merging the adapter avoids the problems.
    """

    tool: Tool
    problems: tuple[str, ...]
    hints: tuple[str, ...] = ()
    can_merge: bool = True

    def lines(self) -> list[str]:
        """Print the result, and suggest a merge if there are problems."""
        label = _LABELS[self.tool]
        if not self.problems:
            return [f"{label} takes this adapter{''.join(f'; {hint}' for hint in self.hints)}."]
        merge = " Merge it instead: lora-lightning export --to merged" if self.can_merge else ""
        return [f"{label} does not take this adapter as it is.{merge}", *(f"  {one}" for one in self.problems)]


def preflight(config: Mapping[str, Any], tensors: Mapping[str, Tensor], tool: Tool) -> Preflight:
    """Check an adapter in PEFT's format for one tool.

    Args:
        config: Content of `adapter_config.json`.
        tensors: The tensors by PEFT's key names.
        tool: `vllm` or `llama.cpp`.

    Returns:
        The problems and hints.

    Example:
        >>> preflight({"r": 8, "lora_alpha": 16, "use_dora": True}, {}, "vllm").problems
        ('DoRA: it knows no magnitudes',)
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        problem = f"an adapter of the kind {kind}: it takes LORA alone"
        return Preflight(tool=tool, problems=(problem,), can_merge=kind not in _INPUTS)
    return _vllm(config, tensors) if tool == "vllm" else _llama_cpp(config, tensors)


def _vllm(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Preflight:
    problems = _common(config, tensors)
    saved = config.get("modules_to_save") or []
    other = [name for name in saved if name.rpartition(".")[2] not in _VLLM_COPIES]
    if other:
        problems.append(f"modules_to_save ({', '.join(other)}): it takes copies of classifier and score alone")
    elif saved:
        problems.append(f"modules_to_save ({', '.join(saved)}): older versions take no copies at all")
    rank = max([int(config["r"]), *(config.get("rank_pattern") or {}).values()])
    hints = []
    if rank > VLLM_RANKS[-1]:
        problems.append(f"rank {rank}: it takes {VLLM_RANKS[-1]} at most")
    elif rank > VLLM_USUAL_RANK:
        hints.append(f"start it with --max-lora-rank {next(one for one in VLLM_RANKS if one >= rank)}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        problems.append("other ranks or alphas for some layers: many versions scale all layers by r and lora_alpha")
    if _embeddings(tensors):
        problems.append(f"embeddings ({_embeddings(tensors)}): it adapts them on few architectures")
    return Preflight(tool="vllm", problems=tuple(problems), hints=tuple(hints))


def _llama_cpp(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Preflight:
    problems = _common(config, tensors)
    saved = config.get("modules_to_save") or []
    if saved:
        problems.append(f"modules_to_save ({', '.join(saved)}): its converter takes low-rank tensors alone")
    if config.get("use_rslora"):
        problems.append("rsLoRA: it scales by lora_alpha / r")
    if config.get("alpha_pattern"):
        problems.append("other alphas for some layers: it knows one lora_alpha")
    if _embeddings(tensors):
        problems.append(f"embeddings ({_embeddings(tensors)}): its converter expects them laid out by mergekit")
    if any(".lm_head.lora_" in name for name in tensors):
        problems.append("lm_head: where it is tied to the embeddings, its converter refuses it")
    return Preflight(tool="llama.cpp", problems=tuple(problems))


def _common(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        problems.append("biases: it takes low-rank tensors alone")
    if config.get("trainable_token_indices"):
        problems.append("rows of embeddings (trainable_token_indices): it takes low-rank tensors alone")
    if config.get("use_dora"):
        problems.append("DoRA: it knows no magnitudes")
    if config.get("target_parameters"):
        problems.append("experts (target_parameters): not tried with it, and it ignores what it does not know")
    if any(tensor.dim() > 2 for name, tensor in tensors.items() if ".lora_" in name):
        problems.append("convolutions: it adapts linear layers")
    return problems


def _embeddings(tensors: Mapping[str, Tensor]) -> str:
    """Return the embeddings that are adapted, by their paths."""
    marker = ".lora_embedding_A"
    return ", ".join(name.removeprefix(PREFIX).removesuffix(marker) for name in tensors if name.endswith(marker))
