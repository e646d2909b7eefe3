"""What a model's first calls after `attach` show: adapters that are not called, and frozen buffers that move."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_lightning.adapters.base import Adapter, Role
from lora_lightning.adapters.calls.watch import (
    Calls,
    called_adapters,
    idle_message,
    left_out,
    read_past_message,
    refuse_idle,
    watch,
)
from lora_lightning.adapters.frozen import KeptBuffers, restore_after_conversion
from lora_lightning.adapters.head import HeadAdapter
from lora_lightning.adapters.sharded import is_sharded
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.errors import TargetError

_WATCH = "_lora_lightning_first_calls"
_CLAIM = threading.Lock()
_PATIENCE = 32
"""Training batches in which a layer that is dropped at random should have its turn."""


@dataclass
class _FirstCalls:
    """What is still to be looked at; plain data, kept on the model that `attach` was given.

    Args:
        buffers: The base's buffers, which training batches must leave as they are.
        looks_at_calls: Whether every adapter is to be called in the next training batch.
        looks_at_reads: Whether reads past a module are to be looked for.
        has_warned: Whether a call in evaluation mode has told of idle adapters.
        has_trained: Whether a training batch was seen.
        num_batches: How many training batches were looked at.
        called: Paths of hosts, with the names there of adapters that were called.
        running: What ends the call that is being watched, and its thread.
    """

    buffers: KeptBuffers
    looks_at_calls: bool = True
    looks_at_reads: bool = True
    has_warned: bool = False
    has_trained: bool = False
    num_batches: int = 0
    called: set[tuple[str, str]] = field(default_factory=set)
    running: tuple[ExitStack, int, BaseException | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a call."""
        return {**self.__dict__, "running": None}


def watch_first_calls(model: nn.Module) -> None:
    """Have a model's first calls watched, by hooks that go when there is nothing left to see."""
    end_watch(model)
    setattr(model, _WATCH, _FirstCalls(buffers=KeptBuffers(model)))
    model.register_forward_pre_hook(_before, prepend=True)  # before those of adapters on the model itself
    model.register_forward_hook(_after, always_call=True)


def end_watch(model: nn.Module) -> None:
    """Take the hooks off, if they are there."""
    model.__dict__.pop(_WATCH, None)
    # By identity, not by handle: handles do not survive deepcopy and pickle, module-level functions do.
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_before, _after)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def _before(model: nn.Module, _args: tuple[Any, ...]) -> None:
    """Begin to watch a call, unless it is traced or there is nothing left to look at."""
    watched: _FirstCalls | None = getattr(model, _WATCH, None)
    if watched is None:
        return
    if torch.compiler.is_compiling():
        if model.training and watched.buffers.paths:
            watched.buffers.keep(model)
        return
    if torch._C._get_tracing_state() is None:
        _begin(model, watched)


def _begin(model: nn.Module, watched: _FirstCalls) -> None:
    """Begin to watch a call, unless another thread's call is being watched."""
    stack = _claim(watched)
    if stack is None:
        return
    try:
        _enter(stack, model, watched)
    except BaseException as error:
        watched.running = None
        _end_failed(stack, error)
        raise


def _claim(watched: _FirstCalls) -> ExitStack | None:
    """Make this thread's call the one that is watched, or return None."""
    # Two threads must not both find the place free: the stack that gives way would be collected, and its mode taken off
    # in the other thread.
    with _CLAIM:
        before = watched.running
        if before is not None and before[1] != threading.get_ident():
            return None
        stack = ExitStack()
        watched.running = stack, threading.get_ident(), sys.exc_info()[1]
    if before is not None:
        _end_failed(before[0], KeyboardInterrupt())  # an interrupt ended the last call before its hook
    return stack


def _enter(stack: ExitStack, model: nn.Module, watched: _FirstCalls) -> None:
    """Put on the stack what watches a call."""
    if model.training:
        if not watched.has_trained:
            restore_after_conversion(model)
            watched.has_trained = True
        stack.enter_context(watched.buffers.still(model))
    looks = watched.looks_at_calls or watched.looks_at_reads
    if looks and torch.is_grad_enabled() and _acts(model):
        stack.enter_context(_looked_at(model, watched))


def _after(model: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:  # noqa: ANN401 - the model's own
    """End the watching of a call."""
    watched: _FirstCalls | None = getattr(model, _WATCH, None)
    if watched is None:
        return
    if torch.compiler.is_compiling():
        if model.training and watched.buffers.paths:
            watched.buffers.give_back(model)
        return
    if watched.running is not None:
        _end(model, watched, watched.running)


def _end(model: nn.Module, watched: _FirstCalls, running: tuple[ExitStack, int, BaseException | None]) -> None:
    """End the watching of a call; raise what it has shown, unless the call itself has failed."""
    stack, thread, error = running
    if thread != threading.get_ident():
        return
    watched.running = None
    failure = sys.exc_info()[1]
    if failure is not None and failure is not error:
        _end_failed(stack, failure)
        return
    stack.close()
    looks_on = watched.looks_at_calls or watched.looks_at_reads or not watched.has_trained or watched.buffers.paths
    if not looks_on:
        end_watch(model)


def _end_failed(stack: ExitStack, failure: BaseException) -> None:
    """Clean up after a call that has failed, and judge nothing by it."""
    stack.__exit__(type(failure), failure, failure.__traceback__)


def _acts(model: nn.Module) -> bool:
    """Return whether the adapters that act by default act here, and the parameters are whole and not on meta."""
    stacks = [stack for _, stack in _stacks(model)]
    all_act = all(stack.acting(Adapter) == stack.chosen(Adapter, stack.selector.default) for stack in stacks)
    is_there = not any(parameter.is_meta for parameter in model.parameters())
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    return bool(stacks) and all_act and is_there and not is_sharded(model) and not is_compiled


def _stacks(model: nn.Module) -> list[tuple[str, Any]]:
    """Return `(path of the host, its adapters)` of every host."""
    return [
        (path, module._modules[RESERVED])
        for path, module in model.named_modules()
        if RESERVED in module._modules and RESERVED not in path.split(".")
    ]


def _adapters(model: nn.Module) -> list[tuple[str, str, Adapter]]:
    """Return `(path of the host, key there, adapter)` of every adapter that acts by default."""
    return [
        (path, key, adapter)
        for path, stack in _stacks(model)
        for key, adapter in stack._modules.items()
        if adapter in stack.chosen(Adapter, stack.selector.default)
    ]


@contextmanager
def _looked_at(model: nn.Module, watched: _FirstCalls) -> Iterator[None]:
    """Check inside the block that adapters are called, and that nothing reads their hosts' weights past them."""
    adapters = _adapters(model)
    hosts = {path: model.get_submodule(path) for path, _, _ in adapters}
    inside = [inner for path, _, adapter in adapters for inner in _read_by(hosts[path], adapter)]
    with called_adapters([adapter for _, _, adapter in adapters]) as called, _watched(model, inside, watched) as calls:
        yield
    if watched.looks_at_reads:
        watched.looks_at_reads = False
        _refuse_read_past(adapters, hosts, calls)
    watched.called |= {(path, name) for path, name, adapter in adapters if id(adapter) in called}
    _judge(model, watched, [(path, name) for path, name, adapter in adapters if not adapter.may_rest])


def _judge(model: nn.Module, watched: _FirstCalls, adapters: list[tuple[str, str]]) -> None:
    """Raise or warn where adapters have not been called up to now.

    It is an error in training mode alone: in evaluation a model may well leave out a vision tower, or an expert. Layers
    that are dropped at random have some batches' time.
    """
    idle = [path for path, name in adapters if (path, name) not in watched.called]
    excepted = left_out(model, idle, {path for path, _ in watched.called})
    never = [path for path in idle if path not in excepted]
    watched.num_batches += model.training
    if not model.training and never and not watched.has_warned:
        watched.has_warned = True
        warnings.warn(idle_message(never, len(adapters)), stacklevel=2)
    if model.training or not idle:
        watched.looks_at_calls = bool(idle) and not never and watched.num_batches < _PATIENCE
        refuse_idle(never, len(adapters))
    if excepted and watched.num_batches == _PATIENCE:
        warnings.warn(f"{_PATIENCE} batches later: {idle_message(idle, len(adapters))}", stacklevel=2)


@contextmanager
def _watched(model: nn.Module, modules: list[nn.Module], watched: _FirstCalls) -> Iterator[Calls]:
    if not watched.looks_at_reads:
        yield Calls()
        return
    with watch(model, modules) as calls:
        yield calls


def _read_by(host: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """Return the modules whose parameters an adapter replaces or adds to."""
    if isinstance(adapter, HeadAdapter):
        return [module for path, module in host.named_modules() if RESERVED not in path.split(".")]
    return [host]


def _refuse_read_past(adapters: list[tuple[str, str, Adapter]], hosts: dict[str, nn.Module], calls: Calls) -> None:
    """Raise TargetError where a weight that an adapter stands for was read without its host."""
    for path, _, adapter in adapters:
        for module in _read_by(hosts[path], adapter):
            names = sorted(calls.read_past.get(id(module), set()))
            names = [name for name in names if _stands_for(adapter, module, name)]
            if names:
                raise TargetError(read_past_message(path, names[0], "the targets and of modules_to_save"))


def _stands_for(adapter: Adapter, module: nn.Module, name: str) -> bool:
    """Return whether an adapter changes what this parameter of its host does: a bias only where it trains one."""
    if not any(True for _ in adapter.parameters()):
        return False  # such as the placeholders of prompts, which change nothing by themselves
    roles = {role for _, _, role in adapter.named_roles()}
    parameter = module._parameters[name]
    is_bias = parameter is not None and parameter.dim() < 2
    return not is_bias or isinstance(adapter, HeadAdapter) or Role.BIAS in roles
