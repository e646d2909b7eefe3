"""`SequenceClassification` with each problem: trained, tested, predicted, merged and reloaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import sklearn.metrics
import torch
import transformers
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lora_lightning import LoRA, Optim, SequenceClassification
from lora_lightning.checkpoint import export_peft
from lora_lightning.checkpoint.folder import RunFacts
from lora_lightning.commands._compare.budget import Skeleton
from lora_lightning.commands.plan import plan
from lora_lightning.errors import CheckpointError, ConfigError, DataError
from lora_lightning.merging.merge import merge_checkpoint
from tests.checkpoint.runs import rebuild_task, save_backbone
from tests.tasks.toys import trainer

NAMES = {
    "single_label": ["bad", "fair", "good"],
    "multi_label": ["sports", "arts", "law"],
    "regression": ["joy", "anger"],
}
TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
PROBLEMS = list(NAMES)
ROWS = 72


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(0)
    return str(save_backbone(tmp_path / "base"))


def batch_of(problem, ids):
    """Return a batch whose words decide the targets."""
    has = torch.stack([(ids == word).any(1) for word in (10, 11, 12)], 1).float()
    labels = {
        "single_label": (has[:, 0] + has[:, 1]).long(),
        "multi_label": has,
        "regression": torch.stack([has[:, 0] - has[:, 1], 2 * has[:, 2] + has[:, 1]], 1),
    }
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels[problem]}


def loader(problem, seed=1, size=16, rows=ROWS):
    """Return batches of 16 rows and, of 72 rows, a last one of 8."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 20, (rows, 7), generator=generator)
    return DataLoader([batch_of(problem, part) for part in ids.split(size)], batch_size=None)


def build(backbone, problem, **settings):
    usual = {
        "method": LoRA(r=4, target_modules="all-linear"),
        "optim": Optim(lr=1e-2, schedule="constant"),
        "label_names": NAMES[problem],
        "problem": problem,
    }
    return SequenceClassification(backbone, **{**usual, **settings})


def fitted(backbone, problem, path=None, epochs=2, **settings):
    task, run = build(backbone, problem, **settings), trainer(max_epochs=epochs)
    run.fit(task, loader(problem), loader(problem, seed=2))
    if path is not None:
        run.save_checkpoint(path)
    return task, run


@torch.no_grad()
def outputs(model, problem, **more):
    """Return logits and labels of the validation rows."""
    model.eval()
    batches = list(loader(problem, seed=2))
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    logits = torch.cat([model(**one, **more).logits.float() for one in inputs])
    return logits, torch.cat([batch["labels"] for batch in batches])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_merged_model_is_transformers_own(backbone, problem, tmp_path):
    task, _ = fitted(backbone, problem, tmp_path / "end.ckpt")
    merge_checkpoint(tmp_path / "end.ckpt", tmp_path / "merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    names = NAMES[problem]
    assert model.config.problem_type == TYPES[problem]
    assert model.config.num_labels == len(names)
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id == {name: index for index, name in enumerate(names)}
    task.eval()
    logits, _ = outputs(task.adapted, problem)
    torch.testing.assert_close(outputs(model, problem)[0], logits, atol=1e-5, rtol=0)
    fresh = build(backbone, problem)
    fresh.configure_model()
    assert (outputs(fresh.adapted, problem)[0] - logits).abs().max() > 1e-2  # negative control
    batch = next(iter(loader(problem)))
    with torch.no_grad():
        ours, theirs = task.compute_loss(batch).loss, model(**batch).loss
    assert theirs.item() == pytest.approx(ours.item(), abs=1e-5)
    if problem != "single_label":  # the other loss takes the same shapes
        model.config.problem_type = next(one for one in list(TYPES.values())[1:] if one != TYPES[problem])
        assert model(**batch).loss.item() != pytest.approx(ours.item(), abs=1e-3)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_pipeline_of_transformers_gives_our_predictions(backbone, problem, tmp_path):
    task, _ = fitted(backbone, problem, tmp_path / "end.ckpt")
    merge_checkpoint(tmp_path / "end.ckpt", tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    pipeline = transformers.pipeline("text-classification", str(tmp_path / "merged"), tokenizer=tokenizer, top_k=None)
    theirs = {one["label"]: one["score"] for one in pipeline(["w5 w6 w9"])[0]}
    task.eval()
    with torch.no_grad():
        ours = task.predict(dict(tokenizer(["w5 w6 w9"], return_tensors="pt")))[0]
    values = ours["values"] if problem == "regression" else ours["probabilities"]
    assert list(values) == NAMES[problem]
    assert theirs == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_checkpoint_gives_the_same_test_and_predictions(backbone, problem, tmp_path):
    task, run = fitted(backbone, problem, tmp_path / "end.ckpt")
    expected = run.test(task, loader(problem, 2), verbose=False)[0]
    fresh = build(backbone, problem)
    untrained = trainer().test(fresh, loader(problem, 2), verbose=False)[0]
    again = trainer().test(
        build(backbone, problem), loader(problem, 2), ckpt_path=tmp_path / "end.ckpt", weights_only=True, verbose=False
    )[0]
    assert again == expected
    assert untrained["test/loss"] != expected["test/loss"]
    loaded = rebuild_task(tmp_path / "end.ckpt")
    assert loaded.problem == problem
    assert loaded.threshold == task.threshold
    predictions = trainer().predict(loaded, loader(problem, 2))
    assert predictions == run.predict(task, loader(problem, 2))
    assert predictions != trainer().predict(fresh, loader(problem, 2))


def test_the_threshold_of_the_validation_is_used_from_then_on(backbone, tmp_path):
    task, run = fitted(backbone, "multi_label", tmp_path / "end.ckpt", epochs=1)
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    threshold = task.threshold.item()
    logits, labels = outputs(task.adapted, "multi_label")
    probabilities = logits.sigmoid().double().numpy()

    def f1(value, average="micro"):
        return sklearn.metrics.f1_score(labels.numpy(), probabilities >= value, average=average, zero_division=0)

    assert threshold != 0.5
    assert logged["val/threshold"] == threshold
    assert f1(threshold) == pytest.approx(max(map(f1, sorted({*probabilities.flatten().tolist()}))))
    assert logged["val/f1_micro"] == pytest.approx(f1(threshold), abs=1e-6)
    assert logged["val/f1"] == pytest.approx(f1(threshold, "macro"), abs=1e-6)
    assert f1(threshold) > f1(0.5)  # what the default would have given
    loaded = rebuild_task(tmp_path / "end.ckpt")
    tested = trainer().test(loaded, loader("multi_label", 2), verbose=False)[0]
    validated = trainer().validate(loaded, loader("multi_label", 3), verbose=False)[0]
    assert tested["test/f1"] == pytest.approx(logged["val/f1"])
    assert validated["val/threshold"] == loaded.threshold == threshold  # only a fit chooses
    first = trainer().predict(loaded, loader("multi_label", 2))[0][0]
    assert first["labels"] == [name for name, value in first["probabilities"].items() if value >= threshold]
    merge_checkpoint(tmp_path / "end.ckpt", tmp_path / "merged")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").decision_threshold == threshold


def test_only_several_labels_have_a_threshold_in_their_checkpoint(backbone):
    kept = {}
    for problem in PROBLEMS:
        task = build(backbone, problem)
        task.configure_model()
        kept[problem] = [name for name in task.adapter_state() if not name.startswith("model.")]
    assert kept == {"single_label": [], "multi_label": ["threshold"], "regression": []}


def test_predictions_of_several_labels_are_sigmoids_and_those_of_numbers_are_plain(backbone):
    for problem in ("multi_label", "regression"):
        task = build(backbone, problem)
        answers = [one for batch in trainer().predict(task, loader(problem, 2)) for one in batch]
        logits, _ = outputs(task.adapted, problem)
        rows = [[*(one.get("probabilities") or one.get("values")).values()] for one in answers]
        torch.testing.assert_close(torch.tensor(rows), logits.sigmoid() if problem == "multi_label" else logits)
    one = build(backbone, "regression", label_names=["stars"])
    batch = next(iter(loader("regression")))
    one.configure_model()
    one.eval()
    with torch.no_grad():
        assert one.predict(batch)[3] == {"value": one._logits(batch)[3].item()}


def test_class_weights_of_several_labels_weigh_the_columns(backbone):
    task = build(backbone, "multi_label", class_weights={"arts": 3, "law": 0.5})
    task.configure_model()
    task.eval()
    batch = next(iter(loader("multi_label")))
    with torch.no_grad():
        output = task.compute_loss(batch)
    columns = [
        F.binary_cross_entropy_with_logits(output.predictions[:, k], batch["labels"][:, k]).item() for k in range(3)
    ]
    expected = (columns[0] + 3 * columns[1] + 0.5 * columns[2]) / 4.5
    assert output.loss.item() == pytest.approx(expected, abs=1e-6)
    assert expected != pytest.approx(sum(columns) / 3, abs=1e-4)


def test_balanced_weights_come_from_the_data_and_stand_in_the_checkpoint(backbone, tmp_path):
    task = build(backbone, "single_label", class_weights="balanced")
    with pytest.raises(ConfigError, match="balanced needs a data module"):
        task.configure_model()
    task = build(backbone, "single_label", class_weights="balanced")
    task._trainer = SimpleNamespace(datamodule=SimpleNamespace(label_counts={"bad": 10, "fair": 20, "good": 30}))
    weights = task._loss_weights(task.label_names)
    assert weights.tolist() == pytest.approx([2.0, 1.0, 2 / 3])
    task._trainer = None
    task.class_weights = task.hparams["class_weights"]
    assert task.class_weights == {"bad": 2.0, "fair": 1.0, "good": pytest.approx(2 / 3)}
    trainer_of_it = trainer(max_epochs=1)
    trainer_of_it.fit(task, loader("single_label"))
    trainer_of_it.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.equal(rebuild_task(tmp_path / "end.ckpt").loss_weights, weights)


def test_integer_names_are_names(backbone):
    task = build(backbone, "single_label", label_names=[0, 1, 2], class_weights={1: 4.0})
    task.configure_model()
    assert task.label_names == ["0", "1", "2"]
    assert task.loss_weights.tolist() == [1.0, 4.0, 1.0]


@pytest.mark.parametrize(
    ("problem", "other", "words"),
    [
        ("single_label", "multi_label", r"problem: single_label needs labels int64 \[batch\]; got float32 \[16, 3\]"),
        ("multi_label", "single_label", r"needs labels of 0 and 1, float32 \[batch, 3\]; got int64 \[16\]"),
        ("regression", "single_label", r"needs labels float32 \[batch, 2\]; got int64 \[16\]"),
    ],
)
def test_labels_of_another_problem_are_refused(backbone, problem, other, words):
    task = build(backbone, problem)
    task.configure_model()
    with pytest.raises(DataError, match=words):
        task.compute_loss(next(iter(loader(other))))


def test_settings_that_fit_no_problem_are_refused(backbone):
    with pytest.raises(ConfigError, match="problem must be one of single_label, multi_label, regression"):
        SequenceClassification(backbone, problem="ranking")
    with pytest.raises(ConfigError, match="class_weights are for classes"):
        build(backbone, "regression", class_weights={"joy": 2.0})
    with pytest.raises(ConfigError, match="weights by label, or balanced"):
        build(backbone, "single_label", class_weights="equal")
    with pytest.raises(ConfigError, match="at least one name"):
        build(backbone, "multi_label", label_names=["a", "a"])
    assert build(backbone, "multi_label", label_names=["spam"]).label_names == ["spam"]


def test_numbers_need_no_names(backbone):
    task = build(backbone, "regression", label_names=None)
    task.configure_model()
    assert task.label_names == task.hparams["label_names"] == ["score"]
    assert task.adapted.config.id2label == {0: "score"}
    with pytest.raises(ConfigError, match="needs label_names"):
        build(backbone, "multi_label", label_names=None).configure_model()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_models_without_names_are_counted(backbone, problem, capsys):
    weights = None if problem == "regression" else "balanced"
    counted = Skeleton(build(backbone, problem, label_names=None, class_weights=weights))
    assert counted.model.config.num_labels == (1 if problem == "regression" else 2)
    assert plan(build(backbone, problem, label_names=None, class_weights=weights), batch_size=2, length=8) == 0
    assert "total" in capsys.readouterr().out


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_run_starts_from_an_adapter_with_the_same_names(backbone, problem, tmp_path):
    task, _ = fitted(backbone, problem)
    export_peft(task.adapted, tmp_path / "adapter", RunFacts(base=backbone, label_names=NAMES[problem]))
    started = build(backbone, problem, method=None, adapter=str(tmp_path / "adapter"))
    started.configure_model()
    torch.testing.assert_close(outputs(started.adapted, problem)[0], outputs(task.adapted, problem)[0])
    swapped = NAMES[problem][::-1]
    with pytest.raises(CheckpointError, match="in the same order"):
        build(backbone, problem, method=None, adapter=str(tmp_path / "adapter"), label_names=swapped).configure_model()


def learnt(backbone, problem, lr):
    """Return the validation metrics after eight epochs at a learning rate; 1e-9 leaves the head as drawn."""
    torch.manual_seed(3)
    task = build(backbone, problem, optim=Optim(lr=lr, schedule="constant"))
    run = trainer(max_epochs=8)
    run.fit(task, loader(problem, rows=400), loader(problem, seed=2))
    return {name: value.item() for name, value in run.callback_metrics.items()}


@pytest.mark.parametrize(
    ("problem", "least"),
    [("multi_label", {"val/f1": 0.8, "val/average_precision": 0.9}), ("regression", {"val/pearson": 0.8})],
)
def test_training_beats_an_untrained_head_on_rows_it_has_not_seen(backbone, problem, least):
    trained, control = learnt(backbone, problem, 1e-2), learnt(backbone, problem, 1e-9)
    for name, value in least.items():
        assert trained[name] > value > control[name] + 0.1
    assert trained["val/loss"] < 0.7 * control["val/loss"]
