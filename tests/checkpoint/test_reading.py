"""Checkpoints are read once and without running code, and what is damaged or foreign is refused in words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lightning.checkpoint.reading import read_checkpoint
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import LoRA
from tests.checkpoint.runs import PlainTask, save_checkpoint


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return save_checkpoint(PlainTask(method=LoRA(r=2, target_modules=["0"])), tmp_path / "step=3.ckpt")


def test_missing_file_names_the_others(ckpt: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*other\.ckpt; in its folder are step=3\.ckpt"):
        read_checkpoint(ckpt.with_name("other.ckpt"))


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder; name the \.ckpt file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("data", [b"", b"text", b"PK\x03\x04 half a zip"])
def test_not_a_checkpoint(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read safely"):
        read_checkpoint(path)


def test_truncated(ckpt: Path) -> None:
    data = ckpt.read_bytes()
    read_checkpoint(ckpt)
    ckpt.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read safely"):
        read_checkpoint(ckpt)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Canary(tmp_path / "canary")}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read safely"):
        read_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1], {"hyper_parameters": {}, "state_dict": 1}])
def test_other_content(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="was not written by a task of lora_lightning"):
        read_checkpoint(tmp_path / "x.ckpt")
