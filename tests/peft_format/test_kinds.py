"""Every kind of adapter that PEFT writes is computed alike here, and PEFT computes alike what is written for it.

The whole grid of kinds and architectures makes the table of `docs/peft.md`; write it anew with

    UPDATE_DOCS=1 python -m pytest -m slow tests/peft_format/test_kinds.py
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_lightning.adapters import attached_methods, disabled
from lora_lightning.backbones.attach import attach
from lora_lightning.checkpoint import export_peft, load_adapter, load_peft
from lora_lightning.errors import CheckpointError
from lora_lightning.peft_format.config import PEFT_WEIGHTS_NAME
from tests.peft_format.kinds import KINDS, MODELS, Kind, answers, build_model, move, pefts

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*tie.*"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*"),
    pytest.mark.filterwarnings("ignore:.*position_ids|.*token_type_ids|.*PRNG|.*save_embedding_layers"),
]

DOCS = Path(__file__).parents[2] / "docs" / "peft.md"
START, END = "<!-- table: made by tests/peft_format/test_kinds.py -->", "<!-- end of table -->"
TOLERANCE = 1e-5
QUICK = [(kind, model) for kind in KINDS for model in ("llama", "t5", "bert tokens")]


def ours(model: str, kind: Kind) -> nn.Module:
    """Return a model that this library adapted and trained."""
    _, targets = MODELS[model]
    adapted = build_model(model)
    heads = [name for name in ("classifier", "score") if hasattr(adapted, name)]
    attach(adapted, kind.ours(targets if kind.targets else None), modules_to_save=heads)
    move(adapted)
    return adapted


def theirs(model: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(build_model(model), folder).eval()


def perturb_file(folder: Path) -> None:
    """Move one tensor of the adapter in a folder, under all of its names."""
    path = folder / PEFT_WEIGHTS_NAME
    tensors = load_file(path)
    key = next(name for name in tensors if not name.startswith("base_model.vera_") and "classifier" not in name)
    noise = torch.randn(tensors[key].shape, generator=torch.Generator().manual_seed(5))
    tied = [name for name, one in tensors.items() if one.shape == noise.shape and torch.equal(one, tensors[key])]
    save_file({**tensors, **{name: tensors[name] + noise for name in tied}}, path)
    (folder / "manifest.json").unlink(missing_ok=True)  # which would notice


def read_theirs(kind: str, model: str, folder: Path) -> str:
    """Load what PEFT wrote, compare, and return `in`, or why not."""
    try:
        trained, again = pefts(model, KINDS[kind], folder)
    except (ValueError, TypeError):
        return "PEFT cannot"
    adapted = build_model(model)
    base = answers(adapted)
    try:
        load_peft(adapted, folder)
    except CheckpointError:
        return "refused"
    expected = answers(trained)
    torch.testing.assert_close(answers(again), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(answers(adapted), expected, atol=TOLERANCE, rtol=0)
    assert (expected - base).abs().max() > 1e-3  # negative control: the adapter matters
    with disabled(adapted):
        torch.testing.assert_close(answers(adapted), base, atol=0, rtol=0)
    perturb_file(folder)
    other = build_model(model)
    load_peft(other, folder)
    assert (answers(other) - expected).abs().max() > 1e-4  # negative control: each value matters
    return "in"


def write_ours(kind: str, model: str, folder: Path, *, own_kind: bool = False) -> str:
    """Write ours for PEFT, compare, and return `out`, or why not."""
    adapted = ours(model, KINDS[kind])
    expected = answers(adapted)
    try:
        export_peft(adapted, folder, own_kind=own_kind)
    except CheckpointError:
        assert not folder.exists()
        return "refused"
    torch.testing.assert_close(answers(theirs(model, folder)), expected, atol=TOLERANCE, rtol=0)
    back = build_model(model)
    load_peft(back, folder)
    torch.testing.assert_close(answers(back), expected, atol=TOLERANCE, rtol=0)
    perturb_file(folder)
    assert (answers(theirs(model, folder)) - expected).abs().max() > 1e-4  # negative control
    return "out"


@pytest.mark.parametrize(("kind", "model"), QUICK)
def test_both_ways(kind: str, model: str, tmp_path: Path) -> None:
    found = {read_theirs(kind, model, tmp_path / "theirs"), write_ours(kind, model, tmp_path / "ours")}
    assert cell(found) == expected_cell(kind, model)
    if KINDS[kind].own_kind:
        assert write_ours(kind, model, tmp_path / "own", own_kind=True) == "out"


@pytest.mark.parametrize("kind", ["ia3", "prompt tuning", "prefix tuning, mlp", "trainable tokens", "lora, bias"])
def test_a_folder_for_peft_trains_on_here(kind: str, tmp_path: Path) -> None:
    """PEFT's files alone would not give an encoder back; the folder holds our own tensors too."""
    adapted = ours("llama", KINDS[kind])
    export_peft(adapted, tmp_path / "peft")
    fresh = build_model("llama")
    attach(fresh, list(attached_methods(adapted)))
    assert (answers(fresh) - answers(adapted)).abs().max() > 1e-3  # negative control
    load_adapter(fresh, tmp_path / "peft")
    torch.testing.assert_close(answers(fresh), answers(adapted), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "model", "reason"),
    [
        ("prompt tuning", "bert", "pools a virtual token where this library pools the first real one"),
        ("p-tuning", "roberta", "pools a virtual token where this library pools the first real one"),
        ("prompt tuning", "llama rows", "last position of a row, be it padding"),
        ("prefix tuning", "t5", "encoder-decoder's prefix to the decoder alone"),
        ("prefix tuning", "gemma3", "layers with a sliding window lose sight of it"),
    ],
)
def test_what_peft_computes_otherwise_says_why(kind: str, model: str, reason: str, tmp_path: Path) -> None:
    pefts(model, KINDS[kind], tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=reason):
        load_peft(build_model(model), tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=reason):
        export_peft(ours(model, KINDS[kind]), tmp_path / "ours")


def cell(found: set[str]) -> str:
    """Return what one kind does on one architecture, in words."""
    if found == {"in", "out"}:
        return "both"
    if found == {"PEFT cannot", "refused"}:
        return "PEFT cannot"
    return " ".join(sorted(found - {"refused"})) or "refused"


def table(cells: dict[tuple[str, str], str]) -> str:
    """Return the table as Markdown."""
    lines = ["| PEFT's | " + " | ".join(MODELS) + " |", "|---" * (len(MODELS) + 1) + "|"]
    lines += [f"| {kind} | " + " | ".join(cells[kind, model] for model in MODELS) + " |" for kind in KINDS]
    return "\n".join(lines)


def expected_cell(kind: str, model: str) -> str:
    """Return what the docs say."""
    rows = [line.strip("| ").split(" | ") for line in DOCS.read_text(encoding="utf-8").split(START)[1].splitlines()]
    head = next(row for row in rows if row[0] == "PEFT's")
    return next(row for row in rows if row[0] == kind)[head.index(model)]


@pytest.mark.slow
def test_the_table_of_the_docs(tmp_path: Path) -> None:
    cells: dict[tuple[str, str], str] = {}
    for number, (kind, model) in enumerate((kind, model) for kind in KINDS for model in MODELS):
        folder = tmp_path / str(number)
        cells[kind, model] = cell({read_theirs(kind, model, folder / "in"), write_ours(kind, model, folder / "out")})
    assert set(cells.values()) <= {"both", "refused", "PEFT cannot"}
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    made = f"{before}{START}\n\n{table(cells)}\n\n{END}{after}"
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(made, encoding="utf-8")
    assert made == DOCS.read_text(encoding="utf-8")
