"""No cut of PEFT's `svd` is nearer to the sum of the updates, over random layouts."""

import warnings

import peft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import get_peft_model_state_dict

from lora_lightning.arithmetic.adapter import read_layers
from lora_lightning.arithmetic.combine import CombineSettings, combine_updates
from lora_lightning.arithmetic.report import total_error
from lora_lightning.peft_format.config import parse_peft_config
from tests.arithmetic.layouts import LINEAR, base
from tests.arithmetic.test_properties import many, weights


@st.composite
def configs(draw):
    """Draw a config without patterns."""
    return {
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(st.integers(1, 16)),
        "use_rslora": draw(st.booleans()),
        "init_lora_weights": False,  # no factor is zero
        "target_modules": list(LINEAR),
    }


@torch.no_grad()
def _error(model, name, exact):
    layers = model.base_model.model
    return sum(
        float((layers.get_submodule(path).get_delta_weight(name).double() - update).square().sum())
        for path, update in exact.items()
    )


@settings(many)
@given(configs(), configs(), weights, weights, st.integers(1, 6))
def test_a_cut_is_at_most_as_far_off_as_svd_of_peft(one, other, w, v, rank):
    # The sums of PEFT keep `use_rslora` and the patterns of the first adapter, and so are scaled wrongly with these.
    settings_of = {"a": {**one, "use_rslora": False}, "b": other}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(), peft.LoraConfig(**settings_of["a"]), adapter_name="a")
        model.add_adapter("b", peft.LoraConfig(**other))
        model.add_weighted_adapter(["a", "b"], [w, v], "svd", combination_type="svd", svd_rank=rank)
    with torch.no_grad():
        exact = {
            path: sum(
                weight * model.base_model.model.get_submodule(path).get_delta_weight(name).double()
                for name, weight in (("a", w), ("b", v))
            )
            for path in LINEAR
        }
    adapters = {
        name: read_layers(
            parse_peft_config({**settings_of[name], "peft_type": "LORA", "lora_dropout": 0.0}),
            get_peft_model_state_dict(model, adapter_name=name),
            name,
        )
        for name in settings_of
    }
    chosen = {"a": w, "b": v}
    options = CombineSettings.of("sum", rank, None, None, None, chosen)
    updates, cuts = combine_updates(adapters, chosen, options)
    ours = sum(float((updates[path].dense() - update).square().sum()) for path, update in exact.items())
    total = sum(float(update.square().sum()) for update in exact.values())
    assert (ours / total) ** 0.5 <= (_error(model, "svd", exact) / total) ** 0.5 + 1e-6
    assert abs((ours / total) ** 0.5 - total_error(cuts)) < 1e-6
    worse = sum(float((0.9 * updates[path].dense() - update).square().sum()) for path, update in exact.items())
    assert worse > _error(model, "svd", exact)  # control: a cut that is a little off is farther away than PEFT's
