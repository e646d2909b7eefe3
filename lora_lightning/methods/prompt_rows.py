"""The virtual tokens that stand in front of the rows of a batch: the same for all, or of several soft prompts.

Prompts of different lengths are inserted at the longest one's: what a row does not use stands in front of its own
virtual tokens, and is masked as padding on the left is.

Shape suffixes: B rows, L real tokens, N virtual tokens of the longest prompt, M = N + L, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_lightning.adapters.selection.rows import Mixture
from lora_lightning.adapters.view import PromptPlace
from lora_lightning.errors import ConfigError
from lora_lightning.methods.virtual_tokens import (
    cached_length,
    insert,
    insert_positions,
    num_leading,
    tokens_of,
    usual_positions,
)


class Prompt:
    """One prompt for all rows.

    Args:
        num: N.
        tokens: Returns the virtual tokens `[N, E]`.

    Attributes:
        is_even: Whether all rows have N.
    """

    is_even = True

    def __init__(self, num: int, tokens: Callable[[], Tensor]) -> None:
        self.num, self.tokens = num, tokens

    def prepare(self, place: PromptPlace, given: dict[str, Any], *, is_continued: bool) -> None:
        """Complete the body's arguments before anything is inserted; a continued call has a filled cache."""

    def mask_like(self, mask: Tensor) -> Tensor:
        """Return what a mask gets for the virtual tokens, of a shape that broadcasts to `[B, N]`."""
        return mask.new_ones(())

    def shift_of(self, positions: Tensor) -> Tensor | int:
        """Return how far real tokens move on, of a shape that broadcasts to that of the positions."""
        del positions
        return self.num

    def put_positions(self, place: PromptPlace, given: dict[str, Any], mask: Tensor | None) -> None:
        """Insert the virtual tokens' positions, where the body was given some."""
        del place
        if given.get("position_ids") is not None:
            rows = len(tokens_of(given))
            given["position_ids"] = insert_positions(given["position_ids"], self.num, mask, rows)

    def placed(self, slots_bm: Tensor) -> tuple[Tensor, Tensor]:
        """Return virtual tokens `[*, E]`, and which of them stands at each index, `[B, M]`; -1 for none.

        Args:
            slots_bm: Which of the N inserted tokens stands at each index, -1 for real tokens.
        """
        return self.tokens(), slots_bm

    def embeddings_like(self, embeddings: Tensor) -> Tensor:
        """Return the virtual tokens, of a shape that broadcasts to `[B, N, E]`."""
        return self.tokens().to(embeddings.dtype)

    def first_of(self, mask: Tensor | None, states: Tensor) -> Tensor:
        """Return the index of the token that is pooled in each row, `[B, 1]`: the first real one.

        Args:
            mask: `[B, L]`, or None.
            states: The real tokens' states, `[B, L, E]`.
        """
        return num_leading(mask, states)


class MixedPrompt(Prompt):
    """Prompts of several adapters, each for its own rows; rows of others have none.

    Args:
        mixture: The adapters, which are `SoftPromptAdapter`s.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.nums = [adapter.num_virtual_tokens for adapter in mixture.adapters]
        super().__init__(max(self.nums), self._all_tokens)
        self.lengths_b1 = mixture.by_row(self.nums, other=0)[:, None]
        self.unused_b1 = self.num - self.lengths_b1
        covers_all = not mixture.rows.has_base and len(self.nums) == len(mixture.rows.names)
        self.is_even = covers_all and len(set(self.nums)) == 1

    def prepare(self, place: PromptPlace, given: dict[str, Any], *, is_continued: bool) -> None:
        """Give the body a mask where it has none and some rows have fewer virtual tokens.

        Raises:
            ConfigError: The body takes no mask, or no positions although it counts them.
        """
        if self.is_even:
            return
        if "attention_mask" not in place.arguments:
            raise ConfigError(
                "per_row: this model takes no attention_mask, so rows cannot have soft prompts of different lengths, "
                "or none; use prompts with the same num_virtual_tokens for all rows, or a batch for each."
            )
        if "position_ids" not in place.arguments and not place.ignores_padding:
            raise ConfigError(
                "per_row: this model counts positions by itself, so rows cannot have soft prompts of different "
                "lengths, or none; use prompts with the same num_virtual_tokens for all rows, or a batch for each."
            )
        tokens, num_cached = tokens_of(given), cached_length(given)
        if is_continued and not num_cached:
            return  # the cache is a state, which masks no earlier tokens
        if given.get("attention_mask") is None:
            length = tokens.shape[1] + max(num_cached - self.num, 0)
            given["attention_mask"] = torch.ones(len(tokens), length, dtype=torch.long, device=tokens.device)

    def mask_like(self, mask: Tensor) -> Tensor:
        """Return 1 for the virtual tokens that a row has, `[B, N]`."""
        return (self._slots(mask) >= 0).to(mask.dtype)

    def shift_of(self, positions: Tensor) -> Tensor:
        """Return the number of each row's virtual tokens, `[B, 1]`."""
        return self.lengths_b1.to(positions.dtype)

    def put_positions(self, place: PromptPlace, given: dict[str, Any], mask: Tensor | None) -> None:
        """Insert positions that count each row's own virtual tokens; made here where the body would count them all."""
        if self.is_even or "position_ids" not in place.arguments:
            super().put_positions(place, given, mask)
            return
        tokens = tokens_of(given)
        positions = given.get("position_ids")
        if positions is None:
            positions = usual_positions(place, {**given, "attention_mask": mask})
        given["position_ids"] = self._with_own(positions, mask, len(tokens))

    def placed(self, slots_bm: Tensor) -> tuple[Tensor, Tensor]:
        """Return all prompts' tokens, and which of them stands at each index."""
        own_bm = slots_bm - self.unused_b1
        is_virtual = (slots_bm >= 0) & (own_bm >= 0)
        return self.tokens(), torch.where(is_virtual, own_bm + self._starts(), -1)

    def embeddings_like(self, embeddings: Tensor) -> Tensor:
        """Return each row's virtual tokens, `[B, N, E]`; zeros where a row has fewer."""
        slots_bn = self._slots(embeddings)
        tokens = self.tokens().to(embeddings.dtype)[(slots_bn + self._starts()).clamp_min(0)]
        return torch.where(slots_bn[..., None] >= 0, tokens, tokens.new_zeros(()))

    def first_of(self, mask: Tensor | None, states: Tensor) -> Tensor:
        """Return the first real token of rows with a prompt, and the first one, which the body pools, of others."""
        return torch.where(self.lengths_b1 > 0, super().first_of(mask, states), 0)

    def _all_tokens(self) -> Tensor:
        return torch.cat([adapter.virtual_tokens() for adapter in self.mixture.adapters])

    def _starts(self) -> Tensor:
        """Return where each row's prompt starts among all prompts' tokens, `[B, 1]`."""
        starts = [sum(self.nums[:index]) for index in range(len(self.nums))]
        return self.mixture.by_row(starts, other=0)[:, None]

    def _slots(self, like: Tensor) -> Tensor:
        """Return which of its own tokens each row has at the N inserted indices, negative for none, `[B, N]`."""
        return torch.arange(self.num, device=like.device) - self.unused_b1

    def _with_own(self, positions: Tensor, mask: Tensor | None, rows: int) -> Tensor:
        """Return positions `[B, L]` or `[axes, B, L]` with those of each row's virtual tokens."""
        if positions.dim() == 3:
            return torch.stack([self._with_own(axis, mask, rows) for axis in positions])
        positions = positions.expand(rows, -1)
        first = positions.gather(1, num_leading(mask, positions))
        virtual = first + self._slots(positions).clamp_min(0).to(positions.dtype)
        return insert(positions + self.shift_of(positions), virtual, self.num, mask)
