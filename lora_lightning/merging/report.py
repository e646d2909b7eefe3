"""The loss of a merge: the part of the update that survives the cast, and the change of the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_lightning.errors import NotMergeable

THRESHOLD = 0.5
MAX_LAYERS_SHOWN = 5
_TOGETHER = 1 << 22


@dataclass(frozen=True, kw_only=True)
class LayerMerge:
    """Loss of one layer's update Δ when the merged weight W + Δ is cast to the written dtype.

    The cast keeps Δ' = cast(W + Δ) - cast(W).

    Args:
        path: The layer's path in the base model.
        num_changed: Elements of the weight that Δ changes in float32.
        num_survived: Those of them that are still changed after the cast: where Δ' is not zero.
        update_squared: ‖Δ‖², the squared Frobenius norm.
        error_squared: ‖Δ' - Δ‖².
    """

    path: str
    num_changed: int
    num_survived: int
    update_squared: float
    error_squared: float

    @property
    def survived(self) -> float:
        """Share of changed elements that stay changed, 1.0 where nothing changes."""
        return self.num_survived / self.num_changed if self.num_changed else 1.0

    @property
    def kept(self) -> float:
        """Share of the update that is kept, by its squared norm; see `MergeLoss.kept`."""
        return _kept(self.update_squared, self.error_squared)


@dataclass(frozen=True, kw_only=True)
class LogitMove:
    """How far the outputs of the merged weights are from those of the adapted model, both computed in float32.

    Args:
        largest: Largest absolute difference over all outputs of the sample.
        mean: Mean absolute difference.
        adapter_largest: For comparison, the largest change of the base's outputs by the adapter.
        adapter_mean: The mean change of the base's outputs by the adapter.
        num_tokens: Tokens in the sample.
    """

    largest: float
    mean: float
    adapter_largest: float
    adapter_mean: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class MergeLoss:
    """Loss of a merge, over all layers.

    Args:
        layers: Every merged layer.
        dtype: The dtype that is written, such as `bfloat16`.
        logits: Change of the outputs, or None if the model takes no token ids.
    """

    layers: tuple[LayerMerge, ...]
    dtype: str
    logits: LogitMove | None = None

    @property
    def survived(self) -> float:
        """Share of all changed elements that stay changed, 1.0 where nothing changes."""
        changed = sum(layer.num_changed for layer in self.layers)
        return sum(layer.num_survived for layer in self.layers) / changed if changed else 1.0

    @property
    def kept(self) -> float:
        """Share of the update that is kept, by its squared norm: 1 - Σ‖Δ' - Δ‖² / Σ‖Δ‖², and at least 0.

        It determines whether a merge is refused. Unlike a count of elements, it tolerates that the smallest ones are
        rounded away, which always happens; unlike the size of Δ', it accounts for surviving elements that jump by a
        whole step of their dtype. At 0, rounding has added as much noise to the weights as there was update.
        """
        total = sum(layer.update_squared for layer in self.layers)
        return _kept(total, sum(layer.error_squared for layer in self.layers))

    def lines(self) -> list[str]:
        """Describe the loss in a few lines: the total, the layers that lost most, and the outputs."""
        lines = [
            f"Cast to {self.dtype}, {self.kept:.2%} of the update is kept by its squared norm; {self.survived:.2%} of "
            "the weights that it changes stay changed."
        ]
        worst = sorted((layer for layer in self.layers if layer.kept < 0.9995), key=lambda layer: layer.kept)
        shown = worst[:MAX_LAYERS_SHOWN]
        lines += [f"  {layer.path}: {layer.kept:.2%} kept, {layer.survived:.2%} changed" for layer in shown]
        if len(worst) > MAX_LAYERS_SHOWN:
            lines.append(f"  … and {len(worst) - MAX_LAYERS_SHOWN} more layers that lost less")
        if self.logits is not None:
            move = self.logits
            lines.append(
                f"Outputs on {move.num_tokens} tokens move by {move.largest:.2g} at most and {move.mean:.2g} on the "
                f"mean; the adapter itself moves them by {move.adapter_largest:.2g} and {move.adapter_mean:.2g}."
            )
        return lines


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """Result of `merge_checkpoint`.

    Args:
        output_dir: The folder.
        loss: The loss of the merge.
        num_bytes: Bytes of all files in the folder.
        has_tokenizer: Whether a tokenizer is among them.
    """

    output_dir: Path
    loss: MergeLoss
    num_bytes: int
    has_tokenizer: bool

    @property
    def layers(self) -> tuple[LayerMerge, ...]:
        """Every merged layer."""
        return self.loss.layers

    @property
    def survived(self) -> float:
        """Share of all changed elements that stay changed."""
        return self.loss.survived

    @property
    def kept(self) -> float:
        """Share of the update that is kept, by its squared norm."""
        return self.loss.kept


class UpdateLost(NotMergeable):
    """A merge would lose too much of the update.

    Attributes:
        loss: The loss that it would have.
    """

    def __init__(self, loss: MergeLoss, threshold: float) -> None:
        self.loss = loss
        worst = min(loss.layers, key=lambda layer: layer.kept)
        super().__init__(
            f"Merging into {loss.dtype} would lose the update: {1 - loss.survived:.1%} of the weights that it changes "
            f"would not change at all, and {loss.kept:.1%} of it would be kept by its squared norm (worst: "
            f"{worst.path} {worst.kept:.1%}), less than {threshold:.0%}. Nothing was written. Write float32 (--dtype "
            "float32), keep the adapter apart (lora-lightning export --to peft), or merge anyway with --force."
        )


@torch.no_grad()
def measure(path: str, weight: Tensor, merged: Tensor, dtype: torch.dtype) -> LayerMerge:
    """Compare a weight's update in float32 with what a cast to `dtype` keeps of it; nothing is changed.

    Args:
        path: The layer's path.
        weight: Its weight, float32 or wider.
        merged: Its merged weight, likewise; see `Adapter.merged_weights`.
        dtype: Final dtype of the merged weight.
    """
    num_changed = num_survived = 0
    update_squared = error_squared = 0.0
    flat, flat_merged = weight.reshape(-1), merged.reshape(-1)
    # In parts, since an embedding would else be in memory several times.
    for part, part_merged in zip(torch.split(flat, _TOGETHER), torch.split(flat_merged, _TOGETHER), strict=True):
        left = part_merged.to(dtype).to(part.dtype) - part.to(dtype).to(part.dtype)
        update = part_merged - part
        changed = update != 0
        num_changed += int(changed.sum())
        num_survived += int((changed & (left != 0)).sum())
        update_squared += float(update.square().sum(dtype=torch.float64))
        error_squared += float((left - update).square().sum(dtype=torch.float64))
    return LayerMerge(
        path=path,
        num_changed=num_changed,
        num_survived=num_survived,
        update_squared=update_squared,
        error_squared=error_squared,
    )


def _kept(update_squared: float, error_squared: float) -> float:
    return max(1 - error_squared / update_squared, 0.0) if update_squared else 1.0
