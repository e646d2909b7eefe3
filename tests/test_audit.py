"""The dependency audit: only a database that knows every package counts as a pass."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "audit.py"


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLEAN = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (1)"}
HOLED = {"name": "c", "version": "2", "vulns": [{"id": "CVE-2026-1", "fix_versions": ["3"]}]}


@pytest.mark.parametrize(
    ("packages", "status", "words"),
    [
        ([CLEAN], 0, "passed: no known vulnerability in 1 packages."),
        ([CLEAN, SKIPPED], 2, "it does not know 1 of 2 packages (b)"),
        ([SKIPPED], 2, "it does not know 1 of 1 packages (b)"),
        ([], 2, "it does not know 0 of 0 packages"),
        ([SKIPPED, HOLED], 1, "FAILED: 1 known vulnerabilities.\nc 2: CVE-2026-1, fixed in 3"),
    ],
)
def test_verdict(audit, packages, status, words):
    assert audit.verdict({"dependencies": packages}) == (status, words)


@pytest.mark.parametrize(
    ("answers", "arguments", "status", "words"),
    [
        ([(None, "no network"), (None, "no name")], [], 0, "NOT DONE, so nothing is known"),
        ([(None, "no network"), (None, "no name")], ["--required"], 2, "pypi: no network; osv: no name"),
        ([({"dependencies": [SKIPPED]}, ""), ({"dependencies": [CLEAN]}, "")], [], 0, "audit (osv): passed"),
        ([({"dependencies": [HOLED]}, "")], [], 1, "CVE-2026-1"),
    ],
)
def test_a_database_that_cannot_be_reached_is_said_and_no_pass(
    audit, monkeypatch, capsys, answers, arguments, status, words
):
    given = iter(answers)
    monkeypatch.setattr(audit, "ask", lambda _: next(given))
    assert audit.main(arguments) == status
    shown = "".join(capsys.readouterr())
    assert words in shown
    assert ("NOT DONE" in shown) != ("passed" in shown or "FAILED" in shown)
