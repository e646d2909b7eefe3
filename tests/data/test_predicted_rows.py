"""Rows to predict: read alone, shared out in whole batches, and given back with all that their records hold."""

from __future__ import annotations

import json

import pytest

from lora_lightning.checkpoint.folder import RunFacts
from lora_lightning.data import InstructionData, TextClassificationData, TokenClassificationData
from lora_lightning.data.batches.batching import WholeBatchSampler
from lora_lightning.data.predicted_rows import settings_to_use
from lora_lightning.errors import DataError
from lora_lightning.texts.saved_tokenizer import SavedTokenizer
from tests.data.conftest import labelled


def dealt(num_rows, batch_size, num_ranks, **settings):
    """Return the batches of each rank."""
    ranks = []
    for rank in range(num_ranks):
        rows = list(WholeBatchSampler(num_rows, batch_size, num_ranks, rank, **settings))
        ranks.append([rows[start : start + batch_size] for start in range(0, len(rows), batch_size)])
    return ranks


@pytest.mark.parametrize("is_even", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "batch_size", "num_ranks"), [(11, 2, 2), (11, 3, 4), (8, 4, 2), (3, 4, 3), (1, 1, 2)]
)
def test_ranks_are_dealt_the_batches_of_one_process(num_rows, batch_size, num_ranks, is_even):
    (alone,) = dealt(num_rows, batch_size, 1)
    ranks = dealt(num_rows, batch_size, num_ranks, is_even=is_even)
    in_turn = [ranks[index % num_ranks][index // num_ranks] for index in range(len(alone))]
    assert in_turn == alone
    further = [batch for index, one in enumerate(ranks) for batch in one[len(alone[index::num_ranks]) :]]
    assert all(batch == alone[0] for batch in further)
    assert all(ranks)
    assert len({len(one) for one in ranks}) == 1 or not is_even


def test_rows_come_back_with_their_records_and_positions(write, tokenizer_folder):
    rows = [(text, label, f"note {index}") for index, (text, label) in enumerate(labelled(30))]
    path = write("a.csv", rows, ("text", "label", "note"))
    data = TextClassificationData(path, test_size=7, tokenizer=tokenizer_folder)
    data.setup("predict")
    found = list(data.input_rows())
    assert len(found) == 7
    assert [row.fields["note"] for row in found] == [f"note {row.position}" for row in found]
    assert [row.content[0] for row in found] == [example.text for example in data.examples("predict")]
    assert [row.position for row in found] != list(range(7))  # control: they are drawn


def test_a_source_that_has_changed_is_told(write, tokenizer_folder):
    path = write("a.csv", labelled(9))
    data = TextClassificationData(predict=path, label_names=["no", "yes"], tokenizer=tokenizer_folder)
    data.setup("predict")
    assert len(list(data.input_rows())) == 9
    write("a.csv", labelled(5))
    with pytest.raises(DataError, match="line 7: the row is no longer there"):
        list(data.input_rows())


def test_sources_in_memory_and_named_sets(tokenizer_folder):
    first, second = ([{"text": f"w{index}", "more": [index]} for index in range(count)] for count in (3, 4))
    data = TextClassificationData(
        predict={"a": first, "b": second}, label_names=["no", "yes"], tokenizer=tokenizer_folder
    )
    data.setup("predict")
    assert list(data.predict_dataloader()) == ["a", "b"]
    for index, rows in enumerate((first, second)):
        assert [dict(row.fields) for row in data.input_rows(index)] == rows
        assert [row.position for row in data.input_rows(index)] == list(range(len(rows)))


def test_sentences_in_columns_of_a_file(tmp_path, tokenizer_folder):
    (tmp_path / "new.conll").write_text("w1\nw2\n\nw3\n")
    data = TokenClassificationData(
        predict=str(tmp_path / "new.conll"), tag_names=["O", "B-X"], tokenizer=tokenizer_folder
    )
    data.setup("predict")
    assert [row.fields["tokens"] for row in data.input_rows()] == [["w1", "w2"], ["w3"]]


def test_a_streamed_training_needs_no_stream_to_predict(tmp_path, folder):
    (tmp_path / "new.jsonl").write_text(json.dumps({"prompt": "question 3"}) + "\n")
    trained = InstructionData(
        str(tmp_path / "gone.jsonl"), streaming=True, val_size=0, template="chatml", tokenizer=folder
    )
    facts = RunFacts(tokenizer=SavedTokenizer(chat_template="{{ messages[0].content }}!"))
    settings = settings_to_use(dict(trained.hparams), facts, names_source=True)
    data = InstructionData(**{**settings, "predict": str(tmp_path / "new.jsonl")})
    data.expect_run(facts)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert data.tokenizer.decode(batch["input_ids"][0]) == "question 3!"  # the run's template, not the settings'
    assert batch.keys() == {"input_ids", "attention_mask"}


def test_long_questions_keep_their_end(tmp_path, folder):
    lines = [{"prompt": "start " + "word " * 200 + "end"}, {"prompt": "short"}]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    data = InstructionData(predict=str(tmp_path / "new.jsonl"), max_length=16, template="plain", tokenizer=folder)
    with pytest.warns(UserWarning, match="1 of 2 predict rows .* their beginning was cut off"):
        data.setup("predict")
    (batch,) = data.predict_dataloader()
    texts = [
        data.tokenizer.decode(ids[mask > 0])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts[0].endswith("end")
    assert "start" not in texts[0]
    assert texts[1].endswith("short")
