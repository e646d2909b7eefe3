"""Guards, logs and adapter folders of runs with modules that exist, with manual optimization and two optimizers."""

from __future__ import annotations

import json
import os
import signal

import lightning as L
import pytest
import torch

from lora_lightning import (
    AdapterCheckpoint,
    AdapterFinetuning,
    IdleParameterGuard,
    LoRA,
    NonFiniteGuard,
    OutOfMemoryGuard,
    SignalGuard,
    Throughput,
    adapter_state_dict,
    load_adapter,
)
from lora_lightning.backbones.attach import attach
from lora_lightning.checkpoint.folder import load_tensors
from lora_lightning.errors import TrainingError
from tests.callbacks.runs import LIGHTNING_WARNINGS
from tests.finetuning.modules import Gan, ImageClassifier, SelfSupervised, SentenceClassifier, loader
from tests.finetuning.runs import MODULES, finetuning, fit, same, trained_state

pytestmark = LIGHTNING_WARNINGS


class Broken(Gan):
    """Its discriminator's loss is infinite in the third batch, after the generator has stepped."""

    def noise(self, x):
        number = self.trainer.fit_loop.total_batch_idx
        return torch.full((len(x), 4), torch.inf if number == 2 else 1.0)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    module, folder = Broken(), tmp_path
    before = {}

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.update(trained_state(pl_module))

    with pytest.raises(TrainingError, match=r"stopped before optimizer step 4: the loss is nan") as raised:
        run(module, Watch(), NonFiniteGuard(), folder=folder)
    assert "Lower the learning rate, warm up longer or clip gradients" in str(raised.value)
    assert same(before, trained_state(module))


def run(module, *callbacks, folder, **settings):
    known = next(one for one in MODULES if isinstance(module, one))
    usual = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False}
    saves = any(isinstance(one, L.pytorch.callbacks.Checkpoint) for one in callbacks)
    usual |= {"enable_model_summary": False, "enable_checkpointing": saves, "default_root_dir": folder}
    trainer = L.Trainer(callbacks=[finetuning(known), *callbacks], **{**usual, **settings})
    trainer.fit(module, loader(known))
    return trainer


def test_advice_names_no_setting_that_a_module_lacks(tmp_path):
    class Exhausted(L.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            raise MemoryError

    for module, batches in ((Gan(), "batches of 2 instead of 4;"), (ImageClassifier(), "accumulate_grad_batches=2")):
        with pytest.raises(MemoryError) as raised:
            run(module, Exhausted(), OutOfMemoryGuard(), folder=tmp_path)
        assert batches in raised.value.__notes__[0]
        assert "init_args" not in raised.value.__notes__[0]


class Rare(Gan):
    """Its generator steps in every eighth batch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, 0 if self.trainer.fit_loop.total_batch_idx % 8 == 0 else 1)


class Detached(Gan):
    """Its generator gets no gradient."""

    def training_step(self, batch, batch_idx):
        for parameter in self.generator.parameters():
            parameter.register_hook(torch.zeros_like) if parameter.requires_grad and batch_idx == 0 else None
        return super().training_step(batch, batch_idx)


def test_parameters_are_judged_by_the_steps_of_their_own_optimizer(tmp_path, recwarn):
    """By the steps of both, the generator's adapters would be judged after its first, in which A has no gradient."""
    run(Rare(), IdleParameterGuard(num_steps=2), folder=tmp_path)
    assert not [str(one.message) for one in recwarn if "adapter parameters" in str(one.message)]
    with pytest.warns(UserWarning, match="6 of 6 trained adapter parameters had no gradient in the first 2"):
        run(Detached(), IdleParameterGuard(num_steps=2), folder=tmp_path)


def test_throughput_is_logged_though_steps_skip_the_interval(tmp_path):
    logged = []

    class Collect(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if "train/samples_per_second" in trainer.callback_metrics:
                logged.append(trainer.callback_metrics.pop("train/samples_per_second"))

    run(Gan(), Throughput(), Collect(), folder=tmp_path, log_every_n_steps=5)
    assert logged


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("cls", [Gan, SelfSupervised])
def test_a_signal_saves_and_ends(cls, tmp_path):
    """A manual module's gradients travel, so that the run resumes exactly."""

    class Interrupt(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.fit_loop.total_batch_idx == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    whole, _ = fit(cls)
    with pytest.raises(SystemExit) as ended:
        fit(cls, Interrupt(), AdapterCheckpoint(tmp_path), SignalGuard())
    assert ended.value.code == 128 + signal.SIGTERM
    resumed, rest = fit(cls, AdapterCheckpoint(tmp_path), seed=99, ckpt_path=tmp_path / "last.ckpt")
    assert same(trained_state(resumed), trained_state(whole))
    assert min(rest.by_batch) == (5 if cls is Gan else 7)  # after the step that was due


@pytest.mark.parametrize("cls", MODULES)
def test_the_folder_beside_a_checkpoint_holds_the_adapter(cls, tmp_path):
    module, _ = fit(cls, AdapterCheckpoint(tmp_path, save_top_k=1), max_epochs=1)
    folder = tmp_path / "last"
    path = finetuning(cls).module
    fresh = cls()
    fresh.configure_model()
    saving = finetuning(cls).modules_to_save
    attach(getattr(fresh, path), finetuning(cls).methods, modules_to_save=saving)
    load_adapter(getattr(fresh, path), folder)
    assert same(adapter_state_dict(getattr(fresh, path)), adapter_state_dict(getattr(module, path)))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["task"].endswith(cls.__name__)
    beside = {name: tensor for name, tensor in trained_state(module).items() if not name.startswith(f"{path}.")}
    if beside:
        assert same(load_tensors(folder / "task.safetensors"), beside)
    else:
        assert cls is SentenceClassifier
        assert not (folder / "task.safetensors").exists()


def test_several_adapted_submodules_have_no_folder(tmp_path):
    both = [AdapterFinetuning(LoRA(r=2, target_modules=["0"]), "discriminator"), AdapterCheckpoint(tmp_path)]
    with pytest.warns(UserWarning, match="Several submodules have adapters"):
        run(Gan(), *both, folder=tmp_path, max_epochs=1)
    assert (tmp_path / "last.ckpt").is_file()
    assert not (tmp_path / "last").exists()
