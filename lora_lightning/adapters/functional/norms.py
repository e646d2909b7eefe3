"""The norms that DoRA divides by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lora_lightning.adapters.functional.forms import narrow

MIN_NORM = 1e-30


class Stamp:
    """Which values a tensor holds, as far as it can be told without reading them.

    A stamp fits its tensor until that is written to, or gets other storage or another layout. Writes through `.data`
    count nowhere, so they go unnoticed. The storage is remembered by a weak reference: as long as that lives, its
    address is given to no other storage.

    Args:
        tensor: The tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]  # torch's
        self._key = self._key_of(tensor)

    @staticmethod
    def _key_of(tensor: Tensor) -> tuple[object, ...]:
        version = 0 if tensor.is_inference() else tensor._version
        return tensor.untyped_storage()._cdata, tensor.data_ptr(), version, tensor.shape, tensor.stride()

    def fits(self, tensor: Tensor) -> bool:
        """Return whether a tensor still holds the values that it had."""
        return self._key_of(tensor) == self._key

    @property
    def has_expired(self) -> bool:
        """Whether the storage is gone."""
        return bool(self._storage.expired())  # type: ignore[no-untyped-call]  # torch's


class _Kept(NamedTuple):
    stamp: Stamp
    norm_squared: Tensor


_KEPT: dict[tuple[object, ...], _Kept] = {}


def kept_norm_squared(weight: Tensor, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ‖w‖² of each row, computed again only when the parameter that holds the weight has changed.

    Args:
        weight: W, `[O, I]`.
        stored: The parameter: W itself, W in another layout, or W packed.
        dtype: What to compute in.

    Returns:
        `[O]`; not to be written to.
    """
    if stored.is_meta:
        return weight.to(dtype).sum(1)
    key = (stored.untyped_storage()._cdata, stored.storage_offset(), weight.stride(), weight.shape, dtype)
    kept = _KEPT.get(key)
    if kept is None or not kept.stamp.fits(stored):
        for old in [old for old, one in list(_KEPT.items()) if one.stamp.has_expired]:
            _KEPT.pop(old, None)
        kept = _KEPT[key] = _Kept(Stamp(stored), weight.detach().to(dtype).square().sum(1))
    return kept.norm_squared


def forget_kept_norms() -> None:
    """Compute every norm anew when it is next asked for."""
    _KEPT.clear()


@torch.library.custom_op("lora_lightning::dora_norm", mutates_args=())
def dora_norm(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    base_norm_squared: Tensor | None,
    stored: Tensor | None = None,
) -> Tensor:
    """Compute ‖W + s B A‖ of each row without building B A.

    ‖v_o‖² = ‖w_o‖² + 2 s b_o · (A w_o) + s² b_o (A A^T) b_o^T. Where these terms cancel (‖V‖² below a tenth of their
    sum), the row is built after all, in float64. One opaque operator, so that the branch does not break a graph, and
    compiled graphs look at the weight as it is when they run.

    Args:
        weight: W, `[O, I]`, any floating dtype.
        lora_a: `[R, I]`.
        lora_b: `[O, R]`.
        scaling: The factor s.
        base_norm_squared: ‖w_o‖², `[O]`; None takes what `kept_norm_squared` keeps.
        stored: The parameter that holds W, where `base_norm_squared` is None.

    Returns:
        The norms, `[O]`, float32 or wider, at least 1e-30.
    """
    with torch.autocast(weight.device.type, enabled=False):
        if base_norm_squared is None:
            assert stored is not None
            dtype = torch.promote_types(lora_a.dtype, torch.float32)
            base_norm_squared = kept_norm_squared(weight, stored, dtype)
        dtype = torch.promote_types(base_norm_squared.dtype, torch.float32)
        a_ri, b_or = lora_a.to(dtype), lora_b.to(dtype)
        cross_o = 2 * scaling * (narrow(weight.to(dtype), a_ri) * b_or).sum(1)
        update_o = scaling**2 * ((b_or @ (a_ri @ a_ri.t())) * b_or).sum(1)
        squared_o = base_norm_squared + cross_o + update_o
        cancelled = squared_o < 0.1 * (base_norm_squared + update_o)
        if bool(cancelled.any()):
            rows = cancelled.nonzero().squeeze(1)
            v_oi = weight[rows].double() + scaling * (lora_b[rows].double() @ lora_a.double())
            squared_o[rows] = v_oi.square().sum(1).to(dtype)
        return squared_o.clamp_min_(0).sqrt_().clamp_min_(MIN_NORM)


@dora_norm.register_fake
def _(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    base_norm_squared: Tensor | None,
    stored: Tensor | None = None,
) -> Tensor:
    del lora_b, scaling, stored
    like = lora_a if base_norm_squared is None else base_norm_squared
    return weight.new_empty(weight.shape[0], dtype=torch.promote_types(like.dtype, torch.float32))
