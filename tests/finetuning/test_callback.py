"""`AdapterFinetuning` itself: where it attaches, what it refuses, and methods that act around steps."""

from __future__ import annotations

from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

from lora_lightning import (
    AdaLoRA,
    AdapterFinetuning,
    DeltaLoRA,
    LoRA,
    Optim,
    attach,
    finetune,
    load_finetuned,
    merge,
    param_groups,
)
from lora_lightning.adapters import attached_methods, is_attached
from lora_lightning.errors import CheckpointError, ConfigError
from lora_lightning.finetuning.checks import frozen_heads
from lora_lightning.finetuning.record import record_of
from tests import models
from tests.callbacks.runs import LIGHTNING_WARNINGS, LineData, LineTask
from tests.finetuning.modules import NUM_BATCHES, Gan, ImageClassifier, SelfSupervised, SentenceClassifier, loader
from tests.finetuning.runs import answers, finetuning, fit, same, saved, trained_state, trainer
from tests.resume.runs import SaveAfter

pytestmark = LIGHTNING_WARNINGS
QUICK = {"max_epochs": 1, "limit_train_batches": 2}


class Late(ImageClassifier):
    """Creates its backbone in `setup`."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [self.backbone]
        del self.backbone

    def setup(self, stage: str) -> None:
        if not hasattr(self, "backbone"):
            self.backbone = self.parts.pop()


class LoadsInSetup(ImageClassifier):
    """Loads the weights of its backbone in `setup`, strictly, into what `__init__` has built."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.backbone.load_state_dict(ImageClassifier(seed=8).backbone.state_dict())


class HeadOnly(ImageClassifier):
    """Gives its optimizer the classifier alone."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.classifier.parameters(), lr=0.1)


class PartOfAdapters(ImageClassifier):
    """Chooses its parameters before a layer is thought of."""

    def configure_optimizers(self):
        return torch.optim.SGD([*self.classifier.parameters(), *self.backbone[1].parameters()], lr=0.1)


class Automatic(SelfSupervised):
    """The same, optimized by Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch):
        return self.loss(batch[0])


class WithLoraPlus(ImageClassifier):
    """Trains with LoRA+."""

    def configure_optimizers(self):
        return torch.optim.AdamW(param_groups(self, Optim(lr=1e-3, lora_plus_ratio=16, head_lr=5e-3)))


def test_a_submodule_that_setup_creates_is_adapted(tmp_path):
    module = Late()
    run = trainer(finetuning(ImageClassifier), SaveAfter(tmp_path, [2]), **QUICK)
    run.fit(module, loader(ImageClassifier))
    assert attached_methods(module.backbone) == finetuning(ImageClassifier).methods
    assert "backbone.1.conv1.lora_A" in torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    with pytest.raises(CheckpointError, match="no submodule 'backbone' after __init__ and configure_model"):
        load_finetuned(Late, tmp_path / "2.ckpt")


def test_adapters_stand_on_the_weights_that_setup_loads():
    module = LoadsInSetup()
    trainer(finetuning(ImageClassifier), **QUICK).fit(module, loader(ImageClassifier))
    other = ImageClassifier(seed=8)
    finetune(other, finetuning(ImageClassifier).methods, "backbone")
    assert record_of(module).parts[0].base_fingerprint == record_of(other).parts[0].base_fingerprint
    fresh = ImageClassifier()
    finetune(fresh, finetuning(ImageClassifier).methods, "backbone")
    assert record_of(module).parts[0].base_fingerprint != record_of(fresh).parts[0].base_fingerprint


@pytest.mark.parametrize(
    ("path", "nearest"),
    [("bakbone", "did you mean 'backbone'"), ("zzz", "its submodules are 'backbone', 'classifier'")],
)
def test_an_unknown_path_is_named_with_the_nearest(path, nearest):
    with pytest.raises(ConfigError, match=nearest):
        fit(ImageClassifier, changes={"module": path}, **QUICK)


def test_an_optimizer_without_adapters_is_refused():
    run = trainer(finetuning(ImageClassifier), **QUICK)
    with pytest.raises(ConfigError, match="hold none of the 8 adapter parameters of 'backbone'"):
        run.fit(HeadOnly(), loader(ImageClassifier))
    run = trainer(finetuning(ImageClassifier), **QUICK)
    with pytest.warns(UserWarning, match=r"hold 4 of the 8 adapter parameters .*'2.conv1.lora_A'"):
        run.fit(PartOfAdapters(), loader(ImageClassifier))


def test_lora_plus_takes_the_rates_of_param_groups():
    module = WithLoraPlus()
    run = trainer(finetuning(ImageClassifier), **QUICK)
    run.fit(module, loader(ImageClassifier))
    rates = {group["name"]: (group["lr"], len(group["params"])) for group in run.optimizers[0].param_groups}
    assert rates == {"A": (1e-3, 4), "B": (16e-3, 4), "head": (5e-3, 2)}


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed", "fsdp2"])
def test_strategies_that_shard_are_referred_to_attach(strategy, monkeypatch):
    from lora_lightning.strategies.facts import StrategyFacts

    facts = StrategyFacts(name=strategy, shards=True)
    monkeypatch.setattr("lora_lightning.finetuning.checks.facts_of", lambda _: facts)
    with pytest.raises(ConfigError, match=r"not with .*Call lora_lightning.attach in the module's own configure_model"):
        fit(ImageClassifier, **QUICK)


@pytest.mark.slow
def test_a_strategy_that_copies_the_module_needs_the_adapters_before(tmp_path):
    settings = {"strategy": "ddp_spawn", "devices": 1, **QUICK}
    with pytest.raises(Exception, match=r"call lora_lightning.finetune\(module, method, submodule\) before"):
        trainer(finetuning(ImageClassifier), **settings).fit(ImageClassifier(), loader(ImageClassifier))
    module, callback = ImageClassifier(), finetuning(ImageClassifier)
    finetune(module, callback.methods, "backbone")
    before = trained_state(module)
    trainer(callback, **settings).fit(module, loader(ImageClassifier))
    assert not same(trained_state(module), before)


def test_a_task_and_other_settings_are_refused():
    with pytest.raises(ConfigError, match="An AdapterTask attaches its own"):
        trainer(AdapterFinetuning(LoRA(r=2), "model"), **QUICK).fit(LineTask(), LineData())
    module = ImageClassifier()
    finetune(module, LoRA(r=2, target_modules=["conv1"]), "backbone")
    with pytest.raises(ConfigError, match="has adapters with other settings already"):
        trainer(finetuning(ImageClassifier), **QUICK).fit(module, loader(ImageClassifier))
    with pytest.raises(ConfigError, match="merge_which must be best or last"):
        finetuning(ImageClassifier, merge_which="first")
    with pytest.raises(ConfigError, match=r"write \['head'\]"):
        finetuning(ImageClassifier, modules_to_save="head")


def test_merged_adapters_are_not_trained_again(tmp_path):
    module, _ = fit(ImageClassifier, **QUICK)
    expected = answers(module)
    merge(module.backbone)
    assert torch.allclose(answers(module), expected, atol=1e-6)
    module.trainer.save_checkpoint(tmp_path / "merged.ckpt")  # a whole one, since no adapter holds the update
    assert torch.equal(answers(ImageClassifier.load_from_checkpoint(tmp_path / "merged.ckpt")), answers(module))
    with pytest.raises(ConfigError, match="were merged or taken off"):
        trainer(finetuning(ImageClassifier), **QUICK).fit(module, loader(ImageClassifier))


def test_two_submodules_take_two_callbacks(tmp_path):
    both = [finetuning(Gan), AdapterFinetuning(LoRA(r=2, target_modules=["0"]), "discriminator")]
    module = Gan()
    run = trainer(*both, SaveAfter(tmp_path, [2]), **QUICK)
    run.fit(module, loader(Gan))
    state = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in state} == {"generator", "discriminator"}
    assert all("lora" in name for name in state)
    loaded = load_finetuned(Gan, tmp_path / "2.ckpt")
    assert same(trained_state(loaded), trained_state(module))
    again = trainer(*[finetuning(Gan), AdapterFinetuning(LoRA(r=2, target_modules=["0"]), "discriminator")], **QUICK)
    again.predict(Gan(), loader(Gan), ckpt_path=tmp_path / "2.ckpt")


def test_a_whole_module_is_adapted(tmp_path):
    changes = {"module": None, "modules_to_save": ["classifier"]}
    module, _ = fit(ImageClassifier, SaveAfter(tmp_path, [2]), changes=changes, **QUICK)
    state = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    assert {"num_seen", "classifier.weight", "backbone.1.conv1.lora_A"} < state.keys()
    assert not any("bn1" in name for name in state)
    loaded = load_finetuned(ImageClassifier, tmp_path / "2.ckpt")
    assert loaded.num_seen == 8
    assert torch.equal(answers(loaded), answers(module))


ADALORA = AdaLoRA(init_r=4, target_r=1, t_init=2, t_final=3, delta_t=1, target_modules=["0", "3"])
DELTA_LORA = DeltaLoRA(r=4, start_step=3, target_modules=["0", "3"])


@pytest.mark.parametrize(
    ("cls", "method", "num_steps"),
    [(Automatic, ADALORA, 2 * NUM_BATCHES), (SelfSupervised, DELTA_LORA, 4)],
    ids=["automatic", "manual"],
)
def test_methods_act_around_the_steps(cls, method, num_steps, tmp_path):
    """Compared with the same run that is stopped: the methods' own counts travel too."""
    changes = {"method": method}
    module, _ = fit(cls, SaveAfter(tmp_path, [5]), changes=changes)
    assert record_of(module).parts[0].num_steps == num_steps
    resumed, _ = fit(cls, seed=99, ckpt_path=tmp_path / "5.ckpt", changes=changes)
    assert same(trained_state(resumed), trained_state(module))
    if cls is Automatic:
        left = [int((triplets != 0).sum()) for name, triplets in trained_state(module).items() if "lora_E" in name]
        assert sum(left) == 2  # of eight, by the schedule
    content = torch.load(tmp_path / "5.ckpt", weights_only=True)
    content["lora_lightning"]["parts"][0]["num_steps"] = 0
    torch.save(content, tmp_path / "forgotten.ckpt")
    other, _ = fit(cls, seed=99, ckpt_path=tmp_path / "forgotten.ckpt", changes=changes)
    assert not same(trained_state(other), trained_state(module))


def test_a_penalty_needs_automatic_optimization():
    with pytest.raises(ConfigError, match="adds a penalty to the loss"):
        fit(SelfSupervised, changes={"method": ADALORA}, **QUICK)
    _, losses = fit(Automatic, changes={"method": ADALORA}, max_epochs=1)
    _, without = fit(Automatic, changes={"method": replace(ADALORA, orthogonality_weight=0.0)}, max_epochs=1)
    assert losses.by_batch[1]["loss"] > without.by_batch[1]["loss"]


def test_a_method_that_looks_at_data_is_refused():
    with pytest.raises(ConfigError, match="looks at training data before the first step"):
        fit(Gan, changes={"method": LoRA(r=2, init="eva")}, **QUICK)


def test_averages_are_saved_small_and_resume(tmp_path):
    average = {"decay": 0.5}
    path = saved(ImageClassifier, tmp_path, 3)
    plain = path.stat().st_size
    run = [SaveAfter(tmp_path, [3])]
    module, _ = fit_averaged(ImageClassifier, *run, **average)
    assert (tmp_path / "3.ckpt").stat().st_size < plain + 40_000
    resumed, _ = fit_averaged(ImageClassifier, ckpt_path=tmp_path / "3.ckpt", **average)
    assert same(trained_state(resumed), trained_state(module))
    with pytest.raises(ConfigError, match="Put AdapterFinetuning before it"):
        trainer(EMAWeightAveraging(), finetuning(ImageClassifier)).fit(ImageClassifier(), loader(ImageClassifier))


def fit_averaged(cls, *callbacks, ckpt_path=None, decay):
    with pytest.warns(UserWarning, match="configure_model"):
        return fit(cls, EMAWeightAveraging(decay=decay), *callbacks, ckpt_path=ckpt_path)


def test_a_base_that_is_set_to_train_is_told():
    class Thaw(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.unfreeze()

    with pytest.warns(UserWarning, match="16 frozen weights of 'backbone' were set to train"):
        fit(ImageClassifier, Thaw(), **QUICK)


def test_stochastic_averages_are_saved_small(tmp_path):
    plain = saved(ImageClassifier, tmp_path, 6, max_epochs=2, limit_train_batches=4).stat().st_size
    average = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    module, _ = fit(ImageClassifier, average, SaveAfter(tmp_path, [6]), max_epochs=2, limit_train_batches=4)
    content = torch.load(tmp_path / "6.ckpt", weights_only=True)
    held = content["callbacks"]["StochasticWeightAveraging"]["average_model_state"]
    assert held.keys() == content["state_dict"].keys() == trained_state(module).keys()
    assert (tmp_path / "6.ckpt").stat().st_size < plain + 40_000


@pytest.mark.parametrize(("saving", "heads"), [([], ["classifier"]), (["classifier"], [])], ids=["frozen", "trained"])
def test_a_head_that_stays_frozen_is_named(saving, heads, capfd):
    module, _ = fit(SentenceClassifier, changes={"modules_to_save": saving}, **QUICK)
    assert frozen_heads(module.bert) == heads
    assert ("Its head 'classifier' is frozen" in capfd.readouterr().err) is bool(heads)


def test_the_output_layer_of_a_language_model_is_no_new_head():
    model = models.build("gpt2")
    attach(model, LoRA(r=2))
    assert frozen_heads(model) == []


def test_the_module_keeps_its_class_and_its_own_hooks():
    module, _ = fit(ImageClassifier, **QUICK)
    assert type(module).__qualname__ == "ImageClassifier"
    assert isinstance(module, ImageClassifier)
    assert is_attached(module.backbone)
    assert not is_attached(nn.Sequential(module.classifier))
    assert isinstance(module, L.LightningModule)
