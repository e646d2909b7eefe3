"""Weights that several modules of a transformers model share, given up such that a reload does not tie them again."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.adapters.view import output_embeddings
from lora_lightning.backbones.trials.read_past import trial_inputs
from lora_lightning.errors import NotMergeable

_FLAG = "tie_word_embeddings"
# Two measurements of one factor agree to rounding; a factor and another candidate differ by far more.
_SAME = 1e-4


def give_up_ties(model: Any, path: str) -> None:  # noqa: ANN401 - a transformers model
    """Make the configs say that nothing is tied to a module, and copy what a reload would then not tie.

    One flag decides over all ties of a model part: without it, the embeddings of an encoder, of a decoder and their
    common source are read from a file one by one, so each of them must be there.

    Args:
        model: The model, changed in place.
        path: Path of the module that gets weights of its own.
    """
    own = {f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters(recurse=False)}
    before = model.get_expanded_tied_weights_keys(all_submodels=True)
    if _asks_for_flag(model) and _is_forced(model.config):
        # A reload ties again what the file lacks, and leaves untied what it holds with other values.
        given_up = {target for target, source in before.items() if source in own}
    else:
        for config in _configs_that_tie(model, own):
            config.tie_word_embeddings = False
        given_up = before.keys() - model.get_expanded_tied_weights_keys(all_submodels=True).keys()
    for target in sorted(given_up):
        _copy(model, target)
    model.all_tied_weights_keys = {name: before[name] for name in before if name not in given_up | own}


def flag_factor(model: Any) -> float | None:  # noqa: ANN401 - a transformers model
    """Measure by what factor a model scales the input of its output head because its weights are tied.

    Some models (UMT5, Switch Transformers, UDOP) multiply by `d_model ** -0.5` if `config.tie_word_embeddings` is true.

    Returns:
        The factor; None if no forward of the model asks for the flag, the flag changes nothing, or it cannot be false.

    Raises:
        NotMergeable: The flag changes the model by more than a factor, or it cannot be measured.
    """
    is_tied = getattr(model.config, _FLAG, False)
    if not is_tied or not _asks_for_flag(model) or _is_forced(model.config):
        return None
    tied = _head_input(model)
    model.config.tie_word_embeddings = False
    try:
        untied = _head_input(model)
    finally:
        model.config.tie_word_embeddings = True
    factor = float((tied * untied).sum() / untied.square().sum())
    if not torch.allclose(tied, factor * untied, rtol=_SAME, atol=_SAME * float(tied.abs().max())):
        raise _cannot_untie(model, "what the flag changes is not a factor")
    return None if abs(factor - 1) < _SAME else _exact(factor, model.config)


def scale_head(model: Any, factor: float) -> None:  # noqa: ANN401 - a transformers model
    """Multiply the weight of a model's output head, so that it answers untied as it did tied.

    Args:
        model: The model, whose output head shares its weight with no other module.
        factor: What `flag_factor` returned.
    """
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(factor)


def _configs_that_tie(model: Any, names: set[str]) -> Iterator[Any]:  # noqa: ANN401 - transformers' classes
    """Return the configs of the model and of those of its parts that tie one of some parameters."""
    yield model.config
    for prefix, part in model.named_modules():
        if not hasattr(part, "get_expanded_tied_weights_keys"):
            continue
        ties = part.get_expanded_tied_weights_keys(all_submodels=False)
        tied = {f"{prefix}.{name}".lstrip(".") for name in itertools.chain(ties, ties.values())}
        if tied & names:
            yield part.config


def _copy(model: nn.Module, name: str) -> None:
    """Give a parameter or buffer that another module has too a copy of its own."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    shared = getattr(module, leaf)
    own = shared.detach().clone()
    is_parameter = isinstance(shared, nn.Parameter)
    setattr(module, leaf, nn.Parameter(own, requires_grad=shared.requires_grad) if is_parameter else own)


def _asks_for_flag(model: nn.Module) -> bool:
    forwards = {inspect.unwrap(type(module).forward) for module in model.modules()}
    return any(_FLAG in forward.__code__.co_names for forward in forwards if hasattr(forward, "__code__"))


def _is_forced(config: Any) -> bool:  # noqa: ANN401 - transformers' configs differ by model
    """Return whether a config always sets the flag, as those of UMT5 and UDOP do."""
    told = {**config.to_dict(), _FLAG: False}
    return bool(getattr(type(config).from_dict(told), _FLAG, False))


def _head_input(model: Any) -> Tensor:  # noqa: ANN401 - a transformers model
    """Return what enters the output head in a trial call."""
    seen: list[Tensor] = []
    head = output_embeddings(model)
    if head is None:
        raise _cannot_untie(model, "it has no output head")

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:  # noqa: ARG001 - torch's signature
        seen.append(args[0])

    hook = head.register_forward_pre_hook(note)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(**trial_inputs(model))
    except Exception as error:  # a model's own forward may raise anything
        raise _cannot_untie(model, f"a trial call failed ({error})") from error
    finally:
        hook.remove()
        model.train(was_training)
    if not seen:
        raise _cannot_untie(model, "its output head was not called")
    return seen[0].double()


def _exact(factor: float, config: Any) -> float:  # noqa: ANN401 - transformers' configs differ by model
    """Return the inverse square root of a size in the config that a measured factor stands for, or the factor."""
    sizes = {value for value in config.to_dict().values() if isinstance(value, int) and value > 1}
    return next((size**-0.5 for size in sorted(sizes) if abs(size**-0.5 / factor - 1) < _SAME), factor)


def _cannot_untie(model: nn.Module, why: str) -> NotMergeable:
    return NotMergeable(
        f"{type(model).__name__} computes otherwise where its embeddings and its output head are not tied, and {why}. "
        "Leave both out of target_modules and modules_to_save, or use the adapter without merging it."
    )
