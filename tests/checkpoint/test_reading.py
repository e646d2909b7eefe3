"""Checkpoints are read once and without running code, and what is damaged or foreign is refused in words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

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
    """The message names the file that is meant, where there is one."""
    inside = tmp_path / "run" / "checkpoints"
    (inside / "last").mkdir(parents=True)
    example = r"name a \.ckpt file, such as runs/version_0/checkpoints/last\.ckpt\.$"
    for folder in (tmp_path / "run", inside, inside / "last"):
        with pytest.raises(CheckpointError, match=f"is a folder; {example}"):
            read_checkpoint(folder)
    for name in ("epoch=1.ckpt", "last.ckpt"):
        (inside / name).touch()
        for folder in (tmp_path / "run", inside):
            with pytest.raises(CheckpointError, match=rf"is a folder; name a \.ckpt file inside, such as .*/{name}\.$"):
                read_checkpoint(folder)
    with pytest.raises(
        CheckpointError, match=r"is a folder; name the \.ckpt file that stands beside it, .*last\.ckpt\.$"
    ):
        read_checkpoint(inside / "last")


SAFETENSORS = save({"lora_A": torch.zeros(2)})
KINDS = [
    (b"", "it is empty"),
    (b"text,label\n", "it is a text file"),
    ("schön".encode(), "it is a text file"),
    (("x" * 511 + "ö").encode(), "it is a text file"),
    (SAFETENSORS, "it is a safetensors file, which holds weights alone"),
    (b"GGUF\x03\x00", "it is a GGUF file"),
    (b"PK\x03\x04 half a zip", "(?!it is a|it is empty)"),
    (b"\x80\x04", "(?!it is a|it is empty)"),
]


@pytest.mark.parametrize(("data", "kind"), KINDS)
def test_not_a_checkpoint(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"not a checkpoint that can be read safely \({kind}"):
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
