"""Whether a model really runs what adapters hang on: calls, reads past a module, and the look at a first batch."""

from lora_lightning.adapters.calls.first import end_watch, watch_first_calls
from lora_lightning.adapters.calls.watch import (
    Calls,
    called_adapters,
    is_container,
    left_out,
    read_past_message,
    refuse_idle,
    watch,
)

__all__ = [
    "Calls",
    "called_adapters",
    "end_watch",
    "is_container",
    "left_out",
    "read_past_message",
    "refuse_idle",
    "watch",
    "watch_first_calls",
]
