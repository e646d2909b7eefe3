"""The matrix of methods against abilities: each cell is tried on a tiny model, and is `yes` or the library's reason.

`python -m tests.contract.abilities` writes the page of the documentation; `test_abilities.py` compares the page with
what it tries itself.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from lora_lightning import combine, export_peft, load_peft, per_row
from lora_lightning.adapters import Method, active, adapter_state_dict, iter_roles, load_adapter_state_dict
from lora_lightning.backbones.attach import attach, merge
from lora_lightning.checkpoint import write_adapter_folder
from lora_lightning.errors import UserError
from lora_lightning.methods import LoRA
from tests import models
from tests.contract.crowd import row_of
from tests.contract.examples import EXAMPLES
from tests.contract.steps import dequantized, quantize

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "abilities.md"
YES = "yes"
NAMES = ("de", "fr")
TOLERANCE = 1e-5


class Pair:
    """Two adapters of one method: on one base under two names, and each alone on a base of its own.

    Args:
        method: The method of both.
        architecture: The model.
    """

    def __init__(self, method: Method, architecture: str) -> None:
        self.method = method
        self.base = models.build(architecture)
        self.batch = models.inputs(self.base)
        self.alone = {name: self._alone(seed) for seed, name in enumerate(NAMES)}
        self.expected = {name: self.answer(model) for name, model in self.alone.items()}

    def _alone(self, seed: int) -> nn.Module:
        model = copy.deepcopy(self.base)
        attach(model, self.method)
        return models.perturb(model, seed=seed, std=0.2)

    def shared(self) -> nn.Module:
        """Return a new model that has both adapters."""
        model = copy.deepcopy(self.base)
        for name in NAMES:
            attach(model, self.method, name=name)
            load_adapter_state_dict(model, adapter_state_dict(self.alone[name]), name=name)
        return model

    @torch.no_grad()
    def answer(self, model: nn.Module, names: str | list[str] | None = None) -> Tensor:
        """Return what a model answers, under some names where they are given."""
        if names is None:
            return models.logits(model, self.batch)
        with active(model, names):
            return models.logits(model, self.batch)

    @cached_property
    def compiled(self) -> tuple[nn.Module, nn.Module, CompileCounter]:
        """The shared model, the same compiled in one graph, and the counter of its compilations."""
        torch.compiler.reset()
        model, counter = self.shared(), CompileCounter()
        return model, torch.compile(model, fullgraph=True, backend=counter, dynamic=False), counter


def close(actual: Tensor, expected: Tensor) -> None:
    """Require two answers to be the same."""
    gap = models.gap(actual, expected)
    assert gap <= TOLERANCE, f"differs by {gap:.1e}"


def differ(actual: Tensor, expected: Tensor) -> None:
    """Require two answers to be different ones."""
    gap = models.gap(actual, expected)
    assert gap > 1e-3, f"differs by {gap:.1e} only"


def named(pair: Pair, folder: Path) -> None:
    """Beside another one, under a name (`attach(model, method, name="fr")`)."""
    model = pair.shared()
    for name in NAMES:
        close(pair.answer(model, name), pair.expected[name])
    differ(pair.expected["de"], pair.expected["fr"])


def mixed(pair: Pair, folder: Path) -> None:
    """Each row of a batch under its own name (`per_row`)."""
    model = pair.shared()
    with per_row(model, ["fr", None, "de"]):
        actual = models.logits(model, pair.batch)
    expected = torch.stack([pair.expected["fr"][0], pair.answer(pair.base)[1], pair.expected["de"][2]])
    close(actual, expected)
    differ(actual, pair.expected["fr"])


def added(pair: Pair, folder: Path) -> None:
    """Several active at once, with what merging all of them gives (`active(model, ["de", "fr"])`)."""
    model = pair.shared()
    together = pair.answer(model, list(NAMES))
    for name in NAMES:
        differ(together, pair.expected[name])
    merge(model, name=NAMES)
    close(pair.answer(model), together)


def combined(pair: Pair, folder: Path) -> None:
    """Written as the weighted sum of several (`combine`)."""
    weights = {str(folder / name): 1.0 for name in NAMES}
    for name, model in pair.alone.items():
        write_adapter_folder(folder / name, model)
    combine(weights, output_dir=folder / "sum", model=copy.deepcopy(pair.base))
    model = copy.deepcopy(pair.base)
    load_peft(model, folder / "sum")
    reference = pair.shared()
    for name in NAMES:
        merge(reference, name=name)
    close(pair.answer(model), pair.answer(reference))


def joint(pair: Pair, folder: Path) -> None:
    """Several names trained in one step, each on its rows of the batch."""
    model, rows = pair.shared().train(), ["fr", "de", "fr"]
    with per_row(model, rows):
        models.logits(model, pair.batch).square().sum().backward()
    for name in NAMES:
        alone = copy.deepcopy(pair.alone[name]).train()
        for row, own in enumerate(rows):
            if own == name:
                models.logits(alone, row_of(pair.batch, row)).square().sum().backward()
        gradients, expected = gradients_of(model, name), gradients_of(alone)
        assert torch.cat(list(expected.values())).abs().max() > 1e-3
        assert gradients.keys() == expected.keys()
        close(torch.cat(list(gradients.values())), torch.cat(list(expected.values())))


def gradients_of(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Return the gradients of the adapters of one name, each flat."""
    found = {own: parameter for own, parameter, _ in iter_roles(model, name) if parameter.requires_grad}
    return {own: parameter.grad.flatten() for own, parameter in found.items()}


def merged(pair: Pair, folder: Path) -> None:
    """Folded into the base's weights (`merge`)."""
    model = pair.shared()
    merge(model, name="fr")
    close(pair.answer(model, []), pair.expected["fr"])
    differ(pair.answer(model, "de"), pair.expected["fr"])


def exported(pair: Pair, folder: Path) -> None:
    """Written in PEFT's format (`export_peft`), and read back."""
    export_peft(pair.shared(), folder / "fr", name="fr")
    model = copy.deepcopy(pair.base)
    load_peft(model, folder / "fr")
    close(pair.answer(model), pair.expected["fr"])


def quantized(pair: Pair, folder: Path) -> None:
    """On a base in 4 bits."""
    packed = quantize(copy.deepcopy(pair.base))
    dense = dequantized(packed)
    for model in (packed, dense):
        attach(model, pair.method, name="fr")
        load_adapter_state_dict(model, adapter_state_dict(pair.alone["fr"]), name="fr")
    close(pair.answer(packed), pair.answer(dense))
    differ(pair.answer(packed), pair.answer(packed, []))


def compiled(pair: Pair, folder: Path) -> None:
    """In one graph, once (`torch.compile(fullgraph=True)`)."""
    model, called, counter = pair.compiled
    for _ in range(2):
        with active(model, "fr"), torch.no_grad():
            close(models.logits(called, pair.batch), pair.expected["fr"])
    assert counter.frame_count == 1


def hot_swapped(pair: Pair, folder: Path) -> None:
    """Other values loaded while compiled, without compiling again (`load_adapter_state_dict`)."""
    compiled(pair, folder)
    model, called, counter = pair.compiled
    load_adapter_state_dict(model, adapter_state_dict(pair.alone["de"]), name="fr")
    with active(model, "fr"), torch.no_grad():
        close(models.logits(called, pair.batch), pair.expected["de"])
    assert counter.frame_count == 1


ABILITIES: dict[str, Callable[[Pair, Path], None]] = {
    "named": named,
    "mixed": mixed,
    "added": added,
    "combined": combined,
    "joint": joint,
    "merged": merged,
    "exported": exported,
    "quantized": quantized,
    "compiled": compiled,
    "hot-swapped": hot_swapped,
}

# The first example of each method on its first model, and what a method does elsewhere.
ROWS: dict[str, tuple[Method, str]] = {
    f"`{cls.__name__}`": (example.method, example.models[0])
    for cls, examples in EXAMPLES.items()
    for example in list(examples.values())[:1]
}
ROWS["`LoRA` with a trained head (`modules_to_save`)"] = (LoRA(r=4, modules_to_save=["lm_head"]), "llama")
ROWS["`LoRA` on stacked experts"] = (LoRA(r=4, target_modules=["experts"]), "mixtral")


COMPILING = ("compiled", "hot-swapped")
"""Abilities that take seconds to try."""


def answers_of(row: str, abilities: Collection[str] = tuple(ABILITIES)) -> dict[str, str]:
    """Try abilities of one row: `yes`, or why not.

    Raises:
        AssertionError: Something is neither refused nor right.
    """
    pair = Pair(*ROWS[row])
    return {ability: _try(ability, pair) for ability in ABILITIES if ability in abilities}


def _try(ability: str, pair: Pair) -> str:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a relative of LoRA is exported as LoRA
        try:
            ABILITIES[ability](pair, Path(folder))
        except UserError as error:
            return str(error).replace(folder, "runs")
        except (Unsupported, GuardOnDataDependentSymNode):
            return (
                "torch.compile breaks the graph: what is computed depends on values, such as the tokens of an expert."
            )
        except AssertionError as error:
            raise AssertionError(f"{ability}: {error}") from error
    return YES


INTRODUCTION = """\
# What each method can do

The tests try each cell on a tiny model: the result equals that of the adapter alone, or the library refuses with the
reason in the footnote. `python -m tests.contract.abilities` writes this page.
"""


def page_text(matrix: Mapping[str, Mapping[str, str]]) -> str:
    """Return the page: the abilities, the table, and each reason once as a footnote.

    Args:
        matrix: For each row of `ROWS` the answers of `answers_of`.
    """
    reasons = list(dict.fromkeys(answer for answers in matrix.values() for answer in answers.values() if answer != YES))
    numbers = {reason: number for number, reason in enumerate(reasons, start=1)}
    cells = {YES: YES} | {reason: f"no [^{number}]" for reason, number in numbers.items()}
    abilities = ["| ability | what was tried |", "|---|---|"]
    abilities += [f"| {name} | {(function.__doc__ or '').rstrip('.')} |" for name, function in ABILITIES.items()]
    table = [f"| method | {' | '.join(ABILITIES)} |", f"|---|{'---|' * len(ABILITIES)}"]
    for row, answers in matrix.items():
        table.append(f"| {row} | {' | '.join(cells[answers[ability]] for ability in ABILITIES)} |")
    footnotes = [f"[^{number}]: {reason}" for reason, number in numbers.items()]
    return "\n".join([INTRODUCTION, *abilities, "", *table, "", *footnotes]) + "\n"


def read_page(text: str) -> dict[str, dict[str, str]]:
    """Return the matrix that a page shows, as `page_text` takes it."""
    footnotes = dict(re.findall(r"^\[\^(\d+)\]: (.*)$", text, re.MULTILINE))
    table = text[text.index("| method |") :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    matrix: dict[str, dict[str, str]] = {}
    for row, *cells in rows:
        answers = {}
        for ability, cell in zip(header[1:], cells, strict=True):
            number = re.fullmatch(r"no \[\^(\d+)\]", cell)
            answers[ability] = footnotes[number.group(1)] if number else cell
        matrix[row] = answers
    return matrix


if __name__ == "__main__":
    PAGE.write_text(page_text({row: answers_of(row) for row in ROWS}), encoding="utf-8")
