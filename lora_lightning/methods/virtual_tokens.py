"""Where virtual tokens stand in a row, as functions of tensors: insert them, drop them again, count positions.

Shape suffixes: B rows, L real tokens, N virtual tokens, M = N + L.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.view import PromptPlace
from lora_lightning.errors import ConfigError

CACHES = ("past_key_values", "cache_params", "past_buckets_states", "state", "mems")
"""Arguments by which transformers models take the cache of earlier calls."""

_EXTENDED = ("input_ids", "attention_mask", "position_ids")
_ZERO_FOR_VIRTUAL = ("token_type_ids", "mm_token_type_ids", "global_attention_mask", "langs", "bbox")
"""Arguments with one value a token, of which virtual tokens get 0: first segment, text, local attention, no box."""


def num_leading(mask: Tensor | None, like: Tensor) -> Tensor:
    """Return how many padding tokens stand before the first real one of each row, `[B, 1]`."""
    if mask is None:
        return torch.zeros(len(like), 1, dtype=torch.long, device=like.device)
    return (mask != 0).int().argmax(1, keepdim=True)


def insert(values: Tensor, new: Tensor, num: int, mask: Tensor | None) -> Tensor:
    """Insert `num` values before the first real token of each row.

    Args:
        values: `[B, L, ...]`.
        new: What to insert, of a shape that broadcasts to `[B, num, ...]`.
        num: N.
        mask: 1 for real tokens, `[B, L]`; None where all are.

    Returns:
        `[B, N + L, ...]`.

    Example:
        >>> rows = torch.tensor([[0, 5, 6], [7, 8, 0]])
        >>> insert(rows, torch.tensor(9), 2, (rows != 0).long())
        tensor([[0, 9, 9, 5, 6],
                [9, 9, 7, 8, 0]])
    """
    both = torch.cat([new.expand(len(values), num, *values.shape[2:]), values], 1)
    if mask is None:
        return both
    lead_b1 = num_leading(mask, values)
    at_m = torch.arange(both.shape[1], device=values.device)
    index_bm = torch.where(at_m < lead_b1, at_m + num, torch.where(at_m < lead_b1 + num, at_m - lead_b1, at_m))
    return both.gather(1, _like(index_bm, both))


def slots(tokens: Tensor, num: int, mask: Tensor | None) -> Tensor:
    """Return which virtual token stands at each index of a row that they are inserted into, -1 for real tokens.

    Args:
        tokens: Anything with one value a token, `[B, L]`.
        num: N.
        mask: As for `insert`.

    Returns:
        `[B, N + L]`, from -1 to N - 1.

    Example:
        >>> slots(torch.tensor([[0, 5]]), 2, torch.tensor([[0, 1]]))
        tensor([[-1,  0,  1, -1]])
    """
    real = tokens.new_full(tokens.shape, -1, dtype=torch.long)
    return insert(real, torch.arange(num, device=tokens.device), num, mask)


def drop_virtual(states: Tensor, num: int, mask: Tensor | None, num_real: int) -> Tensor:
    """Undo `insert`: return `[B, L, ...]` of `[B, N + L, ...]`."""
    if mask is None:
        return states[:, num : num + num_real]
    at_l = torch.arange(num_real, device=states.device)
    index_bl = torch.where(at_l < num_leading(mask, states), at_l, at_l + num)
    return states.gather(1, _like(index_bl, states))


def positions_of(mask: Tensor, offset: int) -> Tensor:
    """Return positions that count real tokens, `[B, L]`, from `offset` on.

    Example:
        >>> positions_of(torch.tensor([[0, 1, 1], [1, 1, 0]]), 0)
        tensor([[0, 0, 1],
                [0, 1, 1]])
    """
    return ((mask != 0).long().cumsum(1) - 1).clamp_min(0) + offset


def usual_positions(place: PromptPlace, given: Mapping[str, Any]) -> Tensor:
    """Return the positions that a body gives its tokens where it gets none, `[B, L]`.

    Args:
        place: The body.
        given: What it is called with.
    """
    tokens, mask = tokens_of(given), given.get("attention_mask")
    length = tokens.shape[1]
    if mask is not None and not place.counts_padding:
        return positions_of(mask, place.position_offset)[:, -length:]
    start = cached_length(given) + place.position_offset
    return torch.arange(start, start + length, device=tokens.device).expand(len(tokens), -1)


def insert_positions(positions: Tensor, num: int, mask: Tensor | None, rows: int) -> Tensor:
    """Return given positions with those of the virtual tokens, which take over the first real token's.

    Args:
        positions: `[1 or B, L]`, or `[axes, B, L]` where the model rotates along several axes.
        num: N.
        mask: As for `insert`.
        rows: B.

    Returns:
        `[B, N + L]` or `[axes, B, N + L]`; real tokens stand N further on.
    """
    if positions.dim() == 3:
        return torch.stack([insert_positions(axis, num, mask, rows) for axis in positions])
    positions = positions.expand(rows, -1)
    first = positions.gather(1, num_leading(mask, positions))
    virtual = first + torch.arange(num, device=positions.device)
    return insert(positions + num, virtual, num, mask)


def insert_defaults(given: dict[str, Any], num: int, mask: Tensor | None) -> None:
    """Give virtual tokens a value in every argument that has one for each token.

    Raises:
        ConfigError: An argument has a value for each token, and none is known for virtual ones; or it holds positions
            of something else, which would be the ones before the virtual tokens came.
    """
    size = tokens_of(given).shape[:2]
    for name, value in given.items():
        if value is not None and name.endswith("_position_ids") and not name.startswith("decoder_"):
            raise ConfigError(
                f"Soft prompts move tokens on, and {name!r} says where they were; leave it out, or use a method "
                "without virtual tokens, such as LoRA."
            )
        is_by_token = isinstance(value, Tensor) and value.shape[:2] == size
        if not is_by_token or name in _EXTENDED or name.startswith(("encoder_", "decoder_")):
            continue
        if value.is_floating_point() and not name.endswith(("_mask", "_mapping")):
            continue  # features of another kind, whose number happens to be that of the tokens
        if name not in _ZERO_FOR_VIRTUAL:
            raise ConfigError(
                f"{name!r} has a value for each token, and virtual tokens have none; leave it out, or use a method "
                "without virtual tokens, such as LoRA."
            )
        given[name] = insert(value, value.new_zeros(()), num, mask)


def check_inputs(place: PromptPlace, given: Mapping[str, Any], num: int) -> bool:
    """Return whether this call continues from a cache, which then already holds the virtual tokens.

    Raises:
        ConfigError: The row is too long, mask or positions have another shape than the rows, rows are packed, or the
            cache is static.
    """
    mask, positions, length = given.get("attention_mask"), given.get("position_ids"), tokens_of(given).shape[1]
    if mask is not None and getattr(mask, "ndim", None) != 2:
        found = f"one with {mask.ndim} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ConfigError(
            f"Soft prompts extend masks of shape [batch, length], and got {found}; pass the padding mask itself, and "
            "let the model derive the rest."
        )
    if place.max_positions is not None and length + num > place.max_positions:
        raise ConfigError(
            f"{length} tokens and {num} virtual ones are more than the model's {place.max_positions} positions; "
            "shorten the rows (max_length) or use fewer num_virtual_tokens."
        )
    if positions is not None and length > 1 and not torch.compiler.is_compiling() and positions.device.type != "meta":
        _refuse_packed(positions, mask)
    return is_continued(given)


def _refuse_packed(positions: Tensor, mask: Tensor | None) -> None:
    """Raise ConfigError where positions start over inside a row."""
    falls = positions.diff(dim=-1) < 0
    if mask is not None:
        real = mask[:, -positions.shape[-1] :] != 0
        falls = falls & real[:, 1:] & real[:, :-1]
    if bool(falls.any()):
        raise ConfigError(
            "Several documents are packed into one row, and a soft prompt stands before the first alone; turn packing "
            "off."
        )


def is_continued(given: Mapping[str, Any]) -> bool:
    """Return whether a call continues from a filled cache.

    Raises:
        ConfigError: The cache is static.
    """
    return any(_is_filled(given[name]) for name in CACHES if given.get(name) is not None)


def cached_length(given: Mapping[str, Any]) -> int:
    """Return how many positions a call's cache holds; 0 for one that does not count them."""
    past = given.get("past_key_values")
    return 0 if past is None or not _counts(past) else int(past.get_seq_length())


def _is_filled(cache: Any) -> bool:  # noqa: ANN401 - a Cache, or tensors
    """Return whether a cache holds something of earlier tokens."""
    if hasattr(cache, "seqlen_offset"):  # xLSTM's own
        return bool(cache.seqlen_offset > 0)
    if not hasattr(cache, "has_previous_state"):  # a sequence with one entry for each layer
        return len(cache) > 0
    if getattr(cache, "is_compileable", False) and getattr(cache, "get_max_length", lambda: 0)() >= 0:
        raise ConfigError("Soft prompts do not fit a static cache, whose length is fixed; use a DynamicCache.")
    if _counts(cache):
        return int(cache.get_seq_length()) > 0
    return bool(cache.has_previous_state())


def _counts(cache: Any) -> bool:  # noqa: ANN401 - a transformers Cache
    """Return whether a cache knows its length; the one of a state-space model has none."""
    is_linear = getattr(cache, "is_linear", None)
    return not is_linear or not all(is_linear)


def tokens_of(given: Mapping[str, Any]) -> Tensor:
    """Return what a call has for its tokens: ids `[B, L]`, or embeddings `[B, L, E]`."""
    ids = given.get("input_ids")
    tokens: Tensor = given["inputs_embeds"] if ids is None else ids
    return tokens


def _like(index: Tensor, values: Tensor) -> Tensor:
    """Return an index `[B, M]` in the shape that `gather` needs for `values` `[B, ..., ...]`."""
    return index.view(*index.shape, *[1] * (values.dim() - 2)).expand(*index.shape, *values.shape[2:])
