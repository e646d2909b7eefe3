"""Small models and files, trained and asked through the command line as users do."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from lora_lightning.__main__ import main

QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
LEARNS = ("--data.batch_size=8", "--model.method=LoRA")
WORDS = ["good", "bad", "film", "very", "not", "the", "a", "is", "anna", "bell", "paris", "went", "to", "yes", "no"]


def save_encoder(folder: Path) -> str:
    """Write a tiny BERT without a head, and its tokenizer."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{one}" for one in letters), *WORDS]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(pieces))
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def command(*words: object) -> None:
    """Run a command of the library in this process; it must succeed."""
    assert main([str(word) for word in words]) == 0


def fit(*words: object, lr: float = 1e-2, epochs: int = 6) -> Path:
    """Train in the current folder and return the last checkpoint."""
    command(
        "fit",
        *words,
        *LEARNS,
        f"--model.optim.lr={lr}",
        f"--model.optim.head_lr={3 * lr}",
        f"--trainer.max_epochs={epochs}",
        *QUIET,
    )
    return max(Path("runs").glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)


def predict(checkpoint: Path, *words: object) -> None:
    """Predict with a checkpoint."""
    command("predict", "--ckpt_path", checkpoint, *words, *QUIET)


def merged(checkpoint: Path) -> str:
    """Merge a checkpoint into a folder of transformers."""
    command("merge", "--ckpt_path", checkpoint, "--output_dir", "merged")
    return "merged"


def write_lines(path: str, rows: list[object]) -> str:
    """Write rows as JSON lines."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: object) -> list[dict[str, object]]:
    """Read rows from JSON lines."""
    return [json.loads(line) for line in Path(str(path)).read_text("utf-8").splitlines()]


def in_the_run(name: str) -> Path:
    """Return the only file of this name in the folders of the runs."""
    (found,) = Path("runs").glob(f"*/{name}")
    return found
