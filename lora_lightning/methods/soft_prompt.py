"""What prompt tuning and P-Tuning share: virtual tokens in front of the input embeddings of a model's body.

Shape suffixes: B rows, L real tokens, N virtual tokens, M = N + L, E width of the embeddings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_lightning.adapters.base import ForwardAdapter, InputAdapter, OutputAdapter, Role
from lora_lightning.adapters.selection.rows import Mixture
from lora_lightning.adapters.view import PromptPlace
from lora_lightning.adapters.weights import Host
from lora_lightning.errors import ConfigError, NotMergeable
from lora_lightning.methods.prompt_rows import MixedPrompt, Prompt
from lora_lightning.methods.virtual_tokens import (
    check_inputs,
    drop_virtual,
    insert,
    insert_defaults,
    slots,
    tokens_of,
)


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
    mixes_itself: ClassVar[bool] = True

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
            ConfigError: The row is too long, the mask has four dimensions, rows are packed, the cache is static, the
                body got embeddings, which it treats in another way than those of ids, or the token embedding is not
                the one of `attach`.
        """
        return self._prompted(host, args, kwargs, Prompt(self.num_virtual_tokens, self.virtual_tokens))

    def mixed(self, host: Host, mixture: Mixture, *given: Any) -> Any:  # noqa: ANN401 - the body's own output
        """Call the body with each row's own virtual tokens in its input; see `forward`."""
        args, kwargs = given
        return self._prompted(host, args, kwargs, MixedPrompt(mixture))

    def _prompted(self, host: Host, args: Any, kwargs: Any, prompt: Prompt) -> Any:  # noqa: ANN401 - the body's own output
        given = {**dict(zip(self.place.arguments, args, strict=False)), **kwargs}
        is_continued = check_inputs(self.place, given, prompt.num)
        prompt.prepare(self.place, given, is_continued=is_continued)
        if is_continued:
            return self.base_forward(host, **self._continued(given, prompt))
        num_real, mask = tokens_of(given).shape[1], self._layout(given)
        virtual = self._extend(host, given, mask, prompt)
        config = getattr(host, "config", None)
        as_tuple = given.get("return_dict", getattr(config, "return_dict", True)) is False
        if as_tuple:  # a tuple does not say what it holds
            given["return_dict"] = True
        with inserting(virtual) as state:
            output = self.base_forward(host, **given)
            if state.now is not None:
                raise ConfigError(
                    "The virtual tokens of a soft prompt were not put in: the token embedding was replaced after "
                    "`attach` (set_input_embeddings does that), or switched off alone. Attach the prompt afterwards."
                )
        if not self.place.keeps_virtual:
            output = self._trim(host, output, mask, num_real, prompt)
        return output.to_tuple() if as_tuple and not isinstance(output, tuple) else output

    def _continued(self, given: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
        """Return the arguments of a call whose cache holds the virtual tokens: mask and positions count them."""
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        changed = dict(given)
        if mask is not None:
            changed["attention_mask"] = insert(mask, prompt.mask_like(mask), prompt.num, mask)
        if positions is not None:
            changed["position_ids"] = positions + prompt.shift_of(positions)
        return changed

    def _layout(self, given: dict[str, Any]) -> Tensor | None:
        """Return what says where each row's first real token stands, `[B, L]`: the mask, or padding itself."""
        mask: Tensor | None = given.get("attention_mask")
        ids = given.get("input_ids")
        if mask is None and ids is not None and self.place.padding is not None:
            return ids != self.place.padding
        return mask

    def _extend(self, host: Host, given: dict[str, Any], mask: Tensor | None, prompt: Prompt) -> VirtualTokens | None:
        """Put the virtual tokens into all that has a value for each token.

        Returns:
            What the embedding puts in, where the body is called with ids; None where the tokens went in as embeddings.
        """
        num, ids = prompt.num, given.get("input_ids")
        insert_defaults(given, num, mask)
        prompt.put_positions(self.place, given, mask)
        if given.get("attention_mask") is not None:
            own = given["attention_mask"]
            given["attention_mask"] = insert(own, prompt.mask_like(own), num, mask)
        if ids is not None and self.place.placeholder is not None:
            given["input_ids"] = insert(ids, ids.new_tensor(self.place.placeholder), num, mask)
            return VirtualTokens(*prompt.placed(slots(ids, num, mask)))
        if ids is None and not self.place.takes_embeddings:
            raise ConfigError(
                f"{self.host_class.__name__} treats embeddings in another way than those of token ids, so a soft "
                "prompt cannot stand in front of both; call it with input_ids."
            )
        embeds_ble = host.get_submodule(self.place.embedding)(ids) if ids is not None else given["inputs_embeds"]
        given["input_ids"] = None
        given["inputs_embeds"] = insert(embeds_ble, prompt.embeddings_like(embeds_ble), num, mask)
        return None

    def _trim(self, host: Host, output: Any, mask: Tensor | None, num_real: int, prompt: Prompt) -> Any:  # noqa: ANN401 - what the body returns
        """Drop the virtual positions from hidden states, and pool again where the body pools."""

        def real(states: Tensor) -> Tensor:
            is_by_token = states.shape[1] == num_real + prompt.num  # not where a body shortens its rows
            return drop_virtual(states, prompt.num, mask, num_real) if is_by_token else states

        if isinstance(output, tuple):
            return (real(output[0]), *output[1:])
        changed = {**output, "last_hidden_state": real(output["last_hidden_state"])}
        if changed.get("hidden_states") is not None:
            changed["hidden_states"] = tuple(real(states) for states in changed["hidden_states"])
        if changed.get("pooler_output") is not None:  # poolers read the first token, which must be a real one
            assert self.place.pooling is not None
            states = changed["last_hidden_state"]
            index_b1e = prompt.first_of(mask, states)[..., None].expand(-1, -1, states.shape[-1])
            changed["pooler_output"] = POOLINGS[self.place.pooling](host, states.gather(1, index_b1e))
        return type(output)(**changed)


POOLINGS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "states": lambda body, first: body.pooler(first),
    "token": lambda body, first: body.pooler(first[:, 0]),
    "activated": lambda body, first: body.activation(body.pooler(first[:, 0])),
    "pooler_activated": lambda body, first: body.pooler_activation(body.pooler(first[:, 0])),
}
"""How transformers' bodies pool: a function of the body and the first token's states, `[B, 1, E]`, by name."""


@dataclass(frozen=True)
class VirtualTokens:
    """What the token embedding puts in for placeholders.

    Args:
        tokens: The virtual tokens, `[N, E]`.
        slots: Which of them stands at each index of the rows, -1 for real tokens, `[B, M]`.
    """

    tokens: Tensor
    slots: Tensor


class _Inserting(threading.local):
    """What the embedding has yet to put in, in the running thread; `torch.compile` traces no ContextVar."""

    now: VirtualTokens | None = None


_INSERTING = _Inserting()


@contextmanager
def inserting(virtual: VirtualTokens | None) -> Iterator[_Inserting]:
    """Make the token embedding put in virtual tokens inside the block, at its first call."""
    before = _INSERTING.now
    _INSERTING.now = virtual
    try:
        yield _INSERTING
    finally:
        _INSERTING.now = before


class PlaceholderAdapter(OutputAdapter):
    """Puts virtual tokens where placeholders were looked up; hangs on the token embedding and has no parameters.

    So the body is called with ids, and counts positions, scales embeddings and masks padding by itself.
    """

    roles: ClassVar[Mapping[str, Role]] = {}
    mixes_itself: ClassVar[bool] = True

    def mixed(self, host: Host, mixture: Mixture, *given: Any) -> Tensor:  # noqa: ANN401 - the host's own
        """Return the embeddings, whose virtual tokens say for themselves where they stand."""
        del mixture
        return self.forward(host, *given)

    def forward(self, host: Host, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Return the embeddings `[B, M or more, E]`; a body may have padded its rows on the right."""
        del host, args, kwargs
        virtual = _INSERTING.now
        if virtual is None:
            return output
        _INSERTING.now = None
        slots_bm = virtual.slots
        if slots_bm.shape != output.shape[:2]:
            slots_bm = functional.pad(slots_bm, (0, output.shape[1] - slots_bm.shape[1]), value=-1)
        tokens_bme = virtual.tokens.to(output.dtype)[slots_bm.clamp_min(0)]
        return torch.where(slots_bm[..., None] >= 0, tokens_bme, output)

    def check_mergeable(self, host: nn.Module) -> None:
        """Accept: the adapter on the body says why soft prompts cannot be merged."""


class CrossMaskAdapter(InputAdapter):
    """Lets a decoder see the virtual tokens that its encoder put out: its mask over the encoder covers them too.

    Args:
        num_virtual_tokens: How many the encoder adds.
    """

    roles: ClassVar[Mapping[str, Role]] = {}
    mixes_itself: ClassVar[bool] = True

    def __init__(self, num_virtual_tokens: int) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens

    def forward(self, host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Extend `encoder_attention_mask` where the encoder's states are longer than it."""
        del host
        return args, self._extended(kwargs, Prompt(self.num_virtual_tokens, torch.empty(0).clone))

    def mixed(self, host: Host, mixture: Mixture, *given: Any) -> tuple[Any, Any]:  # noqa: ANN401 - the host's own
        """Extend the mask by the virtual tokens of each row."""
        del host
        args, kwargs = given
        return args, self._extended(kwargs, MixedPrompt(mixture))

    def _extended(self, kwargs: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is None:
            return kwargs
        if mask is None and not prompt.is_even:
            mask = torch.ones(len(states), states.shape[1] - prompt.num, dtype=torch.long, device=states.device)
        if mask is None or states.shape[1] != mask.shape[1] + prompt.num:
            return kwargs
        return {**kwargs, "encoder_attention_mask": insert(mask, prompt.mask_like(mask), prompt.num, mask)}

    def check_mergeable(self, host: nn.Module) -> None:
        """Accept: the adapter on the encoder says why soft prompts cannot be merged."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode inside a `with` block."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
