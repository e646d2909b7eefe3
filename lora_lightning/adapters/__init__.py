"""How trainable parts hang on a model, in pure torch."""

from lora_lightning.adapters.attaching.attach import attach
from lora_lightning.adapters.attaching.detach import detach
from lora_lightning.adapters.attaching.report import AttachReport, report_of
from lora_lightning.adapters.base import (
    Adapter,
    AttentionAdapter,
    ForwardAdapter,
    InputAdapter,
    Method,
    OutputAdapter,
    Role,
    TargetedMethod,
)
from lora_lightning.adapters.calls.required import require_calls
from lora_lightning.adapters.merge import merge
from lora_lightning.adapters.selection.blocks import (
    acting_names,
    active,
    disabled,
    iter_acting,
    per_row,
    selected,
    set_active,
)
from lora_lightning.adapters.selection.state import bind
from lora_lightning.adapters.state import (
    adapter_state_dict,
    fold,
    folded_state_dict,
    gathered,
    load_adapter_state_dict,
    refresh,
)
from lora_lightning.adapters.view import ModelView, PlainView
from lora_lightning.adapters.walk import (
    adapter_names,
    attached_methods,
    is_attached,
    iter_adapters,
    iter_hosts,
    iter_roles,
    only,
)

__all__ = [
    "Adapter",
    "AttachReport",
    "AttentionAdapter",
    "ForwardAdapter",
    "InputAdapter",
    "Method",
    "ModelView",
    "OutputAdapter",
    "PlainView",
    "Role",
    "TargetedMethod",
    "acting_names",
    "active",
    "adapter_names",
    "adapter_state_dict",
    "attach",
    "attached_methods",
    "bind",
    "detach",
    "disabled",
    "fold",
    "folded_state_dict",
    "gathered",
    "is_attached",
    "iter_acting",
    "iter_adapters",
    "iter_hosts",
    "iter_roles",
    "load_adapter_state_dict",
    "merge",
    "only",
    "per_row",
    "refresh",
    "report_of",
    "require_calls",
    "selected",
    "set_active",
]
