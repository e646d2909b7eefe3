"""What checkpoints of modules that exist hold, how large they are, and that they load strictly."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

from lora_lightning import LoRA, adapter_state_dict, finetune, load_finetuned
from lora_lightning.errors import CheckpointError
from lora_lightning.finetuning.record import attached_parts
from tests.callbacks.runs import LIGHTNING_WARNINGS
from tests.finetuning.modules import (
    NUM_BATCHES,
    Gan,
    ImageClassifier,
    SelfSupervised,
    SentenceClassifier,
    loader,
    seeded,
)
from tests.finetuning.runs import MODULES, SETTINGS, answers, finetuning, fit, same, saved, trained_state, trainer
from tests.resume.runs import SaveAfter

pytestmark = LIGHTNING_WARNINGS
WIDE: dict[type[L.LightningModule], dict[str, Any]] = {
    ImageClassifier: {"width": 256},
    SentenceClassifier: {"hidden_size": 512},
    SelfSupervised: {"width": 2048},
    Gan: {"width": 4096},
}
"""Sizes at which weights, not the fixed parts of a file, decide."""


def num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(module: L.LightningModule) -> int:
    states = [state for optimizer in module.trainer.optimizers for state in optimizer.state.values()]
    return num_bytes(value for state in states for value in state.values() if isinstance(value, Tensor))


@pytest.mark.parametrize("cls", MODULES)
def test_a_checkpoint_is_as_large_as_what_trains(cls, tmp_path):
    targets = {SelfSupervised: ["3"], Gan: ["2"]}.get(cls, SETTINGS[cls]["method"].target_modules)
    changes = {"method": replace(SETTINGS[cls]["method"], r=32, target_modules=targets)}
    settings = {"limit_train_batches": 6, "max_epochs": 1}
    module, _ = fit(cls, SaveAfter(tmp_path, [6]), arguments=WIDE[cls], changes=changes, **settings)
    adapters = [tensor for _, part in attached_parts(module) for tensor in adapter_state_dict(part).values()]
    inside = {id(one) for _, part in attached_parts(module) for one in part.parameters()}
    trained = [one for one in module.parameters() if one.requires_grad and id(one) not in inside]
    followers = module.teacher.parameters() if cls is SelfSupervised else ()
    expected = num_bytes([*adapters, *trained, *module._buffers.values(), *followers]) + optimizer_bytes(module)
    size = (tmp_path / "6.ckpt").stat().st_size
    assert expected <= size < 1.05 * expected
    assert num_bytes(module.parameters()) + optimizer_bytes(module) > 1.2 * expected  # what it would be otherwise


@pytest.mark.parametrize("cls", MODULES)
def test_a_weights_only_checkpoint_is_as_small(cls, tmp_path):
    module, _ = fit(cls, limit_train_batches=2, max_epochs=1)
    module.trainer.save_checkpoint(tmp_path / "small.ckpt", weights_only=True)
    content = torch.load(tmp_path / "small.ckpt", weights_only=True)
    assert same(content["state_dict"], trained_state(module))
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert frozen
    kept = frozen & content["state_dict"].keys()
    assert kept == ({"bert.classifier.weight", "bert.classifier.bias"} if cls is SentenceClassifier else set())


@pytest.mark.parametrize("cls", MODULES)
def test_what_was_saved_is_loaded_without_a_trainer(cls, tmp_path):
    module, _ = fit(cls, SaveAfter(tmp_path, [7]))
    path = tmp_path / "7.ckpt"
    loaded = load_finetuned(cls, path)
    assert isinstance(loaded, cls)
    assert same(torch.load(path, weights_only=True)["state_dict"], trained_state(loaded))
    assert not same(trained_state(load_finetuned(cls, path)), trained_state(module))  # which has trained on
    assert torch.equal(answers(loaded), answers(load_finetuned(cls, path)))
    assert not torch.equal(answers(loaded), answers(module))
    with pytest.raises(RuntimeError, match="Missing key"):
        cls.load_from_checkpoint(path)


@pytest.mark.parametrize("cls", MODULES)
def test_modules_copy_and_pickle(cls):
    module, _ = fit(cls, limit_train_batches=3, max_epochs=1)
    expected = answers(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert same(trained_state(twin), trained_state(module))
        assert torch.equal(answers(twin), expected)
        for parameter in twin.parameters():
            parameter.data += 1
        assert not torch.equal(answers(twin), expected)
    assert torch.equal(answers(module), expected)


def test_what_a_module_changes_itself_is_kept(tmp_path):
    """A teacher that follows its student has no gradient, and is nothing that could be filled in."""
    path = saved(SelfSupervised, tmp_path, 6)
    state = torch.load(path, weights_only=True)["state_dict"]
    fresh = SelfSupervised()
    assert not torch.equal(state["teacher.weight"], fresh.teacher.weight)
    assert "frozen_features.weight" not in state
    early = torch.load(saved(SelfSupervised, tmp_path, 1), weights_only=True)["state_dict"]
    assert "teacher.weight" not in early  # before its first update it is what the module builds
    loaded = load_finetuned(SelfSupervised, path)
    assert torch.equal(loaded.teacher.weight, state["teacher.weight"])


def test_frozen_norms_keep_their_statistics_unless_they_train(tmp_path):
    still = saved(ImageClassifier, tmp_path, 3)
    assert not any("running" in name for name in torch.load(still, weights_only=True)["state_dict"])
    fit(ImageClassifier, SaveAfter(tmp_path, [4]), changes={"train_norm_statistics": True})
    state = torch.load(tmp_path / "4.ckpt", weights_only=True)["state_dict"]
    fresh = ImageClassifier().backbone[1].bn1.running_mean
    assert not torch.equal(state["backbone.1.bn1.running_mean"], fresh)
    loaded = load_finetuned(ImageClassifier, tmp_path / "4.ckpt")
    assert torch.equal(trained_state(loaded)["backbone.1.bn1.running_mean"], state["backbone.1.bn1.running_mean"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("backbone.1.conv1.lora_A"), r"1 tensors are missing \(backbone.1.conv1.lora_A\)"),
        (lambda state: state.pop("classifier.bias"), r"1 tensors are missing \(classifier.bias\)"),
        (lambda state: state.update(other=torch.ones(1)), r"1 are unknown \(other\)"),
        (lambda state: state.update({"backbone.1.conv1.lora_A": torch.ones(9, 1)}), "have another shape"),
        (lambda state: state["backbone.1.conv1.lora_A"].fill_(torch.nan), "NaN"),
    ],
)
def test_loading_is_strict(change, message, tmp_path):
    path = saved(ImageClassifier, tmp_path, 2)
    content = torch.load(path, weights_only=True)
    load_finetuned(ImageClassifier, path)
    change(content["state_dict"])
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_finetuned(ImageClassifier, path)


def test_another_base_is_refused(tmp_path):
    path = saved(ImageClassifier, tmp_path, 2)
    with pytest.raises(CheckpointError, match="trained on another base model"):
        load_finetuned(ImageClassifier, path, seed=6)
    path = saved(SelfSupervised, tmp_path, 2)
    content = torch.load(path, weights_only=True)
    content["lora_lightning"]["frozen"]["frozen_features.weight"] = "0" * 16
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"other frozen weights outside .* 'frozen_features.weight'"):
        load_finetuned(SelfSupervised, path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    plain = trainer(max_epochs=1, limit_train_batches=2)
    plain.fit(ImageClassifier(), loader(ImageClassifier))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="was not saved with AdapterFinetuning"):
        load_finetuned(ImageClassifier, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="holds no adapters"):
        fit(ImageClassifier, ckpt_path=tmp_path / "plain.ckpt")
    path = saved(ImageClassifier, tmp_path, 2)
    with pytest.raises(CheckpointError, match="trained with alpha=16"):
        fit(ImageClassifier, ckpt_path=path, changes={"method": LoRA(r=4, alpha=8, target_modules=["conv1", "conv2"])})


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("cls", [ImageClassifier, SentenceClassifier])
def test_evaluation_loads_a_checkpoint(cls, stage, tmp_path):
    path = saved(cls, tmp_path, NUM_BATCHES)
    data = loader(cls, shuffle=False)
    evaluated = getattr(trainer(finetuning(cls)), stage)(cls(), data, ckpt_path=path)
    expected = getattr(trainer(), stage)(load_finetuned(cls, path), data)
    other = getattr(trainer(finetuning(cls)), stage)(cls(), data)
    if stage == "predict":
        evaluated, expected, other = (torch.cat(found) for found in (evaluated, expected, other))
        assert torch.equal(evaluated, expected)
        assert not torch.equal(evaluated, other)
    else:
        assert evaluated == expected != other


class Aliased(ImageClassifier):
    """Reaches its backbone by a second attribute, and ties its classifier to a layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self.backbone[0]
        self.blocks = nn.ModuleList(self.backbone[1:3])
        with seeded(1):
            self.backbone.append(nn.Linear(16, 3))
        self.classifier.weight = self.backbone[4].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.backbone[:4](x)) + self.backbone[4].bias


def test_second_names_of_a_tensor_are_no_second_copy(tmp_path):
    method = LoRA(r=4, target_modules=["conv1", "conv2"])
    run = trainer(finetuning(Aliased, method=method), SaveAfter(tmp_path, [3]), max_epochs=1, limit_train_batches=3)
    module = Aliased()
    run.fit(module, loader(ImageClassifier))
    state = torch.load(tmp_path / "3.ckpt", weights_only=True)["state_dict"]
    lora = {
        f"backbone.{block}.{conv}.lora_{factor}" for block in (1, 2) for conv in ("conv1", "conv2") for factor in "AB"
    }
    assert state.keys() == {*lora, "classifier.bias", "num_seen"}
    loaded = load_finetuned(Aliased, tmp_path / "3.ckpt")
    assert same(trained_state(loaded), trained_state(module))
    batch = loader(ImageClassifier).dataset.tensors[0]
    assert torch.equal(loaded.eval()(batch), module.eval()(batch))
    assert not torch.equal(Aliased().eval()(batch), module(batch))


class Thawed(L.Callback):
    """Lets a frozen layer of the base train from the second epoch on."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone[0][0].requires_grad_()


def test_base_weights_that_come_to_train_are_kept(tmp_path):
    stops = (3, NUM_BATCHES + 3)
    module, _ = fit(ImageClassifier, Thawed(), SaveAfter(tmp_path, stops))
    early, late = (torch.load(tmp_path / f"{stop}.ckpt", weights_only=True)["state_dict"] for stop in stops)
    assert late.keys() - early.keys() == {"backbone.0.0.weight", "backbone.0.0.bias"}
    assert not torch.equal(late["backbone.0.0.weight"], ImageClassifier().backbone[0][0].weight)
    for stop in stops:
        resumed, _ = fit(ImageClassifier, Thawed(), seed=99, ckpt_path=tmp_path / f"{stop}.ckpt")
        assert same(trained_state(resumed), trained_state(module))


class Compiled(ImageClassifier):
    """Compiles its backbone when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.compile(self.backbone, backend="eager")


def test_a_compiled_submodule_has_the_names_of_a_plain_one(tmp_path):
    run = trainer(finetuning(ImageClassifier), SaveAfter(tmp_path, [3]), max_epochs=1, limit_train_batches=3)
    module = Compiled()
    run.fit(module, loader(ImageClassifier))
    assert "backbone.1.conv1.lora_A" in torch.load(tmp_path / "3.ckpt", weights_only=True)["state_dict"]
    plain = load_finetuned(ImageClassifier, tmp_path / "3.ckpt")
    batch = loader(ImageClassifier).dataset.tensors[0]
    assert torch.allclose(plain.eval()(batch), module.eval()(batch), atol=1e-5)
    assert not torch.allclose(ImageClassifier().eval()(batch), module(batch), atol=1e-3)


def test_a_learning_rate_finder_restores_what_it_saved(tmp_path):
    torch.manual_seed(3)
    module = ImageClassifier()
    finetune(module, finetuning(ImageClassifier).methods, "backbone")
    before = trained_state(module)
    run = trainer(finetuning(ImageClassifier), default_root_dir=tmp_path, max_epochs=1)
    found = Tuner(run).lr_find(module, loader(ImageClassifier), num_training=5, update_attr=False)
    assert found.results["loss"]
    assert same(trained_state(module), before)


def test_double_precision_is_resumed_exactly(tmp_path):
    module, _ = fit(ImageClassifier, SaveAfter(tmp_path, [4]), precision="64-true", max_epochs=1)
    assert torch.load(tmp_path / "4.ckpt", weights_only=True)["state_dict"]["classifier.weight"].dtype is torch.float64
    resumed, _ = fit(ImageClassifier, seed=99, ckpt_path=tmp_path / "4.ckpt", precision="64-true", max_epochs=1)
    assert same(trained_state(resumed), trained_state(module))
