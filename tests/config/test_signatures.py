from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from lora_lightning.adapters.base import Method, TargetedMethod
from lora_lightning.config.signatures import (
    alternatives,
    describe,
    find_class,
    is_class_type,
    parameters_of,
    parameters_of_function,
    subclasses,
)
from lora_lightning.methods import DoRA, LoRA


class Base:
    def __init__(self, a: int, b: str = "") -> None: ...


class Child(Base):
    def __init__(self, c: float = 0.0, **kwargs: Any) -> None: ...


class Inherits(Child):
    pass


class Open:
    def __init__(self, **kwargs: Any) -> None: ...


class _Hidden(Base):
    pass


@dataclass
class Data:
    x: int
    y: list[str] = field(default_factory=list)
    z: int = field(default=0, init=False)


def test_keywords_are_followed_to_the_base():
    for cls in (Child, Inherits):
        parameters = parameters_of(cls)
        assert parameters.types == {"c": float, "a": int, "b": str}
        assert parameters.required == {"a"}
        assert not parameters.is_open


def test_keywords_without_end():
    assert parameters_of_function(Open.__init__).is_open
    assert not parameters_of_function(Base.__init__).is_open


def test_dataclasses():
    assert parameters_of(Data).types == {"x": int, "y": list[str]}
    assert parameters_of(Data).required == {"x"}
    assert {"r", "alpha", "target_modules", "modules_to_save"} <= parameters_of(LoRA).types.keys()


def test_types_that_cannot_be_resolved_count_as_any():
    def function(a: "Nowhere") -> None: ...  # noqa: F821

    assert parameters_of_function(function).types == {"a": Any}


def test_alternatives():
    assert alternatives(Optional[int | str]) == (int, str, type(None))  # noqa: UP045
    assert alternatives(list[int]) == (list[int],)


@pytest.mark.parametrize(("hint", "is_class"), [(LoRA, True), (int, False), (list[LoRA], False), (Path, False)])
def test_class_types(hint, is_class):
    assert is_class_type(hint) is is_class


def test_find_class():
    assert find_class("LoRA", Method) is LoRA
    assert find_class("lora_lightning.methods.dora.DoRA", Method) is DoRA
    assert find_class("DoRA", Base) is None
    assert find_class("lora_lightning.methods.dora.DoRA", Base) is None
    assert find_class("never.imported.LoRA", Method) is None


def test_subclasses_are_public_and_concrete():
    assert set(subclasses(Base)) == {"Base", "Child", "Inherits"}
    assert {"LoRA", "DoRA"} <= subclasses(Method).keys()
    assert not {Method.__name__, TargetedMethod.__name__} & subclasses(Method).keys()


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "an int"),
        (float | None, "a number"),
        (Literal["a", "b"] | None, "one of a, b"),
        (dict[str, int], "a mapping"),
        (Method | list[Method] | None, "a Method or a list of Method"),
        (type(None), "null"),
        (bool | int, "true or false or an int"),
    ],
)
def test_describe(hint, text):
    assert describe(hint) == text
