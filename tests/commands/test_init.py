"""`init` writes configs that run as they are, with what the data hold, and refuses what it cannot tell."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

from lora_lightning.__main__ import main
from tests.commands import init_data as kinds
from tests.tasks.texts import save_t5
from tests.test_configs import stand_in


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return kinds.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    return save_t5(tmp_path_factory.mktemp("writer"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return stand_in("Llama", tmp_path_factory.mktemp("decoder"))


def init(*arguments):
    """Write a config, and return it as a dict and as text."""
    assert main(["init", *arguments]) == 0
    text = Path("config.yaml").read_text("utf-8")
    return yaml.safe_load(text), text


def fit():
    """Train two steps with the config as it is, and return what the last checkpoint holds."""
    # Two batches are an epoch, so that validation runs too.
    flags = [
        "--trainer.max_steps",
        "2",
        "--trainer.limit_train_batches",
        "2",
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
    ]
    assert main(["fit", "--config", "config.yaml", *flags]) == 0
    return torch.load("runs/version_0/checkpoints/last.ckpt", weights_only=True)


def labels_in(text):
    """Return the counts that a comment of a config names."""
    line = next(line for line in text.splitlines() if re.search(r"^ +# \d+ (labels|tags)", line))
    return {name: int(count.replace(",", "")) for name, count in re.findall(r"([\w-]+) \(([\d,]+)\)", line)}


def num_tokens(backbone, texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(backbone)
    return [len(tokenizer(text)["input_ids"]) for text in texts]


def said_in(value):
    """Return all texts of a row, without roles."""
    if isinstance(value, str):
        return value
    parts = value.values() if isinstance(value, dict) else value
    return "".join(said_in(part) for part in parts if part not in ("user", "assistant"))


NUM_TOKENS_OF_A_TEMPLATE = 200
"""Letters that Alpaca's words have, at most."""


# Kinds of data.


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("separator", [",", ";"])
def test_texts_with_a_label(encoder, separator, encoding):
    rows = kinds.labelled()
    kinds.write_csv(Path("reviews.csv"), rows, separator, encoding)
    config, text = init("--data", "reviews.csv", "--backbone", encoder)
    data = config["data"]["init_args"]
    assert config["model"]["class_path"] == "SequenceClassification"
    assert (data["text_column"], data["label_column"]) == ("review", "sentiment")
    assert ("separator" in data) == (separator == ";")
    assert ("encoding" in data) == (encoding == "latin-1")
    counts = Counter(row["sentiment"] for row in rows)
    assert labels_in(text) == counts
    assert config["model"]["init_args"].get("class_weights") is None
    lengths = num_tokens(encoder, [row["review"] for row in rows])
    assert 0 <= data["max_length"] - np.percentile(lengths, 99, method="higher") < 8
    assert fit()["hyper_parameters"]["label_names"] == sorted(counts)


def test_uneven_classes_are_weighed(encoder):
    rows = [{**row, "sentiment": "rare" if row["id"] % 20 == 0 else "usual"} for row in kinds.labelled()]
    kinds.write_csv(Path("reviews.csv"), rows)
    config, _ = init("--data", "reviews.csv", "--backbone", encoder)
    assert config["model"]["init_args"]["class_weights"] == "balanced"


def test_texts_with_several_labels_in_a_cell(encoder):
    rows = kinds.several()
    kinds.write_csv(Path("topics.csv"), rows)
    config, text = init("--data", "topics.csv", "--backbone", encoder)
    assert config["model"]["init_args"]["problem"] == "multi_label"
    assert labels_in(text) == Counter(one for row in rows for one in row["topics"].split("; "))
    assert fit()["hyper_parameters"]["label_names"] == ["a", "b", "c"]


def test_texts_with_a_column_for_each_label(encoder):
    rows = kinds.flagged()
    kinds.write_csv(Path("comments.csv"), rows)
    config, text = init("--data", "comments.csv", "--backbone", encoder)
    assert config["data"]["init_args"]["label_column"] == ["toxic", "insult"]
    assert labels_in(text) == {name: sum(row[name] for row in rows) for name in ("toxic", "insult")}
    assert fit()["hyper_parameters"]["label_names"] == ["toxic", "insult"]


def test_texts_with_a_number(encoder):
    kinds.write_lines(Path("scores.jsonl"), kinds.scored())
    config, _ = init("--data", "scores.jsonl", "--backbone", encoder)
    assert config["model"]["init_args"]["problem"] == "regression"
    assert config["data"]["init_args"]["label_column"] == "similarity"
    fit()


def test_words_with_tags_a_line_each(encoder):
    kinds.write_conll(Path("names.conll"), kinds.tagged())
    config, text = init("--data", "names.conll", "--backbone", encoder)
    assert config["model"]["class_path"] == "TokenClassification"
    assert labels_in(text) == Counter(tag for _, tags in kinds.tagged() for tag in set(tags))
    assert fit()["hyper_parameters"]["label_names"] == ["B-LOC", "B-PER", "I-PER", "O"]


def test_lists_of_words_and_tags(encoder):
    rows = [{"words": words, "ner": tags} for words, tags in kinds.tagged()]
    kinds.write_lines(Path("names.jsonl"), rows)
    config, _ = init("--data", "names.jsonl", "--backbone", encoder)
    data = config["data"]["init_args"]
    assert (data["token_column"], data["tag_column"]) == ("words", "ner")
    fit()


def test_questions_with_choices(encoder):
    rows = kinds.asked()
    kinds.write_csv(Path("quiz.csv"), rows)
    config, _ = init("--data", "quiz.csv", "--backbone", encoder)
    data = config["data"]["init_args"]
    assert config["model"]["class_path"] == "MultipleChoice"
    assert (data["question_column"], data["choices_column"], data["label_column"]) == (
        "question",
        ["A", "B", "C"],
        "answer",
    )
    longest = max(num_tokens(encoder, [row["question"] + row["C"] for row in rows]))
    assert longest <= data["max_length"]  # no choice may be cut
    fit()


def test_texts_and_texts_to_write(writer):
    rows = kinds.summed()
    kinds.write_lines(Path("news.jsonl"), rows)
    config, _ = init("--data", "news.jsonl", "--backbone", writer)
    data = config["data"]["init_args"]
    assert config["model"]["class_path"] == "Seq2SeqLM"
    assert (data["source_column"], data["target_column"]) == ("article", "highlights")
    for setting, column in (("max_length", "article"), ("max_target_length", "highlights")):
        longest = np.percentile(num_tokens(writer, [row[column] for row in rows]), 99, method="higher")
        assert 0 <= data[setting] - longest < 8
    assert config["model"]["init_args"]["max_new_tokens"] == data["max_target_length"]
    fit()


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (kinds.talked(), {"template": "dialogue"}),
        (kinds.instructed(), {}),
        (kinds.answered(), {"columns": {"prompt": "question", "completion": "response"}}),
        (kinds.written(), {}),
    ],
    ids=["conversations", "alpaca", "prompts", "texts"],
)
def test_what_language_models_learn(decoder, rows, settings):
    kinds.write_lines(Path("talk.jsonl"), rows)
    config, _ = init("--data", "talk.jsonl", "--backbone", decoder)
    data = config["data"]["init_args"]
    assert config["model"]["class_path"] == "CausalLM"
    assert {name: data[name] for name in ("template", "columns") if name in data} == settings
    longest = max(num_tokens(decoder, map(said_in, rows)))
    assert longest < data["max_length"] < longest + NUM_TOKENS_OF_A_TEMPLATE
    fit()


def test_the_backbone_decides_between_two_ways_to_write(writer, decoder):
    kinds.write_lines(Path("talk.jsonl"), kinds.answered())
    found, _ = init("--data", "talk.jsonl", "--backbone", writer)
    assert found["model"]["class_path"] == "Seq2SeqLM"
    Path("config.yaml").unlink()
    found, _ = init("--data", "talk.jsonl", "--backbone", decoder)
    assert found["model"]["class_path"] == "CausalLM"


# What a source holds beside its rows.


def test_further_splits_beside_the_file_are_used(encoder, capsys):
    rows = kinds.labelled()
    kinds.write_csv(Path("train.csv"), rows[:90])
    kinds.write_csv(Path("dev.csv"), rows[90:])
    kinds.write_csv(Path("test.csv"), [{**row, "sentiment": ""} for row in rows[90:]])
    config, _ = init("--data", "train.csv", "--backbone", encoder)
    data = config["data"]["init_args"]
    assert data["val"] == "dev.csv"
    assert "val_size" not in data
    assert "test" not in data  # it has no labels
    assert data["test_size"] == 0.1
    assert "test.csv is not used" in capsys.readouterr().out
    fit()


def test_all_classes_of_a_long_sorted_file_are_seen(encoder):
    rows = sorted(kinds.labelled(9000, labels=("a", "b")), key=lambda row: row["sentiment"])
    assert {row["sentiment"] for row in rows[:4000]} == {"a"}  # the first rows tell of one class only
    kinds.write_csv(Path("long.csv"), rows)
    config, text = init("--data", "long.csv", "--backbone", encoder)
    assert labels_in(text).keys() == {"a", "b"}
    assert "4,000 were looked at" in text
    assert config["data"]["init_args"]["label_column"] == "sentiment"


@pytest.mark.filterwarnings("ignore:1 broken rows")
def test_broken_rows_are_skipped(encoder):
    kinds.write_csv(Path("reviews.csv"), kinds.labelled())
    with Path("reviews.csv").open("a", encoding="utf-8") as file:
        file.write("1,a,b,c,d,e\n")
    config, text = init("--data", "reviews.csv", "--backbone", encoder)
    assert config["data"]["init_args"]["bad_rows"] == "skip"
    assert "1 broken rows" in text
    fit()


def test_classes_too_rare_to_divide_are_left_out(encoder):
    rows = [*kinds.labelled(), {"id": 999, "review": "once", "sentiment": "it's rare"}]
    kinds.write_csv(Path("reviews.csv"), rows)
    config, _ = init("--data", "reviews.csv", "--backbone", encoder)
    assert config["data"]["init_args"]["where"] == ['`sentiment` != "it\'s rare"']
    assert fit()["hyper_parameters"]["label_names"] == ["neg", "neutral", "pos"]


def test_the_usual_backbone_is_named_where_none_is(here):
    kinds.write_csv(Path("reviews.csv"), kinds.labelled())
    english, text = init("--data", "reviews.csv")
    assert english["model"]["init_args"]["backbone"] == "FacebookAI/roberta-base"
    assert "estimated" in text
    Path("config.yaml").unlink()
    kinds.write_csv(Path("reviews.csv"), [{**row, "review": f"отзыв {row['id']}"} for row in kinds.labelled()])
    other, _ = init("--data", "reviews.csv")
    assert other["model"]["init_args"]["backbone"] == "FacebookAI/xlm-roberta-base"


# Options, and what cannot be told.


def test_options_decide(encoder):
    rows = [{**row, "rating": row["id"] % 5 + 1, "title": f"t{row['id']}"} for row in kinds.labelled()]
    kinds.write_csv(Path("reviews.csv"), rows)
    options = ["--task", "regression", "--text_column", "title", "--label_column", "rating"]
    config, _ = init("--data", "reviews.csv", "--backbone", encoder, *options)
    data = config["data"]["init_args"]
    assert (data["text_column"], data["label_column"]) == ("title", "rating")
    assert config["model"]["init_args"]["problem"] == "regression"
    fit()


def refused(capsys, *arguments):
    """Return the line with which `init` refuses, and see that it wrote nothing."""
    before = sorted(Path().iterdir())
    assert main(["init", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sorted(Path().iterdir()) == before
    return line


def test_no_file_is_overwritten(capsys):
    kinds.write_csv(Path("reviews.csv"), kinds.labelled())
    Path("config.yaml").write_text("mine")
    assert "--output" in refused(capsys, "--data", "reviews.csv")
    assert Path("config.yaml").read_text() == "mine"


def test_the_file_is_written_where_output_says(encoder):
    kinds.write_csv(Path("reviews.csv"), kinds.labelled())
    assert main(["init", "--data", "reviews.csv", "--backbone", encoder, "--output", "mine.yaml"]) == 0
    assert Path("mine.yaml").read_text().startswith("# TextClassificationData reads")
    assert not Path("config.yaml").exists()


def test_numbers_of_tags_need_names(capsys):
    rows = [{"tokens": words, "ner_tags": [len(tag) for tag in tags]} for words, tags in kinds.tagged()]
    kinds.write_lines(Path("numbers.jsonl"), rows)
    assert "Set tag_names" in refused(capsys, "--data", "numbers.jsonl")


def test_several_labels_that_may_be_meant_are_named(capsys):
    rows = [{**row, "genre": "xyz"[row["id"] % 3]} for row in kinds.labelled()]
    kinds.write_csv(Path("reviews.csv"), rows)
    line = refused(capsys, "--data", "reviews.csv")
    assert "'sentiment' and 'genre'" in line
    assert "--label_column" in line


def test_whole_numbers_may_be_classes_or_amounts(capsys, encoder):
    rows = [{"text": f"{row['review']}", "kind": row["id"] % 40} for row in kinds.labelled()]
    kinds.write_csv(Path("grades.csv"), rows)
    line = refused(capsys, "--data", "grades.csv", "--label_column", "kind")
    assert "set --task to single_label or regression" in line
    config, _ = init("--data", "grades.csv", "--label_column", "kind", "--task", "regression", "--backbone", encoder)
    assert config["model"]["init_args"]["problem"] == "regression"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--task", "CausalML"], "did you mean `CausalLM`?"),
        (["--label_column", "sentimant"], "did you mean `sentiment`?"),
        (["--task", "MultipleChoice"], "no columns for MultipleChoice"),
        (["--task", "CausalLM"], "needs a model of the kind 'decoder'"),
        (["--label_column", "id"], "set --task"),
        (["--backbone", "./nowhere"], "does not exist"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_fit_are_refused(capsys, encoder, options, expected):
    kinds.write_csv(Path("reviews.csv"), kinds.labelled())
    backbone = [] if "--backbone" in options else ["--backbone", encoder]
    assert expected in refused(capsys, "--data", "reviews.csv", *backbone, *options)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("notes.txt", "A line of words.\nAnother line\n", "JSON lines"),
        ("empty.csv", "", "empty"),
        ("bare.csv", "".join(f"{n % 2},words of row {n}\n" for n in range(30)), "should name the columns"),
        ("objects.jsonl", '{"context": "a b", "question": "c d", "answers": {"text": ["e"]}}\n' * 9, "--task"),
        ("pairs.csv", "premise,hypothesis,label\n" + "a b c,d e f,yes\ng h i,j k l,no\n" * 30, "pairs of texts"),
        ("numbers.csv", "x,y\n" + "1.5,2\n2.5,3\n" * 30, "--task"),
        ("one.csv", "text,label\n" + "".join(f"text {n},same\n" for n in range(30)), "in every row"),
    ],
    ids=["running-text", "empty", "no-header", "objects", "pairs", "numbers", "one-class"],
)
def test_data_that_no_task_fits_are_refused(capsys, name, content, expected):
    Path(name).write_text(content)
    assert expected in refused(capsys, "--data", name)
