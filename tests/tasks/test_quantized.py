import logging
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from lora_lightning import AdapterCheckpoint, AdapterTask, LoRA, Optim, SequenceClassification
from lora_lightning.backbones.quantization import Quantization
from lora_lightning.backbones.storage.quantized import is_quantized, quantized_modules
from lora_lightning.checkpoint import load_adapter
from lora_lightning.errors import BackboneError, ConfigError
from tests import models, quantizable
from tests.checkpoint.runs import rebuild_task
from tests.tasks.quantized_runs import EXACT, LABELS, METHODS, loader, task, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


@pytest.fixture
def backbone(tmp_path):
    quantizable.build("bert").bert.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def fitted(module, **settings):
    L.seed_everything(1, verbose=False)
    run = trainer(**settings)
    run.fit(module, loader(), loader())
    return run


def largest_gap(one, other):
    assert one.keys() == other.keys()
    return max(models.gap(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_run_learns_saves_resumes_and_is_tested(backbone, tmp_path, method):
    straight = task(backbone, method)
    callback = AdapterCheckpoint(dirpath=tmp_path / "checkpoints", filename="{epoch}", save_top_k=-1)
    run = fitted(straight, max_epochs=4, callbacks=[callback], enable_checkpointing=True)
    first = torch.load(tmp_path / "checkpoints" / "epoch=0.ckpt", weights_only=True)
    assert first["hyper_parameters"]["quantization"]["quant_type"] == "nf4"
    assert not any("absmax" in name for name in first["state_dict"])
    assert largest_gap(first["state_dict"], straight.adapter_state()) > 1e-3

    resumed = task(backbone, method)
    L.seed_everything(2, verbose=False)
    trainer(max_epochs=4).fit(
        resumed, loader(), loader(), ckpt_path=tmp_path / "checkpoints" / "epoch=1.ckpt", weights_only=True
    )
    assert largest_gap(resumed.adapter_state(), straight.adapter_state()) <= 1e-6

    (expected,) = run.test(straight, loader(), verbose=False)
    last = str(tmp_path / "checkpoints" / "epoch=3.ckpt")
    (found,) = trainer().test(task(backbone, method), loader(), ckpt_path=last, weights_only=True, verbose=False)
    assert found == pytest.approx(expected, rel=1e-6)

    rebuilt = rebuild_task(Path(last))
    assert isinstance(rebuilt, SequenceClassification)
    assert rebuilt.quantization == EXACT
    assert is_quantized(rebuilt.adapted)
    batch = {name: value for name, value in next(iter(loader())).items() if name != "labels"}
    logits = straight.eval()(batch).logits
    assert models.gap(rebuilt.eval()(batch).logits, logits) <= 1e-6

    fresh = task(backbone, method)
    fresh.configure_model()
    load_adapter(fresh.adapted, tmp_path / "checkpoints" / "epoch=3")
    assert models.gap(fresh.eval()(batch).logits, logits) <= 1e-6


def test_a_checkpoint_of_a_4_bit_run_fits_the_dense_base(backbone, tmp_path):
    module = task(backbone)
    run = fitted(module)
    run.save_checkpoint(tmp_path / "a.ckpt")
    dense = SequenceClassification.load_from_checkpoint(tmp_path / "a.ckpt", quantization=None, weights_only=True)
    assert not is_quantized(dense.adapted)
    assert dense.base_fingerprint == module.base_fingerprint
    assert largest_gap(dense.adapter_state(), module.adapter_state()) == 0


@pytest.mark.parametrize(
    ("quantization", "settings", "precision"),
    [
        (Quantization(), {"gradient_checkpointing": True}, "32-true"),
        (Quantization(compute_dtype="bfloat16"), {}, "bf16-mixed"),
        (Quantization(compute_dtype="bfloat16"), {"dtype": "bfloat16"}, "32-true"),
        (Quantization(bits=8), {}, "32-true"),
        (Quantization(bits=8), {}, "bf16-mixed"),
        (Quantization(quant_type="fp4", storage_dtype="float32"), {"gradient_checkpointing": True}, "bf16-mixed"),
    ],
)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")  # bitsandbytes, in evaluation
def test_every_format_trains_and_evaluates_in_turn(backbone, method, quantization, settings, precision):
    module = task(backbone, method, quantization=quantization, **settings)
    run = fitted(module, precision=precision)  # with Lightning's sanity check, in inference mode, before the first step
    assert run.global_step == 3
    losses = [float(run.callback_metrics[f"{stage}/loss"]) for stage in ("train", "val")]
    assert all(0 < loss < 2 for loss in losses)
    assert all(tensor.any() for name, tensor in module.adapter_state().items() if name.endswith("lora_B"))


def test_a_task_says_how_the_base_is_stored(backbone, caplog):
    with caplog.at_level(logging.INFO):
        task(backbone).configure_model()
    assert "12 linear layers are stored in nf4 on cpu and compute in float32." in caplog.text
    assert "bert.pooler" in caplog.text


def test_what_a_method_saves_stays_dense_and_trains(backbone):
    module = task(backbone, LoRA(r=4, target_modules=["query"], modules_to_save=["layer.1.output.dense"]))
    fitted(module)
    packed = [path for path, _ in quantized_modules(module.adapted)]
    assert not any("layer.1.output.dense" in path for path in packed)
    assert "bert.encoder.layer.0.output.dense" in packed


@pytest.mark.slow
def test_two_processes_equal_one_with_all_rows(backbone, tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("quantized_runs.py")), backbone, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for method in METHODS:
        ranks = [torch.load(tmp_path / f"{method.name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        whole, other = task(backbone, method), task(backbone, method)
        fitted(whole)
        fitted(other, max_epochs=2)
        assert largest_gap(ranks[0], ranks[1]) == 0
        assert largest_gap(ranks[0], whole.adapter_state()) <= 1e-5
        assert largest_gap(ranks[0], other.adapter_state()) > 1e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision": "bf16-true"}, ["bf16-true", "must not be cast", "bf16-mixed"]),
        ({"precision": "16-true"}, ["16-true", "must not be cast"]),
        ({"precision": "64-true"}, ["64-true", "must not be cast"]),
    ],
)
def test_precisions_that_cast_the_base_are_refused_before_it_is_loaded(settings, words):
    with pytest.raises(ConfigError) as caught:
        trainer(**settings).fit(task("/no/such/folder"), loader())
    assert all(word in str(caught.value) for word in words), str(caught.value)
    with pytest.raises(BackboneError, match="does not exist"):
        trainer().fit(task("/no/such/folder"), loader())


def test_lightnings_own_quantization_beside_ours_is_refused():
    class BitsandbytesPrecision(L.pytorch.plugins.Precision):
        pass

    run = trainer(plugins=[BitsandbytesPrecision()])
    with pytest.raises(ConfigError, match="quantizes the model itself"):
        run.fit(task("/no/such/folder"), loader())


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_sharding_a_quantized_base_is_refused_with_the_reason(strategy, monkeypatch):
    module, run = task("/no/such/folder"), trainer()
    module._trainer = run
    monkeypatch.setattr(type(run), "strategy", strategy())
    with pytest.raises(ConfigError, match=r"cannot be sharded by .*constants.*strategy=ddp"):
        module.configure_model()


def test_other_strategies_are_refused(monkeypatch):
    class Foreign:
        pass

    module, run = task("/no/such/folder"), trainer()
    module._trainer = run
    monkeypatch.setattr(type(run), "strategy", Foreign())
    with pytest.raises(ConfigError, match=r"Foreign moves weights.*leave quantization out"):
        module.configure_model()


class Custom(AdapterTask):
    def configure_backbone(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8))


def test_a_setting_that_a_custom_backbone_ignores_is_refused():
    module = Custom(method=LoRA(r=2, target_modules=["0"]), quantization=Quantization())
    with pytest.raises(ConfigError, match="without quantized layers"):
        module.configure_model()
    Custom(method=LoRA(r=2, target_modules=["0"])).configure_model()


def test_a_base_that_comes_quantized_is_checked_too(backbone):
    module = task(backbone)
    module.configure_model()
    packed = module.configure_backbone()

    class Ready(SequenceClassification):
        def configure_backbone(self) -> nn.Module:
            return packed

    with pytest.raises(ConfigError, match="must not be cast"):
        trainer(precision="bf16-true").fit(Ready(backbone, METHODS[0], label_names=LABELS), loader())


def test_settings_are_plain_and_read_back(backbone):
    module = SequenceClassification(backbone, quantization={"bits": 8}, optim=Optim(), label_names=LABELS)
    assert module.quantization == Quantization(bits=8)
    assert module.hparams["quantization"]["bits"] == 8
    assert SequenceClassification(backbone, label_names=LABELS).hparams["quantization"] is None
