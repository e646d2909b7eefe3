"""Prompt tuning: trainable embeddings in front of the input."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lora_lightning.adapters.about import About
from lora_lightning.adapters.base import Adapter, Method, check_choice, check_positive_int
from lora_lightning.adapters.view import ModelView, PromptPlace
from lora_lightning.adapters.walk import iter_adapters, join
from lora_lightning.errors import ConfigError
from lora_lightning.methods.soft_prompt import CrossMaskAdapter, PlaceholderAdapter, SoftPromptAdapter

__all__ = ["PromptTuning"]

PromptInit = Literal["random", "vocabulary", "text"]
_RANDOM_STD = 0.5


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Method):
    """A method that puts virtual tokens in front of the input embeddings.

    Args:
        num_virtual_tokens: How many, at least 1.
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
        """Build the adapter of the model's body, and of its decoder where it has one of its own."""
        place = view.prompt_place()
        yield place.body, self.build(view, place)
        if place.placeholder is not None:
            yield join(place.body, place.embedding), PlaceholderAdapter()
        if place.decoder is not None:
            yield place.decoder, CrossMaskAdapter(self.num_virtual_tokens)

    @abc.abstractmethod
    def build(self, view: ModelView, place: PromptPlace) -> SoftPromptAdapter:
        """Build the adapter of the model's body."""

    def fit_to_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Drop the encoder where a state that was saved for use has none."""
        for path, _, adapter in iter_adapters(model):
            if isinstance(adapter, SoftPromptAdapter) and f"{path}.prompt".removeprefix(".") in state:
                adapter.fold()


@dataclass(frozen=True, kw_only=True)
class PromptTuning(SoftPrompt):
    """Trainable virtual tokens in front of the input embeddings (Lester et al. 2021, arXiv 2104.08691, section 2).

    Trains P: [num_virtual_tokens, width of the embeddings]; the model sees [P; E(x)]. Outputs keep the input's length.
    On an encoder-decoder the prompt stands before the encoder's input, and the decoder attends to it.

    Args:
        num_virtual_tokens: How many, at least 1.
        init: `vocabulary` starts from the embeddings of tokens drawn at random, `text` from those of `init_text`,
            `random` from a normal distribution with standard deviation 0.5.
        init_text: The text for `init: text`; it is repeated or cut to the number of virtual tokens.

    Raises:
        ConfigError: A value is out of its range, or `init_text` and `init` do not go together.
    """

    name: ClassVar[str] = "prompt_tuning"
    about: ClassVar[About] = About(
        trains="virtual tokens in front of the input",
        where="the model's input",
        principle="trained embeddings before the input",
        suits="large models, many tasks in a batch",
        difficulty="hard to train small models",
    )
    training_settings: ClassVar[frozenset[str]] = SoftPrompt.training_settings | {"init", "init_text"}

    init: PromptInit = "vocabulary"
    init_text: str | None = None

    def __post_init__(self) -> None:
        """Check every value's range."""
        super().__post_init__()
        check_choice("PromptTuning", "init", self.init, ("random", "vocabulary", "text"))
        if (self.init == "text") != bool(self.init_text):
            raise ConfigError(
                f"PromptTuning: init: text needs init_text, and nothing else takes it; got init={self.init!r} and "
                f"init_text={self.init_text!r}."
            )

    def build(self, view: ModelView, place: PromptPlace) -> SoftPromptAdapter:
        """Build the adapter of the model's body."""
        body = view.model.get_submodule(place.body)
        return SoftPromptAdapter(
            place, self.num_virtual_tokens, prompt=self._start(view, body.get_submodule(place.embedding))
        )

    @torch.no_grad()
    def _start(self, view: ModelView, embedding: nn.Module) -> Tensor:
        """Return the virtual tokens at the start, `[num_virtual_tokens, width]`."""
        weight, num = next(embedding.parameters()), self.num_virtual_tokens
        dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
        if self.init == "random":
            return torch.empty(num, weight.shape[1], device=weight.device, dtype=dtype).normal_(std=_RANDOM_STD)
        if self.init == "vocabulary":
            ids = torch.randint(len(weight), (num,))
        else:
            tokens = view.tokenize(self.init_text or "")
            ids = torch.tensor([tokens[index % len(tokens)] for index in range(num)])
        start: Tensor = embedding(ids.to(weight.device))  # through the module, which may scale what it looks up
        return start.to(dtype)
