"""Loss and gradients against transformers' own on one large batch, whatever the batches, the ranks and the head."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_lightning import DoRA, LoRA, Optim
from lora_lightning.adapters import adapter_state_dict
from lora_lightning.errors import AdapterNotCalled, ConfigError, DataError
from lora_lightning.tasks import CausalLM
from tests import models
from tests.tasks import languages
from tests.tasks.languages import Speaker, batches, built, joined, largest_gap, loader
from tests.tasks.toys import Recorder, trainer

SGD = Optim(lr=0.1, schedule="constant", optimizer={"class_path": "torch.optim.SGD", "init_args": {}})
HEADS = {
    "frozen": languages.TARGETS,
    "copied": LoRA(r=3, target_modules="all-linear", modules_to_save=["lm_head"]),
    "lora": LoRA(r=3, target_modules=["q_proj", "lm_head"]),
    "dora": DoRA(r=3, target_modules=["q_proj", "lm_head"]),
}


def stepped(parts, task=None, **settings):
    """Train on batches for one epoch; return the task, and the trainer."""
    task, run = task or Speaker(), trainer(max_epochs=1, **settings)
    run.fit(task, loader(parts))
    return task, run


# The loss of one batch.


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "gpt2", *languages.OTHERS])
def test_loss_and_gradients_are_those_of_transformers(name):
    task = built(name)
    batch = joined(batches())
    loss = task.compute_loss(batch).loss
    assert models.gap(loss, languages.reference_loss(task.adapted, batch)) < 1e-6
    named = {key: parameter for key, parameter in task.adapted.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    ours = {key: gradient for key, gradient in zip(named, found, strict=True) if gradient is not None}
    reference = languages.reference_gradients(task, batch)
    assert largest_gap(ours, reference) < 1e-5
    other = {**batch, "labels": batch["labels"].clone()}
    other["labels"][2, 5:9] = -100
    assert largest_gap(ours, languages.reference_gradients(task, other)) > 1e-3


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"name": "tied"}], ids=str)
def test_any_head_trains_exactly(kind, settings):
    task = built(method=HEADS[kind], **settings)
    batch = joined(batches())
    named = {key: parameter for key, parameter in task.adapted.named_parameters() if parameter.requires_grad}
    assert any("lm_head" in key for key in named) == (kind != "frozen")
    ours = dict(zip(named, torch.autograd.grad(task.compute_loss(batch).loss, list(named.values())), strict=True))
    assert largest_gap(ours, languages.reference_gradients(task, batch)) < 1e-5
    models.perturb(task.adapted, seed=9, std=0.01)
    assert largest_gap(ours, languages.reference_gradients(task, batch)) > 1e-3


def capped(model):
    """Put a softcap on the logits of which the config says nothing."""
    model.register_forward_hook(lambda *call: type(call[-1])(logits=1.5 * (call[-1].logits / 1.5).tanh()))
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: languages.build("bert"), "something to the hidden states before its output head"),
        (lambda: capped(languages.build("llama")), "something unknown to the logits after its output head"),
    ],
)
def test_unknown_ways_to_logits_fall_back_to_the_models_own(build, reason, caplog):
    class Odd(Speaker):
        def configure_backbone(self):
            return build()

    task = Odd()
    task.configure_model()
    batch = joined(batches())
    with caplog.at_level(logging.WARNING, "lora_lightning"):
        loss = task.compute_loss(batch).loss
        task.compute_loss(batch)
    assert [reason in message for message in caplog.messages] == [True]
    logits = task.adapted(**{key: value for key, value in batch.items() if key != "labels"}).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert models.gap(loss, expected) < 1e-6


def test_known_ways_to_logits_are_silent(caplog):
    with caplog.at_level(logging.WARNING, "lora_lightning"):
        for name in ("llama", "gemma2", "granite", "cohere", "opt"):
            assert built(name)._output_head() is not None
    assert not caplog.messages


def test_logits_at_unsupervised_positions_are_never_computed():
    task, shapes = built(), []
    batch = joined(batches())
    task._output_head()
    task.adapted.lm_head.register_forward_hook(lambda *call: shapes.append(call[-1].shape))
    task.compute_loss(batch)
    assert shapes == [((batch["labels"][:, 1:] != -100).sum(), models.VOCABULARY)]


def test_the_trial_neither_draws_random_numbers_nor_counts_as_a_call():
    class Idle(Speaker):
        def configure_backbone(self):
            model = super().configure_backbone()
            model.lm_head.register_module("extra", torch.nn.Linear(4, 4))
            return model

    task = built(method=LoRA(r=2, target_modules="all-linear", dropout=0.5))
    before = torch.random.get_rng_state()
    task._output_head()
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(AdapterNotCalled, match=r"lm_head\.extra"):
        stepped(batches(), Idle(method=LoRA(r=2, target_modules=["q_proj", "extra"])))


@pytest.mark.parametrize("kind", HEADS)
def test_bfloat16_bases_and_autocast_train(kind):
    for task, context in (
        (built(method=HEADS[kind], dtype=torch.bfloat16), torch.autocast("cpu", enabled=False)),
        (built(method=HEADS[kind]), torch.autocast("cpu", dtype=torch.bfloat16)),
    ):
        exact = built(method=HEADS[kind])
        batch = joined(batches())
        with context:
            loss = task.compute_loss(batch).loss
        loss.backward()
        assert loss.dtype == torch.float32
        assert models.gap(loss, exact.compute_loss(batch).loss) < 2e-2
        ours = {key: p.grad for key, p in task.adapted.named_parameters() if p.requires_grad}
        assert all(gradient.dtype == torch.float32 for gradient in ours.values())
        assert largest_gap(ours, languages.reference_gradients(exact, batch)) < 0.1


def test_packed_documents_give_the_loss_of_the_documents_alone():
    """Without an attention mask, the model tells packed documents by position ids that start again."""
    task = built()
    one, other = batches((9, 6), rows=1)
    packed = {name: torch.cat([one[name], other[name]], 1) for name in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(9), torch.arange(6)])[None]
    sums, parts = task.token_sums(packed), [task.token_sums(part) for part in (one, other)]
    assert sums.num_tokens == sum(part.num_tokens for part in parts)
    assert models.gap(sums.loss, parts[0].loss + parts[1].loss) < 1e-5
    leaking = {**packed, "position_ids": torch.arange(15)[None]}
    assert models.gap(task.token_sums(leaking).loss, sums.loss) > 1e-3


def test_padding_on_either_side_changes_nothing():
    task = built()
    (part,) = batches((9,))
    left = {name: torch.nn.functional.pad(part[name], (4, 0), value=0) for name in part}
    left["labels"][:, :4] = -100
    left["labels"][:, 4] = left["input_ids"][:, 4]  # supervised, and nothing real stands before it
    assert task.token_sums(left).num_tokens == task.token_sums(part).num_tokens
    assert models.gap(task.token_sums(left).loss, task.token_sums(part).loss) < 1e-5


# The gradients of an optimizer step.


def test_accumulated_batches_give_the_gradient_of_one_large_batch():
    task, _ = stepped(batches(), Speaker(dtype=torch.float64), accumulate_grad_batches=4)
    whole, _ = stepped([joined(batches())], Speaker(dtype=torch.float64))
    assert len(task.gradients) == len(whole.gradients) == 1
    assert largest_gap(task.gradients[0], whole.gradients[0]) < 1e-9
    reference = languages.reference_gradients(built(dtype=torch.float64), joined(batches()))
    assert largest_gap(task.gradients[0], reference) < 1e-6  # transformers computes its loss in float32
    singles = [languages.reference_gradients(built(dtype=torch.float64), part) for part in batches()]
    mean_of_means = {name: sum(single[name] for single in singles) / 4 for name in reference}
    assert largest_gap(mean_of_means, reference) > 1e-2


def test_the_last_group_may_be_incomplete():
    task, _ = stepped(batches(), Speaker(dtype=torch.float64, optim=Optim(lr=1e-12)), accumulate_grad_batches=3)
    assert len(task.gradients) == 2
    for gradients, parts in zip(task.gradients, (batches()[:3], batches()[3:]), strict=True):
        assert largest_gap(gradients, languages.reference_gradients(built(dtype=torch.float64), joined(parts))) < 1e-6


def test_two_ranks_give_the_gradient_of_one_large_batch(tmp_path):
    script = Path(__file__).with_name("language_ranks_script.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert len(ranks[0]["gradients"]) == 2
    for one, other in zip(ranks[0]["gradients"], ranks[1]["gradients"], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    method = [languages.TARGETS, Recorder(host="model.norm", width=32, penalty=0.25)]
    task = built(method=method, dtype=torch.float64)
    reference = languages.reference_gradients(task, joined(batches()))
    delta = next(name for name in reference if name.endswith("delta"))
    reference[delta] = reference[delta] + 0.5 * (task.adapted.get_parameter(delta).detach() - 1)
    assert largest_gap(ranks[0]["gradients"][0], reference) < 1e-6
    half = languages.reference_gradients(task, joined(batches()[::2]))
    assert largest_gap(ranks[0]["gradients"][0], half) > 1e-2
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert {"val/loss", "val/perplexity", "val/accuracy", "train/loss"} <= ranks[0]["metrics"].keys()


def test_clipping_sees_gradients_per_token():
    task, run = Speaker(optim=SGD), trainer(max_epochs=1, gradient_clip_val=1e-3)
    task.configure_model()
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(task.adapted).items()}
    run.fit(task, loader(batches()[:1]))
    moved = [tensor - before[name] for name, tensor in adapter_state_dict(task.adapted).items()]
    assert torch.cat([tensor.flatten() for tensor in moved]).norm() == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert largest_gap(task.gradients[0], languages.reference_gradients(built(), batches()[0])) < 1e-5


def test_penalties_are_added_whole_and_seen_by_the_method():
    gradients, journals = {}, {}
    for penalty in (0.0, 2.0):
        Recorder.journal.clear()
        method = [languages.TARGETS, Recorder(host="model.norm", width=32, penalty=penalty)]
        task, run = stepped(batches(), Speaker(method=method), accumulate_grad_batches=4)
        gradients[penalty], journals[penalty] = task.gradients[0], list(Recorder.journal)
        assert run.callback_metrics["train/recorder_penalty"] >= 0
    start = built(method=[languages.TARGETS, Recorder(host="model.norm", width=32)])
    delta = next(name for name in gradients[0.0] if name.endswith("delta"))
    expected = 2 * 2.0 * (start.adapted.get_parameter(delta) - 1)
    assert models.gap(gradients[2.0][delta] - gradients[0.0][delta], expected) < 1e-5
    others = [name for name in gradients[0.0] if name != delta]
    assert all(torch.equal(gradients[0.0][name], gradients[2.0][name]) for name in others)
    assert [entry[0] for entry in journals[2.0]] == ["calibrate", "before", "after"]


def test_a_step_without_supervised_tokens_changes_nothing_and_is_told_once():
    empty = [{**part, "labels": torch.full_like(part["labels"], -100)} for part in batches()]
    task = Speaker(optim=Optim(lr=0.1, schedule="constant", weight_decay=0.5))
    task.configure_model()
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(task.adapted).items()}
    with pytest.warns(UserWarning, match="No token of optimizer step 0 is supervised") as told:
        stepped(empty, task, accumulate_grad_batches=2)
    assert len([one for one in told if "supervised" in str(one.message)]) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state_dict(task.adapted).items())
    stepped([empty[0], batches()[1]], task, accumulate_grad_batches=2)  # one batch with tokens is enough
    assert not all(torch.equal(tensor, before[name]) for name, tensor in adapter_state_dict(task.adapted).items())
    assert largest_gap(task.gradients[-1], languages.reference_gradients(built(), batches()[1])) < 1e-5


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions_of_the_trainer(precision):
    task, _ = stepped(batches(), accumulate_grad_batches=4, precision=precision)
    reference = languages.reference_gradients(built(), joined(batches()))
    ours = {name: gradient.float() for name, gradient in task.gradients[0].items()}
    assert largest_gap(ours, reference) < 0.1


@pytest.mark.gpu
def test_a_gpu_gives_the_gradients_of_the_cpu():
    task, run = stepped(batches(), accumulate_grad_batches=4, accelerator="gpu")
    reference = languages.reference_gradients(built(), joined(batches()))
    assert largest_gap({name: gradient.cpu() for name, gradient in task.gradients[0].items()}, reference) < 1e-3
    (metrics,) = run.validate(task, loader(batches()), verbose=False)
    assert metrics["val/loss"] > 0


# Metrics.


def test_metrics_are_means_over_all_tokens():
    task = built()
    run = trainer()
    (metrics,) = run.validate(task, loader(batches()), verbose=False)
    batch = joined(batches())
    with torch.no_grad():
        logits = task.adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = languages.reference_loss(task.adapted, batch)
    targets = batch["labels"][:, 1:]
    right = (logits[:, :-1].argmax(-1) == targets).sum() / (targets != -100).sum()
    assert metrics["val/loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics["val/perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert metrics["val/accuracy"] == pytest.approx(float(right), rel=1e-6)
    with torch.no_grad():
        means = [float(languages.reference_loss(task.adapted, part)) for part in batches()]
    assert abs(sum(means) / 4 - metrics["val/loss"]) > 1e-3
    assert run.test(task, loader(batches()), verbose=False)[0]["test/loss"] == metrics["val/loss"]


def test_the_training_loss_is_that_of_the_whole_step():
    _, run = stepped(batches(), accumulate_grad_batches=4)
    expected = languages.reference_loss(built().adapted, joined(batches())).detach()
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(float(expected), rel=1e-6)


def test_validation_without_supervised_tokens_is_told():
    empty = [{**part, "labels": torch.full_like(part["labels"], -100)} for part in batches()]
    with pytest.warns(UserWarning, match="No token of the val batches is supervised"):
        (metrics,) = trainer().validate(built(), loader(empty), verbose=False)
    assert metrics["val/loss"] != metrics["val/loss"]


def test_it_learns():
    """Rows that repeat one word can be foretold."""
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in (torch.full((2, 8), word) for word in range(3, 13))]
    method = LoRA(r=8, target_modules="all-linear", modules_to_save=["lm_head"])
    task, run = Speaker(method=method, optim=Optim(lr=2e-2)), trainer(max_epochs=10)
    (before,) = trainer().validate(task, loader(rows), verbose=False)
    run.fit(task, loader(rows), loader(rows))
    assert float(run.callback_metrics["val/loss"]) < 0.5 * before["val/loss"]
    assert float(run.callback_metrics["val/accuracy"]) > 0.5 > before["val/accuracy"]


# Checkpoints and settings.


@pytest.fixture
def backbone(tmp_path):
    languages.build("llama").save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_a_backbone_is_loaded_and_a_checkpoint_rebuilds_the_task(backbone, tmp_path):
    task = CausalLM(backbone, LoRA(r=2), loss_chunk_size=16, max_new_tokens=3)
    run = trainer(max_epochs=1)
    run.fit(task, loader(batches()))
    assert not any("lm_head" in path for path in task.report.hosts)  # pretrained, so frozen
    run.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(11)
    again = CausalLM.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert (again.loss_chunk_size, again.max_new_tokens) == (16, 3)
    task.eval()
    again.eval()
    with torch.no_grad():
        assert torch.equal(again.token_sums(batches()[1]).loss, task.token_sums(batches()[1]).loss)


@pytest.mark.parametrize("settings", [{"loss_chunk_size": 0}, {"max_new_tokens": 0}])
def test_settings_are_checked(settings):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} must be at least 1, got 0"):
        CausalLM(**settings)


IDS = torch.arange(3, 9)[None]
BAD_BATCHES = {
    "input_ids holds token 66": {"input_ids": IDS + 58, "labels": IDS},
    "labels holds token -5": {"input_ids": IDS, "labels": IDS - 8},
    "must have the shape": {"input_ids": IDS, "labels": IDS[:, 1:]},
    "needs token ids": {"labels": IDS},
    "needs labels": {"input_ids": IDS},
    "33 tokens, and this model takes 32": {"input_ids": IDS[:, :1].expand(1, 33), "labels": IDS[:, :1].expand(1, 33)},
}


@pytest.mark.parametrize("words", BAD_BATCHES)
def test_batches_that_do_not_fit_are_told_in_a_sentence(words):
    with pytest.raises(DataError, match=words):
        stepped([BAD_BATCHES[words]])


def test_a_packed_row_may_be_longer_than_the_model():
    ids = torch.randint(3, models.VOCABULARY, (1, 40))
    positions = torch.cat([torch.arange(20), torch.arange(20)])[None]
    stepped([{"input_ids": ids, "labels": ids, "position_ids": positions}])
