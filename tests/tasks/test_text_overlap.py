"""ROUGE against torchmetrics, and by hand."""

import random

import pytest
from torchmetrics.functional.text.rouge import rouge_score

from lora_lightning.tasks.text_overlap import overlap

WORDS = ["the", "Cat", "sat", "on", "mat,", "x2", "dog.", "ran"]


def test_rouge_equals_that_of_torchmetrics():
    rng = random.Random(0)
    largest_apart = 0.0
    for _ in range(100):
        ours, theirs = (" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2))
        expected = rouge_score([ours], [theirs], rouge_keys=("rouge1", "rouge2", "rougeL"))
        found = overlap(ours, theirs)
        for name in ("rouge1", "rouge2", "rougeL"):
            assert getattr(found, name) == pytest.approx(float(expected[f"{name}_fmeasure"]), abs=1e-6)
        largest_apart = max(largest_apart, found.rouge1 - found.rougeL)
    assert largest_apart > 0.1  # control: order counts for one of them


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ("a b c", "a b c", (1, 1, 1, 1)),
        (" a b c\n", "a b c", (1, 1, 1, 1)),
        ("a b, c", "A b c", (0, 1, 1, 1)),
        ("c b a", "a b c", (0, 1, 0, 1 / 3)),
        ("a a a", "a", (0, 1 / 2, 0, 1 / 2)),
        ("", "a", (0, 0, 0, 0)),
        ("über straße", "über die straße", (0, 4 / 5, 0, 4 / 5)),
        ("猫 座", "猫 犬", (0, 1 / 2, 0, 1 / 2)),
    ],
)
def test_overlap_by_hand(ours, theirs, expected):
    assert tuple(overlap(ours, theirs)) == pytest.approx(expected)
