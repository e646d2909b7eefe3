"""Methods and other settings as plain types, as checkpoints store them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import isabstract
from typing import Any, Literal, TypeAlias

from lora_lightning.adapters import Method
from lora_lightning.errors import ConfigError
from lora_lightning.paths import nearest
from lora_lightning.trust import check_import

MethodSpec = Method | Mapping[str, Any]

Recomputing: TypeAlias = bool | Literal["activations"]
"""What backward recomputes: every layer, nothing, or the activations before adapters."""


def methods_from(spec: MethodSpec | Sequence[MethodSpec]) -> tuple[Method, ...]:
    """Build methods from objects or from their plain form.

    Only classes that are imported already are found: reading a checkpoint never imports what it names.

    Raises:
        ConfigError: A class is unknown or not a method.
    """
    if isinstance(spec, Method):
        return (spec,)
    if isinstance(spec, Mapping):
        return (_method_from_plain(spec),)
    if isinstance(spec, list | tuple) and spec:
        return tuple(method for one in spec for method in methods_from(one))
    raise ConfigError(f"method takes a method, such as LoRA(r=8), or a list of methods; got {spec!r}.")


def labels(methods: Sequence[Method]) -> list[str]:
    """Return the methods' names for logging, numbered if one occurs more than once.

    Example:
        >>> from lora_lightning.methods import BitFit, LoRA
        >>> labels([LoRA(target_modules=["q"]), BitFit(), LoRA(target_modules=["k"])])
        ['lora_1', 'bitfit', 'lora_2']
    """
    names = [method.name for method in methods]
    return [
        f"{name}_{names[: index + 1].count(name)}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def refuse_packing(methods: Sequence[Method], data: object) -> None:
    """Refuse methods that put tokens before a row on data that pack several documents into a row.

    Args:
        methods: The methods.
        data: The data module, or None.

    Raises:
        ConfigError: The data are packed, and a method does not take that.
    """
    refusing = [type(method).__name__ for method in methods if not method.takes_packed_rows]
    if refusing and getattr(data, "packing", False):
        raise ConfigError(
            f"{refusing[0]} stands before each row, and with packing: true a row holds several documents, of which "
            "only the first would see it; set packing: false."
        )


def is_plain(method: Any) -> bool:  # noqa: ANN401 - objects, plain forms or lists of them
    """Return whether a method is given as a checkpoint keeps it."""
    return any(isinstance(one, Mapping) for one in (method if isinstance(method, list | tuple) else [method]))


def plain(value: Any) -> Any:  # noqa: ANN401 - nested containers of any depth
    """Return `value` with tuples and sets as lists and strings, numbers, booleans and None as they are.

    Raises:
        ConfigError: A value has no plain form.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in value]
    raise ConfigError(f"Settings must be plain types, so that a checkpoint can hold them; got {type(value).__name__}.")


def plain_ones(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some settings that have a plain form, in that form.

    Example:
        >>> plain_ones({"width": 3, "sizes": (1, 2), "activation": abs})
        {'width': 3, 'sizes': [1, 2]}
    """
    found = {}
    for name, value in settings.items():
        with suppress(ConfigError):
            found[name] = plain(value)
    return found


def _method_from_plain(spec: Mapping[str, Any]) -> Method:
    class_path = str(spec.get("class_path", ""))
    for cls in _subclasses(Method):
        if class_path in (f"{cls.__module__}.{cls.__qualname__}", cls.__name__):
            check_import(f"{cls.__module__}.{cls.__qualname__}", "method")
            return cls(**spec.get("init_args") or {})
    near = nearest(class_path.rpartition(".")[2], {cls.__name__ for cls in _subclasses(Method) if not isabstract(cls)})
    hint = f"did you mean {' or '.join(near)}? If it is a method of your own, " if near else ""
    raise ConfigError(
        f"The method {class_path!r} is not known here; {hint}import the module that defines it first (--import)."
    )


def _subclasses(cls: type[Any]) -> Iterator[type[Method]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
