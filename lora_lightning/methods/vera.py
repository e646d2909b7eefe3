"""VeRA: one frozen random pair of matrices for all layers, and two trained vectors for each."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora_lightning.adapters.about import About
from lora_lightning.adapters.base import (
    Adapter,
    Role,
    TargetedMethod,
    check_dropout,
    check_positive,
    check_positive_int,
)
from lora_lightning.adapters.targets import select_hosts
from lora_lightning.adapters.view import ModelView
from lora_lightning.adapters.walk import adapters_of, join
from lora_lightning.adapters.weights import Host, HostKind, codec_of
from lora_lightning.errors import CheckpointError, ConfigError, TargetError
from lora_lightning.methods.low_rank import LowRankAdapter

__all__ = ["VeRA"]

_DIGEST_BYTES = 32


def draw_projections(seed: int, r: int, num_in: int, num_out: int) -> tuple[Tensor, Tensor]:
    """Draw A and then B on the CPU, each Kaiming-uniform: within ± sqrt(6 / its number of columns).

    Args:
        seed: Seed of the generator; torch's global one is left alone.
        r: Rank.
        num_in: Columns of A.
        num_out: Rows of B.

    Returns:
        A `[r, num_in]` and B `[num_out, r]`, float32.

    Example:
        >>> a, b = draw_projections(0, r=4, num_in=6, num_out=8)
        >>> a.shape, b.shape, bool(a.abs().max() <= 1)
        (torch.Size([4, 6]), torch.Size([8, 4]), True)
    """
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        pair = torch.empty(r, num_in, dtype=torch.float32), torch.empty(num_out, r, dtype=torch.float32)
    for matrix in pair:
        bound = math.sqrt(6 / matrix.shape[1])
        matrix.uniform_(-bound, bound, generator=generator)
    return pair


class SharedProjections(nn.Module):
    """The pair A, B that all adapters of one VeRA share, and a digest of it.

    The pair is never trained and needs no storage: it is drawn from the seed. Where torch replaces buffers without
    their values (`to_empty`, after the model was built on the meta device), they are put back.

    Args:
        seed: Seed of the draw.
        r: Rank.
        num_in: Largest number of inputs among the hosts.
        num_out: Largest number of outputs among the hosts.
        is_saved: Whether A and B are part of the state dict.
        device: Where to keep them; on `meta` nothing is drawn yet.
        dtype: Their precision.

    Attributes:
        projection_a: `[r, num_in]`.
        projection_b: `[num_out, r]`.
        digest: SHA-256 of A and B as drawn in float32, `[32]` bytes; part of the state dict, so that a checkpoint
            notices another draw.
    """

    projection_a: Tensor
    projection_b: Tensor
    digest: Tensor

    def __init__(
        self,
        *,
        seed: int,
        r: int,
        num_in: int,
        num_out: int,
        is_saved: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.seed = seed
        with torch.device("meta"):
            self.register_buffer("projection_a", torch.empty(r, num_in, dtype=dtype), persistent=is_saved)
            self.register_buffer("projection_b", torch.empty(num_out, r, dtype=dtype), persistent=is_saved)
            self.register_buffer("digest", torch.empty(_DIGEST_BYTES, dtype=torch.uint8))
        if device.type != "meta":
            self._apply(lambda tensor: torch.empty_like(tensor, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply torch's conversion (`to`, `to_empty`, …), keeping the values through it."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        changed = {name: tensor for name, tensor in self._buffers.items() if tensor is not before[name]}
        if changed and not self.digest.is_meta:
            values = self._draw() if self._is_hollow(before) else before
            for name, tensor in changed.items():
                tensor.copy_(values[name])  # type: ignore[union-attr, arg-type]  # all three are tensors
        return self

    @staticmethod
    def _is_hollow(buffers: Mapping[str, Tensor | None]) -> bool:
        return any(tensor is not None and tensor.is_meta for tensor in buffers.values())

    def _draw(self) -> dict[str, Tensor | None]:
        (r, num_in), num_out = self.projection_a.shape, self.projection_b.shape[0]
        a, b = draw_projections(self.seed, r, num_in, num_out)
        sha256 = hashlib.sha256()
        for matrix in (a, b):
            sha256.update(matrix.numpy().astype("<f4", copy=False).tobytes())
        digest = torch.frombuffer(bytearray(sha256.digest()), dtype=torch.uint8)
        return {"projection_a": a, "projection_b": b, "digest": digest}


class VeRAAdapter(LowRankAdapter):
    """W' = W + diag(b) B diag(d) A on one linear host.

    Args:
        host: The host module.
        projections: The shared pair; its first columns and rows are taken where the host is smaller.
        d_initial: Start of every element of d.
        dropout: Probability of zeroing an element of A's input, in training only.

    Attributes:
        lambda_d: d, `[r]`.
        lambda_b: b, `[out]`; starts at zero.
    """

    lambda_d: nn.Parameter
    lambda_b: nn.Parameter

    def __init__(self, host: Host, projections: SharedProjections, *, d_initial: float, dropout: float) -> None:
        super().__init__(host, r=projections.projection_a.shape[0], scaling=1.0, dropout=dropout)
        self.d_initial = d_initial
        self.projections = projections
        self.reset_parameters()

    def create_parameters(self, num_out: int, num_in: int, device: torch.device, dtype: torch.dtype) -> None:
        """Create d and b."""
        self.num_in, self.num_out = num_in, num_out
        self.lambda_d = nn.Parameter(torch.zeros(self.r, device=device, dtype=dtype))
        self.lambda_b = nn.Parameter(torch.zeros(num_out, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set d and b to their start; the update is zero afterwards."""
        self.lambda_d.fill_(self.d_initial)
        self.lambda_b.zero_()

    def role_of(self, name: str) -> Role:
        """Return VECTOR for d and b."""
        return {"lambda_d": Role.VECTOR, "lambda_b": Role.VECTOR}[name]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return diag(d) A `[r, in]` and diag(b) B `[out, r]`."""
        shared = self.projections
        a, b = shared.projection_a[:, : self.num_in], shared.projection_b[: self.num_out]
        return self.lambda_d[:, None] * a, self.lambda_b[:, None] * b


@dataclass(frozen=True, kw_only=True)
class VeRA(TargetedMethod):
    """W' = W + diag(b) B diag(d) A with shared frozen A, B (Kopiczko et al. 2023, arXiv 2310.11454, section 3.1).

    One pair A: [r, largest in], B: [largest out, r] serves all layers; a smaller layer takes its first columns and
    rows. Only d: [r] and b: [out] of each layer train, so a large r costs few parameters. b starts at zero, so the
    first forward equals the base model's exactly. The pair is drawn on the CPU from a seed; a checkpoint holds its
    SHA-256, so that a torch that draws differently is noticed. Hosts: linear layers (4-bit and 8-bit ones too) and
    GPT-2's Conv1D.

    Args:
        r: Rank, at least 1; it may exceed the layers' sizes.
        d_initial: Start of d's elements, above 0.
        dropout: Probability of zeroing an element of A's input in training, in [0, 1).
        projection_seed: Seed of A and B, from 0 to 2^63 - 1.
        save_projection: Keep A and B in checkpoints too, which then do not depend on the torch that reads them.

    Raises:
        ConfigError: A value is out of its range.
    """

    name: ClassVar[str] = "vera"
    about: ClassVar[About] = About(
        trains="two vectors a layer around one random pair `B`, `A` that all layers share",
        where="linear layers",
        principle="shared random factors, trained scales",
        suits="very many adapters of one base",
        difficulty="easy; high rates",
    )
    training_settings: ClassVar[frozenset[str]] = TargetedMethod.training_settings | {"dropout", "d_initial"}
    size_setting: ClassVar[str | None] = None  # r grows it by one number a layer, and memory and time by a rank
    usual_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)

    r: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    projection_seed: int = 0
    save_projection: bool = False

    def __post_init__(self) -> None:
        """Check every value's range."""
        super().__post_init__()
        owner = type(self).__name__
        check_positive_int(owner, "r", self.r)
        check_positive(owner, "d_initial", self.d_initial)
        check_dropout(owner, self.dropout)
        seed: Any = self.projection_seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ConfigError(f"{owner}: projection_seed must be an integer from 0 to 2^63 - 1, got {seed!r}.")

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        """Build the shared projections and one adapter per host; see `Method.adapters`."""
        hosts = select_hosts(view, self)
        for path, host in hosts:
            kind = codec_of(host).kind
            if kind is not HostKind.LINEAR:
                raise TargetError(
                    f"VeRA: {path!r} is of kind {kind}, and VeRA is defined for linear layers; leave it out of the "
                    "targets."
                )
        shapes = [codec_of(host).shape(host) for _, host in hosts]
        weights = [next(host.parameters(recurse=False)) for _, host in hosts]
        is_double = any(weight.dtype is torch.float64 for weight in weights)
        projections = SharedProjections(
            seed=self.projection_seed,
            r=self.r,
            num_in=max(num_in for _, num_in in shapes),
            num_out=max(num_out for num_out, _ in shapes),
            is_saved=self.save_projection,
            device=weights[0].device,
            dtype=torch.float64 if is_double else torch.float32,
        )
        for path, host in hosts:
            yield path, VeRAAdapter(host, projections, d_initial=self.d_initial, dropout=self.dropout)

    def fit_to_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Compare the projections that the state was trained with, by their digest, with this model's.

        Raises:
            CheckpointError: They differ, and the state does not hold them.
        """
        if self.save_projection:
            return
        for path, _, adapter in adapters_of(model, self, VeRAAdapter):
            own, theirs = adapter.projections.digest, state.get(join(path, "projections.digest"))
            if theirs is not None and not own.is_meta and own.tolist() != theirs.tolist():
                raise CheckpointError(
                    f"VeRA: the adapter was trained with other random projections than projection_seed="
                    f"{adapter.projections.seed} and r={adapter.r} give here (their SHA-256 differ): the seed, the "
                    "rank or the targets are not those of the training, or this torch draws other numbers. Attach "
                    "with the settings of the training, or train with save_projection: true."
                )
