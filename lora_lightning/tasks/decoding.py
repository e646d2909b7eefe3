"""Choice of the next token of each row, independent of the other rows of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class RepetitionPenalty:
    """Penalizes tokens that a row already holds, like the processor of transformers, but ignores padding.

    transformers also penalizes padding. That is often the end token, so that a padded row would end later.

    Args:
        penalty: Positive scores are divided by it, negative ones multiplied; above 1 penalizes.
        mask: 1 for the real tokens of the prompts, 0 for padding, `[batch, length]`; None where there is no padding.
    """

    def __init__(self, penalty: float, mask: Tensor | None = None) -> None:
        self.penalty, self.mask = penalty, mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[batch, vocabulary]`, given the tokens so far `[batch, length]`."""
        is_real = torch.ones_like(input_ids)
        if self.mask is not None:
            is_real[:, : self.mask.shape[1]] = self.mask
        counts = torch.zeros_like(scores, dtype=torch.int64).scatter_add_(1, input_ids, is_real)
        penalized = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(counts > 0, penalized, scores)


class Draws:
    """Draws tokens: keeps of each row the one that was drawn, so that taking the likeliest token takes it.

    Each row has a random generator of its own. The noise is Gumbel's: a logit plus such noise is the largest with the
    probability of its token.

    Args:
        num_rows: Rows of the batch.
        seed: Seed of each row's draws.
        temperature: What the scores are divided by, above 0.
        top_p: Draw from the likeliest tokens that make up this share of the probability.
        top_k: Draw from this many of the likeliest tokens; 0 means all.
        device: Where the scores are.
    """

    def __init__(
        self, num_rows: int, seed: int, *, temperature: float, top_p: float, top_k: int, device: torch.device
    ) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))]
        if top_k > 0:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(top_p)))
        self._generators = [torch.Generator(device).manual_seed(seed) for _ in range(num_rows)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[batch, vocabulary]` whose largest entry is the token that is drawn."""
        scores = scores.float()
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


class StopAt:
    """Ends the rows whose new tokens are complete according to a function.

    Args:
        start: Tokens that each row starts with and that are not part of its answer.
        is_complete: Returns whether an answer, given as tokens, is complete.
    """

    def __init__(self, start: int, is_complete: Callable[[Sequence[int]], bool]) -> None:
        self.start, self.is_complete = start, is_complete

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401, ARG002 - transformers' signature
        """Return which rows are complete, `[batch]`."""
        answers = input_ids[:, self.start :].tolist()
        return torch.tensor([self.is_complete(answer) for answer in answers], device=input_ids.device)
