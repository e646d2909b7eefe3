"""Public names of version 0.1 are still found in `lora_lightning.checkpoint`."""

from __future__ import annotations

import pytest

import lora_lightning
from lora_lightning import checkpoint, merging
from lora_lightning.peft_format.preflight import preflight


def test_moved_names() -> None:
    assert checkpoint.preflight is preflight is lora_lightning.preflight
    for name in ("LogitMove", "MergeLoss", "MergeReport", "UpdateLost", "merge_checkpoint"):
        assert getattr(checkpoint, name) is getattr(merging, name)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = checkpoint.no_such_name
