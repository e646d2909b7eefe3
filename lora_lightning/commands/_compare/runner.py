"""Runs the trials of a study one after the other in separate processes, and skips finished ones."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_lightning.commands._compare.entries import Entry
from lora_lightning.commands._compare.records import Result, read_result, write_json, write_result
from lora_lightning.commands._compare.study import Study

_MODULE = "lora_lightning.commands._compare.trial"
Job = dict[str, Any]


@dataclass(kw_only=True)
class Outcome:
    """Results of one row.

    Args:
        entry: The row.
        searches: Results of the learning rates that were tried.
        rate: The chosen rate, or None.
        finals: Results of the full runs, by seed.
        errors: Errors, a sentence each.
        is_complete: Whether the row has been processed.
    """

    entry: Entry
    searches: list[Result] = field(default_factory=list)
    rate: float | None = None
    finals: dict[int, Result] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    is_complete: bool = False


def run_child(jobs: Path, log: Path) -> int:
    """Run the jobs of a file in a fresh process, and return its exit status.

    Args:
        jobs: The file.
        log: File for the output of the process.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    with log.open("ab") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(jobs)], stdout=stream, stderr=subprocess.STDOUT, env=environment
        )
        try:
            return child.wait()
        except BaseException:  # Ctrl-C as well: no trial goes on without its comparison
            child.kill()
            child.wait()
            raise


class Runner:
    """Runs a study.

    Args:
        study: The study.
        console: Console for progress messages.
        after_each: Called with all outcomes whenever a row is finished.
    """

    def __init__(self, study: Study, console: Console, after_each: Callable[[list[Outcome]], None]) -> None:
        self.study = study
        self.console = console
        self.after_each = after_each
        self.outcomes = [Outcome(entry=entry) for entry in study.entries]
        self._num_done = 0
        self._num_all = sum(self._num_trials(entry) for entry in study.entries)
        self._steps_left = sum(self._num_steps(entry) for entry in study.entries)
        self._steps_run, self._seconds_run = 0, 0.0

    def run(self) -> list[Outcome]:
        """Run unfinished trials, and return the results of each row."""
        for outcome in self.outcomes:
            entry = outcome.entry
            if entry.error:
                self.console.print(f"{entry.label}: {entry.error}", markup=False, highlight=False)
            elif self._choose_rate(outcome):
                self._train(outcome)
            outcome.is_complete = True
            self.after_each(self.outcomes)
        return self.outcomes

    def _choose_rate(self, outcome: Outcome) -> bool:
        """Search for the learning rate; return whether one was found."""
        study, entry = self.study, outcome.entry
        rates = entry.rates or (study.head_lr,)
        if not self._searches(entry):
            outcome.rate = rates[0]
            return True
        jobs: list[Job] = [
            {"spec": study.search_spec(entry, r), "path": str(study.search_path(entry, r))} for r in rates
        ]
        self._run(f"{entry.label}: search over {', '.join(f'{rate:g}' for rate in rates)}", jobs)
        outcome.searches = [self._result(job) for job in jobs]
        outcome.rate = best_rate(outcome.searches)
        if outcome.rate is not None:
            return True
        errors = [
            f"rate {job['spec']['rate']:g}: {result['error']}"
            for job, result in zip(jobs, outcome.searches, strict=True)
            if "error" in result
        ]
        outcome.errors.append(errors[0] if errors else "no learning rate gave a finite validation loss")
        self.console.print(f"  failed: {outcome.errors[-1]}", style="red", markup=False, highlight=False)
        self._skip()
        return False

    def _train(self, outcome: Outcome) -> None:
        """Run the full runs of one row, one for each seed."""
        study, entry = self.study, outcome.entry
        assert outcome.rate is not None
        for seed in study.seeds:
            spec = study.final_spec(entry, seed, outcome.rate, self._steps(outcome))
            job = {"spec": spec, "path": str(study.final_path(entry, seed))}
            self._run(f"{entry.label}: seed {seed} at {outcome.rate:g}", [job])
            result = self._result(job)
            if "error" in result:
                outcome.errors.append(f"seed {seed}: {result['error']}")
                self.console.print(f"  failed: {outcome.errors[-1]}", style="red", markup=False, highlight=False)
            else:
                outcome.finals[seed] = result

    def _run(self, title: str, jobs: list[Job]) -> None:
        """Run the jobs of a group without a result in one new process."""
        self._num_done += 1
        steps = sum(job["spec"]["steps"] for job in jobs)
        waiting = [job for job in jobs if _is_open(job)]
        number = f"[{self._num_done}/{self._num_all}]"
        if not waiting:
            self.console.print(f"{number} {title}: done before", markup=False, highlight=False)
        else:
            self.console.print(f"{number} {title}{self._time_left()}", markup=False, highlight=False)
            started = time.monotonic()
            self._start(waiting)
            self._steps_run += sum(job["spec"]["steps"] for job in waiting)
            self._seconds_run += time.monotonic() - started
            self.console.print(f"  {_told(jobs)}  ({time.monotonic() - started:.0f} s)", markup=False, highlight=False)
        self._steps_left -= steps

    def _start(self, jobs: list[Job]) -> None:
        """Run jobs in a new process; jobs without a result failed with it."""
        folder = Path(jobs[0]["path"]).parent
        file, log = folder / "jobs.json", folder / "log.txt"
        write_json(file, jobs)
        status = run_child(file, log)
        for job in jobs:
            if read_result(Path(job["path"]), job["spec"]) is None:
                how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
                hint = " (was there too little memory?)" if status == -9 else ""
                error = f"the trial's process {how}{hint}; see {log}"
                write_result(Path(job["path"]), job["spec"], {"error": error})

    def _result(self, job: Job) -> Result:
        result = read_result(Path(job["path"]), job["spec"])
        assert result is not None
        return result

    def _steps(self, outcome: Outcome) -> int:
        """Return the steps of a full run; if minutes are given, as many as the speed of the search allows."""
        if self.study.steps is not None:
            return self.study.steps
        assert self.study.minutes is not None
        [chosen] = [found for found in outcome.searches if found.get("rate") == outcome.rate]
        pace = chosen.get("step_seconds")
        return max(int(60 * self.study.minutes / pace), 1) if pace else 1

    # Progress.

    def _searches(self, entry: Entry) -> bool:
        return len(entry.rates) > 1 or self.study.minutes is not None

    def _num_trials(self, entry: Entry) -> int:
        return 0 if entry.error else len(self.study.seeds) + self._searches(entry)

    def _num_steps(self, entry: Entry) -> int:
        if entry.error:
            return 0
        search = max(len(entry.rates), 1) * self.study.search_steps if self._searches(entry) else 0
        return search + len(self.study.seeds) * (self.study.steps or self.study.search_steps)

    def _skip(self) -> None:
        self._num_done += len(self.study.seeds)
        self._steps_left -= len(self.study.seeds) * (self.study.steps or self.study.search_steps)

    def _time_left(self) -> str:
        if not self._steps_run or self.study.minutes is not None:
            return ""
        minutes = self._steps_left * self._seconds_run / self._steps_run / 60
        return f"  (about {minutes:.0f} min left)" if minutes >= 1 else "  (less than a minute left)"


def best_rate(searches: list[Result]) -> float | None:
    """Return the rate with the lowest finite validation loss, or None.

    Example:
        >>> best_rate([{"rate": 1e-3, "val": {"loss": 0.7}}, {"rate": 3e-3, "val": {"loss": 0.6}}, {"error": "no"}])
        0.003
    """
    judged = [(found["val"]["loss"], found["rate"]) for found in searches if _loss(found) is not None]
    return min(judged)[1] if judged else None


def _loss(result: Result) -> float | None:
    loss: float | None = (result.get("val") or {}).get("loss")
    return loss


def _is_open(job: Job) -> bool:
    """Return whether a job has no result; failed jobs are repeated."""
    result = read_result(Path(job["path"]), job["spec"])
    return result is None or "error" in result


def _told(jobs: list[Job]) -> str:
    """Return the outcome of a group of jobs in a few words."""
    words = []
    for job in jobs:
        result = read_result(Path(job["path"]), job["spec"]) or {}
        rate = f"{job['spec']['rate']:g}: " if len(jobs) > 1 else ""
        figures = result.get("test") or {"val loss": _loss(result)}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if value is not None)
        words.append(f"{rate}{'failed' if 'error' in result else shown or 'no finite loss'}")
    return "; ".join(words)
