"""Parts of the base model that PEFT trained or stored with an adapter: biases, and rows of the embeddings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_lightning.adapters import Method
from lora_lightning.adapters.targets import has_suffix
from lora_lightning.adapters.walk import join
from lora_lightning.errors import CheckpointError
from lora_lightning.methods import BitFit, TrainableTokens
from lora_lightning.methods.bitfit import takes_shift
from lora_lightning.peft_format.hosts import own_modules
from lora_lightning.peft_format.names import base_state

_BASE_TOLERANCE = 1e-2  # a base saved in bfloat16 and loaded in float32 is the same base


@dataclass
class Beside:
    """Methods to attach in addition to the adapter, with their tensors.

    Args:
        methods: The methods.
        state: The tensors by the names of `adapter_state_dict`.
    """

    methods: list[Method] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Iterable[Beside]) -> Beside:
        """Return several parts as one."""
        whole = cls()
        for part in parts:
            whole.methods += part.methods
            whole.state |= part.state
        return whole

    def add_tokens(
        self, model: nn.Module, path: str, ids: Sequence[int], rows: Tensor, saved: list[str] | None = None
    ) -> None:
        """Add trained rows of one embedding.

        Args:
            model: The model.
            path: The embedding's path.
            ids: The tokens.
            rows: Their rows, `[tokens, width]`.
            saved: Modules that are also trained as copies.
        """
        order = sorted(range(len(ids)), key=lambda index: ids[index])
        named = [ids[index] for index in order]
        alike = [one for one in self.methods if isinstance(one, TrainableTokens) and one.token_indices == named]
        targets = [*(alike[0].target_modules or [] if alike else []), path]
        self.methods = [one for one in self.methods if one not in alike]
        self.methods.append(TrainableTokens(token_indices=named, target_modules=targets, modules_to_save=saved))
        self.state[join(first_holder(model, path), "tokens")] = rows[order]


def first_holder(model: nn.Module, path: str) -> str:
    """Return the first module of a model that holds the weight of the one at `path`, which may be itself."""
    weight = model.get_submodule(path)._parameters.get("weight")
    return next(other for other, module in own_modules(model).items() if module._parameters.get("weight") is weight)


def read_biases(
    model: nn.Module, biases: Mapping[str, Tensor], added: Mapping[str, Tensor], copied: Collection[str], source: str
) -> Beside:
    """Convert trained biases into shifts of the base's biases.

    Args:
        model: The bare model.
        biases: The base's biases as trained, by their names.
        added: Biases trained in addition to a layer's own, by the layer's path.
        copied: Paths of modules that are trained as copies, which include their biases.
        source: Where the adapter came from, for messages.

    Raises:
        CheckpointError: A bias was trained that cannot be shifted here.
    """
    modules, own = own_modules(model), base_state(model)
    shifts: dict[str, Tensor] = {path: bias.float() for path, bias in added.items()}
    taken: set[int] = set()
    for name, bias in biases.items():
        path = name.rpartition(".")[0]
        if any(path == copy or path.startswith(f"{copy}.") for copy in copied):
            continue
        if takes_shift(modules, path):
            change = bias.float() - own[name].float().to(bias.device)
            shifts[path] = shifts[path] + change if path in shifts else change
            taken.add(own[name].data_ptr())
    for name, bias in biases.items():
        path = name.rpartition(".")[0]
        is_left = path not in shifts and not any(path == copy or path.startswith(f"{copy}.") for copy in copied)
        if is_left and own[name].data_ptr() not in taken and not _is_same(bias, own[name]):
            raise CheckpointError(
                f"{source} holds a trained {name!r}, a bias that this library cannot shift; merge it with PEFT."
            )
    beside = Beside()
    if shifts:
        _refuse_ambiguous(modules, shifts, source)
        beside.methods.append(BitFit(bias=sorted(shifts), add_bias=bool(added)))
        beside.state |= {join(path, "delta"): shift for path, shift in shifts.items()}
    return beside


def _refuse_ambiguous(modules: Mapping[str, nn.Module], paths: Collection[str], source: str) -> None:
    """Refuse biases of modules whose paths are suffixes of other modules' paths, which BitFit cannot name."""
    for path in paths:
        others = [other for other in modules if has_suffix(other, path) and other not in paths]
        if any(takes_shift(modules, other) for other in others):
            raise CheckpointError(
                f"{source} holds a trained bias of {path!r}, which is the end of {others[0]!r} too, so that this "
                "library cannot name it alone; merge it with PEFT."
            )


def read_base(model: nn.Module, base: Mapping[str, Tensor], hosts: Collection[str], source: str) -> Beside:
    """Compare the base's parameters that PEFT stored with the adapter with those of the model.

    PEFT stores embeddings that are targets or were resized. In the first case they are the base's, unchanged; in the
    second, the rows that were drawn at random are loaded.

    Args:
        model: The bare model.
        base: The parameters by their names.
        hosts: Paths of the adapted modules.
        source: Where the adapter came from, for messages.

    Raises:
        CheckpointError: They are of another base, or of another size.
    """
    own, beside = base_state(model), Beside()
    taken: set[int] = set()
    for name, tensor in base.items():
        mine, path = own[name], name.rpartition(".")[0]
        if not mine.is_floating_point() or mine.data_ptr() in taken:
            continue
        ids = _changed_rows(tensor, mine)
        if ids is None or path in hosts or not name.endswith(".weight"):
            if not _is_same(tensor, mine):
                raise CheckpointError(_another_base(name, tensor, mine, source))
            continue
        if not ids:
            continue
        beside.add_tokens(model, path, ids, tensor[ids])
        taken.add(mine.data_ptr())
    return beside


def _changed_rows(tensor: Tensor, mine: Tensor) -> list[int] | None:
    """Return the rows in which two embeddings differ; None if most differ, or the shapes differ."""
    if tensor.shape != mine.shape or tensor.dim() != 2:
        return None
    differs = (tensor.to(mine.device, mine.dtype) != mine).any(1)
    ids: list[int] = differs.nonzero().flatten().tolist()
    return ids if 2 * len(ids) <= len(mine) else None


def _another_base(name: str, tensor: Tensor, mine: Tensor, source: str) -> str:
    remedy = "Load the base as it was in training (or copy these values into it), or merge the adapter with PEFT."
    if tensor.dim() == 2 and mine.dim() == 2 and tensor.shape[0] != mine.shape[0]:
        remedy = f"Extend the vocabulary first, as in training: model.resize_token_embeddings({tensor.shape[0]})."
    return (
        f"{source} holds {name!r} itself, {list(tensor.shape)}, which is not what this base has ({list(mine.shape)}): "
        f"the vocabulary was resized or the layer trained, or it is another base. {remedy}"
    )


def _is_same(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    if not left.numel():
        return True
    scale = right.detach().abs().max().float().item()
    return torch.allclose(left.float().to(right.device), right.float(), rtol=_BASE_TOLERANCE, atol=1e-3 * scale)
