"""What a method may ask of a model, without knowing which library the model comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from lora_lightning.errors import TargetError


@dataclass(frozen=True, kw_only=True)
class PromptPlace:
    """Where a model takes its tokens, for methods that add virtual ones.

    Args:
        body: Path of the module that takes token ids, mask and positions: the model without its head.
        embedding: Path of the token embedding, from the body.
        arguments: Names of the arguments of the body's forward, in order.
        position_offset: The first position's number.
        max_positions: How many positions the model has; None where nothing limits them.
        decoder: Path of a decoder that attends to the body's output, or None.
    """

    body: str
    embedding: str
    arguments: tuple[str, ...]
    position_offset: int = 0
    max_positions: int | None = None
    decoder: str | None = None

    @property
    def keeps_virtual(self) -> bool:
        """Whether the body's output keeps its virtual positions, because a decoder attends to them."""
        return self.decoder is not None


@dataclass(frozen=True, kw_only=True)
class AttentionPlace:
    """One attention module.

    Args:
        path: Where it is.
        num_heads: Heads of its keys and values.
        head_size: Width of a head.
    """

    path: str
    num_heads: int
    head_size: int


class ModelView(Protocol):
    """The questions a method may ask of a model.

    Attributes:
        model: The model itself.
        model_type: The architecture's name, such as `bert`, or None where there is none.
    """

    model: nn.Module
    model_type: str | None

    def usual_targets(self) -> list[str] | None:
        """Return the path suffixes that low-rank methods usually take on this architecture, if known."""
        ...

    def head_paths(self) -> list[str]:
        """Return the paths of the output head: left out by `all-linear`, trained by a task."""
        ...

    def untie(self, path: str) -> None:
        """Give the module at `path` a weight of its own where it shares one with another module."""
        ...

    def prompt_place(self) -> PromptPlace:
        """Return where the model takes its tokens; raise TargetError where that is not known."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Return a text's token ids, without special tokens."""
        ...

    def attention_places(self) -> list[AttentionPlace]:
        """Return the attention modules, in order; raise TargetError where keys and values cannot be added to them."""
        ...

    def route_attention(self) -> Callable[[nn.Module], None]:
        """Make attention modules ask their adapters for more keys and values; return what undoes it on a model."""
        ...


class PlainView:
    """The view of any torch module: it knows no usual targets and no head."""

    model_type: str | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def usual_targets(self) -> list[str] | None:
        """Return None: a plain module has no usual targets, so methods fall back to `all-linear`."""
        return None

    def head_paths(self) -> list[str]:
        """Return nothing: a plain module does not say which part is its head."""
        return []

    def prompt_place(self) -> PromptPlace:
        """Raise TargetError: a plain module does not say where its tokens go in."""
        raise _unknown(self.model, "takes its tokens, so soft prompts do not work on it")

    def tokenize(self, text: str) -> list[int]:
        """Raise TargetError: a plain module has no tokenizer."""
        raise _unknown(self.model, f"has its tokenizer, so {text!r} has no tokens")

    def attention_places(self) -> list[AttentionPlace]:
        """Raise TargetError: a plain module does not say where its attention is."""
        raise _unknown(self.model, "attends, so prefix methods do not work on it")

    def route_attention(self) -> Callable[[nn.Module], None]:
        """Raise TargetError, as `attention_places`."""
        raise _unknown(self.model, "attends, so prefix methods do not work on it")

    def untie(self, path: str) -> None:
        """Give the module at `path` its own copy of each parameter that another module uses too."""
        host = self.model.get_submodule(path)
        for name, parameter in list(host.named_parameters(recurse=False)):
            if is_shared(self.model, host, parameter):
                own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                setattr(host, name, own)


def _unknown(model: nn.Module, what: str) -> TargetError:
    name = type(model).__name__
    return TargetError(
        f"{name} is not a transformers model and does not say where it {what}; use LoRA or its relatives."
    )


def is_shared(model: nn.Module, host: nn.Module, parameter: nn.Parameter) -> bool:
    """Tell whether another module of `model` than `host` holds the very same parameter."""
    return any(
        other is parameter for module in model.modules() if module is not host for other in module._parameters.values()
    )
