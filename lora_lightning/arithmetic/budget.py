"""Ranks for all layers from one budget of parameters: which singular values of the whole adapter are worth their cost.

A rank of a layer costs `in + out` parameters and gains the square of its singular value. Every layer keeps one rank, so
that the adapter stays on the same layers. The choice of the rest is a knapsack. It is solved exactly by dynamic
programming over the classes of layers that cost alike; within a class the largest values come first. Where that would
take too many steps (`MAX_STEPS`), the values are taken by their gain per parameter, which may miss the optimum by less
than the gain of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_lightning.errors import ConfigError

MAX_STEPS = 1_000_000_000


@dataclass(frozen=True)
class Spectrum:
    """What a layer's ranks gain and cost.

    Args:
        squares: Squared singular values, `[k]`, the largest first.
        cost: Parameters of one rank.
        rank: How many of the values are above the rounding, at least 1; no more are bought.
    """

    squares: Tensor
    cost: int
    rank: int


def ranks_within(spectra: Sequence[Spectrum], num_parameters: int) -> list[int]:
    """Return the rank of each layer that discards least within a number of parameters.

    Args:
        spectra: The layers.
        num_parameters: The budget.

    Raises:
        ConfigError: It does not pay one rank for every layer.

    Example:
        >>> wide, narrow = Spectrum(torch.tensor([9.0, 4.0]), 10, 2), Spectrum(torch.tensor([5.0, 3.0]), 4, 2)
        >>> ranks_within([wide, narrow], 18), ranks_within([wide, narrow], 24)
        ([1, 2], [2, 1])
    """
    least = sum(spectrum.cost for spectrum in spectra)
    if num_parameters < least:
        raise ConfigError(
            f"{num_parameters:,} parameters are too few: one rank for each of the {len(spectra)} layers takes "
            f"{least:,}. Raise the budget."
        )
    room = num_parameters - least
    plan = _Plan.of(spectra)
    if plan.num_steps(room) > MAX_STEPS:
        return _by_gain_per_parameter(spectra, room)
    return plan.ranks(plan.spend(room), room // plan.unit)


def ranks_for_error(spectra: Sequence[Spectrum], max_error: float) -> list[int]:
    """Return the ranks with the fewest parameters that discard at most a share of the whole update.

    Args:
        spectra: The layers.
        max_error: Largest relative error of all layers together, in the Frobenius norm.
    """
    total = sum(float(spectrum.squares.sum()) for spectrum in spectra)
    allowed = max_error**2 * total
    room = sum(spectrum.cost * (spectrum.rank - 1) for spectrum in spectra)
    plan = _Plan.of(spectra)
    if plan.num_steps(room) > MAX_STEPS:
        return _by_gain_until(spectra, allowed)
    tables = plan.spend(room)
    fits = (tables[-1].discarded <= max(allowed - plan.noise, 0)).nonzero()
    units = int(fits[0]) if len(fits) else room // plan.unit
    return plan.ranks(tables, units)


def rank_for_error(squares: Tensor, rank: int, max_error: float) -> int:
    """Return the lowest rank of one layer that discards at most a share of its update, from 1 to `rank`."""
    allowed = max_error**2 * float(squares.sum())
    tails = squares.flip(0).cumsum(0).flip(0)  # what a cut to each index discards
    enough = (tails[1:rank] <= allowed).nonzero()
    return int(enough[0]) + 1 if len(enough) else rank


@dataclass(frozen=True)
class _Class:
    """The layers of one cost.

    Args:
        cost: What a rank costs, in parameters.
        order: The layer of each rank that can be bought, the largest value first.
        discarded: What stays discarded when the first n are bought, `[n + 1]`.
    """

    cost: int
    order: list[int]
    discarded: Tensor


@dataclass(frozen=True)
class _Table:
    """How to spend an amount on some classes: by units, what is discarded then, and how many of the last are bought."""

    discarded: Tensor
    bought: Tensor


@dataclass(frozen=True)
class _Plan:
    """The classes of layers, with the greatest common divisor of their costs as the unit of spending."""

    classes: list[_Class]
    unit: int
    num_layers: int
    noise: float

    @classmethod
    def of(cls, spectra: Sequence[Spectrum]) -> _Plan:
        costs = sorted({spectrum.cost for spectrum in spectra})
        classes = [_class_of(spectra, cost) for cost in costs]
        classes.sort(key=lambda one: -len(one.order))  # the first needs no search, so let it be the largest
        noise = sum(float(one.squares[one.rank :].sum()) for one in spectra)
        return cls(classes, math.gcd(*costs), len(spectra), noise)

    def num_steps(self, room: int) -> int:
        """Return how many numbers the tables take."""
        return (room // self.unit + 1) * sum(len(one.order) for one in self.classes[1:])

    def spend(self, room: int) -> list[_Table]:
        """Return a table for the first class, for the first two, and so on."""
        num_units = room // self.unit
        before = torch.zeros(num_units + 1, dtype=torch.float64)
        tables: list[_Table] = []
        for one in self.classes:
            table = _spend_on_one(one, before, one.cost // self.unit, is_first=not tables)
            tables.append(table)
            before = table.discarded
        return tables

    def ranks(self, tables: Sequence[_Table], units: int) -> list[int]:
        """Return the ranks that a number of units buys."""
        ranks = [1] * self.num_layers
        for one, table in zip(reversed(self.classes), reversed(tables), strict=True):
            bought = int(table.bought[units])
            for layer in one.order[:bought]:
                ranks[layer] += 1
            units -= bought * (one.cost // self.unit)
        return ranks


def _class_of(spectra: Sequence[Spectrum], cost: int) -> _Class:
    free = [
        (float(square), layer)
        for layer, spectrum in enumerate(spectra)
        if spectrum.cost == cost
        for square in spectrum.squares[1 : spectrum.rank]
    ]
    free.sort(key=lambda item: (-item[0], item[1]))
    squares = torch.tensor([0.0, *(square for square, _ in reversed(free))], dtype=torch.float64)
    return _Class(cost, [layer for _, layer in free], squares.cumsum(0).flip(0))


def _spend_on_one(one: _Class, before: Tensor, step: int, *, is_first: bool) -> _Table:
    """Add a class to a table: of each amount, so many units for its ranks and the rest for the classes before."""
    if is_first:  # all of it goes here
        bought = (torch.arange(len(before)) // step).clamp_max(len(one.order))
        return _Table(one.discarded[bought], bought)
    discarded = before + one.discarded[0]
    bought = torch.zeros(len(before), dtype=torch.long)
    for count in range(1, min(len(one.order), (len(before) - 1) // step) + 1):
        candidate = before[: len(before) - count * step] + one.discarded[count]
        is_better = candidate < discarded[count * step :]
        discarded[count * step :] = torch.where(is_better, candidate, discarded[count * step :])
        bought[count * step :].masked_fill_(is_better, count)
    return _Table(discarded, bought)


def _by_gain(spectra: Sequence[Spectrum]) -> list[tuple[float, int]]:
    """Return the square and the layer of every rank that can be bought, the best gain per parameter first."""
    free = [
        (float(square), layer)
        for layer, spectrum in enumerate(spectra)
        for square in spectrum.squares[1 : spectrum.rank]
    ]
    return sorted(free, key=lambda item: (-item[0] / spectra[item[1]].cost, item[1]))


def _by_gain_per_parameter(spectra: Sequence[Spectrum], room: int) -> list[int]:
    ranks = [1] * len(spectra)
    for _, layer in _by_gain(spectra):
        cost = spectra[layer].cost
        if cost <= room:
            ranks[layer] += 1
            room -= cost
    return ranks


def _by_gain_until(spectra: Sequence[Spectrum], allowed: float) -> list[int]:
    ranks = [1] * len(spectra)
    order = _by_gain(spectra)
    tails = torch.tensor([square for square, _ in order], dtype=torch.float64).flip(0).cumsum(0).flip(0)
    for (_, layer), left in zip(order, tails.tolist(), strict=True):
        if left <= allowed:
            break
        ranks[layer] += 1
    return ranks
