"""Trial runs of a transformers model on two tokens: what can be known of it before the first batch."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lora_lightning.adapters.calls import Calls, watch
from lora_lightning.adapters.weights import RESERVED

log = logging.getLogger(__name__)

_CACHES = ("past_key_values", "cache_params")
_TOO_LARGE = 2 * 10**9
"""Parameters from which on a CPU takes seconds for two tokens."""
_FOUND: WeakKeyDictionary[nn.Module, tuple[tuple[tuple[str, int], ...], dict[str, frozenset[str]]]]
_FOUND = WeakKeyDictionary()  # what a trial has shown, as long as the modules are the same
_SMALL = 5 * 10**8
"""Parameters up to which more threads cost more than they gain."""


def trial_inputs(model: Any) -> dict[str, Tensor]:  # noqa: ANN401 - a transformers model
    """Return two tokens, for the decoder too where there is one, with boxes for models of documents."""
    device = next(model.parameters()).device
    ids = torch.ones(1, 2, dtype=torch.long, device=device)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if "bbox" in inspect.signature(model.forward).parameters:
        inputs["bbox"] = torch.zeros(1, 2, 4, device=device)
    return inputs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def read_past(model: Any) -> dict[str, frozenset[str]]:  # noqa: ANN401 - a transformers model
    """Find parameters that a model reads without calling the module that owns them, as Mamba does with `dt_proj`.

    The model runs on two tokens, and on a third one with its cache, as in generation. What a trial does not show
    (other inputs than tokens, an architecture that fails) is left to the first batch.

    Args:
        model: A bare model; it is as before afterwards.

    Returns:
        Names of parameters by the path of the module that owns them.
    """
    modules = tuple((path, id(module)) for path, module in model.named_modules() if RESERVED not in path.split("."))
    before, found = _FOUND.get(model, ((), {}))
    if before != modules:
        found = _read_past(model)
        _FOUND[model] = modules, found
    return found


def _read_past(model: Any) -> dict[str, frozenset[str]]:  # noqa: ANN401 - a transformers model
    if getattr(model, "main_input_name", None) != "input_ids" or not any(True for _ in model.parameters()):
        return {}
    runnable = _twin(model) if _is_costly(model) else model
    if runnable is None:
        return {}
    paths = {id(module): path for path, module in runnable.named_modules() if RESERVED not in path.split(".")}
    with _undisturbed(runnable), _few_threads(runnable), watch(runnable, runnable.modules()) as calls:
        _run(runnable)
    return _by_path(paths, calls)


def _by_path(paths: dict[int, str], calls: Calls) -> dict[str, frozenset[str]]:
    return {paths[owner]: frozenset(names) for owner, names in calls.read_past.items() if owner in paths}


def _run(model: Any) -> None:  # noqa: ANN401 - a transformers model
    """Run a model on two tokens and then on one more; an error ends the trial, and what it has shown stays."""
    inputs = trial_inputs(model)
    try:
        output = model(**inputs)
        caches = {name: cache for name in _CACHES if (cache := getattr(output, name, None)) is not None}
        if model.can_generate():  # some keep what they have seen in their modules, and return no cache
            last = {name: one[:, :1] for name, one in inputs.items()}
            model(**last, **caches, use_cache=True)
    except Exception as error:
        log.debug("No trial of %s: %s", type(model).__name__, error)


def _is_costly(model: nn.Module) -> bool:
    """Return whether a trial would take long, or change how weights are stored, as a first run of packed ones does."""
    parameters = list(model.parameters())
    is_packed = any(not one.is_floating_point() or hasattr(one, "quant_state") for one in parameters)
    is_large = parameters[0].device.type == "cpu" and sum(one.numel() for one in parameters) > _TOO_LARGE
    return is_packed or is_large


def _twin(model: Any) -> Any:  # noqa: ANN401 - a transformers model
    """Build the same model without weights, or return None where it cannot be built."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"):
            return type(model)._from_config(config).eval()
    except Exception as error:
        log.debug("No trial of %s: %s", type(model).__name__, error)
        return None


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Give a model what its modules keep of a run, such as recurrent states, as it was; leave random numbers alone."""
    kept = {module: (dict(module.__dict__), dict(module._buffers)) for module in model.modules()}
    device = next(model.parameters()).device
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)  # it reads weights in evaluation mode, and adapters end it
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.no_grad(), evaluating(model), _quiet():
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(value=fast_path)
        for module, (attributes, buffers) in kept.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def _few_threads(model: nn.Module) -> Iterator[None]:
    """Run a small model in one thread: a product of two tokens is over before others have begun."""
    before = torch.get_num_threads()
    if sum(one.numel() for one in model.parameters()) < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress messages of transformers during a trial run."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
