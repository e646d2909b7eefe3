import json

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from lora_lightning import LoRA, MultipleChoice, MultipleChoiceData, Optim
from lora_lightning.__main__ import main
from lora_lightning.errors import DataError
from tests.data.conftest import _save_tokenizer
from tests.data.test_multiple_choice import COLUMNS, questions
from tests.models import gap, perturb
from tests.tasks.toys import trainer


@pytest.fixture
def backbone(tmp_path):
    """A folder with a tiny BERT without a head, and a tokenizer of whole words."""
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    _save_tokenizer(tmp_path, pad_token="[PAD]")
    transformers.BertModel(config).save_pretrained(tmp_path)
    return str(tmp_path)


def batches(num=3, size=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        ids = torch.randint(3, 50, (size, 3, 6), generator=generator)
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).repeat(size, 1)[:size]
        labels = ids[:, 0, 1] % 2
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "choice_mask": mask, "labels": labels}


def loader():
    return DataLoader(list(batches()), batch_size=None)


def build(backbone, **settings):
    usual = {"method": LoRA(r=4, target_modules="all-linear"), "optim": Optim(lr=1e-2, schedule="constant")}
    return MultipleChoice(backbone, **{**usual, **settings})


def built(backbone):
    task = build(backbone)
    task.configure_model()
    perturb(task.adapted, std=0.5)
    return task.eval()


def reference(task, batch, choices):
    """The mean cross-entropy in float64, question by question, over its own choices."""
    losses = []
    for ids, count, label in zip(batch["input_ids"], choices, batch["labels"].tolist(), strict=True):
        logits = task.adapted(input_ids=ids[None, :count], attention_mask=torch.ones_like(ids[None, :count])).logits
        losses.append(-logits[0].double().log_softmax(-1)[label])
    return torch.stack(losses).mean()


def test_loss_is_over_the_choices_that_there_are(backbone):
    task, batch = built(backbone), next(batches())
    loss = task.compute_loss(batch).loss
    assert gap(loss, reference(task, batch, [3, 2, 3, 2, 3])) < 1e-6
    assert gap(loss, reference(task, batch, [3, 3, 3, 3, 3])) > 1e-3


def test_batches_that_do_not_fit_are_sentences(backbone):
    task, batch = built(backbone), next(batches())
    with pytest.raises(DataError, match=r"needs token ids \[batch, choices, length\]; got \[5, 3\]"):
        task.compute_loss({**batch, "input_ids": batch["input_ids"][..., 0]})
    del batch["labels"]
    with pytest.raises(DataError, match="needs labels"):
        task.compute_loss(batch)


def test_fit_then_test_from_the_checkpoint_gives_bit_identical_metrics(backbone, tmp_path):
    task, run = build(backbone), trainer(max_epochs=3)
    run.fit(task, loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    expected = run.test(task, loader(), verbose=False)[0]
    torch.manual_seed(99)
    untrained = trainer().test(build(backbone), loader(), verbose=False)[0]
    loaded = MultipleChoice.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert trainer().test(loaded, loader(), verbose=False)[0] == expected
    assert untrained["test/loss"] != expected["test/loss"]
    rows = [row for batch in batches() for row in task.eval().predict(batch)]
    labels = [label for batch in batches() for label in batch["labels"].tolist()]
    right = [row["choice"] == label for row, label in zip(rows, labels, strict=True)]
    assert expected["test/accuracy"] == pytest.approx(sum(right) / 15)
    assert {len(row["probabilities"]) for row in rows} == {2, 3}
    assert sum(rows[1]["probabilities"]) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:.*logging interval.*", "ignore:.*does not have many workers.*")
def test_the_command_line_trains(backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in questions(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    config = {
        "model": {"class_path": "MultipleChoice", "init_args": {"backbone": backbone}},
        "data": {"class_path": MultipleChoiceData.__name__, "init_args": {"train": "train.jsonl"}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": "run"},
    }
    (tmp_path / "fit.yaml").write_text(json.dumps(config))
    assert main(["fit", "--config", "fit.yaml"]) == 0
    checkpoint = str(tmp_path / "run/version_0/checkpoints/last.ckpt")
    assert main(["test", "--config", "fit.yaml", "--ckpt_path", checkpoint]) == 0
