"""Hang adapters on a model; `adapters/host.py` does it to one host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lora_lightning.adapters.attaching.detach import detach
from lora_lightning.adapters.attaching.placing import (
    check_combination,
    check_placement,
    free_name,
    labels,
    methods_of,
    norm_statistics,
    saved_paths,
)
from lora_lightning.adapters.attaching.report import AttachReport, report_of
from lora_lightning.adapters.base import Adapter, AttentionAdapter, Method
from lora_lightning.adapters.calls import watch_first_calls
from lora_lightning.adapters.frozen import freeze_norms, release_modes
from lora_lightning.adapters.head import HeadAdapter
from lora_lightning.adapters.host import hang, no_op_hook, stack_key
from lora_lightning.adapters.selection.checkpointing import follow_selection
from lora_lightning.adapters.selection.compiling import watch
from lora_lightning.adapters.selection.state import ALL, Selector, part, synchronize, whole
from lora_lightning.adapters.targets import is_within
from lora_lightning.adapters.view import ModelView, PlainView
from lora_lightning.adapters.walk import COPIES, RECORD, Attachment
from lora_lightning.adapters.weights import RESERVED
from lora_lightning.errors import TargetError


def attach(
    model: nn.Module,
    method: Method | Sequence[Method],
    view: ModelView | None = None,
    *,
    name: str | None = None,
    modules_to_save: Sequence[str] = (),
    train_norm_statistics: bool = False,
) -> AttachReport:
    """Freeze a model and hang the adapters of one or several methods on it.

    Everything is checked and built before the first change, so an error leaves the model as it was. Adapter
    parameters are float32 (float64 on a float64 host). The base parameters keep their names: `model.state_dict()`
    without adapter keys is the base model's. Norms with running statistics compute with the stored ones in training
    mode too, so that neither parameters nor persistent buffers of the base move.

    A model can have several adapters, each under a name of its own; a list of methods is one name. The first one acts
    until `set_active` or `active` chooses others. All of them train what is theirs, and share nothing, however alike
    their settings are.

    The first training batch is watched: an adapter that it does not call raises AdapterNotCalled, a weight that is read
    without its module a TargetError.

    Args:
        model: Any module; changed in place.
        method: The method, or a list of methods, to attach.
        view: What methods may ask of the model; None for a plain torch module.
        name: Letters, digits, - and _; may be left out for the first adapter of a model.
        modules_to_save: Names (path suffixes) of modules to train as full copies, beside the methods' own.
        train_norm_statistics: Compute with batch statistics in training mode, and let the running ones move: in copies
            that belong to the adapters' state, so that `disabled` and `detach` give the base's.

    Returns:
        How many parameters train, and on which hosts.

    Raises:
        TargetError: The name is taken or missing beside other adapters, nothing fits, or two methods want the same
            host's forward.
        ConfigError: The name has other characters, a setting does not fit this model, such as a rank larger than a
            layer allows, or two methods exclude each other.

    Example:
        >>> from lora_lightning.methods import LoRA
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> attach(model, LoRA(r=2, target_modules=["0"])).num_trainable
        32
    """
    methods = methods_of(model, method)
    name = free_name(model, name)
    check_combination(methods)
    view = view or PlainView(model)
    placed = _placed(view, name, methods, modules_to_save, trains_norms=train_norm_statistics)
    check_placement(model, placed)

    record = _record_of(model)
    _freeze(model, record)
    if record.methods and record.selector.default is ALL:  # what acts now continues to act alone
        record.selector.act_by_default(tuple(map(whole, record.methods)))
    release_modes(model)
    for path, key, adapter in placed:
        hang(model.get_submodule(path), stack_key(name, key), adapter, record.selector, path)
    record.methods[name] = methods
    follow_selection(model)
    watch(synchronize)
    _turn_off_fast_paths(model, [path for path, _, _ in placed], record)
    needs_route = record.unroute is None and any(isinstance(adapter, AttentionAdapter) for _, _, adapter in placed)
    if needs_route:
        record.unroute = view.route_attention()
    try:
        freeze_norms(model)  # last, so that their class lies above the adapters'
    except TargetError:
        detach(model, name)
        raise
    watch_first_calls(model)
    return report_of(model, name)


def _placed(
    view: ModelView, name: str, methods: Sequence[Method], modules_to_save: Sequence[str], *, trains_norms: bool
) -> list[tuple[str, str, Adapter]]:
    """Build all adapters of one name, and return `(path of the host, key of the method, adapter)`; changes nothing."""
    model = view.model
    placed: list[tuple[str, str, Adapter]] = []
    saved = list(dict.fromkeys([*modules_to_save, *(each for one in methods for each in one.modules_to_save or [])]))
    if saved:
        placed += [(path, "head", HeadAdapter(model.get_submodule(path))) for path in saved_paths(view, saved)]
    if trains_norms:
        placed += norm_statistics(model, placed)
    for _, _, copied in placed:
        copied.selected_as = part(name, COPIES)
    # After the copies, so that merging a delta adds to what a copy leaves.
    for one, label in zip(methods, labels(methods), strict=True):
        informed = replace(one, modules_to_save=saved or None)  # all-linear leaves out every copied module
        for path, adapter in informed.adapters(view):
            adapter.method, adapter.selected_as = one, part(name, label)
            placed.append((path, one.name, adapter))
    for _, _, adapter in placed:
        adapter.name, adapter.selected_by_name = name, whole(name)
    return placed


def _record_of(model: nn.Module) -> Attachment:
    """Return what a model keeps of the adapters attached to it; new where there are none."""
    record: Attachment | None = model.__dict__.get(RECORD)
    if record is None:
        record = Attachment({}, Selector())
        setattr(model, RECORD, record)
    return record


def _freeze(model: nn.Module, record: Attachment) -> None:
    """Freeze the base, and note which of its parameters trained; adapters that are there stay as they are."""
    named = model.named_parameters(remove_duplicate=False)  # each name of a tied weight, which merging may untie
    base = [(name, parameter) for name, parameter in named if RESERVED not in name.split(".")]
    record.was_trainable += [name for name, parameter in base if parameter.requires_grad]
    for _, parameter in base:
        parameter.requires_grad_(False)


def _turn_off_fast_paths(model: nn.Module, paths: Sequence[str], record: Attachment) -> None:
    """Make torch's own transformer layers call their linear layers in eval mode too.

    `nn.TransformerEncoderLayer` reads `linear1.weight` directly unless a module inside it has a hook;
    `nn.TransformerEncoder` packs padded batches into nested tensors, which only that fast path understands.
    """
    for path, module in model.named_modules():
        inside = [host for host in paths if is_within(host, [path]) or not path]
        if isinstance(module, nn.TransformerEncoderLayer):
            for host in inside:
                model.get_submodule(host).register_forward_pre_hook(no_op_hook)
        if isinstance(module, nn.TransformerEncoder) and inside and module.use_nested_tensor:
            module.use_nested_tensor = False
            record.nested_encoders.append(path)
