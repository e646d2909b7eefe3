"""Quantized models: loading them, which modules stay dense, and keeping them as they were loaded."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.targets import has_suffix, is_within
from lora_lightning.adapters.weights import HostKind, find_codec
from lora_lightning.backbones.defaults import DENSE_MODULES, DENSE_MODULES_BY_TYPE
from lora_lightning.backbones.quantization import Quantization, require_packages
from lora_lightning.backbones.storage.codecs import restore_layout
from lora_lightning.backbones.storage.samples import keep_sample, sample
from lora_lightning.backbones.view import view_of
from lora_lightning.errors import BackboneError

log = logging.getLogger(__name__)
_BLOCK = 64


def load_quantized(
    auto_class: Any,  # noqa: ANN401 - transformers' auto classes share no public base class
    source: str,
    quantization: Quantization,
    *,
    dtype: str = "auto",
    keep_dense: Sequence[str] = (),
    **config: Any,  # noqa: ANN401 - overrides of any type
) -> tuple[Any, dict[str, Any], str]:
    """Load a transformers model and quantize it on the way, onto torch's default device.

    Inside a Trainer that is the device of this process, so each rank of a DDP run loads and quantizes for itself.

    Args:
        auto_class: transformers' class.
        source: Folder or Hub name.
        quantization: The settings.
        dtype: Precision of what stays dense; `auto` is the files' own, and float32 where the layers compute in that
            on a CPU.
        keep_dense: Further modules (path suffixes) to leave as they are.
        **config: Overrides of the model's config.

    Returns:
        The model, transformers' account of missing keys, and a line that says what was quantized.

    Raises:
        BackboneError: bitsandbytes is not installed, the files are quantized already, or no layer can be quantized.
        OSError: As transformers raises it.
    """
    require_packages()
    from transformers import AutoConfig

    device = torch.get_default_device()
    compute_dtype = quantization.compute_dtype_on(device)
    if dtype == "auto" and device.type == "cpu" and quantization.bits == 4 and compute_dtype is torch.float32:
        dtype = "float32"
    settings = AutoConfig.from_pretrained(source, trust_remote_code=False, **config)
    _refuse_quantized_files(settings, source)
    with torch.device("meta"):
        empty = auto_class.from_config(copy.deepcopy(settings))
    dense = dense_modules(empty, keep_dense)
    if quantization.bits == 4 and device.type == "cpu" and cpu_needs_whole_blocks():
        dense += _with_partial_blocks(empty, dense)
    with _keeping_samples():
        model, info = auto_class.from_pretrained(
            source,
            config=settings,
            dtype=dtype,
            quantization_config=quantization.to_transformers(device, dense),
            device_map={"": device},
            trust_remote_code=False,
            output_loading_info=True,
        )
    layers = [path for path, _ in quantized_modules(model)]
    if not layers:
        raise BackboneError(
            f"{source!r} has no linear layer that {quantization.label} could store on {device} "
            f"({type(model).__name__}); leave quantization out."
        )
    settle(model)
    return model, info, _describe(quantization, device, compute_dtype, layers, dense)


def dense_modules(model: nn.Module, keep_dense: Sequence[str] = ()) -> list[str]:
    """Return the paths of the modules of an unquantized model that shall stay dense.

    These are the output head, what is known by name to be a head, a pooler or a router, and what the caller names.

    Args:
        model: The model, on the meta device or with weights.
        keep_dense: Path suffixes.
    """
    named = {*DENSE_MODULES, *DENSE_MODULES_BY_TYPE.get(getattr(getattr(model, "config", None), "model_type", ""), ())}
    found = list(view_of(model).head_paths())
    for path, _ in model.named_modules():
        if not path or is_within(path, found):
            continue
        if path.rpartition(".")[2] in named or any(has_suffix(path, name) for name in keep_dense):
            found.append(path)
    return found


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over `(path, module)` of the layers whose weight is stored quantized."""
    for path, module in model.named_modules():
        codec = find_codec(module)
        if codec is not None and codec.write is None:
            yield path, module


def is_quantized(model: nn.Module) -> bool:
    """Return whether any layer of a model stores its weight quantized."""
    return any(True for _ in quantized_modules(model))


def settle(model: nn.Module) -> None:
    """Keep bitsandbytes from changing 4-bit layers in their first forward pass, so that training finds them as loaded.

    On a CPU with bfloat16 instructions it would rearrange the weight in place in evaluation, for an inference-only
    kernel, after which the layer can neither train nor be read; and it casts a bias to the compute dtype, which under
    `inference_mode` leaves a tensor that training cannot use. The first is turned off (and undone), the second done.
    """
    for _, module in quantized_modules(model):
        if getattr(module, "support_avx512bf16_for_cpu", None) is None:
            continue
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain attribute of Linear4bit
        restore_layout(module)
        bias: Any = module.bias
        compute_dtype: Any = module.compute_dtype
        if bias is not None and compute_dtype is not None:
            bias.data = bias.data.to(compute_dtype)


@functools.cache
def cpu_needs_whole_blocks() -> bool:
    """Return whether bitsandbytes misreads 4-bit weights on this CPU if a row is not a multiple of a block.

    Its kernel for AVX-512 starts each row with a new block (release 0.50.2), while packing runs on over the rows'
    ends: such a layer would compute with a quarter of its weight's size as error. Read as one long row it is right.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.linspace(-1, 1, 3 * _BLOCK, device="cpu").view(2, -1)
    packed, state = quantize_4bit(weight, blocksize=_BLOCK, quant_type="nf4")
    long = copy.copy(state)
    long.shape = torch.Size([1, weight.numel()])
    return not torch.equal(dequantize_4bit(packed, state).flatten(), dequantize_4bit(packed, long).flatten())


def _with_partial_blocks(model: nn.Module, dense: Sequence[str]) -> list[str]:
    """Return the linear layers besides `dense` whose rows are not a multiple of a block, and warn of them."""
    found = []
    for path, module in model.named_modules():
        codec = find_codec(module)
        if codec is None or codec.kind is not HostKind.LINEAR or is_within(path, dense):
            continue
        if codec.shape(module)[1] % _BLOCK:
            found.append(path)
    if found:
        log.warning(
            "%d linear layers (the first: %s) stay dense: the installed bitsandbytes misreads 4-bit weights on this "
            "CPU unless their number of inputs is a multiple of %d.",
            len(found),
            found[0],
            _BLOCK,
        )
    return found


@contextmanager
def _keeping_samples() -> Iterator[None]:
    """While transformers loads, keep a sample of each weight before it is quantized, for the base's fingerprint."""
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize

    originals = {cls: cls.convert for cls in (Bnb4bitQuantize, Bnb8bitQuantize)}

    def keeping(convert: Any) -> Any:  # noqa: ANN401 - transformers' own signature
        def wrapped(self: Any, input_dict: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the wrapped method's own signature
            model = next((one for one in (*args, *kwargs.values()) if isinstance(one, nn.Module)), None)
            for name, value in input_dict.items():
                if model is not None:
                    _keep(model, name, value[0] if isinstance(value, list) else value)
            return convert(self, input_dict, *args, **kwargs)

        return wrapped

    try:
        for cls, convert in originals.items():
            cls.convert = keeping(convert)
        yield
    finally:
        for cls, convert in originals.items():
            cls.convert = convert


def _keep(model: nn.Module, name: str, weight: Tensor) -> None:
    from transformers.pytorch_utils import Conv1D

    path, _, parameter = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if parameter == "weight" and weight.dim() == 2:
        is_transposed = issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)
        keep_sample(module, sample(weight.t() if is_transposed else weight))


def _refuse_quantized_files(config: Any, source: str) -> None:  # noqa: ANN401 - transformers' config
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        kind = stored.get("quant_method", "?") if isinstance(stored, dict) else getattr(stored, "quant_method", "?")
        raise BackboneError(
            f"The files of {source!r} are stored quantized already ({getattr(kind, 'value', kind)}); leave "
            "quantization out to use them as they are, or name the unquantized model."
        )


def _describe(
    quantization: Quantization, device: torch.device, compute_dtype: torch.dtype, layers: list[str], dense: list[str]
) -> str:
    """Say what was quantized, and in which dtype it computes."""
    if quantization.bits == 8:
        how = "the dtype of their input"
    else:
        how = str(compute_dtype).removeprefix("torch.")
        if quantization.compute_dtype == "auto" and compute_dtype is torch.float32:
            how += ", since this CPU has no instructions for bfloat16, which would be slower here"
    named = f"{', '.join(dense[:4])}{', …' if len(dense) > 4 else ''}"
    return (
        f"{len(layers)} linear layers are stored in {quantization.label} on {device} and compute in {how}. "
        f"Dense stay the embeddings, the norms{' and ' if named else ''}{named}."
    )
