"""Causal language models with adapters, and batches of very different lengths, for the tests of tasks and callbacks."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_lightning import LoRA, Optim
from lora_lightning.tasks import CausalLM
from tests import models

IGNORED = -100
LENGTHS = (3, 31, 8, 14)
TARGETS = LoRA(r=3, target_modules="all-linear")

_SIZES = {name: value for name, value in models._DECODER.items() if name != "head_dim"}
OTHERS = {
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=1.5)
    ),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**_SIZES, logits_scaling=7.0)),
    "cohere": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**_SIZES)),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**_SIZES)),  # its head has a bias
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=models.VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            dropout=0.0,
        )
    ),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True)),
    "bert": lambda: transformers.BertLMHeadModel(  # transforms the hidden states before the head
        transformers.BertConfig(
            vocab_size=models.VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=True,
        )
    ),
}


def build(name: str) -> nn.Module:
    """Build a tiny causal language model with random weights and logits that differ clearly."""
    if name not in OTHERS:
        return models.build(name)
    torch.manual_seed(0)
    model = OTHERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


class Speaker(CausalLM):
    """Speaks through a model of `build`, its adapters moved off their start; keeps the gradients of each step."""

    def __init__(self, name: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        usual = {"method": TARGETS, "optim": Optim(lr=0.1, schedule="constant")}
        super().__init__(**{**usual, **settings})
        self.name, self.model_dtype = name, dtype
        self.gradients: list[dict[str, Tensor]] = []

    def configure_backbone(self) -> nn.Module:
        return build(self.name).to(self.model_dtype)

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            models.perturb(self.adapted)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """See the gradients as clipping does."""
        named = self.adapted.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        super().configure_gradient_clipping(*args, **kwargs)


def batches(lengths: tuple[int, ...] = LENGTHS, rows: int = 2) -> list[dict[str, Tensor]]:
    """Return batches of one length each; about a third of the tokens, a different part in each, is not supervised."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for length in lengths:
        ids = torch.randint(3, models.VOCABULARY, (rows, length), generator=generator)
        labels = ids.clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return all rows of some batches as one batch, padded on the right."""
    longest = max(part["input_ids"].shape[1] for part in parts)
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.cat(
            [nn.functional.pad(part[name], (0, longest - part[name].shape[1]), value=value) for part in parts]
        )
        for name, value in padding.items()
    }


def loader(parts: list[dict[str, Tensor]]) -> DataLoader[Any]:
    """Return a loader that gives these batches in this order."""
    return DataLoader(parts, batch_size=None, shuffle=False)  # type: ignore[arg-type]


def reference_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return transformers' own loss: the mean over the supervised tokens."""
    return model(**batch).loss


def reference_gradients(task: CausalLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of transformers' own loss on a batch."""
    named = {name: parameter for name, parameter in task.adapted.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(reference_loss(task.adapted, batch), list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def largest_gap(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Return the largest difference of two sets of gradients, relative to the largest gradient of all."""
    assert ours.keys() == reference.keys()
    scale = max(float(gradient.abs().max()) for gradient in reference.values())
    return max(float((ours[name] - reference[name]).abs().max()) for name in reference) / scale


def built(*args: Any, **settings: Any) -> Speaker:
    """Return a `Speaker` whose model is there."""
    task = Speaker(*args, **settings)
    task.configure_model()
    return task
