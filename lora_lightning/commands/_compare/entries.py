"""The entries of a comparison: the requested methods with their sizes, between the two extremes."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_lightning import methods as known_methods
from lora_lightning.adapters import Method
from lora_lightning.checkpoint.manifest import class_config
from lora_lightning.commands._compare.budget import Sized, Skeleton, sized
from lora_lightning.commands._compare.ends import FROZEN, FULL, FULL_RATES, no_adapters
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.imports import import_class
from lora_lightning.methods import LoRA, TrainableTokens
from lora_lightning.optim import Optim
from lora_lightning.paths import nearest

ALL = "all"
LORA_PLUS = "LoRA+"
LORA_PLUS_RATIO = 16
_KEYS = ("class_path", "init_args", "label", "optim", "rates")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the comparison.

    Args:
        label: Its name in the table.
        kind: `method`, `frozen` or `full`.
        name: Name of the method's class, or LoRA+; the key of its description.
        method: The method as `{class_path, init_args}`, None for the two extremes.
        optim: Settings of the optimizer that belong to it, such as LoRA+'s ratio.
        rates: Learning rates to choose from.
        size: Its size, such as `r = 8`.
        num_trainable: Parameters that it trains, without the head.
        num_head: Parameters of the head.
        note: Remark on budget and size.
        error: Why it is omitted; empty if it is not.
    """

    label: str
    kind: str = "method"
    name: str = ""
    method: dict[str, Any] | None = None
    optim: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    size: str = ""
    num_trainable: int = 0
    num_head: int = 0
    note: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class _Wish:
    """A requested method."""

    label: str
    name: str
    method: Method
    optim: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    usual_rates: tuple[float, ...] = ()


def entries_of(
    wanted: str | list[Any], skeleton: Skeleton, budget: int | None, rates: list[float] | None
) -> list[Entry]:
    """Return the rows of a comparison, with the two extremes as first and last.

    Args:
        wanted: `all`, or methods by name or as `{class_path, init_args, label, optim, rates}`.
        skeleton: The model, for counting.
        budget: Parameters that each method trains, without the head; None keeps the given sizes.
        rates: Learning rates for every method; None takes each method's usual ones.

    Raises:
        ConfigError: A method is unknown, misspelt or given twice, or one that was named cannot meet the budget.
        UserError: One that was named does not fit the model.
    """
    is_all = wanted == ALL or wanted == [ALL]
    named = _everything() if is_all else [_wish(one) for one in ([wanted] if isinstance(wanted, str) else wanted)]
    if not named:
        raise ConfigError("methods is empty; name some, such as [LoRA, DoRA], or write all.")
    twice = [label for label, number in Counter(wish.label for wish in named).items() if number > 1]
    if twice:
        raise ConfigError(f"Two methods are called {twice[0]!r}; give each a label of its own: {{label: ...}}.")
    reserved = [wish.label for wish in named if wish.label in (FROZEN, FULL)]
    if reserved:
        raise ConfigError(f"{reserved[0]!r} is the name of an end of the comparison; give the method another label.")
    between = [_entry(wish, skeleton, budget, rates, is_named=not is_all) for wish in named]
    return [_frozen(skeleton), *between, _full(skeleton)]


def known_names() -> dict[str, type[Method]]:
    """Return the methods with short names, by name."""
    found: dict[str, type[Method]] = {}
    for cls in _below(Method):
        hidden = cls.__name__.startswith("_") or "<locals>" in cls.__qualname__
        if not hidden and not inspect.isabstract(cls):
            found.setdefault(cls.__name__, cls)
    return found


def _everything() -> list[_Wish]:
    """Return every method of the library that has defaults, and LoRA+."""
    classes = [getattr(known_methods, name) for name in known_methods.__all__]
    concrete = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, Method)]
    wishes = [
        _Wish(label=cls.__name__, name=cls.__name__, method=cls(), usual_rates=_rates(cls))
        for cls in concrete
        if not inspect.isabstract(cls) and cls is not TrainableTokens  # it needs token ids
    ]
    return sorted([*wishes, _lora_plus()], key=lambda wish: (wish.name not in ("LoRA", LORA_PLUS), wish.label.lower()))


def _lora_plus() -> _Wish:
    optim = {"lora_plus_ratio": LORA_PLUS_RATIO}
    # B learns 16 times as fast: rates lower by the ratio's root keep the product of A's and B's as it is.
    rates = tuple(float(f"{rate / LORA_PLUS_RATIO**0.5:.2g}") for rate in _rates(LoRA))
    return _Wish(label=LORA_PLUS, name=LORA_PLUS, method=LoRA(), optim=optim, usual_rates=rates)


def _wish(one: Any) -> _Wish:  # noqa: ANN401 - what a config holds
    """Read one item of the list of methods.

    Raises:
        ConfigError: It is not a method, or its settings are wrong.
    """
    spec: dict[str, Any] = (
        {"class_path": one} if isinstance(one, str) else dict(one) if isinstance(one, Mapping) else {}
    )
    unknown = [key for key in spec if key not in _KEYS]
    if not isinstance(spec.get("class_path"), str) or unknown:
        raise ConfigError(
            f"methods: expected names such as LoRA, or mappings with {', '.join(_KEYS)}; got "
            f"{f'the key {unknown[0]!r}' if unknown else repr(one)}."
        )
    name = str(spec["class_path"])
    plus = _lora_plus() if name == LORA_PLUS else None
    cls = LoRA if plus else _find(name)
    method = cls(**(spec.get("init_args") or {}))
    optim = {**(plus.optim if plus else {}), **(spec.get("optim") or {})}
    _check_optim(name, optim)
    name = name.rpartition(".")[2]
    label = str(spec.get("label") or name)
    rates = check_rates(f"rates of {label}", spec.get("rates") or ())
    usual = plus.usual_rates if plus else _rates(method)
    return _Wish(label=label, name=name, method=method, optim=optim, rates=rates, usual_rates=usual)


def _find(name: str) -> type[Method]:
    """Return a method's class by its short name or import path.

    Raises:
        ConfigError: There is none; the nearest name is shown.
    """
    if "." in name:
        cls = import_class(name, Method, "methods")
        if inspect.isabstract(cls):
            raise ConfigError(f"methods: {name} is abstract. Name a subclass that implements it.")
        return cls
    known = known_names()
    if name in known:
        return known[name]
    near = nearest(name, [*known, LORA_PLUS, ALL])
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted([*known, LORA_PLUS]))}, and all."
    raise ConfigError(f"methods: there is no method {name!r}; {hint}")


def _check_optim(name: str, optim: dict[str, Any]) -> None:
    foreign = [key for key in optim if key not in Optim.__dataclass_fields__ or key in ("lr", "head_lr")]
    if foreign:
        raise ConfigError(
            f"methods: {name}: optim has {foreign[0]!r}; it takes settings of Optim other than lr (see rates) and "
            "head_lr, which is one for everybody."
        )
    Optim(**optim)


def check_rates(name: str, rates: Any) -> tuple[float, ...]:  # noqa: ANN401 - what a config holds
    """Return learning rates in ascending order.

    Raises:
        ConfigError: One is not a number above 0.
    """
    if not isinstance(rates, list | tuple) or not all(isinstance(one, int | float) and one > 0 for one in rates):
        raise ConfigError(f"{name}: expected a list of numbers above 0, got {rates!r}.")
    return tuple(sorted({float(one) for one in rates}))


def _rates(method: type[Method] | Method) -> tuple[float, ...]:
    return tuple(method.usual_rates)


def _entry(wish: _Wish, skeleton: Skeleton, budget: int | None, rates: list[float] | None, *, is_named: bool) -> Entry:
    """Size a method; a method that was not named may be omitted or miss the budget, with a note."""
    try:
        found: Sized = sized(wish.method, budget, lambda method: skeleton.count(method)[0])
        num_head = skeleton.count(found.method)[1]
    except UserError as error:
        if is_named:
            raise
        return Entry(label=wish.label, name=wish.name, error=f"left out: {' '.join(str(error).split())}")
    if is_named and not found.is_met:
        raise ConfigError(f"{wish.label}: {found.note}. Give another budget, or leave the method out.")
    given = wish.rates or tuple(rates or wish.usual_rates)
    return Entry(
        label=wish.label,
        name=wish.name,
        method=class_config(found.method),
        optim=wish.optim,
        rates=check_rates("search_rates", given),
        size=found.size,
        num_trainable=found.num_trainable,
        num_head=num_head,
        note=found.note,
    )


def _frozen(skeleton: Skeleton) -> Entry:
    _, num_head = skeleton.count(no_adapters())
    note = "" if num_head else "nothing trains: the base as it is"
    return Entry(label=FROZEN, kind="frozen", name=FROZEN, num_head=num_head, note=note)


def _full(skeleton: Skeleton) -> Entry:
    _, num_head = skeleton.count(no_adapters())
    num = skeleton.num_base - num_head
    return Entry(label=FULL, kind="full", name=FULL, rates=FULL_RATES, num_trainable=num, num_head=num_head)


def _below(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _below(subclass)
