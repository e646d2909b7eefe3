"""A run starts from an existing adapter, ours or PEFT's, and its checkpoints do not need that folder again."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from lora_lightning.adapters import adapter_state_dict, attached_methods
from lora_lightning.checkpoint import export_peft
from lora_lightning.checkpoint.base_sample import BASE_SAMPLE_NAME
from lora_lightning.checkpoint.folder import OWN_WEIGHTS_NAME
from lora_lightning.checkpoint.manifest import MANIFEST_NAME
from lora_lightning.checkpoint.starting import read_starting_adapter
from lora_lightning.errors import CheckpointError, ConfigError, UserError
from lora_lightning.methods import BitFit, DoRA, LoRA
from lora_lightning.tasks import AdapterTask, SequenceClassification
from tests.checkpoint.runs import PlainTask, read_content, rebuild_task, save_backbone, save_checkpoint
from tests.models import build, inputs, logits, perturb

LABELS = ["bad", "neutral", "good"]
OURS = LoRA(r=3, alpha=5, target_modules=["query", "value"], rank_pattern={"value": 2})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_backbone(tmp_path / "base")


def classifier(base: Path, **settings: Any) -> SequenceClassification:
    return SequenceClassification(backbone=str(base), **{"label_names": LABELS, **settings})


@pytest.fixture
def trained(base: Path) -> SequenceClassification:
    task = classifier(base, method=OURS)
    task.configure_model()
    perturb(task.adapted)
    return task


@pytest.fixture
def ours(tmp_path: Path, trained: SequenceClassification) -> Path:
    from lora_lightning.checkpoint import RunFacts

    export_peft(trained.adapted, tmp_path / "ours", RunFacts(base=trained.backbone, label_names=LABELS))
    return tmp_path / "ours"


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Return a folder of PEFT for the body of the tiny backbone, head included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query"], use_dora=True, task_type="SEQ_CLS")
        model = peft.get_peft_model(build("bert"), config).eval()
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(tmp_path / "theirs")
        torch.save(model(**inputs(model)).logits.detach(), tmp_path / "logits.pt")
    return tmp_path / "theirs"


def answers(task: AdapterTask) -> Tensor:
    with torch.no_grad():
        return logits(task.adapted.eval())


def test_from_ours(base: Path, ours: Path, trained: SequenceClassification) -> None:
    task = classifier(base, adapter=str(ours))
    assert task.hparams["method"] is None
    task.configure_model()
    assert attached_methods(task.adapted) == task.methods == (OURS,)
    torch.testing.assert_close(answers(task), answers(trained), atol=0, rtol=0)
    fresh = classifier(base, method=OURS)
    fresh.configure_model()
    assert (answers(fresh) - answers(trained)).abs().max() > 1e-2  # negative control


def test_from_pefts(base: Path, theirs: Path) -> None:
    task = classifier(base, adapter=str(theirs))
    task.configure_model()
    assert isinstance(task.methods[0], DoRA)
    assert (task.methods[0].r, task.methods[0].alpha) == (3, 5)
    expected = torch.load(theirs.parent / "logits.pt")
    torch.testing.assert_close(answers(task), expected, atol=1e-5, rtol=0)


def test_starts_a_head_that_the_adapter_lacks(tmp_path: Path, base: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build("bert"), peft.LoraConfig(r=3, target_modules=["query"]))
        model.save_pretrained(tmp_path / "theirs")
    task = classifier(base, adapter=str(tmp_path / "theirs"))
    task.configure_model()
    heads = [name for name in adapter_state_dict(task.adapted) if "lora" not in name]
    assert heads == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("gone", [False, True])
def test_checkpoint_needs_the_folder_no_more(tmp_path: Path, base: Path, theirs: Path, gone: bool) -> None:
    task = classifier(base, adapter=str(theirs))
    ckpt = save_checkpoint(task, tmp_path / "x.ckpt")  # moves the adapter on
    stored = read_content(ckpt)["hyper_parameters"]
    assert stored["adapter"] == str(theirs)
    assert stored["method"]["class_path"] == "lora_lightning.methods.dora.DoRA"
    if gone:
        shutil.rmtree(theirs)
    torch.testing.assert_close(answers(rebuild_task(ckpt)), answers(task), atol=0, rtol=0)


def test_plain_settings_expect_a_checkpoint(base: Path, ours: Path, trained: SequenceClassification) -> None:
    """Weights that are due and never come are noticed, instead of a fresh adapter being used."""
    task = classifier(base, adapter=str(ours), method=trained.hparams["method"])
    task.configure_model()
    batch = {**inputs(task.adapted), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(CheckpointError, match="was not loaded"):
        task.training_step(batch, 0)
    task.load_state_dict(trained.adapter_state())
    assert task._checked("train", task.compute_loss, batch).loss > 0


def test_trains_on_from_it_and_resumes(tmp_path: Path, base: Path, theirs: Path) -> None:
    import lightning as L
    from torch.utils.data import DataLoader

    rows = [
        {"input_ids": torch.tensor([5 + i, 7, 9]), "attention_mask": torch.ones(3, dtype=torch.long), "labels": i % 3}
        for i in range(8)
    ]

    def trainer(steps: int) -> L.Trainer:
        return L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )

    task = classifier(base, adapter=str(theirs))
    first = trainer(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first.fit(task, DataLoader(rows, batch_size=4))
        first.save_checkpoint(tmp_path / "x.ckpt")
        again = classifier(base, adapter=str(theirs))
        trainer(2).fit(again, DataLoader(rows, batch_size=4), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    expected = torch.load(theirs.parent / "logits.pt")
    assert (answers(task) - expected).abs().max() > 1e-4
    torch.testing.assert_close(answers(again), answers(task), atol=0, rtol=0)


def test_the_same_method_may_be_given(base: Path, ours: Path, trained: SequenceClassification) -> None:
    same = LoRA(r=3, alpha=5, dropout=0.2, target_modules=r".*\.(query|value)", rank_pattern={"value": 2})
    task = classifier(base, adapter=str(ours), method=same)
    task.configure_model()
    assert task.methods == (same,)
    torch.testing.assert_close(answers(task), answers(trained), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            LoRA(r=4, alpha=5, target_modules=["query", "value"], rank_pattern={"value": 2}),
            "r=3, and the model has r=4",
        ),
        (DoRA(r=3, alpha=5, target_modules=["query", "value"], rank_pattern={"value": 2}), "trained with .*LoRA.*DoRA"),
        (LoRA(r=3, alpha=6, target_modules=["query", "value"], rank_pattern={"value": 2}), "alpha=5, .*alpha=6"),
    ],
)
def test_a_contradicting_method_is_refused(base: Path, ours: Path, method: LoRA, message: str) -> None:
    task = classifier(base, adapter=str(ours), method=method)
    with pytest.raises(CheckpointError, match=message):
        task.configure_model()
    assert task.model is None


def test_other_targets_are_refused(base: Path, theirs: Path) -> None:
    method = DoRA(r=3, alpha=5, target_modules=["query", "value"])
    with pytest.raises(CheckpointError, match=r"are missing .*value"):
        classifier(base, adapter=str(theirs), method=method).configure_model()


def test_another_base_is_refused(tmp_path: Path, ours: Path) -> None:
    build("bert", seed=1).bert.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="trained on another base model"):
        classifier(tmp_path / "other", adapter=str(ours)).configure_model()


@pytest.mark.parametrize("labels", [["good", "neutral", "bad"], ["a", "b", "c"]])
def test_other_labels_are_refused(base: Path, ours: Path, labels: list[str]) -> None:
    with pytest.raises(CheckpointError, match="holds a head for the labels bad, neutral, good"):
        classifier(base, adapter=str(ours), label_names=labels).configure_model()


def test_another_number_of_labels_is_refused(base: Path, theirs: Path) -> None:
    with pytest.raises(CheckpointError, match=r"classifier.weight \[3, 32\] instead of \[2, 32\]"):
        classifier(base, adapter=str(theirs), label_names=["a", "b"]).configure_model()


@pytest.mark.parametrize("name", ["absent", "x.ckpt", "empty"])
def test_what_is_no_adapter_folder(tmp_path: Path, base: Path, name: str) -> None:
    (tmp_path / "x.ckpt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is not a directory|is a file; name the folder|holds no adapter_config"):
        classifier(base, adapter=str(tmp_path / name)).configure_model()


def test_a_merged_folder_is_named_as_what_it_is(tmp_path: Path) -> None:
    from lora_lightning.checkpoint import merge_checkpoint

    ckpt = save_checkpoint(PlainTask(method=LoRA(r=2)), tmp_path / "x.ckpt")
    merge_checkpoint(ckpt, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="is a merged model, not an adapter"):
        PlainTask(adapter=str(tmp_path / "merged")).configure_model()


def test_own_format_starts_a_run_too(tmp_path: Path) -> None:
    from lora_lightning.checkpoint import write_adapter_folder

    method = DoRA(r=2, magnitude_axis="input", target_modules=["0"])
    task = PlainTask(method=method)
    task.configure_model()
    perturb(task.adapted)
    assert write_adapter_folder(tmp_path / "own", task.adapted).adapter_format == "lora_lightning"
    other = PlainTask(adapter=str(tmp_path / "own"))
    other.configure_model()
    x = {"x": torch.randn(3, 8)}
    torch.testing.assert_close(other(x), task(x), atol=0, rtol=0)


def test_several_methods_of_one_file_start_a_run(tmp_path: Path, base: Path) -> None:
    both = [LoRA(r=2, target_modules=["query"]), BitFit(bias=["query"])]
    task = classifier(base, method=both)
    task.configure_model()
    before = answers(task)
    perturb(task.adapted)
    export_peft(task.adapted, tmp_path / "both")
    (tmp_path / "both" / MANIFEST_NAME).unlink()  # so that PEFT's files are all there is
    (tmp_path / "both" / OWN_WEIGHTS_NAME).unlink()
    other = classifier(base, adapter=str(tmp_path / "both"))
    other.configure_model()
    assert [type(one) for one in attached_methods(other.adapted)] == [LoRA, BitFit]
    torch.testing.assert_close(answers(other), answers(task), atol=1e-5, rtol=0)
    assert (answers(task) - before).abs().max() > 1e-3  # negative control


def test_the_values_of_the_base_are_read_with_the_folder(base: Path, ours: Path) -> None:
    """What is compared later depends on the files no more."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    start = read_starting_adapter(model, str(ours))
    (ours / BASE_SAMPLE_NAME).unlink()
    assert start.base_sample is not None
    assert not start.base_sample.is_quantized
    assert all(path.startswith("bert.") for path in start.base_sample.values)
    with pytest.raises(CheckpointError, match=BASE_SAMPLE_NAME):  # the manifest names it
        read_starting_adapter(model, str(ours))


def test_a_model_with_adapters_is_refused(base: Path, ours: Path) -> None:
    class Twice(SequenceClassification):
        def configure_backbone(self) -> Any:
            from lora_lightning.backbones.attach import attach

            model = super().configure_backbone()
            attach(model, LoRA(r=1))
            return model

    task = Twice(backbone=str(base), adapter=str(ours), label_names=LABELS)
    with pytest.raises(ConfigError, match="returned a model with adapters"):
        task.configure_model()
