"""One base with an adapter of every method at once, and for each of them a model that has it alone."""

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lightning.adapters import adapter_state_dict, iter_roles, load_adapter_state_dict
from lora_lightning.backbones.attach import attach
from lora_lightning.methods import LoRA, PrefixTuning, PromptTuning
from tests import models
from tests.contract.examples import EXAMPLES, Example
from tests.contract.steps import has_no_gradient, quantize

ARCHITECTURES = ("llama", "gpt2", "bert", "t5")
WITHOUT_BIASES = ("llama", "t5")
"""Models on which BitFit is refused; every other example is defined on every architecture."""


def examples_on(architecture: str) -> dict[str, Example]:
    """Return what is attached to one model: every example, and more that differ from those of their kind.

    A head of its own, of which there are two, makes one row's answer come from another module than the next one's;
    prompts and prefixes of other lengths shift the rows against each other.
    """
    found = {name: example for examples in EXAMPLES.values() for name, example in examples.items()}
    if architecture in WITHOUT_BIASES:
        del found["bitfit"]
    head = "classifier" if architecture == "bert" else "lm_head"
    more = {
        "prompt-short": PromptTuning(num_virtual_tokens=2),
        "prefix-short": PrefixTuning(num_virtual_tokens=3),
        "head": LoRA(r=2, modules_to_save=[head]),
        "head-second": LoRA(r=4, alpha=8, target_modules="all-linear", modules_to_save=[head]),
    }
    return found | {name: Example(method=method) for name, method in more.items()}


NAMES = {architecture: list(examples_on(architecture)) for architecture in ARCHITECTURES}


@dataclass(frozen=True, eq=False)
class Crowd:
    """One model with adapters of many names.

    Args:
        model: The base with all of them, in training mode; the first one acts outside of blocks.
        alone: The base under None, and for each name a base with this adapter and no other, unnamed.
        examples: The example of each name.
    """

    model: nn.Module
    alone: dict[str | None, nn.Module]
    examples: dict[str, Example]

    @property
    def names(self) -> list[str]:
        """Return the names, in the order of attaching."""
        return list(self.examples)

    def gradients(self, name: str) -> dict[str, Tensor]:
        """Return the gradients of one adapter on the shared model, without those that are zero by nature."""
        return _gradients(self.model, name, self.examples[name])

    def gradients_alone(self, name: str) -> dict[str, Tensor]:
        """Return the gradients of the same adapter on the model that has it alone."""
        return _gradients(self.alone[name], None, self.examples[name])

    def forget_gradients(self) -> None:
        """Drop the gradients of all models."""
        for model in (self.model, *self.alone.values()):
            model.zero_grad()


@functools.cache
def crowd(architecture: str, dtype: torch.dtype = torch.float64, *, is_quantized: bool = False) -> Crowd:
    """Build a crowd, once; whoever uses it leaves the values of its parameters as they are.

    Adapters that stand alone are attached and moved under one seed, those of the shared model under another one, and
    then load the others' states.

    Args:
        architecture: One of `ARCHITECTURES`.
        dtype: Of the base and the adapters.
        is_quantized: Store the base's linear layers in 4 bits.
    """
    base = models.build(architecture).to(dtype)
    if is_quantized:
        quantize(base)
    examples = examples_on(architecture)
    alone: dict[str | None, nn.Module] = {None: base}
    for seed, (name, example) in enumerate(examples.items()):
        alone[name] = copy.deepcopy(base)
        attach(alone[name], example.method)
        models.perturb(alone[name], seed=seed, std=0.2)
    torch.manual_seed(99)
    shared = copy.deepcopy(base)
    for name, example in examples.items():
        attach(shared, example.method, name=name)
    models.perturb(shared, seed=99)
    for name in examples:
        load_adapter_state_dict(shared, adapter_state_dict(alone[name]), name=name)
    return Crowd(shared, alone, examples)


def _gradients(model: nn.Module, name: str | None, example: Example) -> dict[str, Tensor]:
    found = {own: parameter for own, parameter, _ in iter_roles(model, name) if parameter.requires_grad}
    return {own: parameter.grad for own, parameter in found.items() if not has_no_gradient(own, example)}


def rows_for(architecture: str, num_rows: int, padding: str, seed: int = 1) -> dict[str, Tensor]:
    """Return a batch in which two rows of three are padded by one and two tokens.

    Args:
        architecture: The model that it is for.
        num_rows: Size of the batch.
        padding: `left` or `right`.
        seed: Of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, models.VOCABULARY, (num_rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(num_rows):
        num_padded = row % 3
        padded = slice(0, num_padded) if padding == "left" else slice(7 - num_padded, 7)
        ids[row, padded], mask[row, padded] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if architecture == "t5":
        batch["decoder_input_ids"] = torch.randint(3, models.VOCABULARY, (num_rows, 4), generator=generator)
    return batch


def row_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return a batch of one row of another batch."""
    return {name: tensor[row : row + 1] for name, tensor in batch.items()}


def real_logits(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the logits of each row, without those at padding."""
    logits = models.logits(model, batch)
    if logits.dim() == 2 or "decoder_input_ids" in batch:
        return list(logits)
    return [own[mask.bool()] for own, mask in zip(logits, batch["attention_mask"], strict=True)]
