"""What several adapters must agree in to be added: base, shapes, and whatever is kept as it is beside the updates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_lightning.arithmetic.adapter import LowRankAdapters
from lora_lightning.checkpoint.base_sample import BaseSample, why_another_base
from lora_lightning.checkpoint.folder import RunFacts
from lora_lightning.checkpoint.own_state import OWN_STATE_NAME
from lora_lightning.errors import CheckpointError, ConfigError

Named = Mapping[str, LowRankAdapters]


def check_agreement(adapters: Named) -> None:
    """Refuse adapters of different bases, or of layers of different shapes.

    Raises:
        CheckpointError: They differ.
    """
    first_name, first = next(iter(adapters.items()))
    for name, adapter in adapters.items():
        _check_bases(first_name, first, name, adapter)
        _check_layers(first_name, first, name, adapter)
    types = {name: one.targets.task_type for name, one in adapters.items() if one.targets.task_type}
    if len(set(types.values())) > 1:
        raise CheckpointError(
            f"The adapters are for different kinds of models ({_listed(types)}); combine adapters of one kind."
        )
    copies = {path: name for name, one in adapters.items() for path in one.copies}
    for name, adapter in adapters.items():
        for path in adapter.layers:
            inside = next((copy for copy in copies if path == copy or path.startswith(f"{copy}.")), None)
            if inside is not None:
                raise CheckpointError(
                    f"{name} adapts {path!r}, and {copies[inside]} trained a copy of {inside!r}: an update of the base "
                    "does not add to a copy. Combine adapters that train the same modules in the same way."
                )


def check_corrections(adapters: Named, weights: Mapping[str, float]) -> None:
    """Refuse a sum that counts LoftQ's correction of the error of quantizing other than once.

    Raises:
        CheckpointError: It does.
    """
    correcting = [name for name, one in adapters.items() if one.corrects_quantization]
    total = sum(weights[name] for name in correcting)
    if correcting and not math.isclose(total, 1, rel_tol=1e-6):
        raise CheckpointError(
            f"{' and '.join(correcting)} started at LoftQ's correction of the quantized base, which is part of the "
            f"update: with weights that add up to {total:g} the correction would count {total:g} times. Choose weights "
            "that add up to 1, or train from another init."
        )


def _check_bases(first_name: str, first: LowRankAdapters, name: str, adapter: LowRankAdapters) -> None:
    """Refuse two adapters whose bases are known to differ."""
    one, other = first.base_fingerprint, adapter.base_fingerprint
    if one is not None and one == other:
        return
    mine, theirs = first.base_sample, adapter.base_sample
    if mine is not None and theirs is not None:
        common = mine.values.keys() & theirs.values.keys()
        reason = why_another_base(mine.of(common), theirs.of(common)) if common else None
    else:
        reason = None
    are_alike = first.layers.keys() == adapter.layers.keys()
    is_dense = not any(sample is not None and sample.is_quantized for sample in (mine, theirs))
    if reason is None and are_alike and is_dense and one is not None and other is not None:
        reason = f"the fingerprints of their weights are {one[:12]}… and {other[:12]}…"
    if reason is not None:
        raise CheckpointError(
            f"{first_name} and {name} were trained on different base models: {reason}. An update means something only "
            "beside the weights that it was trained on; combine adapters of one base."
        )
    names = [facts.base for facts in (first.facts, adapter.facts) if facts.base]
    is_known = mine is not None and theirs is not None
    if not is_known and len(names) == 2 and _last(names[0]) != _last(names[1]):
        warnings.warn(
            f"{first_name} names the base {names[0]!r} and {name} names {names[1]!r}; their weights could not be "
            "compared.",
            stacklevel=4,
        )


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _check_layers(first_name: str, first: LowRankAdapters, name: str, adapter: LowRankAdapters) -> None:
    for path in first.layers.keys() & adapter.layers.keys():
        one, other = first.layers[path], adapter.layers[path]
        shapes = one.factors.shape, other.factors.shape
        are_alike = (one.is_embedding, one.kernel, one.is_parameter) == (
            other.is_embedding,
            other.kernel,
            other.is_parameter,
        )
        if shapes[0] != shapes[1] or not are_alike:
            raise CheckpointError(
                f"The weight of {path!r} is {list(shapes[0])} in {first_name} and {list(shapes[1])} in {name}, or of "
                "another kind: they were trained on different bases. Combine adapters of one base."
            )


def common_sample(adapters: Named) -> BaseSample | None:
    """Return the known values of the base under all adapters; dense ones before quantized ones."""
    values: dict[str, Tensor] = {}
    quantized: dict[str, int] = {}
    samples = [one.base_sample for one in adapters.values() if one.base_sample is not None]
    for sample in sorted(samples, key=lambda sample: sample.is_quantized, reverse=True):
        values |= sample.values
        quantized = {path: bits for path, bits in quantized.items() if path not in sample.values}
        quantized |= sample.quantized
    return BaseSample(values=values, quantized=quantized) if samples else None


def common_fingerprint(adapters: Named) -> str | None:
    """Return the fingerprint of the base under all layers; None where no adapter has all of them."""
    every = {path for one in adapters.values() for path in one.layers}
    whole = [one for one in adapters.values() if one.layers.keys() == every]
    return next((one.base_fingerprint for one in whole if one.base_fingerprint is not None), None)


def kept_tensors(adapters: Named, weights: Mapping[str, float], heads: str | None) -> dict[str, Tensor]:
    """Return the tensors that are kept as they are: copies (heads) that agree, or that one adapter alone has.

    Args:
        adapters: By name.
        weights: By name; the copies of an adapter of weight 0 do not count, unless all are.
        heads: The adapter whose copies are kept; None wants them to agree.

    Raises:
        CheckpointError: They differ.
        ConfigError: `heads` names no adapter.
    """
    if heads is not None:
        if heads not in adapters:
            raise ConfigError(f"heads is {heads!r}, which names no adapter; it must be one of {', '.join(adapters)}.")
        return adapters[heads].rest
    counting = _counting(adapters, weights)
    trained: dict[str, Tensor] = {}
    beside: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for name, adapter in counting.items():
        for key, tensor in adapter.rest.items():
            module = next((path for path in adapter.copies if f".{path}." in f".{key}"), None)
            kept = beside if module is None else trained
            if key in kept and not _is_equal(kept[key], tensor):
                raise _differing(owners[key], name, key, module)
            kept[key] = tensor
            owners[key] = name
    return {**beside, **trained}


def _differing(one: str, other: str, key: str, module: str | None) -> CheckpointError:
    if module is None:
        return CheckpointError(
            f"{one} and {other} hold different values of {key!r}, which is a part of the base that neither trained: "
            "their bases differ. Combine adapters of one base."
        )
    return CheckpointError(
        f"{one} and {other} both trained {module!r} as a copy, and differently: copies do not add as updates do. Name "
        "the adapter whose copies are kept (heads)."
    )


def _counting(adapters: Named, weights: Mapping[str, float]) -> Named:
    """Return the adapters whose weight is not 0; all where every weight is."""
    return {name: one for name, one in adapters.items() if weights[name]} or adapters


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other.to(one.dtype)))


def common_facts(adapters: Named, weights: Mapping[str, float], heads: str | None) -> RunFacts:
    """Return what the adapters agree in about their runs; labels are those of the heads.

    Raises:
        CheckpointError: They were trained with different vocabularies.
    """
    counting = {heads: adapters[heads]} if heads is not None else _counting(adapters, weights)
    all_facts = {name: one.facts for name, one in counting.items()}
    vocabularies = {name: facts.tokenizer_fingerprint for name, facts in all_facts.items()}
    if len({one for one in vocabularies.values() if one is not None}) > 1:
        raise CheckpointError(
            f"The adapters were trained with tokenizers of different vocabularies ({', '.join(vocabularies)}); combine "
            "adapters that read the same tokens, or name the adapter whose head and tokenizer are kept (heads)."
        )
    return RunFacts(
        base=_agreed(all_facts.values(), lambda facts: facts.base, or_first=True),
        tokenizer_fingerprint=_agreed(all_facts.values(), lambda facts: facts.tokenizer_fingerprint),
        tokenizer=_agreed(all_facts.values(), lambda facts: facts.tokenizer, or_first=True),
        task=_agreed(all_facts.values(), lambda facts: facts.task),
        label_names=_agreed(all_facts.values(), lambda facts: facts.label_names),
    )


def _agreed(all_facts: Any, get: Callable[[RunFacts], Any], *, or_first: bool = False) -> Any:  # noqa: ANN401 - facts of any type
    """Return the value that all known facts share; None, or the first, where they differ."""
    known = [value for facts in all_facts if (value := get(facts)) is not None]
    are_equal = all(value == known[0] for value in known)
    return known[0] if known and (are_equal or or_first) else None


def common_files(adapters: Named, weights: Mapping[str, float], heads: str | None) -> dict[str, bytes]:
    """Return the further files, such as the tokenizer's; of files that differ, the first, with a warning.

    Raises:
        CheckpointError: The tasks held different tensors beside their models.
    """
    counting = {heads: adapters[heads]} if heads is not None else _counting(adapters, weights)
    files: dict[str, bytes] = {}
    for name, adapter in counting.items():
        differing = [key for key, content in adapter.files.items() if files.setdefault(key, content) != content]
        if OWN_STATE_NAME in differing:
            raise CheckpointError(
                f"{name} holds other tensors of its task beside the model ({OWN_STATE_NAME}) than the adapters before "
                "it: these do not add. Name the adapter whose head and tensors are kept (heads)."
            )
        if differing:
            warnings.warn(f"{name} has another {', '.join(differing)}, which is left out.", stacklevel=4)
    return files


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())
