"""What prompt tuning and P-Tuning share: virtual tokens in front of the input embeddings of a model's body.

Shape suffixes: B rows, L real tokens, N virtual tokens, M = N + L, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import ForwardAdapter, InputAdapter, Role
from lora_lightning.adapters.view import PromptPlace
from lora_lightning.adapters.weights import Host
from lora_lightning.errors import ConfigError, NotMergeable


class SoftPromptAdapter(ForwardAdapter):
    """Puts N virtual tokens directly before the first real token of each row, and drops them from the output again.

    They stand behind padding on the left, so that padding on either side changes nothing, whether positions are
    absolute, rotary, relative or windowed. In generation the cache holds them after the first step.

    Args:
        place: Where the model's body takes its tokens.
        num_virtual_tokens: N.
        encoder: Returns the virtual tokens `[N, E]` during training; None where `prompt` itself is trained.
        prompt: The virtual tokens at the start, `[N, E]`, without an encoder.

    Attributes:
        prompt: `[N, E]`, or None while there is an encoder.
    """

    prompt: nn.Parameter | None

    takes_names: ClassVar[bool] = True

    def __init__(
        self,
        place: PromptPlace,
        num_virtual_tokens: int,
        *,
        encoder: nn.Module | None = None,
        prompt: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.place, self.num_virtual_tokens = place, num_virtual_tokens
        self.register_parameter("prompt", None if prompt is None else nn.Parameter(prompt))
        self.encoder = encoder

    def role_of(self, name: str) -> Role:
        """Return PROMPT: the encoder's parameters make prompts too."""
        del name
        return Role.PROMPT

    def virtual_tokens(self) -> Tensor:
        """Return the virtual tokens `[N, E]`."""
        if self.encoder is None:
            assert self.prompt is not None
            return self.prompt
        device = next(self.encoder.parameters()).device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):  # LSTMs know no bfloat16 on CPUs
            tokens: Tensor = self.encoder()
        return tokens

    def folded_state(self) -> dict[str, Tensor]:
        """Return the prompt alone, as the encoder gives it in evaluation."""
        with torch.no_grad(), evaluating(self):
            return {"prompt": self.virtual_tokens()}

    def fold(self) -> None:
        """Keep the prompt and drop its encoder."""
        if self.encoder is not None:
            self.prompt = nn.Parameter(self.folded_state()["prompt"].clone())
            self.encoder = None

    def check_mergeable(self, host: nn.Module) -> None:
        """Raise NotMergeable: virtual tokens are inputs, and no weight can stand for them."""
        del host
        raise NotMergeable(
            "A soft prompt is part of the input and cannot be merged into weights; keep it attached, and use the "
            "adapter folder beside the checkpoint, which holds the prompt alone."
        )

    def forward(self, host: Host, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the body's own output
        """Call the body with the virtual tokens in its input.

        Args:
            host: The body.
            *args: Its arguments: token ids or embeddings `[B, L]`, a mask `[B, L]` (with a cache, `[B, past + L]`).
            **kwargs: The same by name.

        Returns:
            The body's output; hidden states have L positions.

        Raises:
            ConfigError: The row is too long, the mask has four dimensions, rows are packed, or the cache is static.
        """
        given = {**dict(zip(self.place.arguments, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        num_past = check_inputs(self.place, given, self.num_virtual_tokens)
        if num_past:  # the cache holds the virtual tokens already
            if mask is not None:
                given["attention_mask"] = insert(mask, mask.new_ones(()), self.num_virtual_tokens, mask)
            shift_positions(
                self.place, given, self.num_virtual_tokens, given["attention_mask"] if mask is not None else None
            )
            return self.base_forward(host, **given)
        num_real = self._extend(host, given, mask)
        output = self.base_forward(host, **given)
        return output if self.place.keeps_virtual else self._trim(host, output, mask, num_real)

    def _extend(self, host: Host, given: dict[str, Any], mask: Tensor | None) -> int:
        """Put the virtual tokens into embeddings, mask, positions and token types; return L."""
        embeds_ble = given.get("inputs_embeds")
        if embeds_ble is None:
            embeds_ble = host.get_submodule(self.place.embedding)(given.pop("input_ids"))
        given["input_ids"] = None
        num, num_real = self.num_virtual_tokens, embeds_ble.shape[1]
        prompt_ne = self.virtual_tokens().to(embeds_ble.dtype)
        given["inputs_embeds"] = insert(embeds_ble, prompt_ne, num, mask)
        if given.get("token_type_ids") is not None:
            types = given["token_type_ids"]
            given["token_type_ids"] = insert(types, types.new_zeros(()), num, mask)
        extended = None if mask is None else insert(mask, mask.new_ones(()), num, mask)
        positions = given.get("position_ids")
        if positions is not None:
            positions = positions.expand(len(embeds_ble), -1)
            first = positions.gather(1, num_leading(mask, positions))
            virtual = first + torch.arange(num, device=positions.device)
            given["position_ids"] = insert(positions + num, virtual, num, mask)
        elif extended is not None and "position_ids" in self.place.arguments:
            given["position_ids"] = positions_of(extended, self.place.position_offset)
        given["attention_mask"] = extended
        return num_real

    def _trim(self, host: Host, output: Any, mask: Tensor | None, num_real: int) -> Any:  # noqa: ANN401 - what the body returns
        """Drop the virtual positions from hidden states, and pool again where the body pools."""

        def real(states: Tensor) -> Tensor:
            return drop_virtual(states, self.num_virtual_tokens, mask, num_real)

        if isinstance(output, tuple):
            return (real(output[0]), *output[1:])
        changed = {**output, "last_hidden_state": real(output["last_hidden_state"])}
        if changed.get("hidden_states") is not None:
            changed["hidden_states"] = tuple(real(states) for states in changed["hidden_states"])
        if changed.get("pooler_output") is not None:  # poolers read the first token, which must be a real one
            states = changed["last_hidden_state"]
            first = _like(num_leading(mask, states), states)
            changed["pooler_output"] = host.pooler(states.gather(1, first))
        return type(output)(**changed)


class CrossMaskAdapter(InputAdapter):
    """Lets a decoder see the virtual tokens that its encoder put out: its mask over the encoder covers them too.

    Args:
        num_virtual_tokens: How many the encoder adds.
    """

    roles: ClassVar[Mapping[str, Role]] = {}

    def __init__(self, num_virtual_tokens: int) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens

    def forward(self, host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Extend `encoder_attention_mask` where the encoder's states are longer than it."""
        del host
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is not None and mask is not None and states.shape[1] == mask.shape[1] + self.num_virtual_tokens:
            extended = insert(mask, mask.new_ones(()), self.num_virtual_tokens, mask)
            kwargs = {**kwargs, "encoder_attention_mask": extended}
        return args, kwargs

    def check_mergeable(self, host: nn.Module) -> None:
        """Accept: the adapter on the encoder says why soft prompts cannot be merged."""


def num_leading(mask: Tensor | None, like: Tensor) -> Tensor:
    """Return how many padding tokens stand before the first real one of each row, `[B, 1]`."""
    if mask is None:
        return torch.zeros(len(like), 1, dtype=torch.long, device=like.device)
    return (mask != 0).int().argmax(1, keepdim=True)


def insert(values: Tensor, new: Tensor, num: int, mask: Tensor | None) -> Tensor:
    """Insert `num` values before the first real token of each row.

    Args:
        values: `[B, L, ...]`.
        new: What to insert, of a shape that broadcasts to `[B, num, ...]`.
        num: N.
        mask: 1 for real tokens, `[B, L]`; None where all are.

    Returns:
        `[B, N + L, ...]`.

    Example:
        >>> rows = torch.tensor([[0, 5, 6], [7, 8, 0]])
        >>> insert(rows, torch.tensor(9), 2, (rows != 0).long())
        tensor([[0, 9, 9, 5, 6],
                [9, 9, 7, 8, 0]])
    """
    both = torch.cat([new.expand(len(values), num, *values.shape[2:]), values], 1)
    if mask is None:
        return both
    lead_b1 = num_leading(mask, values)
    at_m = torch.arange(both.shape[1], device=values.device)
    index_bm = torch.where(at_m < lead_b1, at_m + num, torch.where(at_m < lead_b1 + num, at_m - lead_b1, at_m))
    return both.gather(1, _like(index_bm, both))


def drop_virtual(states: Tensor, num: int, mask: Tensor | None, num_real: int) -> Tensor:
    """Undo `insert`: return `[B, L, ...]` of `[B, N + L, ...]`."""
    if mask is None:
        return states[:, num:]
    at_l = torch.arange(num_real, device=states.device)
    index_bl = torch.where(at_l < num_leading(mask, states), at_l, at_l + num)
    return states.gather(1, _like(index_bl, states))


def positions_of(mask: Tensor, offset: int) -> Tensor:
    """Return positions that count real tokens, `[B, L]`, from `offset` on.

    Example:
        >>> positions_of(torch.tensor([[0, 1, 1], [1, 1, 0]]), 0)
        tensor([[0, 0, 1],
                [0, 1, 1]])
    """
    return ((mask != 0).long().cumsum(1) - 1).clamp_min(0) + offset


def shift_positions(place: PromptPlace, given: dict[str, Any], num: int, mask: Tensor | None) -> None:
    """Move the real tokens' positions on by `num`; `mask` counts the virtual tokens already, where there is one."""
    if given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"] + num
    elif mask is not None and "position_ids" in place.arguments:
        given["position_ids"] = positions_of(mask, place.position_offset)[:, -_length(given) :]


def check_inputs(place: PromptPlace, given: Mapping[str, Any], num: int) -> int:
    """Return how many positions the cache holds.

    Raises:
        ConfigError: The row is too long, the mask has four dimensions, rows are packed, or the cache is static.
    """
    past, mask, positions = given.get("past_key_values"), given.get("attention_mask"), given.get("position_ids")
    if mask is not None and mask.dim() != 2:
        raise ConfigError(
            f"Soft prompts extend masks of shape [batch, length], and got one with {mask.dim()} dimensions; pass the "
            "padding mask itself, and let the model derive the rest."
        )
    if past is not None and getattr(past, "is_compileable", False):
        raise ConfigError("Soft prompts do not fit a static cache, whose length is fixed; use a DynamicCache.")
    length = _length(given)
    if place.max_positions is not None and length + num > place.max_positions:
        raise ConfigError(
            f"{length} tokens and {num} virtual ones are more than the model's {place.max_positions} positions; "
            "shorten the rows (max_length) or use fewer num_virtual_tokens."
        )
    if positions is not None and length > 1 and not torch.compiler.is_compiling() and positions.device.type != "meta":
        falls = positions.diff(dim=1) < 0
        if mask is not None:
            real = mask[:, -length:] != 0
            falls = falls & real[:, 1:] & real[:, :-1]
        if bool(falls.any()):
            raise ConfigError(
                "Several documents are packed into one row, and a soft prompt stands before the first alone; turn "
                "packing off."
            )
    return 0 if past is None else int(past.get_seq_length())


def _length(given: Mapping[str, Any]) -> int:
    ids = given.get("input_ids")
    return int((given["inputs_embeds"] if ids is None else ids).shape[1])


def _like(index: Tensor, values: Tensor) -> Tensor:
    """Return an index `[B, M]` in the shape that `gather` needs for `values` `[B, ..., ...]`."""
    return index.view(*index.shape, *[1] * (values.dim() - 2)).expand(*index.shape, *values.shape[2:])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode inside a `with` block."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
