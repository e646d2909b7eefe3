"""Loss and gradients against transformers' own, exactness over batches, and what is generated."""

import copy
import json
import logging
import re

import pytest
import torch
from torch.utils.data import DataLoader
from torchmetrics.functional.text.rouge import rouge_score

from lora_lightning import DoRA, LoRA, Optim, Seq2SeqData, Seq2SeqLM
from lora_lightning.__main__ import main
from lora_lightning.backbones.heads.decoder_head import find_decoder_head
from lora_lightning.errors import ConfigError, DataError
from tests import models
from tests.tasks.languages import largest_gap
from tests.tasks.texts import BUILDERS, END, IGNORED, Writer, batches, joined, padded, save_t5
from tests.tasks.toys import trainer

HEADS = {
    "frozen": LoRA(r=3, target_modules="all-linear"),
    "copied": LoRA(r=3, target_modules=["q"], modules_to_save=["lm_head"]),
    "dora": DoRA(r=3, target_modules=["q", "lm_head"]),
}


def built(*args, **settings):
    task = Writer(*args, **settings)
    task.configure_model()
    return task


def loader(parts):
    return DataLoader(parts, batch_size=None, shuffle=False)


def gradients(task, loss):
    named = {name: parameter for name, parameter in task.adapted.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def reference(task, batch):
    """transformers' own loss, in float64, of a copy of the model in float64."""
    model = copy.deepcopy(task.adapted).double()
    logits = model(**batch).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("name", BUILDERS)
def test_loss_is_that_of_transformers_in_float64(name):
    task, batch = built(name), joined(batches())
    assert find_decoder_head(task.adapted) is task.adapted.lm_head
    loss = task.compute_loss(batch).loss
    assert models.gap(loss, reference(task, batch)) < 1e-6
    assert models.gap(loss, task.adapted(**batch).loss) < 1e-6
    shifted = {**batch, "labels": batch["labels"].roll(1, 0)}
    assert models.gap(loss, reference(task, shifted)) > 1e-3
    masked = {**batch, "labels": batch["labels"].where(batch["labels"] != END, IGNORED)}
    assert models.gap(loss, reference(task, masked)) > 1e-3


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_are_those_of_transformers_with_any_head(kind):
    task, batch = built(method=HEADS[kind]), joined(batches())
    ours = gradients(task, task.compute_loss(batch).loss)
    assert any("lm_head" in name for name in ours) == (kind != "frozen")
    assert largest_gap(ours, gradients(task, task.adapted(**batch).loss)) < 1e-5
    models.perturb(task.adapted, seed=9, std=0.01)
    assert largest_gap(ours, gradients(task, task.adapted(**batch).loss)) > 1e-3


def test_unknown_ways_to_logits_fall_back_to_the_models_own(caplog):
    task, batch = built("bart"), joined(batches())
    plain = task.compute_loss(batch).loss
    task.adapted.final_logits_bias.uniform_(-1, 1)
    task._found = None
    with caplog.at_level(logging.WARNING, "lora_lightning"):
        loss = task.compute_loss(batch).loss
    assert ["does something to the logits" in message for message in caplog.messages] == [True]
    assert models.gap(loss, reference(task, batch)) < 1e-6
    assert models.gap(loss, plain) > 1e-3


def test_padding_changes_nothing():
    """T5 has relative positions, so padding may stand on either side of the source."""
    task, (batch, *_) = built(), batches()
    loss = task.compute_loss(batch).loss
    assert models.gap(task.compute_loss(padded(batch, right=4, target=3)).loss, loss) < 1e-6
    assert models.gap(task.compute_loss(padded(batch, left=4)).loss, loss) < 1e-6
    unmasked = padded(batch, right=4)
    unmasked["attention_mask"][:] = 1
    assert models.gap(task.compute_loss(unmasked).loss, loss) > 1e-3


def test_the_trial_draws_no_random_numbers():
    task = built(method=LoRA(r=2, target_modules="all-linear", dropout=0.5))
    before = torch.random.get_rng_state()
    task._output_head()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_accumulated_batches_give_the_gradient_of_one_large_batch():
    runs = {}
    for key, parts, accumulate in (("parts", batches(), 3), ("whole", [joined(batches())], 1)):
        runs[key] = Writer(dtype=torch.float64)
        trainer(max_epochs=1, accumulate_grad_batches=accumulate).fit(runs[key], loader(parts))
    ((parts,), (whole,)) = (runs[key].gradients for key in ("parts", "whole"))
    assert largest_gap(parts, whole) < 1e-9
    task = built(dtype=torch.float64)
    singles = [gradients(task, task.compute_loss(part).loss) for part in batches()]
    mean_of_means = {name: sum(single[name] for single in singles) / 3 for name in whole}
    assert largest_gap(mean_of_means, whole) > 1e-2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": None}, "needs labels"),
        ({"input_ids": torch.zeros(0, 0, dtype=torch.long)}, "needs token ids"),
        ({"labels": torch.ones(1, 3, dtype=torch.long)}, r"for its 3 rows.*labels of shape \[1, 3\]"),
    ],
)
def test_batches_that_do_not_fit_are_a_sentence(change, words):
    batch = {name: value for name, value in {**batches()[0], **change}.items() if value is not None}
    with pytest.raises(DataError, match=words):
        built().token_sums(batch)


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"num_beams": 0}, {"num_generated": -1}])
def test_settings_out_of_range_are_a_sentence(settings):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} must be at least"):
        Seq2SeqLM("t5", **settings)


# What is generated.


def test_answers_are_scored_for_as_many_rows_as_asked():
    task = built(num_generated=4, max_new_tokens=6)
    result = trainer().test(task, loader(batches()), verbose=False)[0]
    model, pairs = task.adapted.eval(), []
    for batch in batches():
        with torch.no_grad():
            out = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6, do_sample=False
            )
        pairs += zip(out[:, 1:].tolist(), batch["labels"].tolist(), strict=True)
    texts = [[" ".join(str(one) for one in ids if one not in (0, END, IGNORED)) for ids in pair] for pair in pairs]
    expected = [rouge_score(texts[i][0], texts[i][1], rouge_keys=("rouge1", "rouge2", "rougeL")) for i in range(9)]
    for name in ("rouge1", "rouge2", "rougeL"):
        each = [float(one[f"{name}_fmeasure"]) for one in expected]
        assert result[f"test/{name}"] == pytest.approx(sum(each[:4]) / 4, abs=1e-6)
    assert result["test/exact_match"] == 0
    assert {"test/loss", "test/perplexity", "test/accuracy"} < result.keys()


def test_nothing_need_be_generated():
    result = trainer().test(built(num_generated=0), loader(batches()), verbose=False)[0]
    assert result.keys() == {"test/loss", "test/perplexity", "test/accuracy"}


def test_beams_are_those_of_transformers_and_modes_stay():
    task, batch = built(max_new_tokens=5, num_beams=4), batches()[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = task.adapted.eval().generate(**inputs, num_beams=4, max_new_tokens=5)[:, 1:].tolist()
    task.train()
    answers = task._answers(batch)
    assert answers == [[token for token in row if token not in (0, END)] for row in expected]
    assert all(module.training for module in task.adapted.modules())
    task.num_beams = 1
    assert task._answers(batch) != answers


def test_predictions_are_answers():
    task, batch = built(max_new_tokens=4), padded(batches()[0], left=2)
    rows = trainer().predict(task, loader([batch]))[0]
    assert [row["source_ids"] for row in rows] == batches()[0]["input_ids"].tolist()
    assert [row["generated_ids"] for row in rows] == task._answers(batch)
    assert all(len(row["generated_ids"]) <= 4 for row in rows)


# From data to a checkpoint.


def pairs(count=80):
    """Texts, and the same ones in upper case without vowels."""
    words = ["sun", "moon", "star", "tree", "fish", "bird"]
    for index in range(count):
        text = f"{words[index % 6]} {words[index // 6 % 6]} {index}"
        yield {"source": text, "target": re.sub("[aeiou]", "", text).upper()}


@pytest.mark.filterwarnings("ignore:.*logging interval.*", "ignore:.*does not have many workers.*")
def test_fit_then_test_from_the_checkpoint_gives_bit_identical_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    backbone = save_t5(tmp_path / "t5")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs())))
    settings = {"num_generated": 5, "max_new_tokens": 8}
    data = Seq2SeqData("pairs.jsonl", prefix="write: ", batch_size=8)
    task = Seq2SeqLM(backbone, LoRA(r=4, target_modules="all-linear", dropout=0.1), Optim(lr=1e-2), **settings)
    run = trainer(max_epochs=2)
    run.fit(task, data)
    run.save_checkpoint("end.ckpt")
    expected = run.test(task, data, verbose=False)[0]
    torch.manual_seed(99)
    untrained = trainer().test(Seq2SeqLM(backbone, **settings), data, verbose=False)[0]
    loaded = Seq2SeqLM.load_from_checkpoint("end.ckpt", weights_only=True)
    assert trainer().test(loaded, data, verbose=False)[0] == expected
    assert untrained["test/loss"] > expected["test/loss"]
    row = run.predict(task, data)[0][0]
    assert row["source"] in {f"write: {pair['source']}" for pair in pairs()}
    config = {
        "model": {"class_path": "Seq2SeqLM", "init_args": {"backbone": backbone}},
        "data": {
            "class_path": "Seq2SeqData",
            "init_args": {"train": "pairs.jsonl", "prefix": "write: ", "batch_size": 8},
        },
    }
    (tmp_path / "test.yaml").write_text(json.dumps(config))
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["test", "--config", "test.yaml", "--ckpt_path", "end.ckpt", *quiet]) == 0
    told = dict(re.findall(r"(test/\w+)\W+([\d.e-]+)", re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)))
    assert {name: float(value) for name, value in told.items()} == pytest.approx(expected)
