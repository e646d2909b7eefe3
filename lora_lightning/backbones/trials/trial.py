"""Trial calls of a transformers model with a few tokens, from which is read what its modules really receive."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lora_lightning.adapters.view import input_embeddings
from lora_lightning.backbones.reasons import reason_of

NUM_FRONT = 2
_NUM_REAL = 6
_NUM_PADDING = 2
_UNKNOWN_VOCABULARY = 16


@dataclass
class Call:
    """One call of a module.

    Args:
        module: The module.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        inside: The calls that it was made in, the outermost first.
        output: What it returned; None where it raised an error.
        problem: The error, where a trial called it; empty where there was none.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inside: tuple[Call, ...]
    output: Any = None
    problem: str = ""

    @property
    def given(self) -> dict[str, Any]:
        """All arguments by the names in the module's forward."""
        return {**dict(zip(arguments_of(self.module), self.args, strict=False)), **self.kwargs}


@dataclass
class Rows:
    """Tokens of a trial.

    Args:
        ids: `[rows, length]`.
        mask: The same, 1 for real tokens; None where it is left out.
        is_real: The same, True for the tokens whose states are compared.
    """

    ids: Tensor
    mask: Tensor | None
    is_real: Tensor


@dataclass
class Trial:
    """Token ids that mean nothing special to a model, in rows as they are padded.

    Args:
        model: A transformers model.
        vocabulary: Number of its token ids.
    """

    model: Any
    vocabulary: int
    ids: list[int] = field(init=False)
    placeholder: int = field(init=False)
    padding: int = field(init=False)

    @classmethod
    def of(cls, model: Any) -> Trial:  # noqa: ANN401 - a transformers model
        """Return the trial of a model, whose config or embedding says how many token ids it has."""
        embedding = input_embeddings(model)
        weight = None if embedding is None else next(embedding.parameters(), None)
        rows = len(weight) if weight is not None and weight.dim() == 2 else None
        sizes = [one for one in (getattr(text_config(model), "vocab_size", None), rows) if one]
        return cls(model, min(sizes, default=_UNKNOWN_VOCABULARY))

    def __post_init__(self) -> None:
        """Choose the ids."""
        special = special_ids(self.model)
        plain = [one for one in range(self.vocabulary) if one not in special] or list(range(self.vocabulary))
        count = NUM_FRONT + _NUM_REAL
        *self.ids, self.placeholder = (plain[index * (len(plain) - 1) // count] for index in range(count + 1))
        pad = getattr(text_config(self.model), "pad_token_id", None)
        self.padding = pad if isinstance(pad, int) and 0 <= pad < self.vocabulary else 0

    @property
    def front(self) -> Tensor:
        """The ids that stand in front, `[NUM_FRONT]`."""
        return self._tensor(self.ids[:NUM_FRONT])

    def rows(self, *, with_front: bool, with_mask: bool) -> Rows:
        """Return three rows with a mask (not padded, padded right, padded left), or one without."""
        front, real = self.ids[:NUM_FRONT] if with_front else [], self.ids[NUM_FRONT:]
        whole = [*front, *real]
        compared = [False] * len(front) + [True] * len(real)
        if not with_mask:
            return Rows(self._tensor([whole]), None, self._tensor([compared]))
        pad, short = [self.padding] * _NUM_PADDING, len(whole) - _NUM_PADDING
        blank = [False] * _NUM_PADDING
        ids = [whole, [*whole[:short], *pad], [*pad, *whole[:short]]]
        mask = [[1] * len(whole), [1] * short + [0] * _NUM_PADDING, [0] * _NUM_PADDING + [1] * short]
        is_real = [compared, [*compared[:short], *blank], [*blank, *compared[:short]]]
        return Rows(self._tensor(ids), self._tensor(mask), self._tensor(is_real))

    def call(self, module: nn.Module, rows: Rows) -> Call:
        """Call the model, or the part of it that takes token ids."""
        names = arguments_of(module)
        given: dict[str, Any] = {"input_ids": rows.ids}
        if rows.mask is not None and (module is self.model or "attention_mask" in names):
            given["attention_mask"] = rows.mask
        if "decoder_input_ids" in names:
            given["decoder_input_ids"] = rows.ids[:, -NUM_FRONT:]
        if "use_cache" in names:  # without a cache, masks are made by looking at values, which the meta device lacks
            given["use_cache"] = not has_values(self.model)
        call = Call(module, (), given, ())
        try:
            call.output = module(**given)
        except Exception as error:
            call.problem = f"{type(error).__name__}: {reason_of(error)}"
        return call

    def _tensor(self, values: Any) -> Tensor:  # noqa: ANN401 - nested lists
        return torch.tensor(values, device=next(self.model.parameters()).device)


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """Return the path of a module inside a model; empty for the model itself."""
    return next(path for path, module in model.named_modules() if module is wanted)


def text_config(model: Any) -> Any:  # noqa: ANN401 - a transformers model and its config
    """Return the config of the part of a model that reads text; a config of another library's own is that already."""
    find = getattr(model.config, "get_text_config", None)
    return model.config if find is None else find()


def special_ids(model: Any) -> set[int]:  # noqa: ANN401 - a transformers model
    """Return the token ids to which a model's config gives a meaning, such as padding, ends and images."""
    found: set[int] = set()
    for config in (model.config, text_config(model)):
        for name, value in vars(config).items():
            if name.endswith(("_token_id", "_token_ids", "_token_index")):
                values = value if isinstance(value, list | tuple) else [value]
                found.update(one for one in values if isinstance(one, int))
    return found


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's forward, in order."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return tuple(one.name for one in parameters if one.kind not in variable)


def has_values(model: nn.Module) -> bool:
    """Return whether a model computes with values, and not on the meta device or with fake tensors."""
    return not any(parameter.is_meta or isinstance(parameter, FakeTensor) for parameter in model.parameters())


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients or warnings; leave modes and random numbers as they were."""
    training = [module for module in model.modules() if module.training]
    devices = {parameter.device.index or 0 for parameter in model.parameters() if parameter.device.type == "cuda"}
    logger = logging.getLogger("transformers")
    level = logger.level
    model.eval()
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), torch.random.fork_rng(sorted(devices)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a call that no user made
            yield
    finally:
        logger.setLevel(level)
        for module in training:
            module.training = True


@contextmanager
def recording(model: nn.Module) -> Iterator[list[Call]]:
    """Record the calls of all modules inside the block."""
    calls: list[Call] = []
    stack: list[Call] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(module, args, dict(kwargs), tuple(stack))
        calls.append(call)
        stack.append(call)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - what the module returns
        del args
        while stack[-1].module is not module:  # a module raised an error, and its caller caught it
            stack.pop()
        stack.pop().output = output

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor | None:  # noqa: ANN401 - what a module returns
    """Return the first floating-point tensor of an output of two or more dimensions: states or logits."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
    tensors = (one for one in values if isinstance(one, Tensor) and one.is_floating_point() and one.dim() > 1)
    return next(tensors, None)


def gap(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest element; infinity where shapes differ."""
    if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
        return float("inf")
    one, other = one.double().nan_to_num(0, 0, 0), other.double().nan_to_num(0, 0, 0)
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of their dtype."""
    return gap(one, other) <= (1e-5 if one.dtype in (torch.float32, torch.float64) else 1e-2)
