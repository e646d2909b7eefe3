"""What a soft prompt must equal: it holds the embeddings of real tokens, and the base reads these tokens in front."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters import iter_adapters
from lora_lightning.backbones.attach import attach
from lora_lightning.methods import PromptTuning
from tests import models

FRONT = (9, 12, 10)
OTHER_FRONT = (11, 13, 14)
LENGTH = 7
LAYOUTS = ("whole", "unmasked", "right", "left")


def rows(model: nn.Module, layout: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return ids and mask of two rows; the second is padded by two tokens in the layouts `right` and `left`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    pad = model.config.get_text_config().pad_token_id
    padding = {"right": slice(LENGTH - 2, LENGTH), "left": slice(0, 2)}.get(layout)
    if padding is not None:
        ids[1, padding] = 0 if pad is None else pad
        mask[1, padding] = 0
    return ids, mask


def with_front(ids: Tensor, mask: Tensor, front: tuple[int, ...] = FRONT) -> tuple[Tensor, Tensor]:
    """Return ids and mask with `front` directly before each row's first real token."""
    long_ids, long_mask = [], []
    for row, real in zip(ids.tolist(), mask.tolist(), strict=True):
        first = real.index(1)
        long_ids.append([*row[:first], *front, *row[first:]])
        long_mask.append([*real[:first], *[1] * len(front), *real[first:]])
    return torch.tensor(long_ids), torch.tensor(long_mask)


def call(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the model's first output: logits, or hidden states of a model without a head."""
    given: dict[str, Any] = {"input_ids": ids}
    if mask is not None:
        given["attention_mask"] = mask
    if takes_decoder_ids(model):
        given["decoder_input_ids"] = torch.arange(20, 24).expand(len(ids), -1)
    output = model(**given)
    return output["logits"] if "logits" in output else output[0]


def takes_decoder_ids(model: nn.Module) -> bool:
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def adapted(base: Any, front: tuple[int, ...] = FRONT) -> nn.Module:
    """Return a copy of a model with a prompt that holds the embeddings of `front`."""
    model = copy.deepcopy(base)
    attach(model, PromptTuning(num_virtual_tokens=len(front)))
    hold(model, base, front)
    return model.eval()


@torch.no_grad()
def hold(model: nn.Module, base: Any, front: tuple[int, ...]) -> None:
    """Write the embeddings of `front` into the prompt."""
    [prompt] = [one.prompt for _, _, one in iter_adapters(model) if getattr(one, "prompt", None) is not None]
    prompt.copy_(base.get_input_embeddings()(torch.tensor(front)))


@torch.no_grad()
def gaps(base: Any, model: nn.Module, layouts: tuple[str, ...] = LAYOUTS) -> dict[str, float]:
    """Return by layout how far a model is from its base with the tokens in front, over the real tokens."""
    found = {}
    for layout in layouts:
        ids, mask = rows(base, layout)
        long_ids, long_mask = with_front(ids, mask)
        unmasked = layout == "unmasked"
        want = call(base, long_ids, None if unmasked else long_mask)
        got = call(model, ids, None if unmasked else mask)
        found[layout] = models.gap(*aligned(got, want, mask, long_mask))
    return found


def aligned(got: Tensor, want: Tensor, mask: Tensor, long_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real tokens of both; all of both where the output is not by the input's token."""
    if got.dim() < 3 or got.shape[1] != mask.shape[1]:
        return got, want
    real = long_mask.bool()
    after = real & (long_mask.cumsum(1) > len(FRONT))
    return got[mask.bool()], want[after]
