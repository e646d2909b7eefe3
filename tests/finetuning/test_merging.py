"""Merged checkpoints of modules that exist: their own class loads them, and they answer as the adapted module does."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_lightning import (
    AdapterFinetuning,
    LoRA,
    MergeAtEnd,
    PrefixTuning,
    load_finetuned,
    merge_checkpoint,
    merge_finetuned,
)
from lora_lightning.errors import CheckpointError, ConfigError
from tests.callbacks.runs import LIGHTNING_WARNINGS
from tests.finetuning.modules import ImageClassifier, SelfSupervised, SentenceClassifier, loader
from tests.finetuning.runs import MODULES, answers, finetuning, fit, same, saved, trained_state, trainer
from tests.resume.runs import SaveAfter

pytestmark = LIGHTNING_WARNINGS


def part_of(cls):
    """Return what the names of a module's adapted weights begin with."""
    return "bert.bert." if cls is SentenceClassifier else f"{finetuning(cls).module}."


def distance(module, expected):
    return float((answers(module) - expected).abs().max())


@pytest.mark.parametrize("cls", MODULES)
def test_a_checkpoint_is_merged(cls, tmp_path):
    path = saved(cls, tmp_path, 7)
    expected = answers(load_finetuned(cls, path))
    merged = cls.load_from_checkpoint(merge_finetuned(cls, path, tmp_path / "merged.ckpt"))
    assert type(merged) is cls
    assert not any("lora" in name for name in merged.state_dict())
    assert torch.allclose(answers(merged), expected, atol=1e-5)
    base = cls()
    base.configure_model()
    trained = {name: value for name, value in merged.state_dict().items() if not name.startswith(part_of(cls))}
    base.load_state_dict({**base.state_dict(), **trained})
    assert distance(base, expected) > 20 * distance(merged, expected)
    with pytest.raises(CheckpointError, match="exists already"):
        merge_finetuned(cls, path, tmp_path / "merged.ckpt")


@pytest.mark.parametrize("cls", MODULES)
def test_the_callback_merges_the_weights_at_the_end(cls, tmp_path):
    module, _ = fit(cls, changes={"merge_to": tmp_path / "new" / "merged.ckpt", "merge_which": "last"}, max_epochs=1)
    merged = cls.load_from_checkpoint(tmp_path / "new" / "merged.ckpt")
    assert torch.allclose(answers(merged), answers(module), atol=1e-5)
    with pytest.raises(CheckpointError, match="exists already"):
        fit(cls, changes={"merge_to": tmp_path / "new" / "merged.ckpt"}, max_epochs=1)


def test_the_callback_merges_the_best_checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")  # the worst, which comes before the end
    run = trainer(finetuning(ImageClassifier, merge_to=tmp_path / "merged.ckpt"), saver, max_epochs=3)
    data = loader(ImageClassifier)
    module = ImageClassifier(lr=0.03)
    run.fit(module, data, data)
    assert not saver.best_model_path.endswith("step=21.ckpt")
    best = answers(load_finetuned(ImageClassifier, saver.best_model_path))
    merged = answers(ImageClassifier.load_from_checkpoint(tmp_path / "merged.ckpt"))
    assert torch.allclose(merged, best, atol=1e-5)
    assert not torch.allclose(merged, answers(module), atol=1e-3)


class Given(L.LightningModule):
    """Is given its backbone, as many are, and leaves it out of its hyperparameters."""

    def __init__(self, backbone: nn.Module, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.backbone, self.head = backbone, nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def test_a_module_that_is_given_its_backbone(tmp_path):
    method = finetuning(ImageClassifier).methods[0]
    backbone = ImageClassifier().backbone
    module = Given(backbone)
    run = trainer(AdapterFinetuning(method, "backbone"), SaveAfter(tmp_path, [3]), limit_train_batches=3, max_epochs=1)
    run.fit(module, loader(ImageClassifier))
    path = tmp_path / "3.ckpt"
    loaded = load_finetuned(Given, path, backbone=ImageClassifier().backbone)
    assert same(trained_state(loaded), trained_state(module))
    again = load_finetuned(Given, path, backbone=backbone)  # which has adapters already
    assert same(trained_state(again), trained_state(module))
    with pytest.raises(CheckpointError, match="another base model"):
        load_finetuned(Given, path, backbone=ImageClassifier(seed=6).backbone)

    merged = merge_finetuned(Given, path, tmp_path / "merged.ckpt", backbone=ImageClassifier().backbone)
    assert torch.load(merged, weights_only=True)["hyper_parameters"] == {"lr": 1e-2}
    plain = Given.load_from_checkpoint(merged, backbone=ImageClassifier(seed=6).backbone).eval()
    x = loader(ImageClassifier).dataset.tensors[0]
    assert torch.allclose(plain.backbone(x), module.eval().backbone(x), atol=1e-5)
    assert not torch.allclose(plain.backbone(x), ImageClassifier().eval().backbone(x), atol=1e-3)


def test_a_merged_checkpoint_needs_no_callback(tmp_path):
    path = saved(ImageClassifier, tmp_path, 7)
    merge_finetuned(ImageClassifier, path, tmp_path / "merged.ckpt")
    data = loader(ImageClassifier, shuffle=False)
    plain = trainer().test(ImageClassifier(), data, ckpt_path=tmp_path / "merged.ckpt")
    adapted = trainer(finetuning(ImageClassifier)).test(ImageClassifier(), data, ckpt_path=path)
    assert plain[0]["test_loss"] == pytest.approx(adapted[0]["test_loss"], rel=1e-5)
    assert plain[0]["test_loss"] != pytest.approx(trainer().test(ImageClassifier(), data)[0]["test_loss"], rel=1e-3)


def test_what_cannot_be_merged_is_refused_before_training(tmp_path):
    changes = {"method": PrefixTuning(num_virtual_tokens=2), "merge_to": tmp_path / "merged.ckpt"}
    with pytest.raises(ConfigError, match="cannot be merged; leave merge_to out"):
        fit(SentenceClassifier, changes=changes, max_epochs=1)


def test_what_is_made_for_tasks_refers_to_this(tmp_path):
    with pytest.raises(ConfigError, match=r"Use AdapterFinetuning\(merge_to="):
        fit(ImageClassifier, MergeAtEnd(tmp_path / "out"), max_epochs=1)
    path = saved(ImageClassifier, tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"merge it with lora_lightning.merge_finetuned"):
        merge_checkpoint(path, tmp_path / "out", ImageClassifier)


def test_norm_statistics_and_teachers_are_merged(tmp_path):
    changes = {"method": LoRA(r=2, target_modules=["0"]), "train_norm_statistics": True}
    module, _ = fit(SelfSupervised, SaveAfter(tmp_path, [6]), changes=changes, max_epochs=1)
    merged = SelfSupervised.load_from_checkpoint(
        merge_finetuned(SelfSupervised, tmp_path / "6.ckpt", tmp_path / "m.ckpt")
    )
    state = torch.load(tmp_path / "6.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(merged.encoder[1].running_mean, state["encoder.1.running_mean"])
    assert not torch.equal(merged.encoder[1].running_mean, torch.zeros(32))
    assert torch.equal(merged.teacher.weight, state["teacher.weight"])
    assert not torch.equal(merged.teacher.weight, SelfSupervised().teacher.weight)
    del module


class Normed(ImageClassifier):
    """Has a weight norm of the old kind: a weight that trains keeps the history of the last step."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.backbone.append(nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 16))))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_module_is_merged_right_after_its_last_step(tmp_path):
    changes = {"modules_to_save": ["4"], "merge_to": tmp_path / "merged.ckpt", "merge_which": "last"}
    run, module = trainer(finetuning(Normed, **changes), max_epochs=1), Normed()
    run.fit(module, loader(ImageClassifier))
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(module.backbone)
    merged = Normed.load_from_checkpoint(tmp_path / "merged.ckpt")
    assert torch.allclose(answers(merged), answers(module), atol=1e-5)
    assert not torch.allclose(answers(Normed()), answers(module), atol=1e-3)


@pytest.mark.parametrize("wrong", [ImageClassifier(), nn.Linear, "ImageClassifier"])
def test_what_is_not_the_class_is_refused(wrong, tmp_path):
    path = saved(ImageClassifier, tmp_path, 7)
    got = "Linear" if wrong is nn.Linear else f"a {type(wrong).__name__}"
    for use in (load_finetuned, lambda cls, path: merge_finetuned(cls, path, tmp_path / "merged.ckpt")):
        with pytest.raises(ConfigError, match=rf"^Give the class of the LightningModule, .*; got {got}\.$"):
            use(wrong, path)
    assert not (tmp_path / "merged.ckpt").exists()
    assert isinstance(load_finetuned(ImageClassifier, path), ImageClassifier)
