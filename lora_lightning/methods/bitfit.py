"""BitFit: only the bias terms of a model train."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lora_lightning.adapters.base import About, Adapter, Method, OutputAdapter, Role
from lora_lightning.adapters.targets import find_modules, has_suffix, is_within
from lora_lightning.adapters.view import ModelView
from lora_lightning.adapters.weights import RESERVED, Host, HostKind, codec_of, find_codec, original_class, overwrite
from lora_lightning.errors import ConfigError, NotMergeable, TargetError

__all__ = ["BitFit"]


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """y = W x + b + delta, where only delta trains (Ben Zaken et al. 2022, arXiv 2106.10199).

    The delta of each bias starts at zero, so the first forward equals the base model's exactly, and it gets the
    gradient that the bias itself would get. Hosts: linear layers (4-bit and 8-bit ones too), GPT-2's Conv1D,
    convolutions and norms. The output head is left out: a task trains it whole.

    Args:
        bias: `all` (every bias outside the head), or path suffixes of the modules whose bias trains, such as
            `["query", "intermediate.dense"]` for the two kinds that the paper finds to matter most. A whole path takes
            the output head's too.
        add_bias: Whether linear layers that `bias` names get a shift where they have no bias, which cannot be merged.

    Raises:
        ConfigError: `bias` is neither `all` nor a list of names.
    """

    name: ClassVar[str] = "bitfit"
    about: ClassVar[About] = About(
        trains="biases, all or some",
        where="every layer with a bias",
        principle="only biases learn",
        suits="small data on encoders",
        difficulty="easy; needs biases",
    )
    usual_rates: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2)

    bias: Literal["all"] | list[str] = "all"
    add_bias: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty list, and a name outside a list."""
        super().__post_init__()
        if not self.bias or (isinstance(self.bias, str) and self.bias != "all"):
            raise ConfigError(f"BitFit: bias must be 'all' or a list of at least one module name, got {self.bias!r}.")
        if self.add_bias and isinstance(self.bias, str):
            raise ConfigError("BitFit: add_bias needs a list in bias, which names the layers that get one.")

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        """Build one delta per bias; see `Method.adapters`."""
        modules = {path: module for path, module in view.model.named_modules() if RESERVED not in path.split(".")}
        saved = [path for path in modules if any(has_suffix(path, name) for name in self.modules_to_save or [])]
        left_out = [*view.head_paths(), *saved]
        named = list(modules) if isinstance(self.bias, str) else find_modules(view.model, self.bias, "bias")
        chosen: list[str] = []
        unknown: list[str] = []
        read_past = view.read_past()
        for path in named:
            is_named = not isinstance(self.bias, str) and path in self.bias and not is_within(path, saved)
            if is_within(path, left_out) and not is_named:
                continue
            names = _bias_names(modules[path])
            if not names and not self.add_bias:
                continue
            # A layer without a bias is known to be called where its weight is not read past it.
            is_called = (names or ["weight"])[0] not in read_past.get(path, ())
            (chosen if is_called and takes_shift(modules, path) else unknown).append(path)
        if not chosen:
            raise TargetError(self._nothing_fits(view.model, named, unknown, left_out))
        if unknown:
            kinds = ", ".join(f"{path} ({type(modules[path]).__name__})" for path in unknown)
            warnings.warn(f"BitFit leaves out biases of modules it does not know how to shift: {kinds}", stacklevel=2)
        for path in chosen:
            yield path, BiasAdapter(modules[path])

    def _nothing_fits(self, model: nn.Module, named: list[str], unknown: list[str], left_out: list[str]) -> str:
        what = "this model" if isinstance(self.bias, str) else f"what bias={self.bias!r} names"
        if unknown:
            return f"BitFit: the biases of {what} lie in modules it does not know how to shift, such as {unknown[0]!r}."
        where = f" outside its head ({', '.join(left_out)})" if left_out else ""
        kind = type(model).__name__
        hint = "use a method that needs none, such as IA3 or LoRA"
        if not isinstance(self.bias, str):
            hint = f"bias='all' takes every bias there is; {len(named)} modules matched"
        return f"BitFit trains bias terms, and {what} has none{where} (in {kind}); {hint}."


class BiasAdapter(OutputAdapter):
    """A trainable shift of one host's bias.

    Args:
        host: A linear layer, a convolution or a norm.

    Attributes:
        delta: Shape of the host's bias, or of the one that it would have; zero at the start.
        num_trailing: Dimensions of the output after the one that the bias counts; None where that is the last.
    """

    roles: ClassVar[Mapping[str, Role]] = {"delta": Role.BIAS}

    def __init__(self, host: Host) -> None:
        super().__init__()
        like = host.weight if host.bias is None else host.bias
        shape = (codec_of(host).shape(host)[0],) if host.bias is None else host.bias.shape
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        self.delta = nn.Parameter(torch.zeros(shape, device=like.device, dtype=dtype))
        self.counts_channels = _counts_channels(host)
        self.num_trailing = _num_trailing(host)

    def forward(self, host: Host, args: Any, kwargs: Any, output: Tensor) -> Tensor:  # noqa: ANN401 - the host's own
        """Add the delta to the host's output, `[..., out]`, or `[batch, out, ...]` for channels."""
        del host, args, kwargs
        delta: Tensor = self.delta
        if self.counts_channels:
            num_trailing = output.dim() - 2 if self.num_trailing is None else self.num_trailing
            delta = delta.view(-1, *[1] * num_trailing)
        return output + delta.to(output.dtype)

    def check_mergeable(self, host: Host) -> None:
        """Accept every host with a bias: that is dense, however the weight is stored."""
        if host.bias is None:
            raise NotMergeable(
                f"This {original_class(host).__name__} has no bias to merge a shift into, and a bias that its model "
                "does not know would be lost on saving; keep the adapter attached."
            )

    def merge_into(self, host: Host) -> None:
        """Add the delta to the host's bias."""
        overwrite(host.bias, host.bias.to(self.delta.dtype) + self.delta)


def _bias_names(module: nn.Module) -> list[str]:
    return [name for name, own in module._parameters.items() if own is not None and name.split("_")[-1] == "bias"]


def takes_shift(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Return whether a shift of the module's output is a shift of its bias, and the module is really called."""
    module = modules[path]
    if isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention):
        return False
    codec = find_codec(module)
    if not _bias_names(module):
        return codec is not None and codec.kind is HostKind.LINEAR
    if _bias_names(module) != ["bias"]:
        return False
    forward = original_class(module).forward
    if any(isinstance(module, norm) and forward is norm.forward for norm in _NORMS):
        return True
    return codec is not None and codec.kind in (HostKind.LINEAR, HostKind.CONV)


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _counts_channels(host: Host) -> bool:
    """Return whether a host's bias counts the channels of an output `[batch, channels, ...]`."""
    codec = find_codec(host)
    if codec is not None:
        return codec.kind is HostKind.CONV
    return not isinstance(host, nn.LayerNorm)


def _num_trailing(host: Host) -> int | None:
    """Return how many dimensions a convolution's output has after its channels, which may come without a batch."""
    codec = find_codec(host)
    is_convolution = codec is not None and codec.kind is HostKind.CONV
    return host.weight.dim() - 2 if is_convolution else None
