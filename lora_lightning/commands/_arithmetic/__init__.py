"""What `combine` and `shrink` share: a measurement on a checkpoint's data, and the lines of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_lightning.arithmetic.report import ArithmeticReport
    from lora_lightning.commands._arithmetic.measure import Measurement


def measurement_on(ckpt_path: str | None) -> Measurement | None:
    """Return what measures adapters on a checkpoint's task and validation data; None without a checkpoint."""
    if ckpt_path is None:
        return None
    from lora_lightning.commands._arithmetic.measure import Measurement  # takes seconds to import

    return Measurement(ckpt_path)


def tell(done: str, report: ArithmeticReport, measurement: Measurement | None) -> None:
    """Print what was done, the errors, and the metrics before and after where they are measured."""
    print(done)
    print("\n".join(report.lines()))
    if measurement is not None:
        print("\n".join(measurement.lines(report.output_dir)))
