"""The guards of a run, switched on and off."""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L

from lora_lightning.callbacks.idle_parameter_guard import IdleParameterGuard
from lora_lightning.callbacks.non_finite_guard import NonFiniteGuard
from lora_lightning.callbacks.out_of_memory_guard import OutOfMemoryGuard
from lora_lightning.callbacks.signal_guard import SignalGuard
from lora_lightning.keywords import names_nearest

__all__ = ["Guards"]


@names_nearest
@dataclass(frozen=True, kw_only=True)
class Guards:
    """The guards of a run; each is on unless it is switched off.

    In Python: `L.Trainer(callbacks=[AdapterCheckpoint(), *Guards().callbacks()])`.

    Args:
        non_finite: Stop before an update by a loss or gradient that is not finite.
        idle_parameters: Warn of adapter parameters that do not learn.
        out_of_memory: Suggest settings to change when memory runs out.
        signals: Save and end on SIGTERM, SIGINT and SIGUSR1.
    """

    non_finite: bool = True
    idle_parameters: bool = True
    out_of_memory: bool = True
    signals: bool = True

    def callbacks(self) -> list[L.Callback]:
        """Build the guards that are on; the one that saves comes last, after the others have checked the step.

        Example:
            >>> [type(guard).__name__ for guard in Guards(signals=False, out_of_memory=False).callbacks()]
            ['NonFiniteGuard', 'IdleParameterGuard']
        """
        guards: list[tuple[bool, type[L.Callback]]] = [
            (self.non_finite, NonFiniteGuard),
            (self.idle_parameters, IdleParameterGuard),
            (self.out_of_memory, OutOfMemoryGuard),
            (self.signals, SignalGuard),
        ]
        return [guard() for is_on, guard in guards if is_on]
