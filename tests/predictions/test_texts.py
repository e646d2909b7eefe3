"""`predict` with a `SequenceClassification` of each problem, against transformers and the merged model."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
import transformers

from tests.predictions.toys import fit, in_the_run, merged, predict, save_encoder

NEW = [
    ("7", "good film", "x"),
    ("8", 'a "very, very"\nbad film', "päule"),
    ("9", "", ""),
    ("8", 'a "very, very"\nbad film', "päule"),
    ("3", "the film is not good, is the film bad?", "NaN"),
    ("2", "bad", "1"),
    ("1", "very good", "0.50"),
]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_encoder(tmp_path / "base")
    pd.DataFrame(NEW, columns=["id", "review", "note"]).to_csv("new.csv", index=False)


def write_training(target):
    rows = []
    for index in range(48):
        word = "good" if index % 2 else "bad"
        rows.append({"review": f"film {index} is {word} {'the' if index % 3 else 'a'}", "label": target(index)})
    pd.DataFrame(rows).to_csv("train.csv", index=False)


def trained(problem, *words):
    return fit(
        *("--model=SequenceClassification", "--model.backbone=base", f"--model.problem={problem}"),
        *("--data=TextClassificationData", "--data.train=train.csv", "--data.text_column=review", *words),
    )


def written(path="predictions.csv"):
    """Read the file back; every row of the input stands there once, in order, with all its columns."""
    table = pd.read_csv(in_the_run(path), keep_default_na=False, dtype={"id": str, "note": str})
    assert list(table["index"]) == list(range(len(NEW)))
    assert list(table[["id", "review", "note"]].itertuples(index=False, name=None)) == NEW
    return table


@torch.no_grad()
def logits_of(folder):
    """Ask transformers for each text on its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [model(**tokenizer(text, return_tensors="pt")).logits[0] for _, text, _ in NEW]
    return torch.stack(rows), model.config


def test_labels_and_probabilities_of_single_labels(capsys):
    write_training(lambda index: "pos" if index % 2 else "neg")
    checkpoint = trained("single_label")
    (checkpoint.parents[3] / "train.csv").unlink()  # the training rows are gone
    predict(checkpoint, "--data.predict=new.csv", "--data.eval_batch_size=3")
    assert f"Predictions: {len(NEW)} rows in {in_the_run('predictions.csv')}" in capsys.readouterr().out
    table = written()
    logits, config = logits_of(merged(checkpoint))
    names = [config.id2label[index] for index in range(2)]
    assert list(table.columns) == [
        *("index", "id", "review", "note", "predicted_label"),
        *(f"probability_{name}" for name in names),
    ]
    expected = logits.softmax(-1)
    found = torch.tensor(table[[f"probability_{name}" for name in names]].to_numpy(), dtype=torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert list(table["predicted_label"]) == [names[index] for index in expected.argmax(-1).tolist()]
    assert set(table["predicted_label"]) == set(names)
    assert not torch.allclose(found.flip(0), expected, atol=1e-2)  # control: other rows have other answers


def test_labels_of_several_labels_are_those_above_the_threshold():
    write_training(lambda index: ";".join(["up" if index % 2 else "down", *(["some"] if index % 3 else [])]))
    checkpoint = trained("multi_label")
    predict(checkpoint, "--data.predict=new.csv", "--data.eval_batch_size=3")
    table = written()
    logits, config = logits_of(merged(checkpoint))
    names = [config.id2label[index] for index in range(3)]
    assert sorted(names) == ["down", "some", "up"]
    expected = logits.sigmoid()
    found = torch.tensor(table[[f"probability_{name}" for name in names]].to_numpy(), dtype=torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    chosen = [json.loads(cell) for cell in table["predicted_labels"]]
    wanted = [[name for name, p in zip(names, row, strict=True) if p >= config.decision_threshold] for row in expected]
    assert chosen == wanted
    assert [list(reversed(names)) for _ in NEW] != wanted  # control
    assert len({tuple(one) for one in chosen}) > 1


def test_numbers_of_a_regression():
    write_training(lambda index: 2.5 if index % 2 else -1.0)
    checkpoint = trained("regression")
    predict(checkpoint, "--data.predict=new.csv", "--data.eval_batch_size=3")
    table = written()
    logits, _ = logits_of(merged(checkpoint))
    assert list(table.columns) == ["index", "id", "review", "note", "predicted_value"]
    assert list(table["predicted_value"]) == pytest.approx(logits[:, 0].tolist(), abs=1e-4)
    assert list(table["predicted_value"][::-1]) != pytest.approx(logits[:, 0].tolist(), abs=1e-2)  # control


def test_numbers_of_several_targets_have_a_column_each():
    pd.DataFrame(
        [{"review": f"film {index} is good", "joy": index % 2 + 0.5, "anger": index % 3 - 0.5} for index in range(48)]
    ).to_csv("train.csv", index=False)
    checkpoint = trained("regression", "--data.label_column=[joy,anger]")
    predict(checkpoint, "--data.predict=new.csv")
    logits, _ = logits_of(merged(checkpoint))
    table = written()
    assert list(table["predicted_joy"]) == pytest.approx(logits[:, 0].tolist(), abs=1e-4)
    assert list(table["predicted_anger"]) == pytest.approx(logits[:, 1].tolist(), abs=1e-4)
    assert list(table["predicted_anger"]) != pytest.approx(logits[:, 0].tolist(), abs=1e-2)  # control


def test_without_a_file_the_test_rows_are_predicted_with_their_labels():
    write_training(lambda index: "pos" if index % 2 else "neg")
    checkpoint = trained("single_label", "--data.test_size=9")
    predict(checkpoint)
    table = pd.read_csv(in_the_run("predictions.csv"))
    train = pd.read_csv("train.csv")
    assert len(table) == 9
    assert list(table["index"]) == sorted(table["index"])
    assert list(table["review"]) == list(train["review"][table["index"]])
    assert list(table["label"]) == list(train["label"][table["index"]])
    assert list(table["review"]) != list(train["review"][:9])  # control: they are drawn
