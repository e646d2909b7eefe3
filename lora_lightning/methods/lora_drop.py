"""LoRA-drop: LoRA where its update matters, one shared LoRA elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lora_lightning.adapters.about import About
from lora_lightning.adapters.base import Adapter, Role, check_choice, check_positive, check_positive_int
from lora_lightning.adapters.sharded import is_sharded
from lora_lightning.adapters.walk import adapters_of
from lora_lightning.adapters.weights import Host, overwrite
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.methods.lora import LoRA
from lora_lightning.methods.low_rank import LowRankAdapter

__all__ = ["LoRADrop"]

log = logging.getLogger(__name__)


class SharedFactors(nn.Module):
    """The factors that several hosts of one shape share.

    Args:
        lora_a: `[r, in]`.
        lora_b: `[out, r]`.
    """

    def __init__(self, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        self.lora_A, self.lora_B = lora_a, lora_b


class LoRADropAdapter(LowRankAdapter):
    """W' = W + s B A on one host, with factors of its own or shared ones.

    Args:
        host: The host module.
        **settings: Those of `LowRankAdapter`.

    Attributes:
        shared: The factors that this host shares with others, in place of its own; None where it has its own.
    """

    shared: SharedFactors | None

    def __init__(self, host: Host, **settings: Any) -> None:  # noqa: ANN401 - see `LowRankAdapter`
        super().__init__(host, **settings)
        self.register_module("shared", None)

    def role_of(self, name: str) -> Role:
        """Return the role of a factor, own or shared."""
        return super().role_of(name.removeprefix("shared."))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A `[r, in]` and B `[out, r]`, own or shared."""
        owner = self if self.shared is None else self.shared
        return owner.lora_A, owner.lora_B

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A and B anew, for all hosts that share them too."""
        shared = self._modules.get("shared")
        if not isinstance(shared, SharedFactors):
            super().reset_parameters()
            return
        self.keep()
        super().reset_parameters()
        shared.lora_A.copy_(self.lora_A)
        shared.lora_B.copy_(self.lora_B)
        self.share(shared)

    def share(self, factors: SharedFactors) -> None:
        """Use shared factors from now on."""
        if self.shared is None:
            del self.lora_A, self.lora_B
        self.shared = factors

    def keep(self) -> None:
        """Have factors of its own from now on, copies of the shared ones where it had those."""
        if self.shared is not None:
            a, b = self.factors()
            self.shared = None
            self.lora_A, self.lora_B = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())

    def group(self, path: str) -> tuple[str, torch.Size, torch.Size]:
        """Return what hosts that can share factors have in common: the last part of the path, and the shapes."""
        a, b = self.factors()
        return path.rpartition(".")[2], a.shape, b.shape


@dataclass(frozen=True, kw_only=True)
class LoRADrop(LoRA):
    """LoRA on the hosts where it matters most, one shared LoRA on the others (Zhou et al. 2024, arXiv 2402.07721).

    Before the training, LoRA is trained for a few steps on the first batches. A host's importance is the sum of
    ‖s B A x‖² over a sample of its inputs x (padded positions included), as a share of all hosts' sum. The most
    important hosts, which together make up `threshold`, keep a LoRA of their own; the others share one LoRA per group
    of equal name and shape (all `query`, all `value`, ...). Then all factors start anew, and the head and everything
    else is as it was. A loaded state brings its sharing along.

    A task calibrates by itself before it builds the optimizer. Without a task, call `method.calibrate(model, batches,
    loss)` after `attach` and before building the optimizer; until then this is LoRA.

    Args:
        threshold: Share of the importance that the hosts with their own LoRA make up, above 0 and at most 1.
        calibration_steps: Steps of AdamW before the importance is measured.
        calibration_lr: Its learning rate, above 0.
        sample_batches: Batches to measure on; they are kept in memory meanwhile.
        init: `kaiming`, `gaussian` or `gaussian_sqrt`; see `LoRA`.

    Raises:
        ConfigError: A value is out of its range.
    """

    name: ClassVar[str] = "lora_drop"
    about: ClassVar[About] = About(
        trains="LoRA on the layers that matter for the data; the others share one",
        where="linear layers",
        principle="LoRA only where its output is large",
        suits="many layers, few of them needed",
        difficulty="moderate: calibration",
    )
    takes_experts: ClassVar[bool] = False
    training_settings: ClassVar[frozenset[str]] = LoRA.training_settings | {
        *("threshold", "calibration_steps", "calibration_lr", "sample_batches")
    }

    threshold: float = 0.9
    calibration_steps: int = 20
    calibration_lr: float = 1e-3
    sample_batches: int = 8

    def __post_init__(self) -> None:
        """Check every value's range."""
        super().__post_init__()
        check_positive("LoRADrop", "threshold", self.threshold)
        if self.threshold > 1:
            raise ConfigError(f"LoRADrop: threshold is a share, above 0 and at most 1, got {self.threshold!r}.")
        check_positive_int("LoRADrop", "calibration_steps", self.calibration_steps)
        check_positive("LoRADrop", "calibration_lr", self.calibration_lr)
        check_positive_int("LoRADrop", "sample_batches", self.sample_batches)
        check_choice("LoRADrop", "init", self.init, ("kaiming", "gaussian", "gaussian_sqrt"))

    @property
    def calibrates(self) -> bool:
        """Whether the importance is to be measured: always."""
        return True

    def build(self, path: str, host: nn.Module) -> Adapter:
        """Build the adapter of one host."""
        r, scaling = self.rank_and_scaling(path)
        return LoRADropAdapter(host, r=r, scaling=scaling, dropout=self.dropout, init=self.init)

    def calibrate(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """Choose the hosts that keep their own LoRA; see `Method.calibrate`.

        Raises:
            DataError: There is no batch.
            ConfigError: The importance came out as zero or not finite, or the model is sharded.
        """
        adapters = self._own(model)
        if is_sharded(model):
            raise ConfigError(
                "LoRADrop decides which parameters there are by the data, and this model's are sharded already (FSDP); "
                "train with DDP instead."
            )
        own = {id(parameter) for _, adapter in adapters for parameter in adapter.parameters()}
        with _restored(model, except_for=own):
            sample = self._train(model, batches, loss)
            importance = self._measure(model, sample, loss)
        kept = most_important(importance.tolist(), self.threshold)
        groups: dict[Any, SharedFactors] = {}
        for index, (path, adapter) in enumerate(adapters):
            adapter.reset_parameters()
            if index not in kept:
                key = adapter.group(path)
                groups.setdefault(key, SharedFactors(adapter.lora_A, adapter.lora_B))
                adapter.share(groups[key])
        log.info("LoRADrop keeps a LoRA of their own on %d of %d hosts.", len(kept), len(adapters))

    def fit_to_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Share what the state shares: `<host>.shared.lora_A` stands under the first host of each group."""
        groups: dict[Any, SharedFactors] = {}
        for path, adapter in self._own(model):
            key = adapter.group(path)
            if f"{path}.lora_A" in state:
                adapter.keep()
                continue
            if f"{path}.shared.lora_A" in state:
                a, b = adapter.factors()
                fresh = SharedFactors(nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone()))
                # Parameters that fit already stay the same objects: an optimizer may hold them.
                groups[key] = fresh if adapter.shared is None else adapter.shared
            if key in groups:
                adapter.share(groups[key])

    def _own(self, model: nn.Module) -> list[tuple[str, LoRADropAdapter]]:
        return [(path, adapter) for path, _, adapter in adapters_of(model, self, LoRADropAdapter)]

    def _train(self, model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> list[Any]:
        """Take the steps of calibration, all ranks together; return the batches to measure on."""
        iterator = iter(batches)
        sample = list(islice(iterator, self.sample_batches))
        if not sample:
            raise DataError("LoRADrop measures on training data, and there is no batch; check the data module.")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if _num_ranks() > 1:
            for parameter in trained:
                dist.broadcast(parameter.data, 0)
        optimizer = torch.optim.AdamW(trained, lr=self.calibration_lr, weight_decay=0.0)
        for batch in islice(chain(sample, iterator, cycle(sample)), self.calibration_steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss(batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            for parameter in trained if _num_ranks() > 1 else ():
                if parameter.grad is None:  # every rank must take part in each reduction
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= _num_ranks()
            optimizer.step()
        optimizer.zero_grad()
        return sample

    @torch.no_grad()
    def _measure(self, model: nn.Module, sample: Sequence[Any], loss: Callable[[Any], Tensor]) -> Tensor:
        """Return each host's share of the importance, over all ranks, float64."""
        adapters = [adapter for _, adapter in self._own(model)]
        device = adapters[0].factors()[0].device
        sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in adapters]

        def hook(adapter: LoRADropAdapter, args: tuple[Any, ...]) -> None:
            host, x = args[:2]
            sums[adapters.index(adapter)] += adapter.update(host, x).double().square().sum()

        handles = [adapter.register_forward_pre_hook(hook) for adapter in adapters]
        try:
            model.eval()
            for batch in sample:
                loss(batch)
        finally:
            for handle in handles:
                handle.remove()
        importance = torch.stack(sums)
        if _num_ranks() > 1:
            dist.all_reduce(importance)
        total = importance.sum()
        if not (torch.isfinite(total) and total > 0):
            raise ConfigError(
                f"LoRADrop: after {self.calibration_steps} steps the updates' squared norms sum to {total.item()}, "
                "which ranks no host; lower calibration_lr if they overflow, raise it if they vanish."
            )
        return importance / total


def most_important(shares: Sequence[float], threshold: float) -> set[int]:
    """Return the indices of the fewest hosts whose shares of the importance sum to `threshold`, largest first.

    Args:
        shares: Each host's share; they sum to 1.
        threshold: Above 0, at most 1.

    Example:
        >>> most_important([0.15, 0.5, 0.05, 0.3], 0.8)
        {1, 3}
    """
    chosen: set[int] = set()
    reached = 0.0
    for index in sorted(range(len(shares)), key=lambda index: -shares[index]):
        if reached >= threshold - 1e-12:  # what rounding leaves of a sum
            break
        chosen.add(index)
        reached += shares[index]
    return chosen


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def _restored(model: nn.Module, except_for: set[int]) -> Iterator[None]:
    """Give buffers, modes and trainable parameters their values back afterwards, and leave no gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors = [*(parameter for parameter in trained if id(parameter) not in except_for), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, values, strict=True):
            overwrite(tensor, value)
        for module, mode in modes:
            module.training = mode
        for parameter in trained:
            parameter.grad = None
