from dataclasses import dataclass
from typing import Any

import pytest

from lora_lightning.adapters.base import Method
from lora_lightning.config.diagnosis import explain, problems
from lora_lightning.config.settings import Settings
from lora_lightning.config.signatures import Parameters, parameters_of
from lora_lightning.methods import LoRA


@dataclass
class Closed:
    rate: float = 0.1

    def __post_init__(self):
        if self.rate <= 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")


class Thing:
    def __init__(
        self,
        name: str,
        method: Method | list[Method] | None = None,
        closed: Closed | None = None,
        size: int = 1,
        anything: Any = None,
        patterns: dict[str, int] | None = None,
    ) -> None: ...


def first(value, hint=Thing):
    return next((problem.message for problem in problems(value, hint, ("key",))), None)


def spec(**arguments):
    return {"class_path": "Thing", "init_args": {"name": "x", **arguments}}


@pytest.mark.parametrize(
    "value",
    [
        spec(),
        spec(method="LoRA"),
        spec(method={"class_path": "LoRA", "init_args": {"r": 4, "alpha": 8, "target_modules": "all-linear"}}),
        spec(method=[{"class_path": "LoRA"}, "DoRA"]),
        spec(method=None, closed={"rate": 2}, anything={"class_path": "Nothing"}, patterns={"a": 1}),
        {"name": "x"},
    ],
)
def test_good_settings(value):
    assert first(value) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (spec(nme=1), "unknown key `key.init_args.nme`; did you mean `name`?"),
        ({"class_path": "Thing"}, "`key.init_args.name` is missing; give a string"),
        ({"class_path": "Thing", "name": "x"}, "unknown key `key.name`; it goes under `init_args`"),
        ({"class_path": "Thing", "init_arg": {}}, "unknown key `key.init_arg`; did you mean `init_args`?"),
        (spec(size="x"), "key.init_args.size: expected an int, got 'x'"),
        (spec(patterns={"a": "x"}), "key.init_args.patterns: expected a mapping, got {'a': 'x'}"),
        (spec(closed={"rate": 0}), "key.init_args.closed.rate: rate must be above 0, got 0"),
        (spec(closed={"rat": 0}), "unknown key `key.init_args.closed.rat`; did you mean `rate`?"),
        (spec(method="Lora"), "unknown class `Lora` at `key.init_args.method`; did you mean `LoRA`?"),
        (spec(method=[{"class_path": "LoRA", "init_args": {"r": "8x"}}]), "method.0.init_args.r: expected an int, got"),
        (
            spec(method={"class_path": "a.b.C"}),
            "`key.init_args.method`: There is no module `a` among the installed ones",
        ),
        (spec(method=3), "key.init_args.method: expected a Method or a list of Method, got 3"),
        ({"class_path": "Thing", "init_args": [1]}, "key.init_args: expected a mapping, got [1]"),
        (spec(method={"class_path": "LoRA", "init_args": {"lora_dropout": 0}}), "lora_dropout`; use dropout"),
    ],
)
def test_mistakes(value, message):
    assert message in (first(value) or "")


def test_a_class_without_its_arguments_in_a_group():
    group = parameters_of(Thing)
    assert first({"name": "x", "size": 2}, group) is None
    assert first({"name": "x", "siz": 2}, group) == "unknown key `key.siz`; did you mean `size`?"


def test_explain_tells_the_line():
    schema = Parameters({"model": LoRA})
    settings = Settings(
        {"model": {"class_path": "LoRA", "init_args": {"r": 0}}}, {("model", "init_args"): "a.yaml, line 3"}
    )
    assert (
        explain(settings, schema)
        == "a.yaml, line 3: model.init_args.r: LoRA: r must be an integer of at least 1, got 0."
    )
    assert explain(Settings({"model": {"class_path": "LoRA"}}), schema) is None
