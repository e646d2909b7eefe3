"""The loss of a language model without its logits: chunk by chunk, at supervised positions only.

Shape suffixes: B batch, L length, N supervised tokens, C tokens of a chunk, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from lora_lightning.backbones.heads.output_head import LogitMap

__all__ = ["TokenSums"]

IGNORED = -100
"""The label of a token that is not supervised."""

CHUNK = 128
"""Tokens whose logits are in memory at one time."""


class TokenSums(NamedTuple):
    """Sums over the supervised tokens of a batch.

    Args:
        loss: Sum of their cross-entropies, scalar, float32 or wider.
        num_tokens: How many there are.
        num_right: How many have the largest logit at their target, int64 scalar.
    """

    loss: Tensor
    num_tokens: int
    num_right: Tensor


def supervised(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Find the supervised positions and their targets.

    The token at position t is predicted from position t - 1. A token without a predecessor is not supervised, whatever
    its label: the first of a row, of a packed document (its position id is 0), and after padding.

    Args:
        batch: `labels` `[B, L]`, -100 where not supervised; where there are any, `position_ids` `[B, L]` and
            `attention_mask` `[B, L]` (masks of other shapes say nothing about padding here).

    Returns:
        Indices `[N]` into the positions of all rows, flattened, and the targets `[N]` predicted there.

    Example:
        >>> positions, targets = supervised({"labels": torch.tensor([[-100, -100, 5], [-100, 7, 8]])})
        >>> positions.tolist(), targets.tolist()
        ([1, 3, 4], [5, 7, 8])
    """
    labels: Tensor = batch["labels"]
    wanted = labels[:, 1:] != IGNORED
    position_ids, mask = batch.get("position_ids"), batch.get("attention_mask")
    if isinstance(position_ids, Tensor) and position_ids.shape == labels.shape:
        wanted &= position_ids[:, 1:] != 0
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        wanted &= mask[:, :-1] != 0
    rows, columns = wanted.nonzero(as_tuple=True)
    return rows * labels.shape[1] + columns, labels[rows, columns + 1]


def chunked_token_loss(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    logit_map: LogitMap | None = None,
    *,
    chunk_size: int = CHUNK,
) -> TokenSums:
    """Sum the cross-entropies of tokens, with the logits of one chunk in memory at a time.

    The gradients of the hidden states and of trained parameters of the head are computed together with each chunk's
    logits; only these gradients are kept for backward.

    Args:
        hidden: Input of the head at the supervised positions, `[N, H]`.
        targets: Token ids, `[N]`.
        head: Takes `[C, H]` to `[C, V]`: a module of any kind, its adapters included.
        logit_map: Function applied to the output of the head; None for none.
        chunk_size: Tokens in a chunk.

    Returns:
        The sums; gradients flow through the loss.

    Example:
        >>> chunked_token_loss(torch.zeros(3, 4), torch.tensor([0, 1, 2]), nn.Linear(4, 8, bias=False)).num_tokens
        3
    """
    logit_map = logit_map or LogitMap()
    parameters = list(head.parameters()) if isinstance(head, nn.Module) else []
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        loss, num_right = _ChunkedLoss.apply(hidden, targets, head, logit_map, chunk_size, *trained)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    else:
        with torch.no_grad():
            loss, num_right = _without_gradients(hidden, targets, head, logit_map, chunk_size)
    return TokenSums(loss, len(targets), num_right)


class _ChunkedLoss(Function):
    """The sum of cross-entropies; its gradients are computed in the forward pass.

    The logits of a chunk become their own gradient in place, softmax(z) - onehot(target), which the head's graph (one
    chunk's, dropped right away) takes to the hidden states and to the head's parameters.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context
        hidden_nh: Tensor,
        targets_n: Tensor,
        head: Callable[[Tensor], Tensor],
        logit_map: LogitMap,
        chunk_size: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the number of right tokens; keep the gradients."""
        ctx.has_hidden = hidden_nh.requires_grad
        d_hidden_nh = torch.empty_like(hidden_nh) if ctx.has_hidden else None
        d_parameters: list[Tensor] = []
        loss, num_right = _zero_sums(hidden_nh)
        start = 0
        for hidden_ch, targets_c in _chunks(hidden_nh, targets_n, chunk_size):
            with torch.enable_grad():  # no leaf: tools that watch modules refuse autograd.grad for leaves
                rows_ch = hidden_ch.detach().requires_grad_(ctx.has_hidden).view_as(hidden_ch)
            inputs = [rows_ch, *parameters] if ctx.has_hidden else list(parameters)
            loss_c, right_c, gradients = _differentiate(rows_ch, targets_c, head, logit_map, inputs)
            loss, num_right = loss + loss_c, num_right + right_c
            if d_hidden_nh is not None:
                d_hidden_nh[start : start + len(rows_ch)] = gradients.pop(0)
            if d_parameters:
                torch._foreach_add_(d_parameters, gradients)
            else:
                d_parameters = gradients
            start += len(rows_ch)
        ctx.mark_non_differentiable(num_right)
        ctx.save_for_backward(*([] if d_hidden_nh is None else [d_hidden_nh]), *d_parameters)
        return loss, num_right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's own context
        """Scale the gradients by that of the loss, in place: the head's may be the largest tensor of all."""
        gradients = [gradient.mul_(d_loss) for gradient in ctx.saved_tensors]
        d_hidden = gradients.pop(0) if ctx.has_hidden else None
        return d_hidden, None, None, None, None, *gradients


def _differentiate(
    rows_ch: Tensor,
    targets_c: Tensor,
    head: Callable[[Tensor], Tensor],
    logit_map: LogitMap,
    inputs: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return a chunk's loss, its number of right tokens, and the gradients of `inputs`; its logits end here."""
    with torch.enable_grad(), _saved_storages() as saved:
        scores_cv = head(rows_ch)
    logits_cv = logit_map.apply_(_own_wide(scores_cv, {*saved, _storage(rows_ch)}))
    slope = logit_map.slope(logits_cv)
    losses_c, right_c, d_logits_cv = _cross_entropy_(logits_cv, targets_c)
    if isinstance(slope, Tensor) or slope != 1:
        d_logits_cv.mul_(slope)
    found = torch.autograd.grad(scores_cv, inputs, d_logits_cv.to(scores_cv.dtype), allow_unused=True)
    pairs = zip(inputs, found, strict=True)
    gradients = [torch.zeros_like(tensor) if gradient is None else gradient for tensor, gradient in pairs]
    return losses_c.sum(), right_c.sum(), gradients


def _without_gradients(
    hidden_nh: Tensor, targets_n: Tensor, head: Callable[[Tensor], Tensor], logit_map: LogitMap, chunk_size: int
) -> tuple[Tensor, Tensor]:
    loss, num_right = _zero_sums(hidden_nh)
    for hidden_ch, targets_c in _chunks(hidden_nh, targets_n, chunk_size):
        logits_cv = logit_map.apply_(_own_wide(head(hidden_ch), {_storage(hidden_ch)}))
        losses_c, right_c, _ = _cross_entropy_(logits_cv, targets_c, with_gradient=False)
        loss, num_right = loss + losses_c.sum(), num_right + right_c.sum()
    return loss, num_right


def _chunks(hidden_nh: Tensor, targets_n: Tensor, chunk_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield hidden states and targets of each chunk; one empty chunk for no tokens, so that the head is called."""
    yield from zip(torch.split(hidden_nh, chunk_size), torch.split(targets_n, chunk_size), strict=True)


def _cross_entropy_(
    logits_cv: Tensor, targets_c: Tensor, *, with_gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses `[C]`, correctness `[C]`, and the gradient of the losses' sum `[C, V]`, written over the logits."""
    targets_c1 = targets_c.unsqueeze(1)
    top_c1, best_c1 = logits_cv.max(1, keepdim=True)
    target_c1 = logits_cv.gather(1, targets_c1)
    exp_cv = logits_cv.sub_(top_c1).exp_()
    sum_c1 = exp_cv.sum(1, keepdim=True)
    losses_c = (sum_c1.log() + top_c1 - target_c1).squeeze(1)
    if with_gradient:
        exp_cv.div_(sum_c1).scatter_add_(1, targets_c1, torch.full_like(target_c1, -1))
    return losses_c, (best_c1 == targets_c1).squeeze(1), exp_cv


def _zero_sums(hidden: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return torch.zeros((), dtype=dtype, device=hidden.device), torch.zeros((), dtype=torch.int64, device=hidden.device)


def _own_wide(scores: Tensor, kept: set[int]) -> Tensor:
    """Return scores in float32 or wider, as a tensor that may be overwritten: a copy only if others need it."""
    scores = scores.detach()
    return scores.to(torch.promote_types(scores.dtype, torch.float32), copy=_storage(scores) in kept)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _saved_storages() -> Iterator[set[int]]:
    """Collect the storages that the graph built inside saves for backward; DoRA, for example, saves its output."""
    storages: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        storages.add(_storage(tensor))
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield storages
