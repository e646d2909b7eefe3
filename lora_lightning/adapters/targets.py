"""Which modules a method takes, and the errors when none, or only some, match."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lora_lightning.adapters.base import TargetedMethod
from lora_lightning.adapters.calls.watch import is_container, read_past_message
from lora_lightning.adapters.experts import check_experts, expert_weights
from lora_lightning.adapters.parameters import bare_weights
from lora_lightning.adapters.patterns import compile_pattern, matches_whole
from lora_lightning.adapters.view import ModelView
from lora_lightning.adapters.weights import RESERVED, HostKind, find_codec, original_class
from lora_lightning.errors import TargetError

ALL_LINEAR = "all-linear"
T = TypeVar("T")


def has_suffix(path: str, suffix: str) -> bool:
    """Return whether `path` ends with `suffix` at a dot.

    Example:
        >>> has_suffix("encoder.layer.0.attention.self.query", "self.query"), has_suffix("subquery", "query")
        (True, False)
    """
    return path == suffix or path.endswith("." + suffix)


def ends_with_any(path: str, patterns: Iterable[str]) -> bool:
    r"""Return whether the last parts of `path` are what one of `patterns`, regular expressions, says.

    Example:
        >>> ends_with_any("layer.1.output.dense", [r"\d+.output.dense"])
        True
    """
    return any(re.fullmatch(rf"(.*\.)?{pattern}", path) for pattern in patterns)


def is_within(path: str, ancestors: Iterable[str]) -> bool:
    """Return whether `path` is one of `ancestors` or lies below one."""
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
    hosts: dict[str, nn.Module] = {}
    for path, host in select_weights(view, method):
        hosts[path.rpartition(".")[0] if _is_parameter(path, host) else path] = host
    return list(hosts.items())


def select_weights(view: ModelView, method: TargetedMethod) -> list[tuple[str, nn.Module]]:
    """Return what `select_hosts` does, but a host without a codec once for each chosen parameter, by that one's path.

    Such hosts are modules of experts, and others of whose parameters some are named.
    """
    modules = {path: module for path, module in view.model.named_modules() if RESERVED not in path.split(".")}
    places = _with_parameters(modules)
    saved = [path for path in modules if any(has_suffix(path, name) for name in method.modules_to_save or [])]
    targets = _targets(view, method)
    read_past = weights_read_past(view)
    if targets == ALL_LINEAR:
        chosen = _all_linear(modules, [*view.head_paths(), *saved], read_past)
    else:
        chosen = _matching(places, targets, "target_modules")
    chosen = _exclude(places, _by_parameter(places, set(chosen)), method)
    chosen = _keep_layers(chosen, method.layers_to_transform)
    if targets != ALL_LINEAR:
        chosen = _outside_copies(chosen, targets, saved, view.head_paths())
    for path in chosen:
        _refuse_read_past(path, places[path], view, read_past)
    _refuse_unsupported(places, chosen, saved, method)
    return [(path, places[path]) for path in chosen]


def _refuse_read_past(path: str, host: nn.Module, view: ModelView, read_past: Mapping[str, str]) -> None:
    """Refuse a host, or one parameter of a host, that the model reads without calling the host.

    Args:
        path: Path of the host, or of the parameter.
        host: The host.
        view: The model.
        read_past: What `weights_read_past` gives.

    Raises:
        TargetError: The model does.
    """
    holder, _, name = path.rpartition(".")
    if not _is_parameter(path, host):
        holder, name = path, read_past.get(path, "")
    if name in view.read_past().get(holder, ()):
        raise TargetError(read_past_message(holder, name, "target_modules"))


def _targets(view: ModelView, method: TargetedMethod) -> list[str] | str:
    return method.target_modules or view.usual_targets() or ALL_LINEAR


def takes_all_linear(view: ModelView, method: TargetedMethod) -> bool:
    """Return whether a method takes every linear layer, whatever its size."""
    return _targets(view, method) == ALL_LINEAR


def _outside_copies(
    chosen: list[str], targets: Sequence[str] | str, saved: Sequence[str], head: Sequence[str]
) -> list[str]:
    """Leave out what targets take inside modules that are trained as full copies, if they take others too.

    A name that fits inside a copy alone contradicts `modules_to_save`, unless the copy is the model's head: a task
    trains that without being asked.
    """
    inside = [path for path in chosen if is_within(path, saved) and (path not in saved or is_within(path, head))]
    outside = [path for path in chosen if path not in inside]
    names = [] if isinstance(targets, str) else targets
    is_wanted_inside = any(not any(has_suffix(path, name) for path in outside) for name in names)
    is_head = all(is_within(path, head) for path in inside)
    if not inside or not outside or (is_wanted_inside and not is_head):
        return chosen  # `_refuse_unsupported` says what is wrong with those inside
    warnings.warn(
        f"target_modules leaves out {len(inside)} modules that modules_to_save trains as full copies, such as "
        f"{inside[0]!r}.",
        stacklevel=2,
    )
    return outside


def weights_read_past(view: ModelView) -> dict[str, str]:
    """Return the name of a weight, by path, that the model reads without calling its module: no host, on evidence."""
    modules = dict(view.model.named_modules())
    found: dict[str, str] = {}
    for path, names in view.read_past().items():
        weights = [name for name in sorted(names) if modules[path]._parameters[name].dim() > 1]
        if weights:
            found[path] = weights[0]
    return found


def _with_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules by path, and after each one without a codec that one again by each parameter's path."""
    places: dict[str, nn.Module] = {}
    for path, module in modules.items():
        places[path] = module
        names = expert_weights(module) or bare_weights(module)
        places |= {f"{path}.{name}": module for name in names if path}
    return places


def _by_parameter(places: Mapping[str, nn.Module], chosen: Collection[str]) -> list[str]:
    """Put all parameters of a chosen module of experts in its place."""
    kept = []
    for path, place in places.items():
        if _is_parameter(path, place):
            is_taken = path in chosen or path.rpartition(".")[0] in chosen
        else:
            is_taken = path in chosen and not expert_weights(place)
        kept += [path] if is_taken else []
    return kept


def find_modules(model: nn.Module, names: Sequence[str], setting: str) -> list[str]:
    """Return the paths of the modules that `names` (path suffixes) name.

    Raises:
        TargetError: A name matches nothing, or a module that is never called.
    """
    modules = {path: module for path, module in model.named_modules() if RESERVED not in path.split(".")}
    chosen = _matching(modules, list(names), setting)
    for path in chosen:
        _refuse_attention_output(modules, path, setting)
        if is_container(modules[path]):
            items = [f"{path}.{name}" for name, _ in modules[path].named_children()]
            raise TargetError(
                f"{setting}: {path!r} is a {type(modules[path]).__name__}, which holds modules and is never called "
                f"itself; name what it holds: {', '.join(items[:4]) or 'it is empty'}{', …' if len(items) > 4 else ''}."
            )
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


def _all_linear(modules: Mapping[str, nn.Module], left_out: Sequence[str], read_past: Mapping[str, str]) -> list[str]:
    chosen: list[str] = []
    unknown: list[str] = []
    passed_by: list[str] = []
    for path, module in modules.items():
        if is_within(path, left_out) or _is_attention_output(modules, path):
            continue
        codec = find_codec(module)
        if codec is not None and codec.kind is HostKind.LINEAR:
            (passed_by if path in read_past else chosen).append(path)
        elif codec is None and isinstance(module, nn.Linear):
            unknown.append(f"{path} ({type(module).__name__})")
    if unknown:
        warnings.warn(
            f"all-linear leaves out layers whose forward or weight is not that of nn.Linear: {', '.join(unknown)}",
            stacklevel=2,
        )
    if passed_by:
        warnings.warn(
            f"all-linear leaves out {len(passed_by)} layers whose weight this model reads without calling them, such "
            f"as {passed_by[0]!r}.",
            stacklevel=2,
        )
    if not chosen:
        raise TargetError("all-linear found no linear layer outside the output head; name the modules to adapt.")
    return chosen


def _matching(places: Mapping[str, nn.Module], targets: Sequence[str] | str, setting: str) -> list[str]:
    """Return the paths that `targets` matches; a parameter only by a suffix that names its module too.

    Without that, `down_proj` would take the experts' beside the linear layers of that name.
    """
    modules = [path for path, place in places.items() if not _is_parameter(path, place)]
    if isinstance(targets, str):
        compile_pattern(targets, setting)  # said of what the user wrote
        chosen = [path for path in modules if matches_whole(targets, path, setting)]
        if not chosen:
            raise TargetError(
                f"{setting}: the regular expression {targets!r} matches no whole module path. "
                f"{_nearest(targets, modules)}"
            )
        return chosen
    candidates = {target: list(places) if "." in target else modules for target in targets}
    missing = [target for target in targets if not any(has_suffix(path, target) for path in candidates[target])]
    if missing:
        hints = dict.fromkeys(_parameter_hint(name, places) or _nearest(name, candidates[name]) for name in missing)
        raise TargetError(f"{setting}: no module is called {', '.join(map(repr, missing))}. {' '.join(hints)}")
    found = {path for target in targets for path in candidates[target] if has_suffix(path, target)}
    return [path for path in places if path in found]


def _is_parameter(path: str, place: nn.Module) -> bool:
    """Return whether a place is a parameter, and not a module."""
    name = path.rpartition(".")[2]
    return name in expert_weights(place) or name in bare_weights(place)


def _parameter_hint(name: str, places: Mapping[str, nn.Module]) -> str | None:
    """Return how to name a parameter that was named without its module."""
    found = next(
        (path for path, place in places.items() if _is_parameter(path, place) and has_suffix(path, name)), None
    )
    if found is None:
        return None
    return f"It is a parameter of a {type(places[found]).__name__}; write {'.'.join(found.split('.')[-2:])!r}."


def _refuse_unsupported(
    modules: Mapping[str, nn.Module], chosen: Sequence[str], saved: Sequence[str], method: TargetedMethod
) -> None:
    for path in chosen:
        if is_within(path, saved):
            raise TargetError(f"{path!r} is both a target and in modules_to_save; take it out of one of them.")
        _refuse_attention_output(modules, path, "target_modules")
        module = modules[path]
        if _is_parameter(path, module):
            _refuse_parameter(path, module, method)
        elif find_codec(module) is None:
            inner = [
                p.removeprefix(path + ".") for p, m in modules.items() if p.startswith(path + ".") and find_codec(m)
            ]
            hint = f"it holds {', '.join(inner[:6])}" if inner else _supported(module)
            raise TargetError(f"{path!r} is a {type(module).__name__}, which cannot be adapted; {hint}.")


def _refuse_parameter(path: str, host: nn.Module, method: TargetedMethod) -> None:
    if not method.takes_experts:
        what = "experts" if expert_weights(host) else "single parameters"
        raise TargetError(
            f"{type(method).__name__} does not adapt {what}, and {path!r} is a parameter of "
            f"{original_class(host).__name__}; leave it out of the targets, or use LoRA."
        )
    if expert_weights(host):
        check_experts(host)


def _supported(module: nn.Module) -> str:
    """Return what can be adapted, as the end of a sentence about a module that cannot."""
    names = bare_weights(module)
    if names:
        return f"name its parameter instead, with the module's own name before it, such as {f'...{names[0]}'!r}"
    if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
        return "its 3-D parameters are not laid out, stored or run as transformers' experts interface has them"
    return "adapters hang on linear, embedding and conv layers, and on modules of experts"


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
