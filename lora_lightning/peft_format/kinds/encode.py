"""Export to the types of adapters that PEFT has besides LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lora_lightning.adapters import Adapter, Method, attached_methods, iter_adapters
from lora_lightning.adapters.weights import original_class
from lora_lightning.methods import IA3, AdaLoRA, PrefixTuning, PromptTuning, PTuning, PTuningV2, TrainableTokens, VeRA
from lora_lightning.methods.prefix import PrefixAdapter
from lora_lightning.methods.soft_prompt import SoftPromptAdapter
from lora_lightning.peft_format.adapter import PeftAdapter
from lora_lightning.peft_format.copies import copies_of, extra_copies, is_copy, task_type_of
from lora_lightning.peft_format.differences import why_another_convolution, why_out_of_reach
from lora_lightning.peft_format.kinds.adalora import encode_adalora, why_no_adalora
from lora_lightning.peft_format.kinds.ia3 import encode_ia3
from lora_lightning.peft_format.kinds.prefix import encode_prefix, why_no_prefix
from lora_lightning.peft_format.kinds.prompts import ROOT, encode_prompt, why_no_prompt
from lora_lightning.peft_format.kinds.tokens import encode_tokens, why_other_tokens
from lora_lightning.peft_format.kinds.vera import encode_vera
from lora_lightning.peft_format.names import PREFIX, base_state, module_paths

_PROMPTS = (PromptTuning, PTuning)
_PREFIXES = (PrefixTuning, PTuningV2)
_RELATIVES = (AdaLoRA, VeRA)
KIND_METHODS = (*_PROMPTS, *_PREFIXES, IA3, TrainableTokens)
"""The methods for which PEFT has a separate type, other than LoRA."""

_Encoded = tuple[dict[str, Any], dict[str, Tensor]]


def encode_kind(model: nn.Module, state: Mapping[str, Tensor], *, relatives: bool = False) -> PeftAdapter | None:
    """Describe the adapters of a model in PEFT's format, as a kind of their own.

    Args:
        model: A model with adapters.
        state: Result of `folded_state_dict`.
        relatives: Whether to include AdaLoRA and VeRA, which can also be written as the equivalent LoRA.

    Returns:
        Config and tensors; None if PEFT has no such type or computes something else (see `why_no_kind`).
    """
    method = _sole_method(model)
    if method is None or (isinstance(method, _RELATIVES) and not relatives) or why_no_kind(model) is not None:
        return None
    config, tensors = _encode(model, method, state)
    is_outside = isinstance(method, (*_PROMPTS, *_PREFIXES))
    hosts = [] if is_outside else list(_adapters(model))
    copied = _copies(model, state, config, hosts, ROOT if is_outside else PREFIX)
    if copied is None:
        return None
    others = {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "modules_to_save": copies_of(model) or None,
        "revision": None,
    }
    if not is_outside:
        classes = {original_class(model.get_submodule(path)).__name__ for path in hosts}
        others["fan_in_fan_out"] = "Conv1D" in classes
    if isinstance(method, TrainableTokens):
        del others["fan_in_fan_out"]
    return PeftAdapter(config={**config, **others}, state={**tensors, **copied}, reads_back=False)


def why_no_kind(model: nn.Module) -> str | None:
    """Return why PEFT has no kind of its own for the adapters of a model, as the end of a sentence, or None."""
    method = _sole_method(model)
    if method is None:
        names = [type(one).__name__ for one in attached_methods(model)]
        return f"PEFT has no kind of adapter for {' and '.join(names)}"
    if isinstance(method, _PROMPTS):
        return why_no_prompt(model)
    if isinstance(method, _PREFIXES):
        return why_no_prefix(model)
    if isinstance(method, TrainableTokens) and _why_no_copies(model) is not None:
        return _why_no_copies(model)
    out_of_reach = why_out_of_reach(model)
    for path, host, adapter in iter_adapters(model):
        reason = out_of_reach.get(path) or _why_another(model, path, host, adapter, method)
        if reason is not None:
            return f"{reason} (at {path!r})"
    return None


def _why_no_copies(model: nn.Module) -> str | None:
    """Return why PEFT's trainable tokens hold no copies of a model, as the end of a sentence, or None."""
    heads = copies_of(model)
    if not heads or (set(heads) <= {"classifier", "score"} and task_type_of(model) == "SEQ_CLS"):
        return None
    return f"PEFT trains no copies of modules beside trainable tokens, such as {heads[0]!r}, but a classifier of rows"


def _why_another(model: nn.Module, path: str, host: nn.Module, adapter: Adapter, method: Method) -> str | None:
    if is_copy(adapter):
        return None
    if isinstance(method, TrainableTokens):
        return why_other_tokens(model, path)
    if isinstance(method, AdaLoRA) and why_no_adalora(host) is not None:
        return why_no_adalora(host)
    return why_another_convolution(host)


def _sole_method(model: nn.Module) -> Method | None:
    """Return the one method of a model that is a kind of PEFT, or None."""
    kinds = (*KIND_METHODS, *_RELATIVES)
    methods = attached_methods(model)
    return methods[0] if len(methods) == 1 and type(methods[0]) in kinds else None


def _adapters(model: nn.Module) -> dict[str, Any]:
    """Return a model's adapters by their hosts' paths, without copies."""
    return {path: adapter for path, _, adapter in iter_adapters(model) if not is_copy(adapter)}


def _encode(model: nn.Module, method: Method, state: Mapping[str, Tensor]) -> _Encoded:
    adapters = _adapters(model)
    if isinstance(method, AdaLoRA):
        return encode_adalora(model, method, adapters)
    if isinstance(method, VeRA):
        return encode_vera(model, method, adapters)
    if isinstance(method, IA3):
        return encode_ia3(model, method, adapters)
    if isinstance(method, TrainableTokens):
        return encode_tokens(model, method, adapters)
    if isinstance(method, _PROMPTS):
        place = next(one.place for one in adapters.values() if isinstance(one, SoftPromptAdapter))
        return encode_prompt(model, method, state, place)
    assert isinstance(method, _PREFIXES)
    paths = [path for path, one in adapters.items() if isinstance(one, PrefixAdapter)]
    return encode_prefix(model, method, state, paths)


def _copies(
    model: nn.Module, state: Mapping[str, Tensor], config: dict[str, Any], hosts: Sequence[str], prefix: str
) -> dict[str, Tensor] | None:
    """Return the tensors of copies by PEFT's keys, including those that PEFT adds by itself, and set `task_type`.

    None if PEFT's matching of their names would match adapted modules.
    """
    heads = copies_of(model)
    paths = module_paths(model)
    is_bound = "task_type" in config  # a prompt method works through the wrapper of its task
    task_type = config["task_type"] if is_bound else task_type_of(model)
    if config["peft_type"] == "TRAINABLE_TOKENS":
        # PEFT has no modules_to_save for it: only its wrapper for classifiers of rows adds a copy.
        is_bound, task_type = bool(heads), "SEQ_CLS" if task_type == "SEQ_CLS" else None
    extra = extra_copies(paths, heads, hosts, task_type)
    if extra is None and not is_bound:
        task_type, extra = None, extra_copies(paths, heads, hosts, None)
    if extra is None or "" in heads:
        return None
    config["task_type"] = task_type
    starts = tuple(f"{path}." for path in heads)
    tensors = {f"{prefix}{name}": tensor for name, tensor in state.items() if heads and name.startswith(starts)}
    for path in extra:
        own = base_state(model.get_submodule(path))
        tensors |= {f"{prefix}{path}.{name}": tensor for name, tensor in own.items()}
    return tensors
