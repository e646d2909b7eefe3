"""Compare the versions in constraints.txt with the advisories of PyPI and OSV.

Exit status: 1 where a vulnerability is known. 0 where none is, and also where no database can be reached, which is said
and is no pass; with --required, not having audited everything is 2.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

OK, VULNERABLE, NOT_AUDITED = 0, 1, 2
SERVICES = ("pypi", "osv")
PINS = Path(__file__).parent.parent / "constraints.txt"


def main(arguments: list[str]) -> int:
    """Ask each database in turn until one answers."""
    reasons = []
    for service in SERVICES:
        report, reason = ask(service)
        status, text = verdict(report) if report is not None else (NOT_AUDITED, reason)
        if status != NOT_AUDITED:
            print(f"audit ({service}): {text}")
            return status
        reasons.append(f"{service}: {text}")
    print(f"audit: NOT DONE, so nothing is known about {PINS.name}. {'; '.join(reasons)}", file=sys.stderr)
    return NOT_AUDITED if "--required" in arguments else OK


def ask(service: str) -> tuple[dict[str, Any] | None, str]:
    """Run pip-audit with one database; return its report, or None and why there is none."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(PINS), "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", "10", "--vulnerability-service", service]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        return None, "no answer within 300 s"
    try:
        return json.loads(done.stdout), ""
    except ValueError:
        return None, (done.stderr.strip().splitlines() or ["no output"])[-1][:200]


def verdict(report: dict[str, Any]) -> tuple[int, str]:
    """Judge a report: pip-audit itself calls packages that its database does not know a success.

    Returns:
        The status and one or more lines.

    Example:
        >>> verdict({"dependencies": [{"name": "a", "version": "1", "vulns": []}]})
        (0, 'passed: no known vulnerability in 1 packages.')
    """
    packages = report.get("dependencies", [])
    found = [
        f"{one['name']} {one['version']}: {vuln['id']}, fixed in {', '.join(vuln['fix_versions']) or 'no version yet'}"
        for one in packages
        for vuln in one.get("vulns", [])
    ]
    if found:
        return VULNERABLE, "\n".join([f"FAILED: {len(found)} known vulnerabilities.", *found])
    skipped = [one["name"] for one in packages if "skip_reason" in one]
    if skipped or not packages:
        names = f" ({', '.join(skipped[:3])}{', …' if len(skipped) > 3 else ''})" if skipped else ""
        return NOT_AUDITED, f"it does not know {len(skipped)} of {len(packages)} packages{names}"
    return OK, f"passed: no known vulnerability in {len(packages)} packages."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
