"""The long run: `python -m tests.fuzz --cases 2000 --seed 1`; `--case 17` runs one case and shows where it failed."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter

import torch

from tests.fuzz import steps, walk

CPU_SECONDS = 60


def main() -> None:
    """Run cases, and print a line for each that fails and the figures at the end."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--case", type=int)
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    steps.quiet()
    torch.set_num_threads(1)
    chosen = range(given.first, given.first + given.cases) if given.case is None else [given.case]
    signal.signal(signal.SIGPROF, give_up)
    verdicts = []
    for case in chosen:
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        verdict = walk.run(given.seed, case)
        signal.setitimer(signal.ITIMER_PROF, 0)
        verdicts.append(verdict)
        if verdict.fault or given.verbose or given.case is not None:
            print(f"{verdict} ({time.monotonic() - began:.1f} s) ", flush=True)
        if given.case is not None:
            print("\n".join(f"  refused: {step}: {why}" for step, why in verdict.refusals), verdict.trace, sep="\n")
    print(figures(verdicts))
    sys.exit(any(verdict.fault for verdict in verdicts))


def give_up(*_: object) -> None:
    """End a case that hangs."""
    raise TimeoutError(f"more than {CPU_SECONDS} s of CPU time")


def figures(verdicts: list[walk.Verdict]) -> str:
    """Return how many cases failed, were refused altogether, and what was checked how often."""
    faults = sum(bool(one.fault) for one in verdicts)
    refused = sum(any(step == "begin" for step, _ in one.refusals) for one in verdicts)
    taken = Counter(name for one in verdicts for name in one.steps if name in steps.STEPS)
    controls: Counter[str] = sum((one.controls for one in verdicts), Counter())
    return f"{len(verdicts)} cases, {faults} fail, {refused} refused altogether\nsteps {taken}\ncontrols {controls}"


if __name__ == "__main__":
    main()
