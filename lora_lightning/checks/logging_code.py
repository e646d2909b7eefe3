"""Whether a user's code may log metrics that no declaration names, found by reading its bytecode.

A task declares what it logs (`AdapterTask.logged_metrics`), completely for the library's own classes. A user's class
may call `self.log` anywhere, so a metric that is not declared is refused only if none of his code logs.
The search errs on one side alone: whatever looks like logging counts as such.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType

_INSTALLED = tuple({sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")})
_OURS = frozenset(
    {"lora_lightning", "lightning", "lightning_fabric", "pytorch_lightning", "torch", "torchmetrics", "builtins", "abc"}
)
"""Packages whose classes log nothing but what is declared."""
_LOGS = re.compile(r"^log$|^log_(?!softmax|sigmoid|prob|likelihood|sum_exp)|_log$")
_CHANGES = frozenset({"update", "setdefault"})


def logs_by_itself(thing: object, *, declared_by: str = "logged_metrics") -> bool:
    """Return whether an object's class may log metrics beyond those that it declares.

    Args:
        thing: A task, callback or data module.
        declared_by: Name of the method that declares metrics: code of the class that defines it, and of its bases, is
            taken as declared.
    """
    roots = {_root(cls.__module__) for cls in type(thing).__mro__} - _OURS
    seen: set[CodeType] = set()
    return any(_function_logs(function, roots, seen) for function in _functions_of(thing, declared_by, roots))


def _functions_of(thing: object, declared_by: str, roots: set[str]) -> Iterator[FunctionType]:
    """Yield the users' functions that an object can call: its methods, and those of the objects that it holds."""
    for cls in type(thing).__mro__:
        if declared_by in vars(cls):
            break
        yield from _methods_of(cls, roots)
    for held in vars(thing).values():
        if isinstance(held, FunctionType | functools.partial):
            yield from _unwrapped(held, roots)
        yield from _methods_of(type(held), roots)


def _methods_of(cls: type, roots: set[str]) -> Iterator[FunctionType]:
    if _is_of_user(cls.__module__, roots):
        for value in vars(cls).values():
            yield from _unwrapped(value, roots)


def _unwrapped(value: object, roots: set[str]) -> Iterator[FunctionType]:
    """Yield the functions behind a method, a property, a partial or a decorated function."""
    if isinstance(value, property):
        candidates: Iterable[object] = (value.fget, value.fset)
    elif isinstance(value, classmethod | staticmethod):
        candidates = (value.__func__,)
    elif isinstance(value, functools.partial | functools.cached_property):
        candidates = (value.func,)
    else:
        candidates = (value,)
    for candidate in candidates:
        function = inspect.unwrap(candidate) if isinstance(candidate, FunctionType) else None
        if isinstance(function, FunctionType) and _is_of_user(function.__module__, roots):
            yield function


def _function_logs(function: FunctionType, roots: set[str], seen: set[CodeType]) -> bool:
    """Return whether a function, or one of the users' that it names, looks like logging."""
    if function.__code__ in seen:
        return False
    seen.add(function.__code__)
    codes = list(_codes(function.__code__))
    names = {name for code in codes for name in code.co_names}
    texts = {text for code in codes for text in code.co_consts if isinstance(text, str)}
    if any(_LOGS.search(name) for name in names | texts):
        return True
    if "callback_metrics" in names and (names & _CHANGES or any(map(_stores_items, codes))):
        return True
    return any(_function_logs(other, roots, seen) for other in _named_functions(function, names, roots))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _stores_items(code: CodeType) -> bool:
    return any(instruction.opname == "STORE_SUBSCR" for instruction in dis.get_instructions(code))


def _named_functions(function: FunctionType, names: set[str], roots: set[str]) -> Iterator[FunctionType]:
    """Yield the users' functions and methods that the names of a function's code lead to."""
    for name in names & function.__globals__.keys():
        found = function.__globals__[name]
        inside = [found]
        if isinstance(found, ModuleType):
            inside = [vars(found).get(one) for one in names] if _is_of_user(found.__name__, roots) else []
        for one in inside:
            yield from _methods_of(one, roots) if isinstance(one, type) else _unwrapped(one, roots)


def _is_of_user(module: str | None, roots: set[str]) -> bool:
    """Return whether a module is the user's: of the package that defines his class, or in no folder of packages."""
    root = _root(module)
    if root in _OURS or root in sys.builtin_module_names:
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return root in roots or file is None or not file.startswith(_INSTALLED)


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]
