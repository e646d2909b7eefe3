"""What a method may ask of a model, without knowing which library the model comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from lora_lightning.errors import TargetError


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


def is_shared(model: nn.Module, host: nn.Module, parameter: nn.Parameter) -> bool:
    """Tell whether another module of `model` than `host` holds the very same parameter."""
    return any(
        other is parameter for module in model.modules() if module is not host for other in module._parameters.values()
    )
