"""Hang adapters on a model; `adapters/host.py` does it to one host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from lora_lightning.adapters.attaching.detach import detach
from lora_lightning.adapters.attaching.placing import (
    check_combination,
    check_placement,
    norm_statistics,
    refuse_reattach,
    saved_paths,
    selection_names,
)
from lora_lightning.adapters.attaching.report import AttachReport, report_of
from lora_lightning.adapters.base import Adapter, AttentionAdapter, Method
from lora_lightning.adapters.calls import watch_first_calls
from lora_lightning.adapters.frozen import freeze_norms
from lora_lightning.adapters.head import HeadAdapter
from lora_lightning.adapters.host import hang, no_op_hook
from lora_lightning.adapters.selection.checkpointing import follow_selection
from lora_lightning.adapters.selection.compiling import watch
from lora_lightning.adapters.selection.state import Selector, synchronize
from lora_lightning.adapters.targets import is_within
from lora_lightning.adapters.view import ModelView, PlainView
from lora_lightning.adapters.walk import COPIES, RECORD, Attachment
from lora_lightning.errors import TargetError


def attach(
    model: nn.Module,
    method: Method | Sequence[Method],
    view: ModelView | None = None,
    *,
    modules_to_save: Sequence[str] = (),
    train_norm_statistics: bool = False,
) -> AttachReport:
    """Freeze a model and hang the adapters of one or several methods on it.

    Everything is checked and built before the first change, so an error leaves the model as it was. Adapter
    parameters are float32 (float64 on a float64 host). The base parameters keep their names: `model.state_dict()`
    without adapter keys is the base model's. Norms with running statistics compute with the stored ones in training
    mode too, so that neither parameters nor persistent buffers of the base move.

    The first training batch is watched: an adapter that it does not call raises AdapterNotCalled, a weight that is read
    without its module a TargetError.

    Args:
        model: Any module; changed in place.
        method: The method, or a list of methods, to attach.
        view: What methods may ask of the model; None for a plain torch module.
        modules_to_save: Names (path suffixes) of modules to train as full copies, beside the methods' own.
        train_norm_statistics: Compute with batch statistics in training mode, and let the running ones move: in copies
            that belong to the adapters' state, so that `disabled` and `detach` give the base's.

    Returns:
        How many parameters train, and on which hosts.

    Raises:
        TargetError: The model has adapters already, nothing fits, or two methods want the same host's forward.
        ConfigError: A setting does not fit this model, such as a rank larger than a layer allows, or two methods
            exclude each other.

    Example:
        >>> from lora_lightning.methods import LoRA
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> attach(model, LoRA(r=2, target_modules=["0"])).num_trainable
        32
    """
    methods = (method,) if isinstance(method, Method) else tuple(method)
    refuse_reattach(model, methods)
    check_combination(methods)
    view = view or PlainView(model)
    placed: list[tuple[str, str, Adapter]] = []
    saved = list(dict.fromkeys([*modules_to_save, *(name for one in methods for name in one.modules_to_save or [])]))
    if saved:
        placed += [(path, "head", HeadAdapter(model.get_submodule(path))) for path in saved_paths(view, saved)]
    if train_norm_statistics:
        placed += norm_statistics(model, placed)
    for _, _, copied in placed:
        copied.selected_as = COPIES
    # After the copies, so that merging a delta adds to what a copy leaves.
    for one, selected_as in zip(methods, selection_names(methods), strict=True):
        informed = replace(one, modules_to_save=saved or None)  # all-linear leaves out what anybody copies
        for path, adapter in informed.adapters(view):
            adapter.method, adapter.selected_as = one, selected_as
            placed.append((path, one.name, adapter))
    check_placement(model, placed)

    named = model.named_parameters(remove_duplicate=False)  # each name of a tied weight, which merging may untie
    record = Attachment(methods, [name for name, parameter in named if parameter.requires_grad])
    model.requires_grad_(requires_grad=False)
    selector = Selector()
    for path, name, adapter in placed:
        hang(model.get_submodule(path), name, adapter, selector, path)
    follow_selection(model)
    watch(synchronize)
    _turn_off_fast_paths(model, [path for path, _, _ in placed], record)
    if any(isinstance(adapter, AttentionAdapter) for _, _, adapter in placed):
        record.unroute = view.route_attention()
    setattr(model, RECORD, record)
    try:
        freeze_norms(model)  # last, so that their class lies above the adapters'
    except TargetError:
        detach(model)
        raise
    watch_first_calls(model)
    return report_of(model)


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
