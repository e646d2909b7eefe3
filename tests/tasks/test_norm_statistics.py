"""Batch norms of a task's frozen base, frozen with it or trained beside the adapters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lora_lightning import LoRA, Optim, attach, disabled, load_adapter
from lora_lightning.callbacks import AdapterCheckpoint
from lora_lightning.errors import CheckpointError
from lora_lightning.tasks.base import AdapterTask
from lora_lightning.tasks.step_output import StepOutput
from tests.adapters.norm_models import ConvNet, images
from tests.models import gap
from tests.tasks.toys import trainer

METHOD = LoRA(r=2, target_modules=["conv", "mid", "out"])


class Seer(AdapterTask):
    def configure_backbone(self):
        torch.manual_seed(0)
        return ConvNet(nn.BatchNorm2d(8))

    def compute_loss(self, batch):
        logits = self.adapted(batch[0])
        return StepOutput(F.cross_entropy(logits, batch[1]), logits, batch[1])


def loader():
    x = torch.cat([images(seed) for seed in range(4)])
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 1).long()), batch_size=6)


def seer(**settings):
    return Seer(method=METHOD, optim=Optim(lr=1e-2, schedule="constant"), **settings)


def fit(task, tmp_path):
    run = trainer(
        max_epochs=2, enable_checkpointing=True, callbacks=[AdapterCheckpoint(dirpath=tmp_path, filename="end")]
    )
    run.fit(task, loader(), loader())
    return run


def statistics(model):
    return {name: one.clone() for name, one in model.state_dict().items() if name.startswith("norm.running")}


@pytest.mark.parametrize("trains", [False, True])
def test_the_base_keeps_its_statistics_through_validations(trains, tmp_path):
    task = seer(train_norm_statistics=trains)
    before = statistics(task.configure_backbone())
    fit(task, tmp_path)
    assert all(torch.equal(one, before[name]) for name, one in statistics(task.adapted).items())
    with disabled(task.adapted):
        assert gap(task.adapted.eval()(images()), task.configure_backbone().eval()(images())) < 1e-6


def test_trained_statistics_travel_in_checkpoint_and_folder(tmp_path):
    task = seer(train_norm_statistics=True)
    fit(task, tmp_path)
    want = task.adapted.eval()(images())
    again = Seer.load_from_checkpoint(tmp_path / "end.ckpt")
    assert again.hparams["train_norm_statistics"] is True
    assert gap(again.adapted.eval()(images()), want) < 1e-6

    model = task.configure_backbone()
    attach(model, METHOD, train_norm_statistics=True)
    load_adapter(model, tmp_path / "end")
    assert gap(model.eval()(images()), want) < 1e-6
    frozen = task.configure_backbone()
    attach(frozen, METHOD)
    with pytest.raises(CheckpointError, match="train_norm_statistics=True"):
        load_adapter(frozen, tmp_path / "end")


def test_a_run_may_start_from_an_adapter_without_statistics(tmp_path):
    first = seer()
    fit(first, tmp_path)
    task = seer(train_norm_statistics=True, adapter=str(tmp_path / "end"))
    task.configure_model()
    assert gap(task.adapted.eval()(images()), first.adapted.eval()(images())) < 1e-6
    task.adapted.train()
    trainer(max_epochs=1).fit(task, loader())
    hidden = torch.ones(1, 8, 2, 2)
    assert gap(task.adapted.eval().norm(hidden), first.adapted.eval().norm(hidden)) > 1e-3
