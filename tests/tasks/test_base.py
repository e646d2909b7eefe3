import copy
import re

import pytest
import torch
from torch import nn

from lora_lightning import LoRA, Optim, disabled, merge
from lora_lightning.adapters import adapter_state_dict, iter_roles
from lora_lightning.errors import AdapterNotCalled, CheckpointError, ConfigError, UserError
from lora_lightning.tasks.base import AdapterTask
from tests.tasks.toys import Recorder, Tagger, loader, trainer

TARGETS = LoRA(r=4, target_modules=["linear1", "linear2"], modules_to_save=["3"])
FAST = Optim(lr=1e-2, schedule="constant")


@pytest.fixture
def tagger():
    return Tagger(method=TARGETS, optim=FAST)


def perturb(model):
    with torch.no_grad():
        for _, parameter, _ in iter_roles(model):
            parameter.add_(0.1 * torch.randn_like(parameter))


def outputs(task):
    """Evaluate, and leave the task in training mode, as it was."""
    task.eval()
    with torch.no_grad():
        logits = torch.cat([task.adapted(x) for x, _ in loader()])
    task.train()
    return logits


def test_a_custom_task_learns_and_its_base_does_not_move(tagger):
    run = trainer(max_epochs=15)
    run.fit(tagger, loader(), loader())
    base = Tagger().configure_backbone().state_dict()
    own = {name: tensor for name, tensor in tagger.adapted.state_dict().items() if "_lora_lightning" not in name}
    assert own.keys() == base.keys()
    assert all(torch.equal(own[name], base[name]) for name in base)
    assert run.callback_metrics["val/accuracy"] > 0.7 > untrained_accuracy()


def untrained_accuracy():
    run = trainer()
    return run.validate(Tagger(method=TARGETS), loader(), verbose=False)[0]["val/accuracy"]


def test_adapters_are_active_in_validation_of_torch_transformer_layers(tagger):
    """In eval, torch's fast path reads the weights of linear1 and linear2 directly."""
    tagger.configure_model()
    perturb(tagger.adapted)
    with torch.no_grad():
        train = torch.cat([tagger.train().adapted(x) for x, _ in loader()])
    assert torch.allclose(train, outputs(tagger), atol=1e-5)
    with disabled(tagger.adapted):
        assert not torch.allclose(train, outputs(tagger), atol=1e-2)


def test_a_checkpoint_holds_adapters_only_and_resumes(tagger, tmp_path):
    run = trainer()
    run.fit(tagger, loader())
    path = tmp_path / "half.ckpt"
    run.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"].keys() == {"model." + name for name in adapter_state_dict(tagger.adapted)}
    base = {tensor.shape: tensor for tensor in Tagger().configure_backbone().state_dict().values()}
    assert not any(torch.equal(base[t.shape], t) for t in checkpoint["state_dict"].values() if t.shape in base)

    straight = trainer(max_epochs=4)
    torch.manual_seed(5)
    resumed_task = Tagger(method=TARGETS, optim=FAST)
    straight_task = Tagger(method=TARGETS, optim=FAST)
    straight_task.configure_model()
    resumed_task.configure_model()
    assert not torch.equal(outputs(resumed_task), outputs(tagger))
    trainer(max_epochs=4).fit(resumed_task, loader(), ckpt_path=path, weights_only=True)
    straight.fit(straight_task, loader(), ckpt_path=path, weights_only=True)
    assert torch.equal(outputs(resumed_task), outputs(straight_task))
    assert not torch.equal(outputs(resumed_task), outputs(tagger))


def test_load_from_checkpoint_rebuilds_the_same_task(tagger, tmp_path):
    run = trainer()
    run.fit(tagger, loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    torch.manual_seed(11)
    again = Tagger.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert again.methods == tagger.methods
    assert again.optim == tagger.optim
    assert torch.equal(outputs(again), outputs(tagger))


def test_merging_keeps_the_outputs(tagger):
    trainer().fit(tagger, loader())
    before = outputs(tagger)
    unmerged = copy.deepcopy(tagger)
    merge(tagger.adapted)
    assert torch.allclose(outputs(tagger), before, atol=1e-5)
    with disabled(unmerged.adapted):
        assert not torch.allclose(outputs(unmerged), before, atol=1e-2)


def test_predictions_come_from_the_adapted_model(tagger):
    predictions = trainer().predict(tagger, loader())
    assert torch.equal(torch.cat(predictions), outputs(tagger).argmax(-1))


def test_every_training_hook_is_called_with_its_step():
    Recorder.journal.clear()
    task = Tagger(method=[TARGETS, Recorder(host="1.layers.0.norm2", width=16)], optim=FAST)
    run = trainer(max_epochs=1, accumulate_grad_batches=2)
    run.fit(task, loader(num=64, batch_size=16))
    kinds = [entry[0] for entry in Recorder.journal]
    assert kinds == ["calibrate", "before", "after", "before", "after"]
    assert Recorder.journal[0] == ("calibrate", 4)
    assert [entry[1:3] for entry in Recorder.journal[1:]] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert all(entry[3] for entry in Recorder.journal if entry[0] == "before")
    first, second = (entry[3] for entry in Recorder.journal if entry[0] == "after")
    assert first.abs().min() > 0
    assert not torch.equal(first, second)
    task.fold()
    assert Recorder.delta(task.adapted).is_folded


def test_the_extra_loss_of_a_method_is_added_and_logged():
    losses = {}
    for penalty in (0.0, 0.5):
        task = Tagger(method=[TARGETS, Recorder(host="1.layers.0.norm2", width=16, penalty=penalty)])
        torch.manual_seed(2)
        task.configure_model()
        run = trainer(max_steps=1, max_epochs=-1)
        run.fit(task, loader())
        losses[penalty] = run.callback_metrics
    assert losses[0.5]["train/recorder_penalty"] == pytest.approx(0.5 * 16)
    assert losses[0.0]["train/recorder_penalty"] == 0
    assert losses[0.0]["train/loss"] == losses[0.5]["train/loss"]  # the task's own loss, without penalties


def test_extra_state_travels_and_a_resumed_run_does_not_calibrate_again(tmp_path):
    Recorder.journal.clear()
    spec = [TARGETS, Recorder(host="1.layers.0.norm2", width=16)]
    run = trainer(max_epochs=1)
    run.fit(Tagger(method=spec), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    num_calls = len(Recorder.journal)
    Recorder.journal.clear()
    trainer(max_epochs=2).fit(Tagger(method=spec), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert Recorder.journal[0] == ("loaded", {"calls": num_calls, "note": "kept"})
    assert "calibrate" not in [entry[0] for entry in Recorder.journal]


def test_two_methods_on_one_host_merge_together():
    task = Tagger(method=[LoRA(r=2, target_modules=["3"]), Recorder(host="3", width=3)])
    task.configure_model()
    perturb(task.adapted)
    before = outputs(task)
    merge(task.adapted)
    assert torch.allclose(outputs(task), before, atol=1e-5)


def test_state_outside_the_model_travels_too(tmp_path):
    class WithScale(Tagger):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.scale = nn.Parameter(torch.ones(1))

        def compute_loss(self, batch):
            loss = super().compute_loss(batch)
            return loss._replace(loss=loss.loss * self.scale.sum())

    task = WithScale(method=TARGETS, optim=FAST)
    run = trainer()
    run.fit(task, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = WithScale(method=TARGETS)
    assert not torch.equal(again.scale, task.scale)
    again.configure_model()
    again.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(again.scale, task.scale)
    with pytest.raises(CheckpointError, match="scale"):
        Tagger(method=TARGETS).load_state_dict(task.adapter_state())


def test_a_checkpoint_of_another_base_or_library_is_refused(tagger, tmp_path):
    run = trainer(max_epochs=1)
    run.fit(tagger, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")

    class OtherBase(Tagger):
        def configure_backbone(self):
            model = super().configure_backbone()
            with torch.no_grad():
                model[1].layers[1].linear2.weight.mul_(1.001)
            return model

    with pytest.raises(CheckpointError, match="another base"):
        OtherBase.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["lora_lightning"]
    with pytest.raises(CheckpointError, match="not written by lora_lightning"):
        Tagger().on_load_checkpoint(checkpoint)


def test_an_adapter_that_is_never_called_is_named():
    class Skipping(Tagger):
        def configure_backbone(self):
            model = super().configure_backbone()
            model.add_module("idle", nn.Identity())
            model.idle.projection = nn.Linear(4, 4)
            return model

    task = Skipping(method=LoRA(r=2, target_modules=["linear1", "projection"]))
    with pytest.raises(AdapterNotCalled, match=re.escape("'idle.projection'")):
        trainer().fit(task, loader())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AdapterTask(), "needs a backbone"),
        (lambda: AdapterTask(backbone=None, method=[]), "takes a method"),
        (lambda: AdapterTask(method="LoRA"), "takes a method"),
        (lambda: AdapterTask(method={"class_path": "os.system", "init_args": {}}), "os.system"),
        (lambda: Tagger(method=TARGETS, gradient_checkpointing=True), "gradient checkpointing"),
    ],
)
def test_mistakes_in_the_settings_are_sentences(build, words):
    with pytest.raises(UserError, match=words):
        build().configure_model()


def test_the_model_is_needed_before_it_is_used(tagger):
    with pytest.raises(ConfigError, match="configure_model"):
        tagger.adapted  # noqa: B018


def test_a_task_without_compute_loss_says_so(tagger):
    with pytest.raises(TypeError, match="must define compute_loss"):
        AdapterTask().compute_loss(None)


def test_configure_model_runs_once(tagger):
    tagger.configure_model()
    model = tagger.adapted
    tagger.configure_model()
    assert tagger.adapted is model
