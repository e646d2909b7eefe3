"""The autograd functions behind the linear adapters.

Shape suffixes: N tokens (all leading dimensions of an input flattened), I input features, O output features,
R rank. Weights are [O, I], lora_A is [R, I], lora_B is [O, R].

Every function works in the dtype of its input, or in autocast's where that is on; gradients come back in the dtype of
each parameter. Frozen weights get no gradient.
"""

from lora_lightning.adapters.functional.choose import Form, adapted_dora_linear, adapted_linear, choose_form
from lora_lightning.adapters.functional.dora import dora_linear, rebuilt_dora_linear
from lora_lightning.adapters.functional.dropout import draw_seed, seeded_dropout
from lora_lightning.adapters.functional.forms import NOT_REBUILT, Rebuilt, compute_dtype, is_exporting, rebuilding_pays
from lora_lightning.adapters.functional.lora import lora_linear, low_rank_update
from lora_lightning.adapters.functional.norms import dora_norm, forget_kept_norms, kept_norm_squared
from lora_lightning.adapters.functional.recompute import Source, find_source

__all__ = [
    "NOT_REBUILT",
    "Form",
    "Rebuilt",
    "Source",
    "adapted_dora_linear",
    "adapted_linear",
    "choose_form",
    "compute_dtype",
    "dora_linear",
    "dora_norm",
    "draw_seed",
    "find_source",
    "forget_kept_norms",
    "is_exporting",
    "kept_norm_squared",
    "lora_linear",
    "low_rank_update",
    "rebuilding_pays",
    "rebuilt_dora_linear",
    "seeded_dropout",
]
