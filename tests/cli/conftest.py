"""Every test of the command line runs in a folder of its own that holds a good config."""

from pathlib import Path

import pytest

import tests.cli_toys  # noqa: F401 - its classes are known by their short names
from tests.cli.lines import CONFIG


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(CONFIG)
    return tmp_path
