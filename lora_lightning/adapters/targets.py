"""Which modules a method takes, and the errors when none, or only some, match."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lora_lightning.adapters.base import TargetedMethod
from lora_lightning.adapters.patterns import compile_pattern, matches_whole
from lora_lightning.adapters.view import ModelView
from lora_lightning.adapters.weights import RESERVED, HostKind, find_codec
from lora_lightning.errors import TargetError

ALL_LINEAR = "all-linear"
T = TypeVar("T")


def has_suffix(path: str, suffix: str) -> bool:
    """Tell whether `path` ends with `suffix` at a dot.

    Example:
        >>> has_suffix("encoder.layer.0.attention.self.query", "self.query"), has_suffix("subquery", "query")
        (True, False)
    """
    return path == suffix or path.endswith("." + suffix)


def ends_with_any(path: str, patterns: Iterable[str]) -> bool:
    r"""Tell whether the last parts of `path` are what one of `patterns`, regular expressions, says.

    Example:
        >>> ends_with_any("layer.1.output.dense", [r"\d+.output.dense"])
        True
    """
    return any(re.fullmatch(rf"(.*\.)?{pattern}", path) for pattern in patterns)


def is_within(path: str, ancestors: Iterable[str]) -> bool:
    """Tell whether `path` is one of `ancestors` or lies below one."""
    return any(path == ancestor or path.startswith(ancestor + ".") for ancestor in ancestors)


def layer_index(path: str) -> int | None:
    """Return the first number among the parts of a path: the block that a module belongs to.

    Example:
        >>> layer_index("bert.encoder.layer.11.output.dense"), layer_index("classifier")
        (11, None)
    """
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def select_hosts(view: ModelView, method: TargetedMethod) -> list[tuple[str, nn.Module]]:
    """Return the modules that a method takes, in the model's order.

    Args:
        view: The model.
        method: The method with its `target_modules`, `exclude_modules`, `layers_to_transform`, `modules_to_save`.

    Raises:
        TargetError: Nothing matches, an entry of a list matches nothing, or a match cannot be adapted.
        ConfigError: A regular expression is malformed.
    """
    modules = {path: module for path, module in view.model.named_modules() if RESERVED not in path.split(".")}
    saved = [path for path in modules if any(has_suffix(path, name) for name in method.modules_to_save or [])]
    targets = method.target_modules or view.usual_targets() or ALL_LINEAR
    if targets == ALL_LINEAR:
        chosen = _all_linear(modules, [*view.head_paths(), *saved])
    else:
        chosen = _matching(modules, targets, "target_modules")
    chosen = _exclude(modules, chosen, method)
    chosen = _keep_layers(chosen, method.layers_to_transform)
    _refuse_unsupported(modules, chosen, saved)
    return [(path, modules[path]) for path in chosen]


def find_modules(model: nn.Module, names: Sequence[str], setting: str) -> list[str]:
    """Return the paths of the modules that `names` (path suffixes) name.

    Raises:
        TargetError: A name matches nothing, or a module that is never called.
    """
    modules = {path: module for path, module in model.named_modules() if RESERVED not in path.split(".")}
    chosen = _matching(modules, list(names), setting)
    for path in chosen:
        _refuse_attention_output(modules, path, setting)
    return chosen


def by_pattern(path: str, patterns: Mapping[str, T] | None, default: T) -> T:
    r"""Return the value of the first pattern (path suffix or regular expression) that fits `path`.

    Example:
        >>> by_pattern("layer.0.query", {"query": 4, r"layer\.1\..*": 2}, 8)
        4
    """
    for pattern, value in (patterns or {}).items():
        if has_suffix(path, pattern) or matches_whole(rf"(.*\.)?({pattern})", path, "a pattern"):
            return value
    return default


def check_patterns(setting: str, patterns: Mapping[str, object] | None, paths: Sequence[str]) -> None:
    """Raise TargetError unless every pattern fits at least one adapted module.

    Raises:
        TargetError: A pattern fits none of `paths`.
        ConfigError: A pattern is no valid regular expression.
    """
    for pattern in patterns or {}:
        compile_pattern(pattern, setting)
        if not any(by_pattern(path, {pattern: True}, default=False) for path in paths):
            raise TargetError(f"{setting}: {pattern!r} fits no adapted module. {_nearest(pattern, paths)}")


def _all_linear(modules: Mapping[str, nn.Module], left_out: Sequence[str]) -> list[str]:
    chosen, unknown = [], []
    for path, module in modules.items():
        if is_within(path, left_out) or _is_attention_output(modules, path):
            continue
        codec = find_codec(module)
        if codec is not None and codec.kind is HostKind.LINEAR:
            chosen.append(path)
        elif codec is None and isinstance(module, nn.Linear):
            unknown.append(f"{path} ({type(module).__name__})")
    if unknown:
        warnings.warn(
            f"all-linear leaves out layers whose forward or weight is not that of nn.Linear: {', '.join(unknown)}",
            stacklevel=2,
        )
    if not chosen:
        raise TargetError("all-linear found no linear layer outside the output head; name the modules to adapt.")
    return chosen


def _matching(modules: Mapping[str, nn.Module], targets: Sequence[str] | str, setting: str) -> list[str]:
    if isinstance(targets, str):
        compile_pattern(targets, setting)  # said of what the user wrote
        chosen = [path for path in modules if matches_whole(targets, path, setting)]
        if not chosen:
            raise TargetError(
                f"{setting}: the regular expression {targets!r} matches no whole module path. "
                f"{_nearest(targets, modules)}"
            )
        return chosen
    missing = [target for target in targets if not any(has_suffix(path, target) for path in modules)]
    if missing:
        hints = " ".join(_nearest(name, modules) for name in missing)
        raise TargetError(f"{setting}: no module is called {', '.join(map(repr, missing))}. {hints}")
    return [path for path in modules if any(has_suffix(path, target) for target in targets)]


def _refuse_unsupported(modules: Mapping[str, nn.Module], chosen: Sequence[str], saved: Sequence[str]) -> None:
    for path in chosen:
        if is_within(path, saved):
            raise TargetError(f"{path!r} is both a target and in modules_to_save; take it out of one of them.")
        _refuse_attention_output(modules, path, "target_modules")
        module = modules[path]
        if find_codec(module) is None:
            inner = [
                p.removeprefix(path + ".") for p, m in modules.items() if p.startswith(path + ".") and find_codec(m)
            ]
            hint = f"it holds {', '.join(inner[:6])}" if inner else "adapters hang on linear, embedding and conv layers"
            raise TargetError(f"{path!r} is a {type(module).__name__}, which cannot be adapted; {hint}.")


def _exclude(modules: Mapping[str, nn.Module], chosen: list[str], method: TargetedMethod) -> list[str]:
    if not method.exclude_modules:
        return chosen
    excluded = _matching(modules, method.exclude_modules, "exclude_modules")
    kept = [path for path in chosen if not is_within(path, excluded)]
    if not kept:
        raise TargetError(
            f"exclude_modules={method.exclude_modules!r} leaves out everything that target_modules matched, "
            f"such as {chosen[0]!r}."
        )
    return kept


def _keep_layers(chosen: list[str], layers: Sequence[int] | int | None) -> list[str]:
    if layers is None:
        return chosen
    wanted = {layers} if isinstance(layers, int) else set(layers)
    there = {index for path in chosen if (index := layer_index(path)) is not None}
    if not wanted or not wanted <= there:
        raise TargetError(
            f"layers_to_transform={layers!r}: the matched modules lie in layers "
            f"{', '.join(map(str, sorted(there))) or '(none has a layer number)'}; choose among these."
        )
    return [path for path in chosen if layer_index(path) in wanted]


def _is_attention_output(modules: Mapping[str, nn.Module], path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return name == "out_proj" and isinstance(modules.get(parent), nn.MultiheadAttention)


def _refuse_attention_output(modules: Mapping[str, nn.Module], path: str, setting: str) -> None:
    if _is_attention_output(modules, path):
        raise TargetError(
            f"{path!r} is never called by torch's MultiheadAttention, which reads its weight directly: an adapter "
            f"there would do nothing. Leave it out of {setting}."
        )


def _nearest(name: str, paths: Iterable[str]) -> str:
    """Tell the last parts of module paths that are nearest to `name`."""
    width = name.count(".") + 1
    suffixes = list(dict.fromkeys(".".join(path.split(".")[-width:]) for path in paths if path))
    near = difflib.get_close_matches(name, suffixes, n=3, cutoff=0.5)
    if near:
        return f"Nearest names: {', '.join(near)}."
    last = dict.fromkeys(path.rpartition(".")[2] for path in paths if path)
    names = [name for name in last if not name.isdigit()] or list(last)
    return f"Module names of this model: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}."
