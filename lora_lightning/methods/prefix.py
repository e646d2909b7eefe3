"""What prefix tuning and P-Tuning v2 share: trainable keys and values in front of those of every attention."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.adapters import iter_adapters
from lora_lightning.adapters.base import (
    Adapter,
    AttentionAdapter,
    InputAdapter,
    Method,
    Role,
    check_positive_int,
)
from lora_lightning.adapters.selection.rows import Mixture
from lora_lightning.adapters.view import AttentionPlace, ModelView, PromptPlace
from lora_lightning.adapters.weights import Host
from lora_lightning.errors import NotMergeable, TargetError
from lora_lightning.methods.soft_prompt import evaluating
from lora_lightning.methods.virtual_tokens import check_inputs, positions_of, tokens_of, usual_positions

PREFIX_STD = 0.02


class PrefixAdapter(AttentionAdapter):
    """Keys and values in front of one attention's own: [P_k; K] and [P_v; V].

    They carry no rotation and no position, and every query sees them, in layers with a sliding window too.

    Args:
        num_virtual_tokens: N.
        place: The attention module.
        encoder: Makes keys and values, `[N, heads, head size]` each, during training; None where they are trained
            directly.
        device: Where to.
        dtype: Of directly trained ones.

    Attributes:
        prefix_keys: `[heads, N, head size]`, or None while there is an encoder.
        prefix_values: The same, of the values' head size.
    """

    prefix_keys: nn.Parameter | None
    prefix_values: nn.Parameter | None

    def __init__(
        self,
        num_virtual_tokens: int,
        place: AttentionPlace,
        *,
        encoder: nn.Module | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        for name, size in (("prefix_keys", place.head_size), ("prefix_values", place.value_size)):
            fresh = None
            if encoder is None:
                shape = place.num_heads, num_virtual_tokens, size
                fresh = nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(std=PREFIX_STD))
            self.register_parameter(name, fresh)
        self.encoder = encoder

    def role_of(self, name: str) -> Role:
        """Return PROMPT: the encoder's parameters make prefixes too."""
        del name
        return Role.PROMPT

    def forward(self, host: Host) -> tuple[Tensor, Tensor]:
        """Return keys and values, `[heads, N, head size]` each."""
        del host
        if self.encoder is None:
            assert self.prefix_keys is not None
            assert self.prefix_values is not None
            return self.prefix_keys, self.prefix_values
        keys, values = self.encoder()
        return keys.transpose(0, 1), values.transpose(0, 1)

    def folded_state(self) -> dict[str, Tensor]:
        """Return keys and values alone, as the encoder gives them in evaluation."""
        with torch.no_grad(), evaluating(self):
            keys, values = self(None)
        return {"prefix_keys": keys, "prefix_values": values}

    def fold(self) -> None:
        """Keep keys and values and drop their encoder."""
        if self.encoder is not None:
            folded = self.folded_state()
            self.prefix_keys = nn.Parameter(folded["prefix_keys"].clone(memory_format=torch.contiguous_format))
            self.prefix_values = nn.Parameter(folded["prefix_values"].clone(memory_format=torch.contiguous_format))
            self.encoder = None

    def check_mergeable(self, host: nn.Module) -> None:
        """Raise NotMergeable: keys and values of no token are in no weight."""
        del host
        raise NotMergeable(
            "A prefix adds keys and values and cannot be merged into weights; keep it attached, and use the adapter "
            "folder beside the checkpoint, which holds the folded prefix alone."
        )


class PositionShift(InputAdapter):
    """Moves the positions of real tokens on by N, as if the prefix stood before them; has no parameters.

    Args:
        place: Where the model takes its tokens.
        num_virtual_tokens: N.
    """

    roles: ClassVar[Mapping[str, Role]] = {}
    mixes_itself: ClassVar[bool] = True

    def __init__(self, place: PromptPlace, num_virtual_tokens: int) -> None:
        super().__init__()
        self.place, self.num_virtual_tokens = place, num_virtual_tokens

    def forward(self, host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Give the body positions that count the prefix; see `check_inputs` for what is refused."""
        del host
        return self._shifted(args, kwargs, self.num_virtual_tokens)

    def mixed(self, host: Host, mixture: Mixture, *given: Any) -> tuple[Any, Any]:  # noqa: ANN401 - the host's own
        """Give each row positions that count its own prefix."""
        del host
        args, kwargs = given
        nums = [adapter.num_virtual_tokens for adapter in mixture.adapters]
        shifts_b1 = mixture.by_row(nums, other=0)[:, None]
        return self._shifted(args, kwargs, max(nums), shifts_b1)

    def _shifted(self, args: Any, kwargs: Any, num: int, shifts_b1: Tensor | None = None) -> tuple[Any, Any]:  # noqa: ANN401 - the host's own
        given = {**dict(zip(self.place.arguments, args, strict=False)), **kwargs}
        check_inputs(self.place, given, num)
        positions, mask, tokens = given.get("position_ids"), given.get("attention_mask"), tokens_of(given)
        length = tokens.shape[1]
        if positions is None and mask is not None:
            positions = positions_of(mask, self.place.position_offset)[:, -length:]
            if shifts_b1 is not None:  # rows without a prefix get what the body would have given them
                positions = torch.where(shifts_b1 > 0, positions, usual_positions(self.place, given))
        elif positions is None:
            positions = usual_positions(self.place, given)
        return (), {**given, "position_ids": positions + (num if shifts_b1 is None else shifts_b1)}

    def check_mergeable(self, host: nn.Module) -> None:
        """Accept: the prefix adapters say why they cannot be merged."""


@dataclass(frozen=True, kw_only=True)
class Prefix(Method):
    """A method that puts keys and values in front of every attention's own.

    Args:
        num_virtual_tokens: How many in every layer, at least 1.
    """

    size_setting: ClassVar[str | None] = "num_virtual_tokens"
    usual_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)
    exclusive: ClassVar[str | None] = "the soft prompt"
    takes_packed_rows: ClassVar[bool] = False

    num_virtual_tokens: int = 20

    def __post_init__(self) -> None:
        """Check every value's range."""
        super().__post_init__()
        check_positive_int(type(self).__name__, "num_virtual_tokens", self.num_virtual_tokens)

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        """Build the adapter of each attention, and the one that moves positions on."""
        place, attentions = view.prompt_place(), view.attention_places()
        if place.starts_at_zero:
            raise TargetError(
                f"Prefix methods do not work on {view.model_type}: they move positions on, and it has recurrent layers "
                "that start over at position 0 only. Use PromptTuning, or LoRA."
            )
        weight = next(view.model.get_submodule(place.body).get_submodule(place.embedding).parameters())
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        encoders = self.encoders(attentions, weight.shape[1])
        if "position_ids" in place.arguments:
            yield place.body, PositionShift(place, self.num_virtual_tokens)
        for one, encoder in zip(attentions, encoders, strict=True):
            moved = None if encoder is None else encoder.to(device=weight.device, dtype=dtype)
            yield (
                one.path,
                PrefixAdapter(self.num_virtual_tokens, one, encoder=moved, device=weight.device, dtype=dtype),
            )

    @abc.abstractmethod
    def encoders(self, attentions: Sequence[AttentionPlace], width: int) -> Sequence[nn.Module | None]:
        """Return what makes each attention's keys and values during training; None where they are trained directly."""

    def fit_to_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Drop the encoders where a state that was saved for use has none."""
        for path, _, adapter in iter_adapters(model):
            if isinstance(adapter, PrefixAdapter) and f"{path}.prefix_keys" in state:
                adapter.fold()
