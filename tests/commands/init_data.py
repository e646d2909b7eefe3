"""Data of many kinds in files, and tiny backbones that read any text letter by letter."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.test_configs import stand_in

WORDS = [f"w{index}" for index in range(50)]


def text(draw: random.Random, least: int = 3, most: int = 12) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))


def write_csv(path: Path, rows: list[dict[str, Any]], separator: str = ",", encoding: str = "utf-8") -> None:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def write_conll(path: Path, sentences: list[tuple[list[str], list[str]]]) -> None:
    blocks = ["\n".join(f"{word} {tag}" for word, tag in zip(*one, strict=True)) for one in sentences]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def labelled(count: int = 120, labels: tuple[str, ...] = ("neg", "pos", "neutral")) -> list[dict[str, Any]]:
    """Return texts with labels that are not equally frequent."""
    draw = random.Random(0)
    return [
        {"id": n, "review": f"{text(draw)} é{n}", "sentiment": labels[0] if n % 2 else labels[n // 2 % len(labels)]}
        for n in range(count)
    ]


def several(count: int = 120) -> list[dict[str, Any]]:
    draw = random.Random(1)
    topics = ["a; b", "b", "a; c", "c", "a"]
    return [{"text": f"{text(draw)} {n}", "topics": topics[n % len(topics)]} for n in range(count)]


def flagged(count: int = 120) -> list[dict[str, Any]]:
    draw = random.Random(2)
    return [
        {"id": f"c{n}", "comment_text": f"{text(draw)} {n}", "toxic": n % 2, "insult": int(n % 3 == 0)}
        for n in range(count)
    ]


def scored(count: int = 120) -> list[dict[str, Any]]:
    draw = random.Random(3)
    return [{"sentence": f"{text(draw)} {n}", "similarity": round(draw.random() * 5, 2)} for n in range(count)]


def tagged(count: int = 80) -> list[tuple[list[str], list[str]]]:
    draw = random.Random(4)
    tags = ["O", "B-PER", "I-PER", "B-LOC"]
    sentences = [text(draw).split() for _ in range(count)]
    return [(words, [tags[(n + at) % len(tags)] for at in range(len(words))]) for n, words in enumerate(sentences)]


def asked(count: int = 80) -> list[dict[str, Any]]:
    draw = random.Random(5)
    return [
        {"question": f"{text(draw)} {n}", "A": "one", "B": "two", "C": "three", "answer": "ABC"[n % 3]}
        for n in range(count)
    ]


def summed(count: int = 80) -> list[dict[str, Any]]:
    draw = random.Random(6)
    return [{"article": f"{text(draw, 10, 30)} {n}", "highlights": f"{text(draw, 2, 5)} {n}"} for n in range(count)]


def talked(count: int = 60) -> list[dict[str, Any]]:
    draw = random.Random(7)
    turns = [(f"{text(draw)} {n}", text(draw)) for n in range(count)]
    return [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]}
        for one, other in turns
    ]


def instructed(count: int = 60) -> list[dict[str, Any]]:
    draw = random.Random(8)
    return [{"instruction": f"{text(draw)} {n}", "input": "", "output": text(draw)} for n in range(count)]


def answered(count: int = 60) -> list[dict[str, Any]]:
    draw = random.Random(9)
    return [{"question": f"{text(draw)} {n}", "response": text(draw)} for n in range(count)]


def written(count: int = 60) -> list[dict[str, Any]]:
    draw = random.Random(10)
    return [{"text": f"{text(draw, 20, 40)} {n}"} for n in range(count)]


def save_encoder(folder: Path) -> str:
    """Save a tiny BERT with a tokenizer that knows single letters."""
    name = stand_in("Llama", folder)  # for its tokenizer
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=256,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return name
