"""Which adapters act: what the running thread or asyncio task has chosen, never a state of a module.

A `Selector` stands for one attachment, and all hosts of that attachment hold it. A block (`choosing`) adds an entry to
the state of the thread or task that enters it, and removes its own entry on leaving, in whatever order blocks are left.
The state lives in a context variable, which threads and tasks have of their own. `torch.compile` cannot trace a context
variable, so the state is mirrored in a thread-local, which it guards by value: one compilation for each selection.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import nn

from lora_lightning.adapters.selection.compiling import make_room_for
from lora_lightning.adapters.selection.rows import Rows
from lora_lightning.errors import ConfigError

__all__ = ["bind"]

P = ParamSpec("P")
T = TypeVar("T")

Names = tuple[str, ...] | None
"""Which adapters act, sorted; None for all of them. A tuple, since `torch.compile` compares it by value.

Each entry is `whole(name)`, or the `selected_as` of single adapters.
"""

ALL: Names = None
NONE: Names = ()


def whole(name: str) -> str:
    """Return the entry of a selection that chooses all adapters of one name."""
    return f"{name}:*"


def part(name: str, label: str) -> str:
    """Return the entry of a selection that chooses the adapters of one method of a name, or its copies."""
    return f"{name}:{label}"


_TOKENS = itertools.count()


class Selector:
    """The identity of one attachment, by which its hosts find out which of their adapters act.

    Copies and unpickled ones have a token of their own: a block of the original does not reach them.

    Attributes:
        default: What acts outside of all blocks, in every thread.
        token: Attribute of the thread-local under which compiled code looks this attachment up.
        num_hosts: How many hosts hold this selector.
    """

    def __init__(self, default: Names = ALL, num_hosts: int = 0) -> None:
        self.num_hosts = num_hosts
        self.token = f"selection_{next(_TOKENS)}"
        self.act_by_default(default)

    def act_by_default(self, names: Names) -> None:
        """Choose what acts outside of all blocks, in every thread, from now on."""
        global _defaults
        self.default = names
        with _DEFAULTS_LOCK:
            _defaults = {**_defaults, self.token: names}
        make_room_for([(names, None, True)])

    def __reduce__(self) -> tuple[type[Selector], tuple[Names, int]]:
        """Copy and pickle without the token."""
        return Selector, (self.default, self.num_hosts)

    def at(self, path: str) -> tuple[Names, Rows | None]:
        """Return what acts on one host in the running thread or task, and on which rows of a batch; None for all rows.

        Args:
            path: The host, as it was called when its adapters were attached.
        """
        choice = self._choice_at(path)
        return (self.default, None) if choice is None else (choice.names, choice.rows)

    def _choice_at(self, path: str) -> Choice | None:
        choices: tuple[Choice, ...] | None
        if torch.compiler.is_dynamo_compiling():
            choices = getattr(_MIRROR, self.token, None)
        else:
            choices = _STATE.get().choices.get(self.token)
        if choices is not None:
            for choice in choices:
                if choice.hosts is None or path in choice.hosts:
                    return choice
        return None


class Choice(NamedTuple):
    """What a block chooses for one attachment.

    Args:
        names: The adapters that act.
        hosts: Paths of the hosts that the block is about; None for all.
        rows: On which rows of a batch each of them acts; None for all rows.
    """

    names: Names
    hosts: tuple[str, ...] | None
    rows: Rows | None = None


@dataclass(frozen=True, eq=False)
class _Entry:
    """One entered block; two blocks are never equal."""

    choices: Mapping[str, Choice]


class _State(NamedTuple):
    """The blocks that are open, in the order of entering, and what follows for each token, the latest choice first."""

    entries: tuple[_Entry, ...]
    choices: Mapping[str, tuple[Choice, ...]]


_EMPTY = _State((), {})
_STATE: ContextVar[_State] = ContextVar("lora_lightning_selection", default=_EMPTY)


_DEFAULTS_LOCK = threading.Lock()
_defaults: Mapping[str, Names] = {}
"""What acts outside of all blocks, for each token; replaced as a whole, so that a selection can be kept."""


class Moment(NamedTuple):
    """What is selected in one thread or task at one time, with what acts outside of blocks then."""

    state: _State
    defaults: Mapping[str, Names]


class _Mirror(threading.local):
    """What compiled code reads: the choices of each token as attributes of that name."""

    state = _EMPTY


_MIRROR = _Mirror()


@contextmanager
def choosing(choices: Mapping[Selector, Choice]) -> Iterator[None]:
    """Let other adapters act inside the block, in the thread or asyncio task that enters it.

    Blocks may overlap: of those that are open, the one entered last decides for each host.

    Args:
        choices: What to choose, for each attachment.

    Raises:
        ConfigError: The block is left in another thread or task than the one that entered it.
    """
    entry = _Entry({selector.token: choice for selector, choice in choices.items()})
    _activate(_state_of((*_STATE.get().entries, entry)))
    try:
        yield
    except BaseException:  # which must reach the caller as it is
        _leave(entry)
        raise
    if not _leave(entry):
        raise ConfigError(
            "A block that selects adapters, such as disabled(model), was left in another thread or asyncio task than "
            "the one that entered it, and has no effect there. Enter and leave it in the same one; bind(function) "
            "takes a selection to another thread."
        )


def bind(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that runs under the selection of this moment, in whatever thread, and after any block.

    A thread that is started inside a block does not know of the block. The function given to it, bound, does. So does
    a function that checkpointing runs again in backward: `checkpoint(bind(block), x)`.

    Args:
        function: A function or a coroutine function.

    Raises:
        ConfigError: It is a generator function, whose body would run after the call.

    Example:
        >>> from threading import Thread
        >>> from torch import nn, ones
        >>> from lora_lightning.adapters import attach, disabled
        >>> from lora_lightning.methods import LoRA
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> report = attach(model, LoRA(r=1))
        >>> with disabled(model):
        ...     thread = Thread(target=bind(model), args=(ones(1, 2),))  # computes the base's output
        >>> thread.start()
        >>> thread.join()
    """
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError("bind takes no generator function; bind the function that iterates over the generator.")
    moment = current_selection()
    if inspect.iscoroutinefunction(function):

        async def bound_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:  # noqa: ANN401 - the function's own
            with _running_in(moment):
                return await function(*args, **kwargs)

        return cast("Callable[P, T]", functools.wraps(function)(bound_coroutine))

    def bound(*args: P.args, **kwargs: P.kwargs) -> T:
        with _running_in(moment):
            return function(*args, **kwargs)

    # A module has attributes that are not the function's to take over.
    return functools.wraps(function, updated=())(bound)


def synchronize(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Bring what compiled code reads up to date: another task may have run in this thread, or in another context.

    Args:
        module: A compiled model, whose forward pre-hook this is.
        args: What it is called with.
    """
    del module, args
    if torch.compiler.is_dynamo_compiling():  # a compiled model inside another one
        return
    state = _STATE.get()
    if _MIRROR.state is not state:
        _mirror(state)
    make_room_for(())


def current_selection() -> Moment:
    """Return what is selected in the running thread or task, to be handed to `run_under`."""
    return Moment(_STATE.get(), _defaults)


def run_under(selection: Moment, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:  # noqa: ANN401 - the function's own
    """Call a function under a selection that `current_selection` returned."""
    with _running_in(selection):
        return function(*args, **kwargs)


@contextmanager
def _running_in(moment: Moment) -> Iterator[None]:
    before = _STATE.get()
    _activate(moment.state if moment.defaults is _defaults else _with_defaults(moment))
    try:
        yield
    finally:
        _activate(before)


def _with_defaults(moment: Moment) -> _State:
    """Return the state of a moment, below whose blocks acts what acted by default then and does no longer."""
    changed = {token: names for token, names in moment.defaults.items() if _defaults.get(token) != names}
    lowest = _Entry({token: Choice(names, None) for token, names in changed.items()})
    return _state_of((lowest, *moment.state.entries)) if changed else moment.state


def _leave(entry: _Entry) -> bool:
    """Remove a block's own entry, and tell whether it was there."""
    entries = _STATE.get().entries
    left = tuple(one for one in entries if one is not entry)
    _activate(_state_of(left))
    return len(left) < len(entries)


def _state_of(entries: tuple[_Entry, ...]) -> _State:
    """Return the choices that open blocks add up to."""
    if not entries:
        return _EMPTY
    found: dict[str, tuple[Choice, ...]] = {}
    for entry in reversed(entries):
        for token, choice in entry.choices.items():
            later = found.get(token, ())
            is_hidden = any(one.hosts is None or one.hosts == choice.hosts for one in later)
            if not is_hidden:
                found[token] = (*later, choice)
    return _State(entries, found)


def _activate(state: _State) -> None:
    _STATE.set(state)
    _mirror(state)
    for choices in state.choices.values():
        make_room_for((choice.names, choice.hosts, choice.rows is None) for choice in choices)


def _mirror(state: _State) -> None:
    for token in _MIRROR.state.choices:
        if token not in state.choices:
            delattr(_MIRROR, token)
    for token, choices in state.choices.items():
        setattr(_MIRROR, token, choices)
    _MIRROR.state = state
