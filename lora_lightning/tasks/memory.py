"""Memory of a run, part by part, computed before anything is loaded.

The model is built on the meta device from its config. Parameters, gradients and optimizer state follow exactly from its
shapes; activations are counted in a forward pass of tensors without data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.adapters import iter_adapters
from lora_lightning.adapters.targets import is_within
from lora_lightning.adapters.weights import RESERVED, HostKind, find_codec
from lora_lightning.backbones.attach import attach
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.backbones.skeleton import without_weights
from lora_lightning.backbones.storage.quantized import dense_modules
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.methods.recompute import recompute_activations
from lora_lightning.optim import Optim
from lora_lightning.tasks.activations import activations
from lora_lightning.tasks.base import AdapterTask
from lora_lightning.tasks.memory_parts import WIDE, MemoryPart, base_modules, own_tensors
from lora_lightning.tasks.memory_parts import num_bytes as num_bytes_of

_MAX_REAL_ELEMENTS = 50_000_000
_UNQUANTIZED_BLOCK, _OUTER_BLOCK = 64, 256


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a run needs on each device.

    Args:
        parts: Every part.
        batch_size: Rows in a batch, on each device.
        length: Tokens in a row.
    """

    parts: tuple[MemoryPart, ...]
    batch_size: int
    length: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts on the device together."""
        return sum(part.num_bytes for part in self.on_device)

    @property
    def on_device(self) -> tuple[MemoryPart, ...]:
        """The parts that are not in host memory."""
        return tuple(part for part in self.parts if not part.on_host)

    def bytes_of(self, name: str) -> int:
        """Return the bytes of one part, 0 where there is none of that name."""
        return sum(part.num_bytes for part in self.parts if part.name == name)

    def largest_batch(self, num_bytes: int) -> int:
        """Return the largest batch that fits into `num_bytes`, 0 where not even one row does."""
        growing = sum(part.num_bytes for part in self.on_device if part.per_sample)
        left = num_bytes - (self.num_bytes - growing)
        return max(0, left * self.batch_size // growing) if growing else self.batch_size * (left >= 0)


def plan_memory(
    task: AdapterTask,
    *,
    batch_size: int,
    length: int,
    precision: str = "32-true",
    num_replicas: int = 1,
    num_shards: int = 1,
    device: str = "cuda",
) -> MemoryPlan:
    """Count what a task's training needs on each device.

    Args:
        task: The task, not yet built; it is not changed.
        batch_size: Rows in a batch, on each device.
        length: Tokens in each row.
        precision: The trainer's `precision`.
        num_replicas: Processes that each hold the whole model (DDP).
        num_shards: Processes that share parameters, gradients and optimizer state (FSDP2).
        device: Type of the device of the run; determines the compute type of a 4-bit base, and whether tensors are
            offloaded.

    Returns:
        The parts.

    Raises:
        ConfigError: The task's model cannot be built without weights.
        UserError: A mistake in the task's settings.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a real run warns of, it will say itself
        model = _build(task, precision, device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = sum(map(num_bytes_of, trained))
        base, how_base = _base(model, task)
        parts = [
            MemoryPart(name="base", num_bytes=base, how=how_base),
            _adapters(model),
            MemoryPart(name="gradients", num_bytes=gradients, how="one for each trained weight"),
            _optimizer_state(task.optim, trained),
        ]
        if num_shards > 1:
            parts = [_sharded(part, num_shards) for part in parts]
        elif num_replicas > 1:
            how = "DDP's own copy of the gradients"
            parts.append(MemoryPart(name="DDP buckets", num_bytes=gradients, how=how))
        parts += activations(model, task, batch_size, length, precision, device)
    return MemoryPlan(parts=tuple(parts), batch_size=batch_size, length=length)


# Building.


def _build(task: AdapterTask, precision: str, device: str) -> nn.Module:
    """Build the adapted model on the meta device.

    Raises:
        ConfigError: It cannot be built there.
    """
    try:
        with torch.device("meta"), without_weights():
            model = task.configure_backbone()
        task._starting_adapter(model)  # an adapter to start from brings its own methods
        with torch.device("meta"):
            saved, statistics = task.trained_modules(model), task.train_norm_statistics
            attach(model, task.methods, modules_to_save=saved, train_norm_statistics=statistics)
            if task.gradient_checkpointing == "activations":
                recompute_activations(model)
    except UserError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"{type(task).__name__} cannot be built without its weights, so there is no plan for it "
            f"({' '.join(str(error).split()):.120})."
        ) from error
    if task.quantization is not None:
        quantization = task.quantization
        is_wide = quantization.bits == 4 and quantization.compute_dtype_on(torch.device(device)) is torch.float32
        if device == "cpu" and task.backbone_dtype == "auto" and is_wide:
            _cast_base(model, torch.float32)  # as load_quantized does there
    elif precision.endswith("-true") and not precision.startswith(("32", "64")):
        model.to(torch.bfloat16 if precision.startswith("bf16") else torch.float16)
    return model.train()


def _cast_base(model: nn.Module, dtype: torch.dtype) -> None:
    for module in base_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


# Memory that does not change from step to step.


def _base(model: nn.Module, task: AdapterTask) -> tuple[int, str]:
    """Return the bytes of the frozen model as it is stored, and a description of the storage."""
    tensors = {id(t): t for module in base_modules(model) for t in own_tensors(module)}
    packed = _packed(model, task) if task.quantization is not None else {}
    num_bytes = sum(num_bytes_of(tensor) for key, tensor in tensors.items() if key not in packed) + sum(packed.values())
    num_weights = sum(tensor.numel() for tensor in tensors.values())
    dtypes = {tensor.dtype for key, tensor in tensors.items() if key not in packed and tensor.is_floating_point()}
    dense = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if not packed:
        return num_bytes, f"{_count(num_weights)} weights in {dense}"
    assert task.quantization is not None
    num_packed = sum(tensors[key].numel() for key in packed)
    bits = 8 * sum(packed.values()) / num_packed
    label = f"{task.quantization.label} ({bits:.3f} bits each)"
    return num_bytes, f"{_count(num_packed)} weights in {label}, {_count(num_weights - num_packed)} in {dense}"


def _packed(model: nn.Module, task: AdapterTask) -> dict[int, int]:
    """Return the bytes of each weight that would be stored quantized, by its identity."""
    assert task.quantization is not None
    kept = [name for method in task.methods for name in method.modules_to_save or ()]
    dense = dense_modules(model, kept)
    found = {}
    for path, module in model.named_modules():
        codec = find_codec(module)
        if RESERVED in path.split(".") or is_within(path, dense) or codec is None or codec.kind is not HostKind.LINEAR:
            continue
        num_out, num_in = codec.shape(module)
        found[id(module._parameters["weight"])] = quantized_bytes(num_out, num_in, task.quantization)
    return found


def quantized_bytes(num_out: int, num_in: int, quantization: Quantization) -> int:
    """Return the bytes of a linear layer's quantized weight: packed data and constants, without code tables.

    Args:
        num_out: Rows.
        num_in: Columns.
        quantization: How it is stored.

    Example:
        >>> quantized_bytes(4096, 4096, Quantization()) * 8 / 4096**2
        4.126953125
    """
    num = num_out * num_in
    if quantization.bits == 8:
        return num + WIDE * num_out
    blocks = math.ceil(num / _UNQUANTIZED_BLOCK)
    constants = blocks + WIDE * math.ceil(blocks / _OUTER_BLOCK) if quantization.double_quant else WIDE * blocks
    return math.ceil(num / 2) + constants


def _adapters(model: nn.Module) -> MemoryPart:
    own = {id(t): t for _, _, adapter in iter_adapters(model) for m in adapter.modules() for t in own_tensors(m)}
    trained = sum(tensor.numel() for tensor in own.values() if tensor.requires_grad)
    num_hosts = len({path for path, _, _ in iter_adapters(model)})
    how = f"{_count(trained)} trained weights on {num_hosts} modules"
    return MemoryPart(name="adapters", num_bytes=sum(map(num_bytes_of, own.values())), how=how)


def _optimizer_state(optim: Optim, trained: Iterable[Tensor]) -> MemoryPart:
    """Take one step on tensors without data, and count the optimizer's state after it."""
    cls, arguments = optim.optimizer_class()
    parameters = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in trained]

    def state_after_step(parameters: list[nn.Parameter]) -> int:
        optimizer = cls(parameters, lr=optim.lr, **arguments)  # type: ignore[call-arg]  # every optimizer has lr
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        tensors = {id(t): t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)}
        return sum(map(num_bytes_of, tensors.values()))

    name, how = "optimizer state", f"{cls.__name__}'s after its first step"
    try:
        return MemoryPart(name=name, num_bytes=state_after_step(parameters), how=how)
    except Exception:  # an optimizer that looks at values, which only real tensors have
        pass
    try:
        if max((parameter.numel() for parameter in parameters), default=0) > _MAX_REAL_ELEMENTS:
            raise MemoryError
        num_bytes = sum(state_after_step([nn.Parameter(torch.zeros_like(one, device="cpu"))]) for one in parameters)
        return MemoryPart(name=name, num_bytes=num_bytes, how=how)
    except Exception:
        num_bytes = 2 * WIDE * sum(parameter.numel() for parameter in parameters)
        return MemoryPart(
            name=name, num_bytes=num_bytes, how=f"assumed for {cls.__name__}: two float32 for each weight"
        )


def _sharded(part: MemoryPart, num_shards: int) -> MemoryPart:
    num_bytes = math.ceil(part.num_bytes / num_shards)
    return MemoryPart(name=part.name, num_bytes=num_bytes, how=f"{part.how}; 1/{num_shards} on each device")


def _count(number: int) -> str:
    """Format a large number in short form.

    Example:
        >>> _count(74_112), _count(1_234_567_890)
        ('74.1 K', '1.23 B')
    """
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
