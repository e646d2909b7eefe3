"""Several validation sets: figures of each, and of all rows together, against scikit-learn and transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sklearn.metrics
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.nn import functional as F

from lora_lightning import LoRA
from lora_lightning.tasks.evaluation import EvaluationSets, MeanLoss, sets_of
from lora_lightning.tasks.row_metrics import best_threshold
from tests.checkpoint.runs import save_backbone
from tests.tasks import languages, texts
from tests.tasks.languages import Speaker, joined
from tests.tasks.test_problems import build
from tests.tasks.test_problems import loader as rows_loader
from tests.tasks.toys import Tagger, trainer
from tests.tasks.toys import loader as tagged

SIZES = {"reviews": 24, "tweets": 40}
"""Numbers of rows, in batches of 16: the last of each has 8."""


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(0)
    return str(save_backbone(tmp_path / "base"))


def seeded(backbone, problem):
    """Return a built task with the same trained weights each time, whatever the process has drawn before."""
    task = build(backbone, problem)
    task.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(task.adapted.named_parameters(), key=lambda one: one[0]):
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    torch.manual_seed(2)  # of dropout
    return task


def tagger():
    return Tagger(method=LoRA(r=2, target_modules="all-linear"))


def loaders_of(problem):
    return {
        name: rows_loader(problem, seed=seed, rows=rows) for seed, (name, rows) in enumerate(SIZES.items(), start=5)
    }


@torch.no_grad()
def logits_and_labels(task, problem):
    """Return float32 logits and labels of each set, and of all rows under no name."""
    task.eval()
    parts = {}
    for name, loader in loaders_of(problem).items():
        batches = list(loader)
        logits = torch.cat([task._logits(batch) for batch in batches])
        parts[f"{name}/"] = logits, torch.cat([batch["labels"] for batch in batches])
    parts[""] = tuple(map(torch.cat, zip(*parts.values(), strict=True)))
    return parts


def of_single_label(logits, labels):
    probabilities, guesses = logits.double().softmax(-1), logits.argmax(-1)
    return {
        "loss": sklearn.metrics.log_loss(labels, probabilities, labels=range(logits.shape[1])),
        "accuracy": sklearn.metrics.accuracy_score(labels, guesses),
        "f1": sklearn.metrics.f1_score(labels, guesses, average="macro"),
    }


def of_multi_label(logits, labels, threshold):
    probabilities = logits.sigmoid()
    guesses = probabilities >= threshold
    return {
        "loss": F.binary_cross_entropy_with_logits(logits, labels).item(),
        "f1": sklearn.metrics.f1_score(labels, guesses, average="macro", zero_division=0),
        "f1_micro": sklearn.metrics.f1_score(labels, guesses, average="micro", zero_division=0),
        "average_precision": sklearn.metrics.average_precision_score(labels, probabilities, average="macro"),
    }


def of_regression(logits, labels):
    return {"loss": F.mse_loss(logits, labels).item(), "mse": sklearn.metrics.mean_squared_error(labels, logits)}


def assert_figures(metrics, expected):
    """Compare what was logged with `{prefix: {metric: value}}`; the figures of no two prefixes may be alike."""
    for prefix, values in expected.items():
        ours = {name: metrics[f"{prefix}{name}"] for name in values}
        assert ours == pytest.approx(values, abs=1e-6), prefix
    every = list(expected.values())
    for name in every[0]:
        figures = [values[name] for values in every]
        assert min(abs(one - other) for i, one in enumerate(figures) for other in figures[:i]) > 1e-4, name


@pytest.mark.parametrize("stage", ["val", "test"])
def test_each_set_and_all_rows_have_figures_of_their_own(backbone, stage):
    task, run = seeded(backbone, "single_label"), trainer()
    evaluate = run.validate if stage == "val" else run.test
    metrics = evaluate(task, loaders_of("single_label"), verbose=False)[0]
    parts = logits_and_labels(task, "single_label")
    assert_figures(metrics, {f"{stage}/{name}": of_single_label(*part) for name, part in parts.items()})
    assert len(metrics) == 9
    assert evaluate(task, loaders_of("single_label"), verbose=False)[0] == metrics  # it starts anew


def test_one_threshold_is_chosen_on_the_rows_of_all_sets(backbone):
    task, run = seeded(backbone, "multi_label"), trainer(max_epochs=2)
    run.fit(task, rows_loader("multi_label"), loaders_of("multi_label"))
    parts = logits_and_labels(task, "multi_label")
    thresholds = {name: best_threshold(logits.sigmoid(), labels > 0.5) for name, (logits, labels) in parts.items()}
    assert task.threshold.item() == pytest.approx(thresholds[""])
    assert len(set(thresholds.values())) == 3  # control: each set alone would choose another
    expected = {f"val/{name}": of_multi_label(*part, thresholds[""]) for name, part in parts.items()}
    assert_figures({name: value.item() for name, value in run.callback_metrics.items()}, expected)
    own = of_multi_label(*parts["tweets/"], thresholds["tweets/"])
    assert abs(own["f1_micro"] - expected["val/tweets/"]["f1_micro"]) > 1e-4
    tested = run.test(task, loaders_of("multi_label"), verbose=False)[0]
    assert tested["test/tweets/f1"] == run.callback_metrics["test/tweets/f1"].item()
    assert tested["test/tweets/f1"] == pytest.approx(expected["val/tweets/"]["f1"], abs=1e-6)


def test_numbers_are_measured_set_by_set(backbone):
    task, run = seeded(backbone, "regression"), trainer(max_epochs=1)
    run.fit(task, rows_loader("regression"), loaders_of("regression"))
    expected = {f"val/{name}": of_regression(*part) for name, part in logits_and_labels(task, "regression").items()}
    assert_figures({name: value.item() for name, value in run.callback_metrics.items()}, expected)


# Language models.


def test_tokens_of_each_set_and_of_all_are_counted():
    task = Speaker()
    parts = {"long": languages.batches((31, 14)), "short": languages.batches((5, 7, 3))}
    metrics = trainer().validate(task, {name: languages.loader(one) for name, one in parts.items()}, verbose=False)[0]
    expected = {}
    for prefix, part in {
        "long/": parts["long"],
        "short/": parts["short"],
        "": [*parts["long"], *parts["short"]],
    }.items():
        with torch.no_grad():
            loss = languages.reference_loss(task.adapted, joined(part))
        expected[f"val/{prefix}"] = {"loss": loss.item(), "perplexity": loss.exp().item()}
    for prefix, values in expected.items():
        assert {name: metrics[f"{prefix}{name}"] for name in values} == pytest.approx(values, rel=1e-5)
    assert abs(metrics["val/long/loss"] - metrics["val/short/loss"]) > 1e-2
    assert abs(metrics["val/long/accuracy"] - metrics["val/short/accuracy"]) > 1e-3
    assert len(metrics) == 9


def test_each_set_has_answers_of_its_own():
    """Three rows of each set are answered; alone, each set has the same figures."""
    task = texts.Writer(num_generated=3, max_new_tokens=6)
    parts = {"first": texts.batches(((5, 3), (9, 8))), "second": texts.batches(((4, 12),), rows=4)}
    loaders = {name: languages.loader(batches) for name, batches in parts.items()}
    metrics = trainer().validate(task, loaders, verbose=False)[0]
    alone = {name: trainer().validate(task, one, verbose=False)[0] for name, one in loaders.items()}
    figures = {"loss", "perplexity", "accuracy", "exact_match", "rouge1", "rouge2", "rougeL"}
    for name, own in alone.items():
        assert {metric: metrics[f"val/{name}/{metric}"] for metric in figures} == pytest.approx(
            {metric: own[f"val/{metric}"] for metric in figures}, rel=1e-6
        )
    mean = sum(own["val/rouge1"] for own in alone.values()) / 2
    assert metrics["val/rouge1"] == pytest.approx(mean, rel=1e-6)
    assert alone["first"]["val/rouge1"] != alone["second"]["val/rouge1"]


# Names, and what callbacks see.


def test_loaders_are_named_by_their_mapping_or_their_index():
    task = tagger()
    figures = {"loss", "accuracy"}

    def logged(loaders):
        return set(trainer().validate(task, loaders, verbose=False)[0])

    plain = {f"val/{name}" for name in figures}
    assert logged(tagged()) == logged([tagged()]) == plain
    assert logged({"only": tagged()}) == plain | {f"val/only/{name}" for name in figures}
    two = {f"val/{index}/{name}" for index in (0, 1) for name in figures}
    assert logged([tagged(), tagged(32)]) == plain | two
    assert logged(CombinedLoader([tagged(), tagged(32)], "sequential")) == plain | two
    assert sets_of(None, "val") == EvaluationSets("val")


def test_the_progress_bar_shows_all_sets_together_alone():
    run = trainer()
    run.validate(tagger(), {"a": tagged(), "b": tagged(32)}, verbose=False)
    assert set(run.progress_bar_metrics) == {"val/loss", "val/accuracy"}
    assert {"val/a/loss", "val/b/accuracy"} < set(run.callback_metrics)


def test_names_may_change_between_runs():
    task = tagger()
    first = trainer().validate(task, {"a.b": tagged(), "c": tagged(32)}, verbose=False)[0]
    second = trainer().validate(task, {"c": tagged(32), "d": tagged()}, verbose=False)[0]
    assert second["val/c/loss"] == first["val/c/loss"]
    assert second["val/d/loss"] == first["val/a.b/loss"] != first["val/c/loss"]
    assert not [name for name in second if "a.b" in name]


def test_a_loss_that_is_not_a_number_is_told():
    loss = MeanLoss()
    for value, rows in ((1.0, 3), (4.0, 1)):
        loss.update(torch.tensor(value), rows)
    assert loss.compute().item() == pytest.approx(7 / 4)
    loss.update(torch.tensor(float("nan")), 2)
    assert loss.compute().isnan()
    wide = MeanLoss()
    wide.update(torch.tensor(1 / 3, dtype=torch.float64), 1)
    assert wide.compute().item() == 1 / 3


# Ranks.


def test_two_ranks_give_the_figures_of_one_process(backbone, tmp_path):
    script = Path(__file__).with_name("evaluation_ranks_script.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), backbone, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    for problem in ("single_label", "multi_label"):
        whole = trainer().validate(seeded(backbone, problem), loaders_of(problem), verbose=False)[0]
        assert ranks[0][problem] == pytest.approx(whole, abs=1e-6)
        assert abs(whole["val/reviews/f1"] - whole["val/tweets/f1"]) > 1e-3
    parts = {"long": languages.batches((31, 14)), "short": languages.batches((5, 7))}
    loaders = {name: languages.loader(part) for name, part in parts.items()}
    assert ranks[0]["tokens"] == pytest.approx(trainer().validate(Speaker(), loaders, verbose=False)[0], rel=1e-5)
