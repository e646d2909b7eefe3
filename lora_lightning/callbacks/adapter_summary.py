"""A table of what trains, by role, printed when training starts."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ModelSummary
from torch import Tensor, nn

from lora_lightning.adapters import Adapter, iter_adapters, iter_roles
from lora_lightning.adapters.frozen import NormStatistics
from lora_lightning.adapters.head import HeadAdapter
from lora_lightning.callbacks.places import adapted_model
from lora_lightning.tasks.backward import describe_backward

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["AdapterSummary"]

TRAINABLE, FROZEN, BASE, BUFFER = "trainable", "frozen", "base", "buffer"


@dataclass
class RoleCount:
    """Totals of the parameters of one role.

    Args:
        num_tensors: Number of tensors.
        num_parameters: Number of elements; of packed weights, the number of unpacked elements.
        num_bytes: Bytes of their storage, quantization constants included.
        dtypes: Names of their dtypes.
    """

    num_tensors: int = 0
    num_parameters: int = 0
    num_bytes: int = 0
    dtypes: set[str] = field(default_factory=set)

    def add(self, parameter: Tensor) -> None:
        """Count one tensor."""
        self.num_tensors += 1
        self.num_parameters += count_elements(parameter)
        self.num_bytes += count_bytes(parameter)
        self.dtypes.add(dtype_name(parameter))


class AdapterSummary(ModelSummary):
    """Print, when `fit` starts, the trained parameters by role, the size of the base, and what backward keeps.

    It replaces Lightning's `ModelSummary`, which counts the packed storage of 4-bit weights as parameters.
    """

    def __init__(self) -> None:
        super().__init__(max_depth=1)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table on rank 0; a module without adapters gets Lightning's own summary."""
        model = adapted_model(pl_module)
        if model is None:
            super().on_fit_start(trainer, pl_module)
        elif trainer.is_global_zero:
            from rich.console import Console

            Console().print(build_table(count_roles(model), caption=describe_backward(pl_module)))


def count_roles(model: nn.Module) -> dict[str, RoleCount]:
    """Count the parameters of an adapted model by role.

    Args:
        model: A model with adapters.

    Returns:
        One entry for each role that occurs (`A`, `B`, `head`, …; `A (frozen)` for adapter parameters that do not
        train, `buffer (frozen)` for tensors of adapters that are not parameters), and `base` for the others. A tensor
        that two modules share counts once.
    """
    counts: dict[str, RoleCount] = defaultdict(RoleCount)
    own: set[int] = set()
    for _, parameter, role in iter_roles(model):
        own.add(id(parameter))
        counts[role if parameter.requires_grad else f"{role} ({FROZEN})"].add(parameter)
    buffers = {id(one): one for _, _, adapter in iter_adapters(model) for one in adapter_buffers(adapter)}
    for buffer in buffers.values():
        counts[f"{BUFFER} ({FROZEN})"].add(buffer)
    base = RoleCount()
    for parameter in model.parameters():
        if id(parameter) not in own:
            base.add(parameter)
    return {**{str(role): count for role, count in counts.items()}, BASE: base}


def adapter_buffers(adapter: Adapter) -> list[Tensor]:
    """Return the tensors of an adapter that are not parameters, such as frozen projections.

    Tensors of a trained copy of a module, or of its statistics, are omitted: they repeat the base's.
    """
    is_copy = isinstance(adapter, HeadAdapter | NormStatistics)
    return [] if is_copy else [one for one in adapter.buffers() if one.numel()]


def build_table(counts: dict[str, RoleCount], caption: str = "") -> Table:
    """Format the counts as a table for the terminal.

    Args:
        counts: As `count_roles` returns them.
        caption: A line below the table; empty for none.
    """
    from rich.table import Table

    total = max(sum(count.num_parameters for count in counts.values()), 1)
    trainable = RoleCount()
    for role, count in counts.items():
        if role != BASE and not role.endswith(f"({FROZEN})"):
            trainable.num_tensors += count.num_tensors
            trainable.num_parameters += count.num_parameters
            trainable.num_bytes += count.num_bytes
            trainable.dtypes |= count.dtypes
    table = Table(title="Parameters by role", caption=caption or None)
    table.add_column("role")
    for name in ("tensors", "parameters", "share", "dtype", "bytes"):
        table.add_column(name, justify="right")
    for role, count in counts.items():
        if role != BASE:
            table.add_row(role, *_cells(count, total))
    table.add_section()
    table.add_row(TRAINABLE, *_cells(trainable, total), style="bold")
    table.add_row(f"{BASE} ({FROZEN})", *_cells(counts[BASE], total))
    return table


def count_elements(parameter: Tensor) -> int:
    """Return the number of unpacked elements of a parameter, which packed 4-bit storage hides."""
    state = quant_state(parameter)
    return parameter.numel() if state is None else math.prod(state.shape)


def count_bytes(parameter: Tensor) -> int:
    """Return the bytes of a parameter, including the constants of its quantization."""
    num_bytes = parameter.numel() * parameter.element_size()
    state = quant_state(parameter)
    while state is not None:  # double quantization: the constants are quantized in turn
        num_bytes += sum(
            part.numel() * part.element_size()
            for part in (getattr(state, name, None) for name in ("absmax", "code", "offset"))
            if isinstance(part, Tensor)
        )
        state = getattr(state, "state2", None)
    return num_bytes


def dtype_name(parameter: Tensor) -> str:
    """Return the usual name of a parameter's dtype: `float32`, or `nf4` for packed weights."""
    state = quant_state(parameter)
    return str(parameter.dtype).removeprefix("torch.") if state is None else str(state.quant_type)


def quant_state(parameter: Tensor) -> Any:  # noqa: ANN401 - bitsandbytes' QuantState, which need not be installed
    """Return the quantization state of a packed 4-bit parameter, or None."""
    return getattr(parameter, "quant_state", None)


def format_bytes(num_bytes: float) -> str:
    """Write a number of bytes with a unit.

    Example:
        >>> format_bytes(512), format_bytes(2_400_000)
        ('512 B', '2.4 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _cells(count: RoleCount, total: int) -> tuple[str, ...]:
    return (
        f"{count.num_tensors:,}",
        f"{count.num_parameters:,}",
        f"{count.num_parameters / total:.3%}",
        ", ".join(sorted(count.dtypes)) or "-",
        format_bytes(count.num_bytes),
    )
