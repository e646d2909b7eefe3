"""Entities in sequences of tags, and metrics of exactly matching entities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lora_lightning.tasks.token_loss import IGNORED

OUTSIDE = "O"
_BEGINS, _GOES_ON, _ENDS = "BSU", "IEL", "ESLU"
"""Prefixes of BIO (IOB1, IOB2), BIOES and BILOU tags."""


class Entity(NamedTuple):
    """A run of tokens of one type.

    Args:
        type: What the tags say after their prefix.
        start: Index of its first token.
        end: Index after its last token.
    """

    type: str
    start: int
    end: int


def has_prefixes(names: Sequence[str]) -> bool:
    """Return whether all tags other than `O` have a prefix that marks the begin of entities.

    Example:
        >>> has_prefixes(["O", "B-PER", "I-PER"]), has_prefixes(["NOUN", "VERB"])
        (True, False)
    """
    inside = [name for name in names if name != OUTSIDE]
    prefixed = [name for name in inside if name[1:2] == "-" and name[0] in _BEGINS + _GOES_ON and len(name) > 2]
    if prefixed and len(prefixed) < len(inside) and any(name[0] == "I" for name in prefixed):
        other = next(name for name in inside if name not in prefixed)
        rank_zero_warn(
            f"Some tags have a prefix such as B- or I- ({prefixed[0]!r}) and some have none ({other!r}): every token "
            "counts as an entity of its own."
        )
    return bool(inside) and len(prefixed) == len(inside)


def entities(tags: Sequence[str], *, prefixed: bool = True) -> list[Entity]:
    """Return the entities of one sequence of tags, in order.

    With prefixes, `B-x` begins an entity, and `I-x` continues one of the same type; without an open entity of this type
    it begins one, as in CoNLL's scorer. `S-x` and `U-x` are single tokens, `E-x` and `L-x` end an entity. Without
    prefixes, each token whose tag is not `O` is an entity.

    Args:
        tags: The tags.
        prefixed: Whether they have prefixes.

    Example:
        >>> entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
        [Entity(type='PER', start=0, end=2), Entity(type='LOC', start=3, end=4), Entity(type='LOC', start=4, end=5)]
        >>> entities(["NOUN", "O"], prefixed=False)
        [Entity(type='NOUN', start=0, end=1)]
    """
    found: list[Entity] = []
    is_open = False
    for place, tag in enumerate(tags):
        if tag == OUTSIDE:
            is_open = False
            continue
        prefix, kind = (tag[0], tag[2:]) if prefixed else ("S", tag)
        if is_open and prefix in _GOES_ON and found[-1].type == kind:
            found[-1] = found[-1]._replace(end=place + 1)
        else:
            found.append(Entity(kind, place, place + 1))
        is_open = prefix not in _ENDS
    return found


def count_matches(predicted: Sequence[str], expected: Sequence[str], *, prefixed: bool = True) -> tuple[int, int, int]:
    """Count entities of two tag sequences over the same tokens: in both, predicted only, expected only.

    An entity is in both where its type, its first and its last token are the same.

    Example:
        >>> count_matches(["B-PER", "I-PER", "O"], ["B-PER", "O", "B-LOC"])
        (0, 1, 2)
    """
    ours, theirs = {*entities(predicted, prefixed=prefixed)}, {*entities(expected, prefixed=prefixed)}
    both = len(ours & theirs)
    return both, len(ours) - both, len(theirs) - both


class EntityF1(Metric):
    """F1 of entities found exactly, over all entities of all types: 2 tp / (2 tp + fp + fn), 0 where there are none.

    `update` takes predicted tags `[batch, length]` and expected tags `[batch, length]` as indices; tokens whose
    expected tag is -100 are skipped, and the others of a row form one sequence. States are counts, summed over ranks.

    Args:
        label_names: Name of each tag by its index.
        **settings: Those of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    num_both: Tensor
    num_predicted_only: Tensor
    num_expected_only: Tensor

    def __init__(self, label_names: Sequence[str], **settings: Any) -> None:  # noqa: ANN401 - torchmetrics' own
        super().__init__(**settings)
        self.label_names = list(label_names)
        self.prefixed = has_prefixes(self.label_names)
        for name in ("num_both", "num_predicted_only", "num_expected_only"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count the entities of a batch."""
        names = self.label_names
        for ours, theirs in zip(predictions.tolist(), targets.tolist(), strict=True):
            kept = [place for place, target in enumerate(theirs) if target != IGNORED]
            both, extra, missed = count_matches(
                [names[ours[place]] for place in kept],
                [names[theirs[place]] for place in kept],
                prefixed=self.prefixed,
            )
            self.num_both += both
            self.num_predicted_only += extra
            self.num_expected_only += missed

    def compute(self) -> Tensor:
        """Return the F1, scalar float32."""
        return _share(2 * self.num_both, 2 * self.num_both + self.num_predicted_only + self.num_expected_only)


class EntityPrecision(EntityF1):
    """Share of the predicted entities that are right; see `EntityF1`."""

    def compute(self) -> Tensor:
        """Return the precision, scalar float32."""
        return _share(self.num_both, self.num_both + self.num_predicted_only)


class EntityRecall(EntityF1):
    """Share of the expected entities that are found; see `EntityF1`."""

    def compute(self) -> Tensor:
        """Return the recall, scalar float32."""
        return _share(self.num_both, self.num_both + self.num_expected_only)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part.float() / whole.clamp_min(1).float()
