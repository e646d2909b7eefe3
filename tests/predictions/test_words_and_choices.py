"""`predict` with `TokenClassification` and `MultipleChoice`, against transformers and the merged model."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
import transformers

from tests.predictions.toys import fit, in_the_run, merged, predict, read_lines, save_encoder, write_lines


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_encoder(tmp_path / "base")


# Words.

SENTENCES = [
    {"id": 5, "tokens": ["Anna", "Bell", "went", "to", "Paris"], "source": "a"},
    {"id": 4, "tokens": ["\u200b", "the", "\u0007", "film", "is", "Paris"], "source": None},
    {"id": 3, "tokens": ["went"], "source": "b"},
    {"id": 3, "tokens": ["went"], "source": "b"},
    {"id": 9, "tokens": ["to", "Paris", "is", "not", "to", "Anna", "Bell", "!"], "source": "c"},
]


def write_sentences():
    people, places = ["anna", "bell", "anna bell"], ["paris", "paris paris"]
    lines = []
    for index in range(36):
        words = [("went" if index % 2 else "is", "O"), ("to" if index % 3 else "very", "O")]
        person, place = people[index % 3].split(), places[index % 2].split()
        words += [(word, "B-PER" if at == 0 else "I-PER") for at, word in enumerate(person)]
        words += [("the" if index % 5 else "a", "O")]
        words += [(word, "B-LOC" if at == 0 else "I-LOC") for at, word in enumerate(place)]
        lines += [*(f"{word} {tag}" for word, tag in words), ""]
    Path("train.conll").write_text("\n".join(lines))


@torch.no_grad()
def tags_of(folder):
    """Ask transformers for the tag at the first token of each word; None for words without one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    found = []
    for sentence in SENTENCES:
        batch = tokenizer(sentence["tokens"], is_split_into_words=True, return_tensors="pt")
        guesses = model(**batch).logits[0].argmax(-1).tolist()
        tags = [None] * len(sentence["tokens"])
        for place, word in reversed(list(enumerate(batch.word_ids()))):
            if word is not None:
                tags[word] = model.config.id2label[guesses[place]]
        found.append(tags)
    return found


def entities_of(tags, words):
    """Join B- and I- tags of one type, words without a tag inside an entity too."""
    tagged = [(index, tag) for index, tag in enumerate(tags) if tag is not None]
    found = []
    for index, tag in tagged:
        kind = tag[2:]
        continues = tag.startswith("I-") and found and found[-1]["type"] == kind and found[-1]["open"]
        for one in found:
            one["open"] = False
        if tag == "O":
            continue
        if continues:
            found[-1] |= {"end": index + 1, "open": True}
        else:
            found.append({"type": kind, "start": index, "end": index + 1, "open": True})
    return [
        {
            "type": one["type"],
            "start": one["start"],
            "end": one["end"],
            "text": " ".join(words[one["start"] : one["end"]]),
        }
        for one in found
    ]


@pytest.mark.parametrize("too_long", ["cut", "split"])
def test_tags_and_entities_of_words(too_long):
    write_sentences()
    checkpoint = fit(
        *("--model=TokenClassification", "--model.backbone=base", "--data=TokenClassificationData"),
        *("--data.train=train.conll", f"--data.too_long={too_long}"),
    )
    new = write_lines("new.jsonl", SENTENCES)
    with pytest.warns(UserWarning, match="2 words of 5 predict sentences"):
        predict(checkpoint, f"--data.predict={new}", "--data.eval_batch_size=2")
    rows = read_lines(in_the_run("predictions.jsonl"))
    assert [row["index"] for row in rows] == list(range(len(SENTENCES)))
    assert [{name: row[name] for name in ("id", "tokens", "source")} for row in rows] == SENTENCES
    expected = tags_of(merged(checkpoint))
    assert [row["predicted_tags"] for row in rows] == expected
    assert any(tag is None for tags in expected for tag in tags)  # a word without a token
    assert [row["predicted_entities"] for row in rows] == [
        entities_of(tags, one["tokens"]) for tags, one in zip(expected, SENTENCES, strict=True)
    ]
    assert {one["type"] for row in rows for one in row["predicted_entities"]} == {"PER", "LOC"}
    assert list(reversed(expected)) != expected  # control


# Choices.

QUESTIONS = [
    {"id": "q3", "question": "is the film good?", "choices": ["yes", "no, it is bad"]},
    {"id": "q1", "question": "is anna in paris?", "choices": ["no", "very good", "yes", "a film"]},
    {"id": "q2", "question": "is the film good?", "choices": ["bad", "not bad", "anna"]},
]


@torch.no_grad()
def probabilities_of(folder):
    """Ask transformers for each question on its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForMultipleChoice.from_pretrained(folder).eval()
    found = []
    for row in QUESTIONS:
        pairs = tokenizer([row["question"]] * len(row["choices"]), row["choices"], padding=True, return_tensors="pt")
        found.append(model(**{name: one[None] for name, one in pairs.items()}).logits[0].softmax(-1))
    return found


def test_chosen_options_of_questions_with_different_numbers_of_choices():
    training = [
        {"question": f"is film {index} good?", "choices": ["yes good", "no bad"], "label": index % 2}
        for index in range(40)
    ]
    checkpoint = fit(
        *("--model=MultipleChoice", "--model.backbone=base", "--data=MultipleChoiceData"),
        f"--data.train={write_lines('train.jsonl', training)}",
    )
    new = write_lines("new.jsonl", QUESTIONS)
    predict(checkpoint, f"--data.predict={new}", "--data.eval_batch_size=2", "--output=answers.parquet")
    rows = datasets.Dataset.from_parquet("answers.parquet").to_list()
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [{name: row[name] for name in ("id", "question", "choices")} for row in rows] == QUESTIONS
    expected = probabilities_of(merged(checkpoint))
    for row, probabilities, asked in zip(rows, expected, QUESTIONS, strict=True):
        assert row["probabilities"] == pytest.approx(probabilities.tolist(), abs=1e-5)
        assert row["predicted_choice"] == int(probabilities.argmax())
        assert row["predicted_answer"] == asked["choices"][row["predicted_choice"]]
    assert rows[0]["probabilities"] != pytest.approx(expected[2][:2].tolist(), abs=1e-3)  # control
