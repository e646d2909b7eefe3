"""Adapters of every kind that PEFT writes, on tiny models, and both libraries' answers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from lora_lightning.adapters import Method
from lora_lightning.methods import (
    IA3,
    AdaLoRA,
    BitFit,
    DoRA,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    TrainableTokens,
    VeRA,
)
from tests.models import build

TOKENS = [5, 9, 11]
IDS = torch.tensor([[5, 9, 8, 7, 6, 11], [3, 4, 5, 9, 0, 0]])
MASK = (IDS != 0).long()  # padding on the right; PEFT puts virtual tokens before padding on the left


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of adapter, as both libraries set it.

    Args:
        theirs: PEFT's config, of which `target_modules` and `task_type` are added.
        ours: Our method, or methods, with the targets in their place.
        targets: Whether it takes `target_modules`.
        own_kind: Whether it is exported as its own kind when asked for.
    """

    theirs: type[Any]
    settings: dict[str, Any] = field(default_factory=dict)
    ours: Any
    targets: bool = True
    own_kind: bool = False


def _with(method: type[Method], **settings: Any) -> Any:
    return lambda targets: [method(**({"target_modules": targets} if targets else {}), **settings)]


KINDS: dict[str, Kind] = {
    "lora": Kind(theirs=peft.LoraConfig, settings={"r": 3}, ours=_with(LoRA, r=3)),
    "dora": Kind(theirs=peft.LoraConfig, settings={"r": 3, "use_dora": True}, ours=_with(DoRA, r=3)),
    "lora, bias": Kind(
        theirs=peft.LoraConfig,
        settings={"r": 3, "lora_bias": True},
        ours=lambda targets: [LoRA(r=3, target_modules=targets), BitFit(bias=targets, add_bias=True)],
    ),
    "lora, tokens": Kind(
        theirs=peft.LoraConfig,
        settings={"r": 3, "trainable_token_indices": TOKENS},
        ours=lambda targets: [LoRA(r=3, target_modules=targets), TrainableTokens(token_indices=TOKENS)],
    ),
    "adalora": Kind(
        theirs=peft.AdaLoraConfig,
        settings={"init_r": 4, "target_r": 2, "total_step": 10},
        ours=_with(AdaLoRA, init_r=4, target_r=2),
        own_kind=True,
    ),
    "vera": Kind(theirs=peft.VeraConfig, settings={"r": 8}, ours=_with(VeRA, r=8), own_kind=True),
    "ia3": Kind(
        theirs=peft.IA3Config,
        settings={"feedforward_modules": []},
        ours=_with(IA3, feedforward_modules=[]),
    ),
    "prompt tuning": Kind(
        theirs=peft.PromptTuningConfig,
        settings={"num_virtual_tokens": 3},
        ours=_with(PromptTuning, num_virtual_tokens=3),
        targets=False,
    ),
    "p-tuning": Kind(
        theirs=peft.PromptEncoderConfig,
        settings={"num_virtual_tokens": 3, "encoder_hidden_size": 16},
        ours=_with(PTuning, num_virtual_tokens=3, encoder_hidden_size=16),
        targets=False,
    ),
    "prefix tuning": Kind(
        theirs=peft.PrefixTuningConfig,
        settings={"num_virtual_tokens": 3},
        ours=_with(PTuningV2, num_virtual_tokens=3),
        targets=False,
    ),
    "prefix tuning, mlp": Kind(
        theirs=peft.PrefixTuningConfig,
        settings={"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16},
        ours=_with(PrefixTuning, num_virtual_tokens=3, encoder_hidden_size=16),
        targets=False,
    ),
    "trainable tokens": Kind(
        theirs=peft.TrainableTokensConfig,
        settings={"token_indices": TOKENS},
        ours=_with(TrainableTokens, token_indices=TOKENS),
        targets=False,
    ),
}

# Architecture -> task type and usual targets.
MODELS: dict[str, tuple[str, list[str]]] = {
    "llama": ("CAUSAL_LM", ["q_proj", "down_proj"]),
    "gpt2": ("CAUSAL_LM", ["c_attn", "mlp.c_proj"]),
    "qwen2": ("CAUSAL_LM", ["q_proj", "v_proj"]),
    "gemma3": ("CAUSAL_LM", ["k_proj", "o_proj"]),
    "mixtral": ("CAUSAL_LM", ["q_proj", "v_proj"]),
    "t5": ("SEQ_2_SEQ_LM", ["q", "wo"]),
    "bert": ("SEQ_CLS", ["query", "output.dense"]),
    "bert tokens": ("TOKEN_CLS", ["value", "intermediate.dense"]),
    "roberta": ("SEQ_CLS", ["query", "value"]),
    "distilbert": ("SEQ_CLS", ["q_lin", "lin2"]),
    "llama rows": ("SEQ_CLS", ["q_proj", "down_proj"]),
}


# Other heads than those of `tests.models`.
HEADS = {
    "bert tokens": transformers.BertForTokenClassification,
    "llama rows": transformers.LlamaForSequenceClassification,
}


def build_model(name: str) -> nn.Module:
    if name not in HEADS:
        return build(name)
    cls = HEADS[name]
    config = build(name.split()[0]).config
    torch.manual_seed(0)
    return cls(config).eval()


def pefts(model: str, kind: Kind, folder: Path) -> tuple[nn.Module, nn.Module]:
    """Return a model that PEFT adapted and trained, saved in a folder, and the folder as PEFT itself loads it."""
    task_type, targets = MODELS[model]
    settings = {**kind.settings, **({"target_modules": targets} if kind.targets else {}), "task_type": task_type}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build_model(model), kind.theirs(**settings)).eval()
        move(theirs)
        theirs.save_pretrained(folder)
        return theirs, peft.PeftModel.from_pretrained(build_model(model), folder).eval()


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Move every trained parameter off its start."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    """Return a model's logits at real tokens; where PEFT put virtual ones before, the last positions are the real."""
    rows: dict[str, Tensor] = {"input_ids": IDS, "attention_mask": MASK}
    is_pair = model.config.is_encoder_decoder
    if is_pair:
        rows["decoder_input_ids"] = IDS[:, :4]
    logits: Tensor = model(**rows).logits
    if logits.dim() == 2 or is_pair:
        return logits
    return logits[:, -IDS.shape[1] :][MASK.bool()]
