"""What is timed on a workload: the bound, full fine-tuning, PEFT's methods and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.workloads import Batch, Workload
from lora_lightning import (
    BitFit,
    CausalLM,
    DoRA,
    LoRA,
    PromptTuning,
    PTuningV2,
    adapter_state_dict,
    attach,
    recompute_activations,
)
from lora_lightning.adapters import Method

Loss = Callable[[Batch], Tensor]
ALPHA = 16


@dataclass
class Contender:
    """A model that is ready to train, and how it computes its loss.

    Args:
        model: The model.
        loss: Takes a batch.
        names: Our name of each trained parameter -> the parameter, where it has a counterpart at PEFT.
    """

    model: nn.Module
    loss: Loss
    names: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that an optimizer steps."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


Prepare = Callable[[nn.Module], nn.Module]
"""Moves a fresh model to the device and precision of a run, and quantizes it where asked."""


def build(name: str, workload: Workload, prepare: Prepare) -> Contender:
    """Build one of `CONTENDERS` on a workload."""
    return CONTENDERS[name](workload, prepare)


def _bound(workload: Workload, prepare: Prepare) -> Contender:
    """Everything frozen, the activations' gradients taken back to the first block's queries, keys and values."""
    model = prepare(workload.build()).requires_grad_(False)
    for path in workload.first_outputs:
        model.get_submodule(path).register_forward_hook(_require_gradient)
    return Contender(model, lambda batch: workload.loss(model, batch))


def _require_gradient(module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ANN401 - as torch calls a hook
    del module, args
    output.requires_grad_()


def _full(workload: Workload, prepare: Prepare) -> Contender:
    model = prepare(workload.build()).requires_grad_(True)
    return Contender(model, lambda batch: workload.loss(model, batch))


def _targets(workload: Workload, model: nn.Module) -> list[str]:
    """Return the full paths of the target layers, so that both libraries take the same ones."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.endswith(workload.targets)
    ]


def _theirs(**settings: Any) -> Callable[[Workload, Prepare], Contender]:  # noqa: ANN401 - PEFT's own settings
    def make(workload: Workload, prepare: Prepare) -> Contender:
        model = prepare(workload.build())
        config = peft.LoraConfig(r=workload.r, lora_alpha=ALPHA, target_modules=_targets(workload, model), **settings)
        adapted = peft.get_peft_model(model, config).train()
        names = {
            _our_name(name): parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad
        }
        return Contender(adapted, lambda batch: workload.loss(adapted, batch), names)

    return make


def _our_name(name: str) -> str:
    """Return our name of one of PEFT's parameters."""
    parts = name.removeprefix("base_model.model.").split(".")
    host, kind = ".".join(parts[: -(3 if parts[-1] == "weight" else 2)]), parts[-(3 if parts[-1] == "weight" else 2)]
    return f"{host}.{'magnitude' if kind == 'lora_magnitude_vector' else kind}"


def _ours(
    method: Callable[[dict[str, Any]], Method], *, lean: bool = False
) -> Callable[[Workload, Prepare], Contender]:
    """Build ours; with labels, the loss is that of the task `CausalLM`, as users have it."""

    def make(workload: Workload, prepare: Prepare) -> Contender:
        model = prepare(workload.build())
        chosen = method({"r": workload.r, "alpha": ALPHA, "target_modules": _targets(workload, model)})
        if workload.supervised is not None:
            return _task(model, chosen, lean=lean)
        attach(model, chosen)
        if lean:
            recompute_activations(model)
        model.train()
        return Contender(model, lambda batch: workload.loss(model, batch), _names(model))

    return make


def _task(model: nn.Module, method: Method, *, lean: bool) -> Contender:
    class Task(CausalLM):
        def configure_backbone(self) -> nn.Module:
            return model

    task = Task("given", method, gradient_checkpointing="activations" if lean else False)
    task.configure_model()

    def loss(batch: Batch) -> Tensor:
        sums = task.token_sums(batch)
        return sums.loss / sums.num_tokens

    return Contender(task.adapted, loss, _names(task.adapted))


def _names(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by their names in the adapter state, which shares their storage."""
    own = {parameter.data_ptr(): parameter for parameter in model.parameters() if parameter.requires_grad}
    state: Mapping[str, Tensor] = adapter_state_dict(model)
    return {name: own[tensor.data_ptr()] for name, tensor in state.items() if tensor.data_ptr() in own}


CONTENDERS: dict[str, Callable[[Workload, Prepare], Contender]] = {
    "bound": _bound,
    "full": _full,
    "peft lora": _theirs(),
    "lora": _ours(lambda settings: LoRA(**settings)),
    "lora, lean": _ours(lambda settings: LoRA(**settings), lean=True),
    "peft lora, dropout 0.1": _theirs(lora_dropout=0.1),
    "lora, dropout 0.1": _ours(lambda settings: LoRA(**settings, dropout=0.1)),
    "peft dora": _theirs(use_dora=True),
    "dora": _ours(lambda settings: DoRA(**settings)),
    "dora, lean": _ours(lambda settings: DoRA(**settings), lean=True),
    "bitfit": _ours(lambda _: BitFit()),
    "prompt, 20 tokens": _ours(lambda _: PromptTuning(num_virtual_tokens=20)),
    "prefix, 20 tokens": _ours(lambda _: PTuningV2(num_virtual_tokens=20)),
}
"""By name; each builds itself on a workload."""

PAIRS = {"lora": "peft lora", "lora, lean": "peft lora", "dora": "peft dora", "dora, lean": "peft dora"}
"""Ours -> PEFT's, which must give the same loss and the same gradients."""

COUNTERPARTS = {**PAIRS, "lora, dropout 0.1": "peft lora, dropout 0.1"}
"""Ours -> PEFT's, that it is measured against."""


@torch.no_grad()
def copy_state(ours: Contender, theirs: Contender) -> None:
    """Draw adapter weights that are not at their start, and give both the same.

    Raises:
        ValueError: The two do not have parameters of the same names.
    """
    if ours.names.keys() != theirs.names.keys():
        differing = sorted(ours.names.keys() ^ theirs.names.keys())
        raise ValueError(f"The two train different parameters, such as {differing[0]!r}; they cannot be compared.")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(theirs.names.items()):
        if name.endswith("lora_B"):
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.copy_(noise.to(parameter.device, parameter.dtype))
        ours.names[name].copy_(parameter.view_as(ours.names[name]))
