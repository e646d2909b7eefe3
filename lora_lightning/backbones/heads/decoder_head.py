"""The output head of a model with an encoder and a decoder, and what enters it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.sharded import is_sharded
from lora_lightning.adapters.view import output_embeddings
from lora_lightning.adapters.walk import unwrap
from lora_lightning.backbones.heads.output_head import without_cache

log = logging.getLogger(__name__)


def find_decoder_head(model: nn.Module) -> nn.Module | None:
    """Find the module whose output is the logits, and find out by a trial call on two tokens that it is.

    Args:
        model: A model of transformers with an encoder and a decoder, with or without adapters; it is not changed.

    Returns:
        The head, or None, after a line in the log, where logits come about in another way.
    """
    found = _try(model)
    if isinstance(found, nn.Module):
        return found
    log.warning("%s: %s. The loss takes the model's own logits, all of them at once.", type(model).__name__, found)
    return None


def decoder_states(model: nn.Module, head: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Call a model, and return what enters its output head, which computes nothing.

    Args:
        model: The model.
        head: Its head, as `find_decoder_head` gives it.
        inputs: The model's inputs.

    Returns:
        Hidden states `[batch, target length, width]`, with gradients.
    """
    entered: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        entered.append(args[0])
        return (args[0][:, :0], *args[1:])

    # First, so that adapters that change the head's input have their turn when the head is called for the loss.
    hook = head.register_forward_pre_hook(take, prepend=True)
    try:
        model(**inputs, **without_cache(model))
    finally:
        hook.remove()
    return entered[0]


def _try(model: nn.Module) -> nn.Module | str:
    bare: Any = unwrap(model)
    head = output_embeddings(bare)
    if head is None:
        return "it does not say which module is its output head"
    if bare is not model:
        return "it is compiled, so what enters its output head cannot be seen"
    if is_sharded(bare):
        return "its parameters are sharded, so its output head cannot be called alone"
    scores: list[Tensor] = []
    device = next(bare.parameters()).device
    ids = torch.tensor([[0, 1]], device=device)
    hook = head.register_forward_hook(lambda *call: scores.append(call[-1]))
    try:
        # The dropout of a trial must leave the random numbers of the run alone.
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            output = bare(input_ids=ids, decoder_input_ids=ids, **without_cache(bare))
    finally:
        hook.remove()
    if len(scores) != 1:
        return "it does not call its output head as a module"
    if scores[0].shape != output.logits.shape or not torch.equal(scores[0], output.logits):
        return "it does something to the logits after its output head"
    return head
