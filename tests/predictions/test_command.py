"""The command `predict`: what it takes from a checkpoint, and what it, `test` and `validate` refuse."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import torch
import transformers

from lora_lightning import LoRA, PredictionWriter, Seq2SeqData, SequenceClassification, TextClassificationData
from lora_lightning.__main__ import main
from lora_lightning.errors import CheckpointError, DataError
from tests.commands.language_models import save_language_model
from tests.predictions.toys import QUIET, fit, merged, predict, read_lines, save_encoder, write_lines

CLASSIFIER = ("--model=SequenceClassification", "--model.backbone=base")
TEXTS = ("--data=TextClassificationData", "--data.train=train.csv")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a base, its data and a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        save_encoder(Path("base"))
        rows = [
            {"words": f"film {index} is {'good' if index % 2 else 'bad'}", "sort": index % 2} for index in range(40)
        ]
        pd.DataFrame(rows).to_csv("train.csv", index=False)
        pd.DataFrame({"words": ["good", "bad film", "film"], "id": [5, 6, 7]}).to_csv("new.csv", index=False)
        checkpoint = fit(
            *CLASSIFIER, *TEXTS, "--data.text_column=words", "--data.label_column=sort", "--data.max_length=9", epochs=1
        )
        merged(checkpoint)
        yield Path.cwd(), checkpoint


@pytest.fixture
def run(trained, monkeypatch):
    folder, checkpoint = trained
    monkeypatch.chdir(folder)
    return checkpoint


def refused(capsys, *words):
    """Run a command that must fail with one line and leave no folder; return the line."""
    before = set(Path.cwd().rglob("*"))
    capsys.readouterr()
    assert main([str(word) for word in (*words, *QUIET)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lora-lightning: error: ")]
    assert len(lines) == 1
    assert set(Path.cwd().rglob("*")) == before
    return lines[0]


# What comes from the checkpoint.


def test_config_of_the_run_and_no_config_answer_alike(run, tmp_path):
    predict(run, "--data.predict=new.csv", f"--output={tmp_path}/bare.csv")
    config = run.parents[1] / "config.yaml"
    predict(run, "--config", config, "--data.predict=new.csv", f"--output={tmp_path}/with.csv")
    assert (tmp_path / "bare.csv").read_text() == (tmp_path / "with.csv").read_text()
    with pytest.warns(UserWarning, match="1 of 3 predict texts"):
        predict(run, "--data.predict=new.csv", "--data.max_length=3", f"--output={tmp_path}/cut.csv")
    cut, bare = pd.read_csv(tmp_path / "cut.csv"), pd.read_csv(tmp_path / "bare.csv")
    assert list(cut["id"]) == list(bare["id"]) == [5, 6, 7]
    assert list(cut["probability_1"]) != list(bare["probability_1"])  # control: what is given goes first


def test_other_settings_of_the_data_come_from_the_checkpoint_too(run, tmp_path):
    predict(run, "--data=TextClassificationData", "--data.predict=new.csv", f"--output={tmp_path}/a.csv")
    assert list(pd.read_csv(tmp_path / "a.csv")["words"]) == ["good", "bad film", "film"]  # its text_column


def test_named_sets_have_a_file_each(run, tmp_path):
    sets = "--data.predict={first: new.csv, second: [new.csv, new.csv]}"
    predict(run, sets, f"--output={tmp_path}/out.csv")
    first, second = (pd.read_csv(tmp_path / f"out-{name}.csv") for name in ("first", "second"))
    assert list(first["index"]) == [0, 1, 2]
    assert list(second["index"]) == [0, 1, 2, 3, 4, 5]
    assert list(second["id"]) == [5, 6, 7, 5, 6, 7]
    assert list(second["predicted_label"][:3]) == list(first["predicted_label"])


def test_broken_rows_are_left_out_and_count(run, tmp_path):
    (tmp_path / "broken.csv").write_text("words,id\ngood,1\nbad,2,3\nfilm,4\n")
    with pytest.warns(UserWarning, match="1 broken rows are left out"):
        predict(run, f"--data.predict={tmp_path}/broken.csv", "--data.bad_rows=skip", f"--output={tmp_path}/out.jsonl")
    rows = read_lines(tmp_path / "out.jsonl")
    assert [(row["index"], row["id"]) for row in rows] == [(0, "1"), (2, "4")]


def test_test_and_validate_need_no_config_either(run, capsys, monkeypatch):
    for command, kind in (("test", "test"), ("validate", "val")):
        assert main([command, "--ckpt_path", str(run), *QUIET]) == 0
        assert f"{kind}/accuracy" in capsys.readouterr().out
        assert main([command, "--ckpt_path", str(run), f"--data.{kind}=train.csv", *QUIET]) == 0
        out = capsys.readouterr().out
        assert f"{kind}/accuracy" in out
        assert f"0 train, {40 if kind == 'val' else 0} val, {40 if kind == 'test' else 0} test" in out


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_same_in_python(run, tmp_path):
    def answers(task, data, **settings):
        writer = PredictionWriter(str(tmp_path / "out.csv"))
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[writer], default_root_dir=tmp_path
        )
        trainer.predict(task, data, return_predictions=False, **settings)
        return writer.paths[0].read_text()

    data = TextClassificationData.load_from_checkpoint(run, predict="new.csv")
    assert (data.text_column, data.max_length, data.plan.sources["train"]) == ("words", 9, None)
    expected = answers(SequenceClassification.load_from_checkpoint(run), data)
    bare = SequenceClassification("base", method=LoRA())
    fresh = TextClassificationData.load_from_checkpoint(run, predict=pd.read_csv("new.csv"))
    assert answers(bare, fresh, ckpt_path=run) == expected
    torch.manual_seed(3)
    untrained = SequenceClassification("base", method=LoRA(), label_names=["0", "1"])
    own = TextClassificationData(predict="new.csv", text_column="words")
    assert answers(untrained, own) != expected  # control


def test_a_fit_after_a_prediction_reads_the_training_rows(run):
    data = TextClassificationData(
        "train.csv",
        predict="new.csv",
        text_column="words",
        label_column="sort",
        label_names=["0", "1"],
        tokenizer="base",
    )
    data.setup("predict")
    assert (data.counts["rows_read"], len(data._encoded["predict"])) == (0, 3)
    data.setup("fit")
    assert (data.counts["rows_read"], len(data._encoded["train"])) == (40, 32)
    data.setup("predict")
    assert data.counts["rows_read"] == 40  # read once


def test_names_of_labels_must_come_from_somewhere(run, capsys):
    with pytest.raises(DataError, match="names of the labels are not known"):
        TextClassificationData(predict="new.csv", text_column="words", tokenizer="base").setup("predict")
    with pytest.raises(CheckpointError, match="was not trained with a Seq2SeqData"):
        Seq2SeqData.load_from_checkpoint(run)
    line = refused(capsys, "predict", *CLASSIFIER, "--data=TextClassificationData", "--data.predict=new.csv")
    assert "--ckpt_path" in line


def test_what_is_named_wrongly_is_told_in_one_line(run, capsys):
    def told(*words):
        return refused(capsys, "predict", *words)

    new = "--data.predict=new.csv"
    assert "nope.ckpt" in told("--ckpt_path=nope.ckpt", new)
    assert "is a folder" in told(f"--ckpt_path={run.with_suffix('')}", new)
    assert "`data.predict` is set, but no data module is named" in told(new)
    assert "did you mean `predict`" in told("--ckpt_path", run, "--data.predit=new.csv")
    assert "did you mean `--output`" in told("--ckpt_path", run, new, "--outptu=a.csv")
    content = torch.load(run, weights_only=True)
    content["lora_lightning"].pop("data")  # as earlier versions wrote it
    torch.save(content, "earlier.ckpt")
    assert "name it with --data in front of its settings" in told("--ckpt_path=earlier.ckpt", new)
    predict(Path("earlier.ckpt"), "--data=TextClassificationData", new, "--output=earlier.csv")
    assert len(pd.read_csv("earlier.csv")) == 3


def test_the_input_is_not_written_over(run, capsys):
    line = refused(capsys, "predict", "--ckpt_path", run, "--data.predict=new.csv", "--output=new.csv")
    assert "new.csv is the file that is predicted" in line
    line = refused(capsys, "predict", "--ckpt_path", run, "--data.predict=new.csv", "--output=out.txt")
    assert "has the ending '.txt'" in line
    line = refused(
        *(capsys, "predict", "--ckpt_path", run, "--data.predict=new.csv", "--output=out.csv"),
        "--trainer.callbacks=PredictionWriter",
    )
    assert "--output and a PredictionWriter are given" in line


# Heads that were never trained.


@pytest.mark.parametrize("command", ["predict", "test", "validate"])
def test_a_head_that_was_never_trained_is_refused(run, capsys, command):
    words = (*CLASSIFIER, *TEXTS, "--data.text_column=words", "--data.label_column=sort")
    line = refused(capsys, command, *words)
    assert "classifier was never trained" in line
    assert "--ckpt_path" in line
    assert main([command, "--untrained", *words, *QUIET]) == 0
    Path("untrained.yaml").write_text("untrained: true\n")
    assert main([command, "--config=untrained.yaml", *words, *QUIET]) == 0
    finished = ("--model=SequenceClassification", "--model.backbone=merged", *words[2:])
    assert main([command, *finished, *QUIET]) == 0
    adapter = next(Path("runs").glob("*/checkpoints/last"))
    assert main([command, *words, f"--model.adapter={adapter}", *QUIET]) == 0


def test_a_language_model_needs_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_language_model("base")
    write_lines("new.jsonl", [{"prompt": "w1 w2"}])
    words = ("--model=CausalLM", "--model.backbone=base", "--model.max_new_tokens=3", "--data=InstructionData")
    assert main(["predict", *words, "--data.predict=new.jsonl", "--output=out.jsonl", *QUIET]) == 0
    (row,) = read_lines("out.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained("base")
    model = transformers.AutoModelForCausalLM.from_pretrained("base")
    messages = [{"role": "user", "content": "w1 w2"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end>")]
    output = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=ends, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    assert row["generated"] == tokenizer.decode(output, skip_special_tokens=True)
    assert row["prompt_text"] == tokenizer.decode(ids[0])
