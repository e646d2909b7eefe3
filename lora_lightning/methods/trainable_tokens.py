"""Trainable tokens: chosen rows of the embeddings train, and nothing else of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_lightning.adapters.about import About
from lora_lightning.adapters.base import Adapter, ForwardAdapter, Method, Role
from lora_lightning.adapters.targets import find_modules
from lora_lightning.adapters.view import ModelView, input_embeddings
from lora_lightning.adapters.weights import RESERVED, Host, HostKind, codec_of, find_codec, read_weight
from lora_lightning.errors import ConfigError, TargetError

__all__ = ["TrainableTokens"]


class TokenRows(nn.Module):
    """The trained rows, which an embedding shares with the output layer that is tied to it.

    Args:
        start: The rows at the start, `[count, width]`.
        token_indices: Their indices, ascending.

    Attributes:
        tokens: `[count, width]`.
        ids: The indices, `[count]`; no part of the state, since the method's settings name them.
    """

    ids: Tensor

    def __init__(self, start: Tensor, token_indices: list[int]) -> None:
        super().__init__()
        self.token_indices = token_indices
        self.tokens = nn.Parameter(start)
        with torch.device("meta"):
            self.register_buffer("ids", torch.empty(len(token_indices), dtype=torch.long), persistent=False)
        if not start.is_meta:
            self._fill_ids(start.device)

    def _fill_ids(self, device: torch.device) -> None:
        self.ids = torch.tensor(self.token_indices, dtype=torch.long, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply torch's conversion; put the indices back where it made a buffer without values (`to_empty`)."""
        was_hollow = self.ids.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        if was_hollow and not self.ids.is_meta:
            self._fill_ids(self.ids.device)
        return self


class TrainableTokensAdapter(ForwardAdapter):
    """An embedding with other rows for some tokens, or an output layer with other rows for their logits.

    Args:
        host: The embedding, or an output layer that shares its weight.
        rows: The trained rows.
    """

    may_rest: ClassVar[bool] = True  # of modules that share a weight, a model calls some

    def __init__(self, host: Host, rows: TokenRows) -> None:
        super().__init__()
        self.kind = codec_of(host).kind
        self.rows = rows

    def role_of(self, name: str) -> Role:
        """Return EMBEDDING."""
        del name
        return Role.EMBEDDING

    def public_name(self, name: str) -> str:
        """Return `tokens` for `rows.tokens`."""
        return name.removeprefix("rows.")

    def forward(self, host: Host, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - the host's own signature
        """Compute the host, then what the trained rows change about its output.

        Args:
            host: The host.
            x: Token ids of any shape, or for an output layer its input `[..., width]`.
            *args: Further arguments of the host's forward.
            **kwargs: The same.
        """
        output: Tensor = self.base_forward(host, x, *args, **kwargs)
        if self.kind is HostKind.EMBEDDING:
            return self._replace_embeddings(host, x, output)
        ids, rows = self.rows.ids, self.rows.tokens
        bias = None if host.bias is None else host.bias[ids].to(x.dtype)
        return output.index_copy(-1, ids, F.linear(x, rows.to(x.dtype), bias).to(output.dtype))

    def _replace_embeddings(self, host: Host, x: Tensor, output: Tensor) -> Tensor:
        """Return the output with the trained rows where `x` holds their tokens."""
        ids, rows = self.rows.ids, self.rows.tokens
        index = torch.searchsorted(ids, x.contiguous()).clamp_max(len(ids) - 1)
        is_trained = (ids[index] == x).unsqueeze(-1)
        trained = rows[index]
        scale = getattr(host, "embed_scale", None)  # a module that scales what it looks up, such as Gemma's
        if scale is not None:
            trained = trained * scale
        return torch.where(is_trained, trained.to(output.dtype), output)

    def merged_weight(self, host: nn.Module, weight: Tensor) -> Tensor:
        """Return the weight `[out, in]` with the trained rows in it."""
        del host
        merged, rows = weight.clone(), self.rows.tokens.to(weight.dtype)
        if self.kind is HostKind.EMBEDDING:
            merged[:, self.rows.ids] = rows.t()
        else:
            merged[self.rows.ids] = rows
        return merged

    def extra_repr(self) -> str:
        """Tell how many rows train."""
        return f"{len(self.rows.token_indices)} tokens"


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """E'[i] = t_i for chosen tokens i, and E' = E elsewhere: for tokens that were added to a vocabulary.

    Trains T: [number of tokens, width of the embeddings], which starts at the embeddings' own rows, so that the first
    forward equals the base model's. An output layer, or another embedding, that shares the embeddings' weight gets the
    same rows. What is saved are the rows themselves, not their change: rows that were drawn at random when the
    vocabulary was extended need not be the same where the adapter is loaded. Other libraries call it trainable tokens.

    Args:
        token_indices: The tokens' ids, at least one, each once; `tokenizer.convert_tokens_to_ids` tells them.
        target_modules: Path suffixes of the embeddings; None takes the model's input embeddings.

    Raises:
        ConfigError: `token_indices` is empty, or holds something else than whole numbers from 0, each once.
    """

    name: ClassVar[str] = "trainable_tokens"
    about: ClassVar[About] = About(
        trains="the rows of chosen tokens, such as added ones",
        where="embeddings, and output layers that share their weight",
        principle="chosen rows of the embeddings",
        suits="tokens that were added",
        difficulty="easy: name the tokens",
    )
    usual_rates: ClassVar[tuple[float, ...]] = (1e-3, 3e-3, 1e-2)

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        """Check the indices."""
        super().__post_init__()
        ids: Any = self.token_indices
        is_list = isinstance(ids, list) and bool(ids)
        if not is_list or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
            raise ConfigError(
                f"TrainableTokens: token_indices must be a list of token ids, whole numbers from 0, got {ids!r:.80}."
            )
        if len(set(ids)) < len(ids):
            raise ConfigError("TrainableTokens: token_indices names a token twice; name each once.")

    def adapters(self, view: ModelView) -> Iterator[tuple[str, Adapter]]:
        """Build one adapter per embedding and per module that shares its weight; see `Method.adapters`."""
        modules = {path: module for path, module in view.model.named_modules() if RESERVED not in path.split(".")}
        done: set[int] = set()
        for path in self._embeddings(view, modules):
            start, weight = self._start(path, modules[path]), modules[path]._parameters["weight"]
            if id(weight) in done:
                continue
            done.add(id(weight))
            rows = TokenRows(start, sorted(self.token_indices))
            for other, module in modules.items():
                if module._parameters.get("weight") is weight and find_codec(module) is not None:
                    yield other, TrainableTokensAdapter(module, rows)

    def _embeddings(self, view: ModelView, modules: dict[str, nn.Module]) -> list[str]:
        """Return the paths of the modules that are named, or of the model's input embeddings."""
        if self.target_modules is not None:
            paths = find_modules(view.model, self.target_modules, "target_modules")
        else:
            embedding = input_embeddings(view.model)
            paths = [path for path, module in modules.items() if embedding is not None and module is embedding]
        if not paths:
            raise TargetError(
                f"{type(view.model).__name__} does not say which module its input embeddings are; name it in "
                "target_modules of TrainableTokens."
            )
        return paths

    @torch.no_grad()
    def _start(self, path: str, host: nn.Module) -> Tensor:
        """Return the embeddings' own rows, `[count, width]`.

        Raises:
            TargetError: The host has no rows for tokens.
            ConfigError: It has fewer rows.
        """
        codec = find_codec(host)
        if codec is None or codec.kind is HostKind.CONV or getattr(host, "max_norm", None) is not None:
            raise TargetError(
                f"TrainableTokens takes embeddings and output layers, and {path!r} is a {type(host).__name__} that it "
                "cannot take; name others in target_modules."
            )
        weight = read_weight(host)
        by_token = weight.t() if codec.kind is HostKind.EMBEDDING else weight
        if max(self.token_indices) >= len(by_token):
            raise ConfigError(
                f"TrainableTokens: token_indices names token {max(self.token_indices)}, and {path!r} has "
                f"{len(by_token)} rows; extend the vocabulary first (model.resize_token_embeddings)."
            )
        dtype = torch.float64 if by_token.dtype is torch.float64 else torch.float32
        index = torch.tensor(sorted(self.token_indices), device=by_token.device)
        return by_token.detach()[index].to(dtype)
