"""A disk that refuses a checkpoint ends the run in one sentence, and what was saved before stays whole."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lora_lightning.__main__ import _mistake, main
from lora_lightning.checkpoint import read_adapter_folder
from lora_lightning.checkpoint.complete import newest_complete
from lora_lightning.checkpoint.pair import folder_of
from lora_lightning.errors import CheckpointError, trouble_of_disk
from tests.callbacks.runs import LIGHTNING_WARNINGS
from tests.checkpoint.runs import read_content
from tests.killing import CHANGES, WRITING, run_forked

pytestmark = LIGHTNING_WARNINGS

WORDS = {
    "full": "the disk is full",
    "read-only": "the disk is read-only",
    "limit": "a file would be larger than this process may write (ulimit -f)",
    "quota": "the disk quota is used up",
    "denied": "permission is denied",
}
CONFIG = """\
trainer:
  accelerator: cpu
  max_epochs: 1
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  callbacks:
  - class_path: AdapterCheckpoint
    init_args: {{dirpath: {folder}/checkpoints, every_n_train_steps: 1}}
  - class_path: tests.callbacks.test_disk.Trouble
    init_args: {{kind: {kind}, folder: {folder}, at_step: {at_step}}}
model:
  class_path: tests.cli_toys.ToyTask
  init_args:
    method: {{class_path: LoRA, init_args: {{r: 2, target_modules: ["0"]}}}}
data: {{class_path: tests.cli_toys.ToyData}}
"""


class Trouble(L.Callback):
    """Makes the disk refuse before the checkpoint of a step is saved; needs a process of its own.

    Args:
        kind: A key of `WORDS`.
        folder: What refuses: a mount point, if mounting is allowed, else any folder.
        at_step: Which step; 0 means when `fit` starts.
    """

    def __init__(self, kind: str, folder: str, at_step: int) -> None:
        self.kind, self.folder, self.at_step = kind, Path(folder), at_step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.at_step == 0:
            self.begin()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at_step:
            self.begin()

    def begin(self) -> None:
        if self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        elif self.kind == "full" and self.folder.is_mount():
            with (self.folder / "ballast").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
                while True:  # until there is no space left
                    stream.write(bytes(4096))
        elif self.kind == "read-only" and self.folder.is_mount():
            subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)
        else:
            sys.addaudithook(self.refuse)

    def refuse(self, event: str, arguments: tuple[Any, ...]) -> None:
        numbers = {"full": errno.ENOSPC, "read-only": errno.EROFS, "quota": errno.EDQUOT, "denied": errno.EACCES}
        is_open = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if (event in CHANGES or is_open) and str(arguments[0]).startswith(str(self.folder)):
            raise OSError(numbers[self.kind], os.strerror(numbers[self.kind]), str(arguments[0]))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB where mounting is allowed, else a plain folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    yield folder
    if is_mounted:
        subprocess.run(["umount", folder], check=True)


def fit(disk: Path, kind: str, at_step: int) -> tuple[int, str]:
    """Run `fit` in a fork, and return its exit status and what it said on stderr."""
    config, said = disk.parent / "fit.yaml", disk.parent / "stderr"
    config.write_text(CONFIG.format(folder=disk, kind=kind, at_step=at_step))

    def run() -> None:
        with said.open("w") as sys.stderr, (disk.parent / "stdout").open("w") as sys.stdout:
            status = main(["fit", "--config", str(config)])
        os._exit(status)

    status = run_forked(run)
    assert os.WIFEXITED(status)
    return os.WEXITSTATUS(status), said.read_text()


@pytest.mark.parametrize("kind", WORDS)
def test_a_disk_that_refuses_in_mid_run(disk: Path, kind: str) -> None:
    status, said = fit(disk, kind, at_step=3)
    assert status == 2
    assert said.count("\n") == 1
    assert said.startswith("lora-lightning: error: Step 3 could not be saved as ")
    newest = newest_complete(disk / "checkpoints")
    assert newest is not None
    assert f": {WORDS[kind]}. The newest complete checkpoint is {newest} (step 2)" in said
    assert read_content(newest)["global_step"] == 2
    assert read_adapter_folder(folder_of(newest))[0].step == 2
    names = sorted(path.name for path in (disk / "checkpoints").iterdir())
    assert names == ["epoch=0-step=2", "epoch=0-step=2.ckpt", "last", "last.ckpt"]


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_disk_that_refuses_from_the_start(disk: Path, kind: str) -> None:
    status, said = fit(disk, kind, at_step=0)
    assert status == 2
    assert said.count("\n") == 1
    assert WORDS[kind] in said
    assert str(disk) in said
    assert not list(disk.rglob("*.ckpt"))


def test_without_trouble_the_run_succeeds(disk: Path) -> None:
    status, said = fit(disk, "full", at_step=99)
    assert (status, said) == (0, "")
    newest = newest_complete(disk / "checkpoints")
    assert newest is not None
    assert read_content(newest)["global_step"] == 4


def test_the_first_error_is_told() -> None:
    """Winding up a run fails on a full disk as well, and says less about it."""
    full = OSError(errno.ENOSPC, "No space left on device", "metrics.csv")
    assert _mistake(full) == "metrics.csv could not be read or written: the disk is full."
    full.__context__ = CheckpointError("Step 3 could not be saved.")
    assert _mistake(full) == "Step 3 could not be saved."
    assert _mistake(OSError(errno.ENOENT, "No such file", "x")) is None


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    """Folders are made in many places; wherever one cannot be, the command says so."""
    taken = tmp_path / "reviews.csv"
    taken.touch()
    for folder in (taken, taken / "version_0", taken / "a" / "b"):
        with pytest.raises(OSError, match=r"exists|Not a directory") as caught:
            folder.mkdir(parents=True, exist_ok=True)
        assert _mistake(caught.value) == (
            f"{caught.value.filename} could not be read or written: a file is there where a folder is needed."
        )
    with pytest.raises(OSError, match="Is a directory") as caught:
        tmp_path.open("w")
    assert (
        _mistake(caught.value) == f"{tmp_path} could not be read or written: a folder is there where a file is needed."
    )
    (tmp_path / "free" / "version_0").mkdir(parents=True)


def test_a_run_below_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(folder=tmp_path / "runs", kind="full", at_step=99))
    words = ["fit", "--config", str(config), "--trainer.max_steps", "1"]
    assert main([*words, "--trainer.default_root_dir", str(config)]) == 2
    error = f"{config}/version_0/config.yaml could not be written: a file is there where a folder is needed"
    assert error in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(words) == 0


def test_other_errors_are_no_trouble_of_the_disk() -> None:
    assert trouble_of_disk(ValueError("x")) is None
