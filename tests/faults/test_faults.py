"""Every row of the fault table ends in its sentence and exit status: one line on stderr, no traceback."""

import os
import re
from pathlib import Path

import jsonargparse
import pytest

from lora_lightning.__main__ import main
from tests.faults import configuration, data, distributed, loading, merging, training
from tests.faults.bench import FIT, MERGE, PATCHES, START, TEST, copy_of, furnish

FAULTS = [fault for table in (configuration, data, loading, training, distributed, merging) for fault in table.FAULTS]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*names .* as its base, and this model came from.*"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with a backbone, data, and `run/`: the checkpoints of a run that went well."""
    folder = tmp_path_factory.mktemp("bench")
    furnish(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(FIT) == 0
        Path("runs/version_0/checkpoints").rename("run")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(bench, tmp_path, monkeypatch):
    """A copy of the bench as the current folder; strict mode and what rows replace are undone afterwards."""
    copy_of(bench, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_LIGHTNING_ALLOWED", "")  # so that what a strict command sets is undone as well
    monkeypatch.delenv("LORA_LIGHTNING_ALLOWED")
    settings = jsonargparse._common.parsing_settings
    for name in ("import_path_verdicts", "import_paths_enforced"):
        monkeypatch.setitem(settings, name, settings[name])
    yield tmp_path
    PATCHES.undo()


def test_the_table_is_long_and_says_each_thing_once():
    assert len(FAULTS) >= 60
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(here, capsys, fault):
    arguments = fault.arguments()
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    status = main(arguments)
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("lora-lightning: error: ")]
    assert len(errors) == 1, lines
    assert lines[-1] == errors[0]
    assert re.search(fault.sentence, errors[0].removeprefix("lora-lightning: error: ")), errors[0]
    assert status == fault.status
    assert not any("Traceback" in line for line in lines)
    assert not Path("pwned").exists()
    after = [path for path in sorted(Path().rglob("*")) if path.name != "__pycache__"]
    if fault.leaves_run:
        after = [path for path in after if not path.is_relative_to("runs/version_1")]
        assert not [*Path("runs/version_1").rglob("*.ckpt")]
    assert after == before


@pytest.mark.parametrize("arguments", [FIT, TEST, MERGE, START], ids=["fit", "test", "merge", "start"])
def test_nothing_is_wrong_with_the_bench_itself(here, arguments):
    assert main(arguments) == 0
