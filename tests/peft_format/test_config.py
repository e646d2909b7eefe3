"""An `adapter_config.json` is taken only as far as this library computes what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest

from lora_lightning.checkpoint.peft_folder import read_peft_config
from lora_lightning.errors import CheckpointError
from lora_lightning.peft_format.config import CONFIG_NAME, parse_peft_config

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["query"]}


def test_what_peft_writes_is_known(tmp_path: Path) -> None:
    """No field that PEFT writes by default is unknown here, whatever its version adds."""
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["a", "b"], use_rslora=True, modules_to_save=["head"])
    config.save_pretrained(tmp_path)
    read = read_peft_config(tmp_path / CONFIG_NAME)
    assert (read.r, read.alpha, read.use_rslora, read.use_dora) == (4, 7, True, False)
    assert sorted(read.target_modules) == ["a", "b"]
    assert read.modules_to_save == ["head"]


def test_an_old_and_short_config() -> None:
    read = parse_peft_config({**PLAIN, "enable_lora": None, "merge_weights": False, "fan_in_fan_out": True})
    assert (read.dropout, read.rank_pattern, read.layers_to_transform, read.base) == (0.0, {}, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 0}, "r must be a whole number from 1, got 0"),
        ({"r": "8"}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"r": None}, "r is missing"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a number above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be"),
        ({"use_dora": "yes"}, "use_dora must be true or false"),
        ({"target_modules": [1]}, "target_modules must be"),
        ({"target_modules": "(a"}, "no valid regular expression"),
        ({"rank_pattern": {"a": 0}}, "rank_pattern must be"),
        ({"rank_pattern": {"[": 2}}, "no valid regular expression"),
        ({"alpha_pattern": ["a"]}, "alpha_pattern must be"),
        ({"layers_to_transform": [-1]}, "layers_to_transform must be"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights too"),
        ({"init_lora_weights": "olora"}, "changed the base weights too"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
        ({"target_parameters": "a"}, "target_parameters must be a list of names"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"some_option_to_come": 3}, "some_option_to_come=3 is not supported"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    parse_peft_config(PLAIN)
    with pytest.raises(CheckpointError, match=message):
        parse_peft_config({**PLAIN, **change})


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", None])
def test_inits_that_leave_the_base_alone(init: object) -> None:
    assert parse_peft_config({**PLAIN, "init_lora_weights": init}).r == 8


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "must hold a JSON object, got list")])
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_peft_config(tmp_path / CONFIG_NAME)


@pytest.mark.parametrize(
    ("settings", "taken", "left"),
    [
        ({"target_modules": ["q"]}, ["q", "layers.0.attn.q"], ["layers.0.attn.vq", "layers.0.attn"]),
        ({"target_modules": r".*\.q"}, ["layers.0.attn.q"], ["q"]),
        ({"target_modules": ["q"], "exclude_modules": ["0.attn.q"]}, ["layers.1.attn.q"], ["layers.0.attn.q"]),
        ({"target_modules": ["q"], "exclude_modules": r".*\.0\..*"}, ["layers.1.attn.q"], ["layers.0.attn.q"]),
        (
            {"target_modules": ["q"], "layers_to_transform": 1},
            ["m.layers.1.a.q", "q"],
            ["m.layers.0.a.q", "layers.1.a.q"],
        ),
        ({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "h"}, ["h.0.q"], ["layers.0.q"]),
        ({"target_modules": ["q"], "modules_to_save": ["attn"]}, ["layers.0.q"], ["layers.0.attn.q"]),
    ],
)
def test_targets_as_peft_has_them(settings: dict[str, Any], taken: list[str], left: list[str]) -> None:
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    config = parse_peft_config({**PLAIN, **settings})
    theirs = peft.LoraConfig(**settings)
    for path in [*taken, *left]:
        found = check_target_module_exists(theirs, path)
        assert config.takes(path) is (path in taken)
        assert (bool(found) and not isinstance(found, _ExcludedModule)) is (path in taken)


def test_patterns_as_peft_has_them() -> None:
    config = parse_peft_config({**PLAIN, "rank_pattern": {"0.q": 2, "q": 3}, "alpha_pattern": {r"\d+\.v": 5}})
    assert config.rank_and_alpha("layers.0.q") == (2, 16)
    assert config.rank_and_alpha("layers.1.q") == (3, 16)
    assert config.rank_and_alpha("layers.1.vq") == (8, 16)
    assert config.rank_and_alpha("layers.1.v") == (8, 5)


def test_null_is_the_default(tmp_path: Path) -> None:
    text = json.dumps({**PLAIN, "rank_pattern": None, "modules_to_save": None, "lora_dropout": None, "use_dora": None})
    (tmp_path / CONFIG_NAME).write_text(text)
    assert read_peft_config(tmp_path / CONFIG_NAME) == parse_peft_config(PLAIN)
