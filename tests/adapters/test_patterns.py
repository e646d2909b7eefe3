"""Regular expressions of users: as `re` reads them, but never for longer than a moment."""

import re
import time

import pytest
from torch import nn

from lora_lightning import LoRA, attach
from lora_lightning.adapters.patterns import MATCH_SECONDS, MAX_LENGTH, compile_pattern, match_start, matches_whole
from lora_lightning.errors import CheckpointError, ConfigError
from lora_lightning.peft_format.config import parse_peft_config

RUNAWAY = "(a|aa)+$"
LONG = "a" * 60 + "b"
PATHS = ["bert.encoder.layer.11.attention.self.query", "classifier", "", "layers.0.mlp.down_proj", "h.1.attn.c_proj"]


@pytest.mark.parametrize(
    "pattern",
    [r".*\.(query|value)", r"(?i).*QUERY", r"layers\.[0-9]+\..*", "", r"(.*\.)?(c_proj)", r".*\d{2}.*", "[^.]+"],
)
def test_they_read_as_re_reads_them(pattern):
    for path in PATHS:
        assert matches_whole(pattern, path, "s") == bool(re.fullmatch(pattern, path))
        assert bool(match_start(pattern, path, "s")) == bool(re.match(pattern, path))


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "a{2,1}", "(?P<x>a", "x" * (MAX_LENGTH + 1)])
def test_malformed_and_endless_ones_are_refused(pattern):
    with pytest.raises(ConfigError, match=r"^target_modules: .*regular expression"):
        compile_pattern(pattern, "target_modules")


def test_one_that_runs_away_is_stopped():
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"target_modules: the regular expression '\(a\|aa\)\+\$' runs away"):
        matches_whole(RUNAWAY, LONG, "target_modules")
    assert time.process_time() - start < 4 * MATCH_SECONDS
    assert matches_whole(RUNAWAY, "a" * 60, "target_modules")


def test_every_setting_that_takes_one_is_guarded():
    model = nn.Sequential()
    model.add_module(LONG, nn.Linear(4, 4))
    for setting in ({"target_modules": RUNAWAY}, {"exclude_modules": RUNAWAY}, {"rank_pattern": {RUNAWAY: 2}}):
        with pytest.raises(ConfigError, match="runs away"):
            attach(model, LoRA(**{"r": 2, "target_modules": [LONG], **setting}))
    assert attach(model, LoRA(r=2, target_modules=[LONG])).hosts


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": RUNAWAY},
        {"target_modules": [LONG], "exclude_modules": RUNAWAY},
        {"target_modules": [LONG], "modules_to_save": [RUNAWAY]},
        {"target_modules": [LONG], "rank_pattern": {RUNAWAY: 2}},
    ],
)
def test_a_strangers_adapter_config_is_guarded_too(settings):
    config = parse_peft_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings})
    with pytest.raises(CheckpointError, match="runs away"):
        (config.rank_and_alpha if "rank_pattern" in settings else config.takes)(LONG)
