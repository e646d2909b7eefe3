"""What is not added or cut is refused with a sentence, and nothing is written; what agrees is kept."""

import json
import shutil
import warnings
from dataclasses import replace

import peft
import pytest
import torch

from lora_lightning import LoRA, attach, combine, export_peft, load_peft, shrink
from lora_lightning.checkpoint import read_manifest, write_adapter_folder
from lora_lightning.checkpoint.folder import RunFacts
from lora_lightning.checkpoint.manifest import write_manifest
from lora_lightning.errors import CheckpointError, ConfigError, UserError
from lora_lightning.methods import IA3, DoRA
from tests.arithmetic.layouts import Layout, base, write
from tests.checkpoint.peft_runs import answers, peft_model, reconfigure, rewrite, save
from tests.models import build, perturb

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
PLAIN = Layout(LoRA(r=2, target_modules=["first", "second"]), 1)


@pytest.fixture
def plain(tmp_path):
    return write(PLAIN, tmp_path / "plain")


SETTINGS = {
    "method": ({"method": "slerp"}, "must be one of sum, task, ties"),
    "rank": ({"rank": 0}, "rank is 0; it must be a whole number from 1"),
    "flag": ({"rank": True}, "whole number"),
    "error": ({"max_error": -0.1}, "at least 0 and below 1"),
    "both": ({"rank": 2, "max_error": 0.1}, "give one of them"),
    "density": ({"density": 0.5}, "density is for ties"),
    "no-density": ({"method": "ties", "rank": 2, "density": 0.0}, "above 0 and at most 1"),
    "seed": ({"seed": 3}, "seed is for dare"),
    "seed-ties": ({"method": "ties", "rank": 2, "seed": 3}, "seed is for dare"),
    "full-rank": ({"method": "dare"}, "set rank or max_error"),
    "linear": ({"method": "peft_linear", "rank": 2}, "keeps the rank"),
    "heads": ({"heads": "it"}, "names no adapter"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case, plain, tmp_path):
    settings, message = SETTINGS[case]
    with pytest.raises(ConfigError, match=message):
        combine({str(plain): 1.0}, output_dir=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, True, ("x", 1.0, 2)])
def test_weights(weight, plain, tmp_path):
    with pytest.raises(ConfigError, match="must be a"):
        combine({str(plain): weight}, output_dir=tmp_path / "out")
    with pytest.raises(ConfigError, match="no adapter to combine"):
        combine({}, output_dir=tmp_path / "out")


def test_a_taken_folder(plain, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    for operation in (
        lambda out: combine({str(plain): 1.0}, output_dir=out),
        lambda out: shrink(plain, output_dir=out, rank=1),
    ):
        with pytest.raises(CheckpointError, match="exists already"):
            operation(tmp_path / "out")
        with pytest.raises(CheckpointError, match="exists already"):
            operation(plain)
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["mine"]


def _dora(folder):
    write(Layout(DoRA(r=2, target_modules=["first"]), 1), folder)


def _ia3(folder):
    model = build("bert")
    attach(model, IA3(target_modules=["key", "value"], feedforward_modules=[]))
    export_peft(model, folder)


def _biases(folder):
    save(peft_model("bert", target_modules=["query"], bias="lora_only"), folder)


def _tokens(folder):
    save(peft_model("llama", target_modules=["q_proj"], trainable_token_indices=[3, 5]), folder)


def _prompt(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        save(peft.get_peft_model(build("llama"), config), folder)


def _wrong_rank(folder):
    write(PLAIN, folder)
    (folder / "manifest.json").unlink()
    reconfigure(folder, r=3)


def _damaged(folder):
    write(PLAIN, folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])


def _nothing(folder):
    """Make no folder."""


ADAPTERS = {
    "dora": (_dora, "is DoRA: .*merge it into its base first"),
    "ia3": (_ia3, "of the kind Ia3"),
    "biases": (_biases, "bias='lora_only'.*biases"),
    "tokens": (_tokens, "trainable_token_indices"),
    "prompt": (_prompt, "of the kind Prompt"),
    "rank": (_wrong_rank, "has rank 2, and its config says 3"),
    "damaged": (_damaged, "cut short or changed"),
    "missing": (_nothing, "is not an adapter"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_does_not_add(case, plain, tmp_path):
    make, message = ADAPTERS[case]
    make(tmp_path / "other")
    with pytest.raises(CheckpointError, match=message):
        combine({str(plain): 1.0, str(tmp_path / "other"): 0.5}, output_dir=tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        shrink(tmp_path / "other", output_dir=tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()


def _on_base(seed, folder, targets):
    model = base(seed)
    attach(model, LoRA(r=2, target_modules=targets))
    export_peft(perturb(model), folder)
    return folder


@pytest.mark.parametrize("targets", [["first", "second"], ["second", "third"]])
def test_different_bases(targets, plain, tmp_path):
    """By their fingerprints, or where the layers differ by the values that both folders hold."""
    other = _on_base(5, tmp_path / "other", targets)
    with pytest.raises(CheckpointError, match="different base models"):
        combine({str(plain): 1.0, str(other): 0.5}, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    same = _on_base(0, tmp_path / "same", targets)  # control
    combine({str(plain): 1.0, str(same): 0.5}, output_dir=tmp_path / "out")


def test_different_shapes(tmp_path):
    save(peft_model("bert", target_modules=["query"]), tmp_path / "one")
    save(peft_model("bert", target_modules=["query"]), tmp_path / "other")
    rewrite(
        tmp_path / "other",
        lambda tensors: {key: torch.cat([one, one], -1) if "lora_A" in key else one for key, one in tensors.items()},
    )
    with pytest.raises(CheckpointError, match=r"is \[32, 32\] in .* and \[32, 64\]"):
        combine({str(tmp_path / "one"): 1.0, str(tmp_path / "other"): 1.0}, output_dir=tmp_path / "out")


def test_other_names_of_the_base_are_warned_of(tmp_path):
    for name in ("one", "other"):
        save(peft_model("bert", target_modules=["query"]), tmp_path / name)
        reconfigure(tmp_path / name, base_model_name_or_path=f"org/{name}")
    with pytest.warns(UserWarning, match="could not be compared"):
        combine({str(tmp_path / "one"): 1.0, str(tmp_path / "other"): 1.0}, output_dir=tmp_path / "out")


def test_unequal_ranks_of_linear(tmp_path):
    for rank in (2, 3):
        write(Layout(LoRA(r=rank, target_modules=["first"]), rank), tmp_path / str(rank))
    adapters = {str(tmp_path / "2"): 1.0, str(tmp_path / "3"): 1.0}
    with pytest.raises(CheckpointError, match="takes equal ranks"):
        combine(adapters, output_dir=tmp_path / "out", method="peft_linear")


def _with_head(folder, seed, *, head=True, labels=("a", "b", "c")):
    model = build("bert")
    attach(model, LoRA(r=2, target_modules=["query"], modules_to_save=["classifier"] if head else None))
    perturb(model, seed=seed)
    export_peft(model, folder, RunFacts(label_names=list(labels) if head else None, task="tasks.X"))
    return model


def test_heads(tmp_path):
    """Heads that differ are refused, unless one is named; equal ones, and that of one adapter alone, are kept."""
    first = _with_head(tmp_path / "first", 1)
    _with_head(tmp_path / "second", 2)
    _with_head(tmp_path / "none", 3, head=False)
    both = {"first": (tmp_path / "first", 1.0), "second": (tmp_path / "second", 0.5)}
    with pytest.raises(CheckpointError, match="both trained 'classifier' as a copy, and differently"):
        combine(both, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    combine(both, output_dir=tmp_path / "named", heads="second")
    combine({"first": (tmp_path / "first", 1.0), "none": (tmp_path / "none", 1.0)}, output_dir=tmp_path / "alone")
    combine({**both, "second": (tmp_path / "second", 0.0)}, output_dir=tmp_path / "zero")
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    combine({str(tmp_path / "first"): 0.5, str(tmp_path / "copy"): 0.5}, output_dir=tmp_path / "equal")
    heads = {}
    for name in ("named", "alone", "zero", "equal"):
        model = build("bert")
        load_peft(model, tmp_path / name)
        heads[name] = _head_of(model)
        assert read_manifest(tmp_path / name).label_names == ["a", "b", "c"]
        if name in ("zero", "equal"):
            torch.testing.assert_close(answers(model), answers(first), atol=1e-5, rtol=0)
    assert torch.equal(heads["alone"], heads["equal"])
    assert torch.equal(heads["alone"], _head_of(first))
    assert not torch.equal(heads["named"], heads["alone"])  # control


def _head_of(model):
    from lora_lightning.adapters import adapter_state_dict

    return adapter_state_dict(model)["classifier.weight"]


def test_an_update_inside_a_copy(tmp_path):
    """One adapter trained a head as a copy, and another an update of it."""
    _with_head(tmp_path / "copy", 1)
    model = build("bert")
    attach(model, LoRA(r=2, target_modules=["query", "classifier"]))
    export_peft(perturb(model), tmp_path / "update")
    with pytest.raises(CheckpointError, match="does not add to a copy"):
        combine({str(tmp_path / "copy"): 1.0, str(tmp_path / "update"): 1.0}, output_dir=tmp_path / "out")


def test_a_changed_result_is_noticed(plain, tmp_path):
    """The manifest of a result covers its files, as that of every adapter folder does."""
    combine({str(plain): 1.0}, output_dir=tmp_path / "out")
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 7}))
    with pytest.raises(UserError, match=r"its manifest says|differs from what was written"):
        load_peft(base(), tmp_path / "out")


def test_corrections_of_quantizing_count_once(plain, tmp_path):
    """An adapter that LoftQ started holds the correction of its base."""
    for name in ("one", "other"):
        shutil.copytree(plain, tmp_path / name)
        manifest = read_manifest(plain)
        settings = {**manifest.methods[0]["init_args"], "init": "loftq"}
        methods = [{**manifest.methods[0], "init_args": settings}]
        write_manifest(tmp_path / name, replace(manifest, methods=methods))
    pair = {str(tmp_path / "one"): 1.0, str(tmp_path / "other"): 1.0}
    with pytest.raises(CheckpointError, match="would count 2 times"):
        combine(pair, output_dir=tmp_path / "out")
    combine(dict.fromkeys(pair, 0.5), output_dir=tmp_path / "mean")
    combine({str(tmp_path / "one"): 1.0, str(plain): 3.0}, output_dir=tmp_path / "with-another")


def test_what_belongs_to_a_run_agrees(plain, tmp_path):
    """Vocabularies and tensors beside the model must be the same; of other files the first is kept."""
    facts = {"one": "a" * 64, "other": "b" * 64}
    for name, vocabulary in facts.items():
        model = base()
        attach(model, PLAIN.method)
        extra = {"chat_template.jinja": name.encode(), "task.safetensors": b"same"}
        write_adapter_folder(tmp_path / name, model, RunFacts(tokenizer_fingerprint=vocabulary), extra=extra)
    pair = {str(tmp_path / name): 1.0 for name in facts}
    with pytest.raises(CheckpointError, match="different vocabularies"):
        combine(pair, output_dir=tmp_path / "out")
    manifest = read_manifest(tmp_path / "other")
    write_manifest(tmp_path / "other", replace(manifest, tokenizer_fingerprint="a" * 64))
    with pytest.warns(UserWarning, match=r"another chat_template\.jinja"):
        combine(pair, output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "one"
    assert (tmp_path / "out" / "task.safetensors").read_bytes() == b"same"
    model = base()
    attach(model, PLAIN.method)
    vocabulary = RunFacts(tokenizer_fingerprint="a" * 64)
    write_adapter_folder(tmp_path / "other", model, vocabulary, extra={"task.safetensors": b"other"})
    with pytest.raises(CheckpointError, match="other tensors of its task"):
        combine(pair, output_dir=tmp_path / "third")
