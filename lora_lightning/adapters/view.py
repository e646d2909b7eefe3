"""What a method may ask of a model, without knowing which library the model comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from lora_lightning.errors import TargetError


@dataclass(frozen=True, kw_only=True)
class PromptPlace:
    """Where a model takes its tokens, for methods that add virtual ones.

    Args:
        body: Path of the module that takes token ids, mask and positions: the innermost one that returns hidden states.
        embedding: Path of the token embedding, from the body.
        arguments: Names of the arguments of the body's forward, in order.
        placeholder: Token id that stands for a virtual token where the body is called with ids, so that it counts
            positions by itself; None where virtual tokens can only go in as embeddings.
        takes_embeddings: Whether embeddings `[batch, length, width]` in place of ids give the same hidden states.
        padding: Token id of padding, for a body that takes no mask; None for any other body.
        pooling: How the body pools its hidden states, a key of `POOLINGS`; None where it does not.
        position_offset: The first position's number.
        counts_padding: Whether a body without given positions counts padding on the left, too.
        ignores_padding: Whether padding on the left changes nothing where the body gets no positions.
        starts_at_zero: Whether the body forgets earlier rows only at position 0, so that positions cannot be moved on.
        max_positions: How many positions the model has; None where nothing limits them.
        decoder: Path of a decoder that attends to the body's output, or None.
    """

    body: str
    embedding: str
    arguments: tuple[str, ...]
    placeholder: int | None = None
    takes_embeddings: bool = True
    padding: int | None = None
    pooling: str | None = None
    position_offset: int = 0
    counts_padding: bool = True
    ignores_padding: bool = True
    starts_at_zero: bool = False
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
        head_size: Width of a head of the keys.
        value_size: Width of a head of the values, which multi-head latent attention makes narrower.
    """

    path: str
    num_heads: int
    head_size: int
    value_size: int


@dataclass(frozen=True, kw_only=True)
class BlockPlaces:
    r"""Where the parts of one architecture's blocks are, as ends of module paths.

    Each is a regular expression for the last parts of a path, such as `mlp.down_proj` or `\d+.output.dense`.

    Args:
        attention_outputs: Linear layers that return what attention adds to the residual stream.
        ffn_outputs: Second linear layers of the feed-forward networks (FFN); the module that holds one is the FFN.
        keys_values: Linear layers that return keys or values.
        fused: Those of `keys_values` that return queries, keys and values, a third each, in this order.
        ffn_adds_residual: The module that holds the FFN's second layer is called with the FFN's input as its second
            argument, `input_tensor`, and adds it, as in BERT; elsewhere its first argument is the FFN's input.
    """

    attention_outputs: tuple[str, ...]
    ffn_outputs: tuple[str, ...]
    keys_values: tuple[str, ...]
    fused: tuple[str, ...] = ()
    ffn_adds_residual: bool = False


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

    def read_past(self) -> Mapping[str, frozenset[str]]:
        """Return names of parameters, by path, that the model is known to read without calling their modules."""
        ...

    def block_places(self) -> BlockPlaces:
        """Return where the parts of this architecture's blocks are.

        Raises:
            TargetError: Nobody has said so for this architecture.
        """
        ...

    def query_share(self, path: str) -> float:
        """Return the share of the outputs of the module at `path` that are queries beside keys and values."""
        ...

    def untie(self, path: str) -> None:
        """Give the module at `path` a weight of its own where it shares one with another module."""
        ...

    def after_merge(self) -> None:
        """Finish what `untie` began, once all adapters are merged."""
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

    def read_past(self) -> Mapping[str, frozenset[str]]:
        """Return nothing: how to call a plain module is unknown before the first batch."""
        return {}

    def block_places(self) -> BlockPlaces:
        """Raise TargetError: a plain module does not say where its attention and feed-forward layers are."""
        raise TargetError(
            f"{type(self.model).__name__} is no transformers model, so where its attention and feed-forward layers are "
            "is unknown; use a method that takes target_modules, and name them."
        )

    def query_share(self, path: str) -> float:
        """Return 0: a plain module does not say which layers are fused projections."""
        del path
        return 0.0

    def untie(self, path: str) -> None:
        """Give the module at `path` its own copy of each parameter that another module uses too."""
        host = self.model.get_submodule(path)
        for name, parameter in list(host.named_parameters(recurse=False)):
            if is_shared(self.model, host, parameter):
                own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                setattr(host, name, own)

    def after_merge(self) -> None:
        """Do nothing: a plain module computes alike with and without shared weights."""


def _unknown(model: nn.Module, what: str) -> TargetError:
    name = type(model).__name__
    return TargetError(
        f"{name} is not a transformers model and does not say where it {what}; use LoRA or its relatives."
    )


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the token embedding that a transformers model names, None where it names none."""
    return _named_by(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the output layer that a transformers model names, None where it names none."""
    return _named_by(model, "get_output_embeddings")


def _named_by(model: nn.Module, question: str) -> nn.Module | None:
    find = getattr(model, question, None)
    if find is None:
        return None
    try:
        found = find()
    except (AttributeError, NotImplementedError):  # what transformers raises where its usual names do not fit
        return None
    return found if isinstance(found, nn.Module) else None


def is_shared(model: nn.Module, host: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether another module of `model` than `host` holds the very same parameter."""
    return any(
        other is parameter for module in model.modules() if module is not host for other in module._parameters.values()
    )
