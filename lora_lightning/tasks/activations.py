"""Memory that grows with the batch: tensors that a forward pass keeps for backward, and the loss."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from lora_lightning.tasks.base import AdapterTask
from lora_lightning.tasks.memory_parts import WIDE, MemoryPart, base_modules, own_tensors
from lora_lightning.tasks.offload import MIN_BYTES, NUM_IN_FLIGHT

_BUFFERS_IN_FLIGHT = 2
"""Tensors as large as the largest saved one that backward also holds: an input and an output gradient."""


def activations(
    model: nn.Module, task: AdapterTask, batch_size: int, length: int, precision: str, device: str
) -> list[MemoryPart]:
    """Return the memory of a step: saved tensors on and off the device, extra memory of backward, and the loss."""
    config: Any = getattr(model, "config", None)
    if config is None:
        how = f"not counted: {type(model).__name__} is not a transformers model"
        return [MemoryPart(name="activations", num_bytes=0, how=how, per_sample=True)]
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    itemsize = 2 if "16" in precision or _base_itemsize(model) == 2 else WIDE
    tokens = batch_size * length
    width, num_layers = _width(config), _num_layers(config)
    sizes = _count_saved(model, batch_size, length, precision)
    how = "kept for backward, counted on a forward pass without data"
    if sizes is None:
        inner = _inner_width(config)
        sizes = num_layers * (8 * [tokens * width * itemsize] + 3 * [tokens * inner * itemsize])
        how = f"roughly: 8 x {width} + 3 x {inner} numbers for each token and layer"
    elif task.gradient_checkpointing == "activations":
        how = "kept for backward without activations before adapters, counted on a forward pass without data"
    largest, of_one_layer = max(sizes, default=0), 0
    if task.gradient_checkpointing is True:
        of_one_layer, sizes = sum(sizes) // num_layers, num_layers * [tokens * width * itemsize]
        how = "with checkpointing: each layer's input, and all of one layer"
    return [*_placed(task, sizes, of_one_layer, largest, how, device), *_loss(task, config, tokens, itemsize)]


def _placed(
    task: AdapterTask, sizes: list[int], recomputed: int, largest: int, how: str, device: str
) -> list[MemoryPart]:
    """Return the memory of saved tensors: on the device, or in host memory if they are offloaded.

    Args:
        task: Its settings decide whether they are offloaded.
        sizes: Bytes of each tensor that forward keeps.
        recomputed: Bytes that backward computes again at one time, on the device.
        largest: Bytes of the largest tensor.
        how: Description of the tensors.
        device: Type of the device; tensors on the CPU are not offloaded.
    """
    moved: list[int] = []
    in_flight, how_in_flight = _BUFFERS_IN_FLIGHT * largest, "two tensors like the largest kept, in backward"
    if task.offload_activations and device == "cpu":
        how += "; offload_activations changes nothing on the CPU"
    elif task.offload_activations:
        moved = [size for size in sizes if size >= MIN_BYTES]
        in_flight += sum(sorted(moved)[-NUM_IN_FLIGHT:])
        how = f"left on the device: {'one layer, and ' if recomputed else ''}tensors below {MIN_BYTES >> 20} MiB"
        how_in_flight += f"; {NUM_IN_FLIGHT} on their way to the host"
    kept = sum(sizes) - sum(moved) + recomputed
    parts = [
        MemoryPart(name="activations", num_bytes=kept, how=how, per_sample=True),
        MemoryPart(name="in flight", num_bytes=in_flight, how=how_in_flight, per_sample=True),
    ]
    if moved:
        # Pinned memory is handed out in powers of two.
        num_bytes, how = sum(1 << (size - 1).bit_length() for size in moved), "pinned: the activations offloaded"
        parts.append(MemoryPart(name="host memory", num_bytes=num_bytes, how=how, per_sample=True, on_host=True))
    return parts


def _count_saved(model: nn.Module, batch_size: int, length: int, precision: str) -> list[int] | None:
    """Return the bytes of each tensor that a forward pass of the model's body keeps for backward.

    Storages are counted once, and none that hold parameters. None where the pass depends on values.
    """
    try:
        with FakeTensorMode(), _on_fake_cpu(model), _autocast(precision):
            body: Any = getattr(model, "base_model", model)
            ids = torch.zeros(batch_size, length, dtype=torch.long)
            inputs = {"input_ids": ids}
            if getattr(body.config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = ids
            if "use_cache" in inspect.signature(body.forward).parameters:
                inputs["use_cache"] = False  # type: ignore[assignment]  # one flag among tensors
            own = {tensor.untyped_storage()._cdata for module in model.modules() for tensor in own_tensors(module)}
            kept: dict[int, Any] = {}

            def note(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage  # held, so that no later one takes its address
                return tensor

            with saved_tensors_hooks(note, lambda tensor: tensor):
                output = body(**inputs)
            sizes = [storage.nbytes() for storage in kept.values()]
            del output
    except Exception:  # whatever stops a model from running without data
        return None
    return sizes


@contextmanager
def _on_fake_cpu(model: nn.Module) -> Iterator[None]:
    """Within the block, report the CPU as the device of meta tensors, so that models use the CPU's attention kernel.

    On the meta device, attention falls back to an implementation that keeps all probabilities, which no device uses.
    """
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor | None) -> Any:  # noqa: ANN401 - a parameter for a parameter, a tensor for a tensor
        if tensor is None:
            return None
        if id(tensor) not in fakes:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return fakes[id(tensor)]

    before = [(module, module._parameters, module._buffers) for module in model.modules()]
    try:
        for module, parameters, buffers in before:
            module._parameters = {name: fake(tensor) for name, tensor in parameters.items()}
            module._buffers = {name: fake(tensor) for name, tensor in buffers.items()}
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters, module._buffers = parameters, buffers


@contextmanager
def _autocast(precision: str) -> Iterator[None]:
    is_mixed = precision.endswith("-mixed")
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    with torch.autocast("cpu", dtype=dtype, enabled=is_mixed):
        yield


def _loss(task: AdapterTask, config: Any, tokens: int, itemsize: int) -> list[MemoryPart]:  # noqa: ANN401 - transformers' configs differ by model
    """Return the memory of a language model's logits: all of them, or one chunk if the task computes them in chunks."""
    vocabulary = _number(config, "vocab_size")
    if not vocabulary or "LM" not in task.auto_class:
        return []
    chunk = getattr(task, "loss_chunk_size", None)
    if chunk is not None:
        num_bytes = min(chunk, tokens) * vocabulary * (itemsize + WIDE)
        how = f"{chunk} tokens of {vocabulary:,} at a time"
        return [MemoryPart(name="logits and loss", num_bytes=num_bytes, how=how)]
    num_bytes = tokens * vocabulary * (itemsize + 2 * WIDE)
    how = f"{tokens:,} tokens of {vocabulary:,}, in float32 with their gradient"
    return [MemoryPart(name="logits and loss", num_bytes=num_bytes, how=how, per_sample=True)]


def _base_itemsize(model: nn.Module) -> int:
    sizes = [p.element_size() for m in base_modules(model) for p in m._parameters.values() if p is not None]
    return min((size for size in sizes if size > 1), default=WIDE)


def _width(config: Any) -> int:  # noqa: ANN401 - transformers' config
    return _number(config, "hidden_size", "d_model", "dim", "n_embd")


def _num_layers(config: Any) -> int:  # noqa: ANN401 - transformers' config
    return max(_number(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers"), 1)


def _inner_width(config: Any) -> int:  # noqa: ANN401 - transformers' config
    """Return the inner width of the feed-forward network; in a mixture, the sum over the experts of a token."""
    inner = _number(config, "intermediate_size", "hidden_dim", "n_inner", "d_ff") or 4 * _width(config)
    chosen = _number(config, "num_experts_per_tok")
    return chosen * (_number(config, "moe_intermediate_size") or inner) if chosen else inner


def _number(config: Any, *names: str) -> int:  # noqa: ANN401 - transformers' config
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)
