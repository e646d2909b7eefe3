"""Run a model on a small sample, to measure how far its outputs change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters import disabled
from lora_lightning.adapters.view import input_embeddings
from lora_lightning.merging.report import LogitMove

_NUM_SEQUENCES, _LENGTH = 4, 16


class Probe:
    """A sample of token ids, and the outputs of the adapted model and its base.

    Args:
        model: The adapted model, in float32.
        batch: Its input.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.batch = batch
        self.adapted = outputs(model, batch)
        with disabled(model):
            self.base = outputs(model, batch)

    def compare(self, merged: nn.Module) -> LogitMove:
        """Return how far the outputs of the merged model, in float32, are from the adapted one's."""
        move = (outputs(merged, self.batch) - self.adapted).abs()
        own = (self.adapted - self.base).abs()
        return LogitMove(
            largest=move.max().item(),
            mean=move.mean().item(),
            adapter_largest=own.max().item(),
            adapter_mean=own.mean().item(),
            num_tokens=self.batch["input_ids"].numel(),
        )


def sample_batch(
    model: nn.Module,
    text: str | None = None,
    tokenizer: Any = None,  # noqa: ANN401 - tokenizers share no public base class
) -> dict[str, Tensor] | None:
    """Return an input for a transformers model: the tokens of a text, or a few random sequences.

    Args:
        model: The model.
        text: The text; None means 4 sequences of 16 random tokens, always the same ones.
        tokenizer: The tokenizer, for a text.

    Returns:
        Token ids `[4, 16]` or `[1, length]`, and those of the decoder if there is one; with a dimension of size 1 for
        the choices in a multiple-choice model; None for a model that takes no token ids.
    """
    config: Any = getattr(model, "config", None)
    embedding: Any = input_embeddings(model)
    if config is None or not hasattr(embedding, "weight") or getattr(model, "main_input_name", None) != "input_ids":
        return None
    if text is not None and tokenizer is not None:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    else:
        vocabulary = embedding.weight.shape[0]
        length = min(_LENGTH, (getattr(config, "max_position_embeddings", None) or _LENGTH + 2) - 2)
        generator = torch.Generator().manual_seed(0)
        # Ids below 3 are usually special ones, at which some models stop looking.
        ids = torch.randint(min(3, vocabulary - 1), vocabulary, (_NUM_SEQUENCES, max(length, 1)), generator=generator)
    if any(cls.__name__.endswith("ForMultipleChoice") for cls in type(model).__mro__):
        ids = ids[:, None]
    ids = ids.to(embedding.weight.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return a model's logits, or else its first output, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        result = model(**batch)
    finally:
        model.train(was_training)
    logits = getattr(result, "logits", None)
    tensor: Tensor = logits if logits is not None else result[0]
    return tensor.float()
