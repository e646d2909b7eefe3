"""Methods in their plain form, as checkpoints keep them."""

from __future__ import annotations

import pytest

from lora_lightning.errors import ConfigError
from lora_lightning.methods import DoRA, LoRA
from lora_lightning.tasks.settings import methods_from


@pytest.mark.parametrize("name", ["LoRA", "lora_lightning.methods.lora.LoRA"])
def test_known_names(name: str) -> None:
    spec = {"class_path": name, "init_args": {"r": 3}}
    assert methods_from(spec) == (LoRA(r=3),)
    assert methods_from([spec, DoRA(r=2)]) == (LoRA(r=3), DoRA(r=2))


@pytest.mark.parametrize("name", ["LoRaa", "Lora", "lora_lightning.methods.lora.LoRaa"])
def test_unknown_names_get_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"The method '{name}' is not known here; did you mean LoRA\b"):
        methods_from({"class_path": name})


def test_a_name_like_no_other() -> None:
    with pytest.raises(ConfigError, match=r"The method 'mine.Xyzzy' is not known here; import the module that defines"):
        methods_from({"class_path": "mine.Xyzzy"})
