"""Tables of an evaluation against scikit-learn, and against sets of entities counted by hand."""

from __future__ import annotations

import torch
from sklearn.metrics import confusion_matrix

from lora_lightning.tasks.tables import ConfusionTable, EntityTable


def test_confusion_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(40, 4, generator=generator), torch.randint(4, (40,), generator=generator)
    metric = ConfusionTable(["a", "b", "c", "d"])
    for some, right in zip(logits.split(7), targets.split(7), strict=True):
        metric.update(some, right)
    table = metric.table()
    expected = confusion_matrix(targets, logits.argmax(-1), labels=range(4)).tolist()
    assert table.counts == expected
    assert table.counts != confusion_matrix(logits.argmax(-1), targets, labels=range(4)).tolist()
    assert table.rows == table.columns == ["a", "b", "c", "d"]


def test_entities_of_each_type():
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    expected = torch.tensor([[1, 2, -100, 0, 3], [3, 0, 1, 0, 0]])
    predicted = torch.tensor([[1, 2, 4, 0, 0], [3, 0, 3, 0, 1]])
    metric = EntityTable(names)
    metric.update(predicted, expected)
    table = metric.table()
    assert table.columns == ["found", "predicted only", "expected only"]
    # PER: one found, one at the end of the second row is too many, one was taken for LOC. LOC: found in the second row.
    assert dict(zip(table.rows, table.counts, strict=True)) == {"PER": [1, 1, 1], "LOC": [1, 1, 1]}


def test_counts_start_anew():
    metric = ConfusionTable(["a", "b"])
    metric.update(torch.eye(2), torch.tensor([0, 1]))
    assert metric.table().counts == [[1, 0], [0, 1]]
    metric.reset()
    metric.update(torch.eye(2)[:1], torch.tensor([1]))
    assert metric.table().counts == [[0, 0], [1, 0]]
