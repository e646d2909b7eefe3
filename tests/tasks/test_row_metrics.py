"""Metrics over whole sets of rows against scikit-learn and scipy, on one process and on two."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import scipy.stats
import sklearn.metrics
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lora_lightning.tasks.problems import PROBLEMS
from lora_lightning.tasks.row_metrics import MultilabelF1, best_threshold

ROWS, COLUMNS = 53, 4


def logits_and_labels(seed=0, decimals=1):
    """Return logits with ties, and labels of which the last class has none."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(ROWS, COLUMNS, generator=generator) * 2).round(decimals=decimals)
    labels = (logits + 2 * torch.randn(ROWS, COLUMNS, generator=generator) > 1).float()
    labels[:, -1] = 0
    return logits, labels


def numbers(columns):
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(ROWS, columns, generator=generator).round(decimals=1)
    return (targets + torch.randn(ROWS, columns, generator=generator)).round(decimals=1), targets


def fed(problem, predictions, targets):
    """Return the values of a problem's metrics, fed with batches of 16 rows and a last one of 5."""
    metrics = PROBLEMS[problem].metrics(predictions.shape[1])
    for ours, theirs in zip(predictions.split(16), targets.split(16), strict=True):
        metrics.update(ours, theirs)
    return {name: value.item() for name, value in metrics.compute().items()}


def f1_at(threshold, logits, labels, average):
    chosen = logits.sigmoid().double().numpy() >= threshold
    return sklearn.metrics.f1_score(labels.numpy(), chosen, average=average, zero_division=0)


def test_multi_label_metrics_are_those_of_scikit_learn():
    logits, labels = logits_and_labels()
    values = fed("multi_label", logits, labels)
    precision = [
        sklearn.metrics.average_precision_score(labels[:, k].numpy(), logits[:, k].double().numpy()) for k in range(3)
    ]
    assert values["f1"] == pytest.approx(f1_at(0.5, logits, labels, "macro"), abs=1e-6)
    assert values["f1_micro"] == pytest.approx(f1_at(0.5, logits, labels, "micro"), abs=1e-6)
    assert values["average_precision"] == pytest.approx(sum(precision) / 3, abs=1e-6)
    mean_of_batches = [fed("multi_label", *pair) for pair in zip(logits.split(16), labels.split(16), strict=True)]
    for name, value in values.items():  # negative control: none is the mean over the batches
        assert abs(sum(one[name] for one in mean_of_batches) / 4 - value) > 1e-3


def test_metrics_of_several_labels_keep_the_rows_once():
    logits, labels = logits_and_labels()
    metrics = PROBLEMS["multi_label"].metrics(COLUMNS)
    for _ in range(2):
        metrics.update(logits, labels)
    assert len(metrics.compute_groups) == 1


def test_without_any_label_average_precision_is_zero():
    logits, labels = logits_and_labels()
    assert fed("multi_label", logits, labels * 0)["average_precision"] == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("decimals", [0, 3])
def test_the_threshold_has_the_largest_micro_f1(seed, decimals):
    logits, labels = logits_and_labels(seed, decimals)
    scores = logits.sigmoid()
    threshold = best_threshold(scores, labels > 0.5)
    every = [f1_at(value, logits, labels, "micro") for value in scores.double().unique().tolist()]
    assert f1_at(threshold, logits, labels, "micro") == pytest.approx(max(every), abs=1e-12)
    assert f1_at(0.99, logits, labels, "micro") < max(every)
    assert threshold not in scores


def test_a_threshold_may_take_all_and_needs_a_right_label():
    scores = torch.tensor([[0.25, 0.75]])
    assert best_threshold(scores, torch.tensor([[True, True]])) == 0.125
    assert best_threshold(scores, torch.tensor([[False, True]])) == 0.5
    assert best_threshold(scores, torch.tensor([[False, False]])) is None
    assert best_threshold(scores * float("nan"), torch.tensor([[True, True]])) is None
    near = torch.nextafter(torch.tensor(0.75), torch.tensor(1.0)).item()
    assert best_threshold(torch.tensor([[0.75, near]]), torch.tensor([[False, True]])) == near


@pytest.mark.parametrize("columns", [1, 3])
def test_regression_metrics_are_those_of_scipy(columns):
    ours, theirs = numbers(columns)
    values = fed("regression", ours, theirs)
    pairs = [(ours[:, k].double().numpy(), theirs[:, k].double().numpy()) for k in range(columns)]
    pearson = sum(scipy.stats.pearsonr(a, b).statistic for a, b in pairs) / columns
    spearman = sum(scipy.stats.spearmanr(a, b).statistic for a, b in pairs) / columns
    assert values["mse"] == pytest.approx(sklearn.metrics.mean_squared_error(theirs.double(), ours.double()), abs=1e-6)
    assert values["pearson"] == pytest.approx(pearson, abs=1e-6)
    assert values["spearman"] == pytest.approx(spearman, abs=1e-6)
    assert abs(values["pearson"] - values["spearman"]) > 1e-3


def test_targets_of_one_dimension_are_one_column():
    ours, theirs = numbers(1)
    assert fed("regression", ours, theirs[:, 0]) == fed("regression", ours, theirs)


def test_a_constant_correlates_with_nothing_and_warns_of_nothing():
    ours, theirs = numbers(2)
    ours[:, 0] = 0.1
    values, varying = fed("regression", ours, theirs), fed("regression", ours[:, 1:], theirs[:, 1:])
    assert values["pearson"] == pytest.approx(varying["pearson"] / 2)
    assert values["spearman"] == pytest.approx(varying["spearman"] / 2)


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    share = slice(0, 20) if rank == 0 else slice(20, None)  # of different sizes
    logits, labels = logits_and_labels()
    own = fed("multi_label", logits[share], labels[share])
    f1 = MultilabelF1()
    f1.chooses = True
    f1.update(logits[share], labels[share])
    own["best_f1"] = f1.compute().item()
    torch.save({**own, "threshold": f1.threshold, "kept": len(f1.rows()[0])}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_see_the_rows_of_both(tmp_path):
    mp.spawn(_work, (str(tmp_path),), nprocs=2)
    logits, labels = logits_and_labels()
    threshold = best_threshold(logits.sigmoid(), labels > 0.5)
    whole = {**fed("multi_label", logits, labels), "threshold": threshold}
    whole["best_f1"] = pytest.approx(f1_at(threshold, logits, labels, "macro"), abs=1e-6)
    alone = fed("multi_label", logits[:20], labels[:20])
    for rank, kept in enumerate((20, ROWS - 20)):
        assert torch.load(tmp_path / f"{rank}.pt") == {**whole, "kept": kept}
    assert alone["f1"] != whole["f1"]
