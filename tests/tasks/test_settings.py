"""Methods in their plain form, as checkpoints keep them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from lora_lightning.adapters import Method
from lora_lightning.errors import ConfigError
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.tasks.settings import methods_from
from tests.adapters.toys import Bias
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineData, LineTask, make_trainer


@pytest.mark.parametrize("name", ["LoRA", "lora_lightning.methods.lora.LoRA"])
def test_known_names(name: str) -> None:
    spec = {"class_path": name, "init_args": {"r": 3}}
    assert methods_from(spec) == (LoRA(r=3),)
    assert methods_from([spec, DoRA(r=2)]) == (LoRA(r=3), DoRA(r=2))


@pytest.mark.parametrize("name", ["LoRaa", "Lora", "lora_lightning.methods.lora.LoRaa"])
def test_unknown_names_get_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"The method '{name}' is not known here; did you mean .*\bLoRA\b"):
        methods_from({"class_path": name})


def test_a_name_like_no_other() -> None:
    with pytest.raises(ConfigError, match=r"The method 'mine.Xyzzy' is not known here; import the module that defines"):
        methods_from({"class_path": "mine.Xyzzy"})


@dataclass(frozen=True, kw_only=True)
class Before(Bias):
    name: ClassVar[str] = "before"
    takes_packed_rows: ClassVar[bool] = False


class Packed(LineData):
    def __init__(self, *, packing: bool) -> None:
        super().__init__()
        self.packing = packing


@LIGHTNING_WARNINGS[0]
@LIGHTNING_WARNINGS[1]
def test_packed_data_are_refused_by_what_stands_before_a_row(tmp_path: Path) -> None:
    def fit(method: Method, *, packing: bool) -> None:
        trainer = make_trainer(tmp_path, fast_dev_run=True)
        trainer.fit(LineTask(method), datamodule=Packed(packing=packing))

    with pytest.raises(ConfigError, match="Before stands before each row, and with packing: true"):
        fit(Before(target_modules=["0"]), packing=True)
    fit(Before(target_modules=["0"]), packing=False)
    fit(Bias(target_modules=["0"]), packing=True)
