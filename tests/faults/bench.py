"""What the rows of the fault table work with: a tiny backbone, data, and a run that was trained on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_lightning.checkpoint.files import sha256_file
from tests import models
from tests.checkpoint.runs import save_backbone

CONFIG = """\
model:
  class_path: SequenceClassification
  init_args:
    backbone: base
    method:
      class_path: LoRA
      init_args: {r: 2, alpha: 4, target_modules: [query, value]}
    optim: {lr: 1e-2}
data:
  class_path: TextClassificationData
  init_args: {train: train.csv, val_size: 4, test_size: 4, max_length: 16, batch_size: 8}
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
"""
CKPT = "run/last.ckpt"
FIT = ["fit", "--config", "good.yaml"]
TEST = ["test", "--config", "good.yaml", "--ckpt_path", CKPT]
MERGE = ["merge", "--ckpt_path", CKPT, "--output_dir", "out"]
START = [*FIT, "--model.method", "null", "--model.adapter", "run/last"]

Provoke = Callable[[], list[str]]

PATCHES = pytest.MonkeyPatch()  # what rows replace; each test undoes it


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Args:
        name: What is wrong.
        sentence: Regular expression for what the user reads after `lora-lightning: error: `.
        provoke: Makes it so in the current folder, and returns the command line; or the command line alone.
        status: The exit status.
        leaves_run: Training had begun, so the run's folder is there.
    """

    name: str
    sentence: str
    provoke: Provoke | list[str]
    status: int = 2
    leaves_run: bool = False

    def arguments(self) -> list[str]:
        return list(self.provoke) if isinstance(self.provoke, list) else self.provoke()


def furnish(folder: Path) -> None:
    """Write the backbone, the data and the config into an empty folder."""
    save_backbone(folder / "base")
    rows = [f"w{index} w{index * 7 % 50} w{index % 9},{('no', 'yes')[index % 2]}" for index in range(40)]
    (folder / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (folder / "good.yaml").write_text(CONFIG)


# How rows make things wrong.


def replaced(owner: object, name: str, value: object, arguments: list[str] | None = None) -> Provoke:
    """Replace a part of the program, for what no file and no flag can bring about."""

    def provoke() -> list[str]:
        PATCHES.setattr(owner, name, value)
        return FIT if arguments is None else arguments

    return provoke


def config(old: str, new: str, *arguments: str) -> Provoke:
    """Replace a part of the good config."""

    def provoke() -> list[str]:
        assert old in CONFIG, old
        Path("bad.yaml").write_text(CONFIG.replace(old, new, 1))
        return ["fit", "--config", "bad.yaml", *arguments]

    return provoke


def yaml(text: str | bytes) -> Provoke:
    """Give a config of one's own."""

    def provoke() -> list[str]:
        Path("bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["fit", "--config", "bad.yaml"]

    return provoke


def data(name: str, content: str | bytes, *arguments: str) -> Provoke:
    """Train on a file of one's own."""

    def provoke() -> list[str]:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [*FIT, "--data.train", name, *arguments]

    return provoke


def method(text: str, *arguments: str) -> list[str]:
    """Train another method."""
    return [*FIT, "--model.method", text, *arguments]


def checkpoint(change: Callable[[dict[str, Any]], None], arguments: list[str] = TEST) -> Provoke:
    """Change what the run's checkpoint holds."""

    def provoke() -> list[str]:
        content = torch.load(CKPT, weights_only=True)
        change(content)
        leave_alone()
        torch.save(content, CKPT)
        return arguments

    return provoke


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], *, with_manifest: bool = False) -> Provoke:
    """Change the tensors of the adapter folder, whose manifest is mended accordingly, or taken away."""

    def provoke() -> list[str]:
        path = Path("run/last/adapter_model.safetensors")
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
        if with_manifest:
            mend_manifest(path)
        else:
            Path("run/last/manifest.json").unlink()
        return START

    return provoke


def adapter_file(name: str, content: bytes | None, *, with_manifest: bool = False) -> Provoke:
    """Replace a file of the adapter folder, or take it away."""

    def provoke() -> list[str]:
        path = Path("run/last", name)
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        if with_manifest:
            mend_manifest(path)
        elif name != "manifest.json":
            Path("run/last/manifest.json").unlink()
        return START

    return provoke


def json_file(name: str, change: Callable[[dict[str, Any]], None], *, keep_manifest: bool = False) -> Provoke:
    """Change a JSON file of the adapter folder."""

    def provoke() -> list[str]:
        path = Path("run/last", name)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        if name != "manifest.json" and not keep_manifest:
            Path("run/last/manifest.json").unlink()
        return START

    return provoke


def mend_manifest(path: Path) -> None:
    """Write the digest of a changed file into the manifest beside it, as somebody with bad intent would."""
    manifest = path.parent / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["manifest_sha256"]
    content["files"][path.name] = {"sha256": sha256_file(path), "num_bytes": path.stat().st_size}
    manifest.write_text(json.dumps(content))


def leave_alone() -> None:
    """Take the folder beside the checkpoint away, whose manifest knows the digest of what was written."""
    shutil.rmtree("run/last")


def other_base(change: Callable[[Any], None], arguments: list[str] = TEST) -> Provoke:
    """Put another model where the backbone was."""

    def provoke() -> list[str]:
        model = models.build("bert").bert
        change(model)
        for path in Path("base").glob("*.safetensors"):
            path.unlink()
        model.save_pretrained("base")
        return arguments

    return provoke


def other_tokenizer(arguments: list[str], *, alone: bool = False) -> Provoke:
    """Put a tokenizer with the same words under other ids where the backbone's was."""

    def provoke() -> list[str]:
        path = Path("base/tokenizer.json")
        content = json.loads(path.read_text())
        words = content["model"]["vocab"]
        words["w3"], words["w4"] = words["w4"], words["w3"]
        path.write_text(json.dumps(content))
        if alone:  # without the adapter folder, which keeps the tokenizer of the training
            shutil.rmtree("run/last")
        return arguments

    return provoke


# What a model's folder says of the code that it brings, where transformers has no class of its own for it.
OWN_MODEL = {
    "config.json": {
        "model_type": "own",
        "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"), "own.Own"),
    }
}
OWN_TOKENIZER = {
    "config.json": {"model_type": "own"},
    "tokenizer_config.json": {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}},
}
CANARY = "from pathlib import Path\nPath('pwned').touch()\nfrom transformers import {} as Own\n"


def own_code(files: dict[str, dict[str, Any]], arguments: list[str] = FIT, folder: str = "base") -> Provoke:
    """Have the backbone bring code of its own, which would leave a file behind."""

    def provoke() -> list[str]:
        for name, changes in files.items():
            path = Path(folder, name)
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        kind = "BertTokenizerFast" if files is OWN_TOKENIZER else "BertConfig"
        Path(folder, "own.py").write_text(CANARY.format(kind))
        return arguments

    return provoke


def copy_of(folder: Path, here: Path) -> None:
    """Copy the furnished folder, so that a row may break what it likes."""
    shutil.copytree(folder, here, dirs_exist_ok=True)


def written_by(name):
    def change(content):
        content["lora_lightning"]["task"] = name

    return change
