"""What a method may ask of a model, without knowing which library the model comes from."""

from __future__ import annotations

from typing import Protocol

from torch import nn


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
