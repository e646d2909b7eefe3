"""Which module turns hidden states into logits, and what a model does to the logits afterwards."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.sharded import is_sharded
from lora_lightning.adapters.view import output_embeddings
from lora_lightning.adapters.walk import unwrap
from lora_lightning.adapters.weights import RESERVED

log = logging.getLogger(__name__)

_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
_ROUGH = 2e-2  # bfloat16 keeps 8 bits


@dataclass(frozen=True)
class LogitMap:
    """What a model does to the output y of its head: `s y`, or, with a softcap c, `c tanh(s y / c)`.

    Args:
        scale: The factor s (Cohere multiplies by one, Granite divides by one).
        softcap: The bound c of the logits' size, as in Gemma 2; None for no bound.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, scores: Tensor) -> Tensor:
        """Overwrite the head's output by the logits, and return them."""
        if self.softcap is None:
            return scores if self.scale == 1 else scores.mul_(self.scale)
        return scores.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of the logits by the head's output: a number, or a tensor of the logits' shape."""
        if self.softcap is None:
            return self.scale
        return (logits / self.softcap).square_().neg_().add_(1).mul_(self.scale)


@dataclass(frozen=True)
class OutputHead:
    """The parts of a language model around its logits: `logits = logit_map(head(body(inputs)[0]))`.

    Args:
        body: Module that returns hidden states `[batch, length, width]` as its first output.
        head: Module that takes them to the vocabulary.
        logit_map: What the model does to the head's output.
    """

    body: nn.Module
    head: nn.Module
    logit_map: LogitMap

    def hidden_states(self, inputs: Mapping[str, Any]) -> Tensor:
        """Call the body; returns `[batch, length, width]`."""
        return self.body(**inputs, **without_cache(self.body))[0]


def find_output_head(model: nn.Module) -> OutputHead | None:
    """Find out by a trial call on two tokens how a model computes its logits.

    The trial compares what enters the head with what leaves the body, and what the model makes of a known output of
    the head with what its config's settings would: so an architecture that does something else there is noticed.

    Args:
        model: A causal language model of transformers, with or without adapters; it is not changed.

    Returns:
        The parts, or None, after a line in the log, where logits come about in another way.
    """
    found = _try(unwrap(model))
    if isinstance(found, OutputHead):
        return found
    log.warning("%s: %s. The loss takes the model's own logits, all of them at once.", type(model).__name__, found)
    return None


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the argument that keeps a model from building a key-value cache, where it has one."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _try(model: Any) -> OutputHead | str:  # noqa: ANN401 - a transformers model
    """Return the parts, or the reason why the logits cannot be taken apart."""
    bodies, head = _bodies(model), output_embeddings(model)
    if not bodies or head is None:
        return "it does not say which module is its output head"
    if RESERVED in model._modules:
        return "an adapter hangs on the whole model"
    if is_sharded(model):
        return "its parameters are sharded, so its parts cannot be called one by one"
    trial = _call(model, bodies, head)
    if trial.head_input is None or trial.scores is None:
        return "it does not call its output head as a module"
    body = next((body for body, output in trial.body_outputs.items() if _is_same(output, trial.head_input)), None)
    if body is None:
        return "it does something to the hidden states before its output head"
    for logit_map in _candidates(model):
        if _fits(logit_map, trial.scores, trial.logits):
            return OutputHead(body, head, logit_map)
    return "it does something unknown to the logits after its output head"


def _bodies(model: Any) -> list[nn.Module]:  # noqa: ANN401 - a transformers model
    """Return what may be a model without its head, as transformers finds it, the outermost first."""
    found = [getattr(model, "base_model", None)]
    if hasattr(model, "get_decoder"):
        with suppress(AttributeError, NotImplementedError):
            found.append(model.get_decoder())
    return [body for body in dict.fromkeys(found) if isinstance(body, nn.Module) and body is not model]


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


@dataclass
class _Trial:
    """What passed by the possible bodies and the head in one call of the model."""

    body_outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    head_input: Tensor | None = None
    scores: Tensor | None = None
    logits: Tensor | None = None

    def note_body(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - what the body returns
        del args
        first = output if isinstance(output, Tensor) else output[0]
        if isinstance(first, Tensor):
            self.body_outputs[module] = first.clone()

    def note_head(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Replace the scores of the head with known ones."""
        del module
        self.head_input = args[0].clone() if args else None
        known = torch.linspace(-90, 90, output.numel(), device=output.device, dtype=torch.float32)
        self.scores = known.view_as(output).to(output.dtype)
        return self.scores.clone()


@torch.no_grad()
def _call(model: Any, bodies: list[nn.Module], head: nn.Module) -> _Trial:  # noqa: ANN401 - a transformers model
    trial, device = _Trial(), next(model.parameters()).device
    ids = torch.tensor([[0, 1]], device=device)
    with _rng_kept(device):
        # Last, so that adapters that hook the same modules have had their turn.
        hooks = [body.register_forward_hook(trial.note_body) for body in bodies]
        hooks.append(head.register_forward_hook(trial.note_head))
        try:
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **without_cache(model))
        finally:
            for hook in hooks:
                hook.remove()
    logits = getattr(output, "logits", None)
    trial.logits = logits if isinstance(logits, Tensor) else None
    return trial


@contextmanager
def _rng_kept(device: torch.device) -> Iterator[None]:
    """Let the dropout of a trial leave the random numbers of the run alone."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _candidates(model: Any) -> Iterator[LogitMap]:  # noqa: ANN401 - a transformers model
    """Yield the maps that the config's settings allow for, the plainest first."""
    configs = [model.config, model.config.get_text_config()] if hasattr(model.config, "get_text_config") else []
    scales: list[float] = [1.0]
    softcaps: list[float | None] = [None]
    for config in configs:
        scales += [value for name in _MULTIPLIERS if (value := _number(config, name))]
        scales += [1 / value for name in _DIVISORS if (value := _number(config, name))]
        softcaps += [value for name in _SOFTCAPS if (value := _number(config, name))]
    for softcap, scale in itertools.product(dict.fromkeys(softcaps), dict.fromkeys(scales)):
        yield LogitMap(scale, softcap)


def _number(config: Any, name: str) -> float | None:  # noqa: ANN401 - transformers' configs differ by model
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _fits(logit_map: LogitMap, scores: Tensor, logits: Tensor | None) -> bool:
    if logits is None or logits.shape != scores.shape:
        return False
    tolerance = _TOLERANCE.get(scores.dtype, _ROUGH)
    expected = logit_map.apply_(scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True))
    return bool(((expected - logits).abs() <= tolerance * (1 + expected.abs())).all())
