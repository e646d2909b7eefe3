import os
import shutil
from pathlib import Path

import pytest

from lora_lightning.__main__ import main
from tests.faults.bench import FIT, copy_of, furnish


@pytest.fixture(scope="package")
def bench(tmp_path_factory):
    """A folder with a backbone, data, and `run/`: the checkpoints of a run of one epoch."""
    folder = tmp_path_factory.mktemp("bench")
    furnish(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(FIT) == 0
        Path("runs/version_0/checkpoints").rename("run")
        shutil.rmtree("runs")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(bench, tmp_path, monkeypatch):
    """A copy of the bench as the current folder."""
    copy_of(bench, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
