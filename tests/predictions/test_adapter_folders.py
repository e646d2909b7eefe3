"""Predictions of a model that starts from an adapter folder: its manifest says what the answers mean."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import lightning as L
import pandas as pd
import pytest

from lora_lightning import PredictionWriter, SequenceClassification, TextClassificationData
from lora_lightning.__main__ import main
from lora_lightning.checkpoint.manifest import read_manifest, write_manifest
from lora_lightning.errors import ConfigError, DataError
from tests.commands.language_models import save_language_model
from tests.predictions.test_generated_texts import TEMPLATE
from tests.predictions.toys import QUIET, command, fit, predict, read_lines, save_encoder, write_lines

CLASSIFIER = ("--model=SequenceClassification", "--model.backbone=base")
NAMES = ["weak", "good"]
"""Not in the order of the alphabet, which is what the training rows alone give."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("adapters"))
        save_encoder(Path("base"))
        rows = [
            {"text": f"film {index} is {'good' if index % 2 else 'bad'}", "label": NAMES[index % 2]}
            for index in range(40)
        ]
        pd.DataFrame(rows).to_csv("train.csv", index=False)
        pd.DataFrame({"text": ["good", "bad film", "film"]}).to_csv("new.csv", index=False)
        data = ("--data=TextClassificationData", "--data.train=train.csv", f"--data.label_names={json.dumps(NAMES)}")
        checkpoint = fit(*CLASSIFIER, *data, "--data.max_length=9")
        yield Path.cwd(), checkpoint


@pytest.fixture
def run(trained, monkeypatch):
    folder, checkpoint = trained
    monkeypatch.chdir(folder)
    return checkpoint


@pytest.fixture
def adapter(run, tmp_path):
    """A copy of the run's adapter folder."""
    return shutil.copytree(run.with_suffix(""), tmp_path / "adapter")


def without_names(folder):
    """Take the names of the labels out of a manifest."""
    manifest = read_manifest(folder)
    assert manifest.label_names == NAMES
    write_manifest(folder, replace(manifest, label_names=None))
    return folder


def of_folder(adapter, *words):
    return (
        *CLASSIFIER,
        f"--model.adapter={adapter}",
        "--data=TextClassificationData",
        "--data.max_length=9",
        "--data.batch_size=8",
        *words,
    )


def test_rows_without_labels(run, adapter, tmp_path, capsys):
    new = ("--data.predict=new.csv",)
    predict(run, *new, f"--output={tmp_path}/checkpoint.csv")
    command("predict", *of_folder(adapter, *new), f"--output={tmp_path}/folder.csv", *QUIET)
    found = (tmp_path / "folder.csv").read_text()
    assert found == (tmp_path / "checkpoint.csv").read_text()
    assert found.splitlines()[0] == "index,text,predicted_label,probability_weak,probability_good"
    # Controls: without the names there is an error, and other names are other answers.
    assert main(["predict", *of_folder(without_names(adapter), *new), *QUIET]) == 2
    assert "The names of the labels are not known." in capsys.readouterr().err
    swapped = f"--model.label_names={json.dumps(NAMES[::-1])}"
    command("predict", *of_folder(adapter, *new, swapped), f"--output={tmp_path}/swapped.csv", *QUIET)
    assert list(pd.read_csv(tmp_path / "swapped.csv")["predicted_label"]) != list(
        pd.read_csv(tmp_path / "folder.csv")["predicted_label"]
    )


def test_labels_of_rows_to_test(run, adapter, capsys):
    words = ("--data.test=train.csv",)
    command("test", "--ckpt_path", run, *words, *QUIET)
    expected = [line for line in capsys.readouterr().out.splitlines() if "test/" in line]
    command("test", *of_folder(adapter, *words), *QUIET)
    assert [line for line in capsys.readouterr().out.splitlines() if "test/" in line] == expected
    assert any("accuracy" in line for line in expected)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_in_python(run, adapter, tmp_path):
    def answers(data):
        writer = PredictionWriter(str(tmp_path / "out.csv"))
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(accelerator="cpu", callbacks=[writer], default_root_dir=tmp_path, **settings)
        task = SequenceClassification("base", adapter=str(adapter))
        trainer.predict(task, data, return_predictions=False)
        return pd.read_csv(tmp_path / "out.csv")

    expected = answers(TextClassificationData.load_from_checkpoint(run, predict="new.csv"))
    pd.testing.assert_frame_equal(answers(TextClassificationData(predict="new.csv", max_length=9)), expected)
    built = SequenceClassification("base", adapter=str(adapter))
    built.configure_model()
    assert built.label_names == built.hparams.label_names == NAMES
    without_names(adapter)
    with pytest.raises(ConfigError, match="needs label_names"):
        SequenceClassification("base", adapter=str(adapter)).configure_model()
    with pytest.raises(DataError, match="names of the labels are not known"):
        answers(TextClassificationData(predict="new.csv", max_length=9))


def test_a_fit_goes_by_its_training_rows(run, adapter, capsys):
    other = pd.read_csv("train.csv").replace({"label": {"weak": "poor"}})
    other.to_csv("other.csv", index=False)
    assert main(["fit", *of_folder(adapter, "--data.train=other.csv"), *QUIET]) == 2
    assert "holds a head for the labels weak, good, and this run has good, poor" in capsys.readouterr().err


def test_tags_of_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_encoder(Path("base"))
    people = ["anna", "bell", "anna bell", "bell anna"]
    tags = {1: ["B-PER"], 2: ["B-PER", "I-PER"]}
    rows = [
        {"tokens": [*who.split(), verb, "paris"], "tags": [*tags[len(who.split())], "O", "B-LOC"]}
        for who in people
        for verb in ("is", "went", "to", "not")
    ]
    model = ("--model=TokenClassification", "--model.backbone=base")
    data = ("--data=TokenClassificationData",)
    checkpoint = fit(*model, *data, f"--data.train={write_lines('train.jsonl', rows)}", "--data.val_size=2")
    new = f"--data.predict={write_lines('new.jsonl', [{'tokens': ['anna', 'is', 'good']}])}"
    predict(checkpoint, new, "--output=checkpoint.jsonl")
    command("predict", *model, f"--model.adapter={checkpoint.with_suffix('')}", *data, new, "--output=o.jsonl", *QUIET)
    assert read_lines("o.jsonl") == read_lines("checkpoint.jsonl")
    assert read_lines("o.jsonl")[0]["predicted_tags"][0] == "B-PER"


def test_the_template_of_a_dialogue(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_language_model("base", chat_template="{{ 'x' }}")
    Path("own.jinja").write_text(TEMPLATE)
    rows = [
        {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i + 2}"}]}
        for i in range(1, 25)
    ]
    model = ("--model=CausalLM", "--model.backbone=base", "--model.max_new_tokens=3")
    train = f"--data.train={write_lines('train.jsonl', rows)}"
    checkpoint = fit(*model, "--data=InstructionData", train, "--data.template=own.jinja", "--data.val_size=2", lr=1e-4)
    new = ("--data=InstructionData", f"--data.predict={write_lines('new.jsonl', [{'prompt': 'w1 w2'}])}")
    predict(checkpoint, *new, "--output=checkpoint.jsonl")
    command("predict", *model, f"--model.adapter={checkpoint.with_suffix('')}", *new, "--output=o.jsonl", *QUIET)
    assert read_lines("o.jsonl") == read_lines("checkpoint.jsonl")
    command("predict", *model, *new, "--output=base.jsonl", *QUIET)
    assert read_lines("base.jsonl")[0]["prompt_text"] != read_lines("o.jsonl")[0]["prompt_text"]  # control
