"""Combining: beside PEFT's own sums, from its folders and to them, and everything that is kept beside the updates."""

import math
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties

from lora_lightning import LoRA, attach, combine, export_peft, load_adapter, load_peft
from lora_lightning.adapters import iter_adapters, iter_hosts
from lora_lightning.arithmetic.elementwise import ties
from lora_lightning.checkpoint import read_manifest
from lora_lightning.errors import CheckpointError, TargetError
from lora_lightning.methods import AdaLoRA, DoRA
from tests.arithmetic.layouts import Layout, base, dense, distance, read_dense, weighted, write
from tests.checkpoint.peft_runs import answers, move, save
from tests.models import build, inputs, logits, perturb

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
WEIGHTS = {"de": 1.0, "fr": -0.6}
SETTINGS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj", "embed_tokens"]}


def _peft_pair(architecture="llama", **changes):
    """Return a model of PEFT with two adapters, no value of which is zero."""
    settings = {**SETTINGS, **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build(architecture), peft.LoraConfig(**settings), adapter_name="de")
        model.add_adapter("fr", peft.LoraConfig(**{**settings, "lora_alpha": 9, "use_rslora": True}))
    for name in ("de", "fr"):
        model.set_adapter(name)
        move(model)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fr" in name.split("."):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def _write_pair(model, folder):
    save(model, folder)
    return {str(folder / name): weight for name, weight in WEIGHTS.items()}


@torch.no_grad()
def _sum_of(model):
    """Return the dense sum of PEFT's two adapters by its own `get_delta_weight`, by path."""
    total = {}
    for path, layer in model.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            delta = {name: layer.get_delta_weight(name).double() for name in WEIGHTS}
            total[path] = sum(WEIGHTS[name] * delta[name] for name in WEIGHTS)
    return total


@torch.no_grad()
def _theirs(model, name, reference):
    """Return the relative error of an adapter of PEFT's against a dense sum."""
    error = 0.0
    for path, layer in model.base_model.model.named_modules():
        if path in reference:
            error += float((layer.get_delta_weight(name).double() - reference[path]).square().sum())
    return (error / sum(float(one.square().sum()) for one in reference.values())) ** 0.5


def _added_by_peft(theirs: peft.PeftModel, ours: Path) -> peft.PeftModel:
    """Let PEFT add up its adapters, which then act, and read our folder into another model; return that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "cat", combination_type="cat")
        back = peft.PeftModel.from_pretrained(build("llama"), ours).eval()
    theirs.set_adapter("cat")
    return back


def test_folders_of_peft_are_added_and_read_back_by_peft(tmp_path):
    theirs = _peft_pair()
    report = combine(_write_pair(theirs, tmp_path), output_dir=tmp_path / "out")
    assert report.error == 0
    back = _added_by_peft(theirs, tmp_path / "out")
    ours = build("llama")
    start = answers(ours)
    load_peft(ours, tmp_path / "out")
    batch = inputs(ours)
    with torch.no_grad():
        torch.testing.assert_close(answers(ours), theirs(**batch).logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(back(**batch).logits, theirs(**batch).logits, atol=1e-5, rtol=0)
        theirs.set_adapter("de")
        assert (theirs(**batch).logits - answers(ours)).abs().max() > 1e-2  # control: one alone is another model
    assert (start - answers(ours)).abs().max() > 1e-2


def test_adapters_of_a_model_are_added_by_name(tmp_path):
    """On other layers each, of other ranks, and beside what cannot be added."""
    methods = {
        "de": LoRA(r=3, target_modules=["q_proj", "down_proj"]),
        "fr": LoRA(r=2, alpha=5, scaling="rslora", target_modules=["q_proj", "v_proj"]),
        "nl": DoRA(r=2, target_modules=["q_proj"]),
    }
    model = build("llama").double()
    for name, method in methods.items():
        attach(model, method, name=name)
    perturb(model, std=0.2)
    report = combine({"de": 1.0, "fr": -0.5}, model=model, output_dir=tmp_path / "out")
    assert report.error == 0
    ours = build("llama").double()
    load_peft(ours, tmp_path / "out")
    weights = {path: host.weight.clone() for path, host in iter_hosts(ours)}
    for weight, name in ((1.0, "de"), (-0.5, "fr")):
        for path, _, adapter in iter_adapters(model, name):
            weights[path] += weight * adapter.scaling * adapter.lora_B.detach() @ adapter.lora_A.detach()
    dense_model = build("llama").double()
    with torch.no_grad():
        for path, weight in weights.items():
            dense_model.get_submodule(path).weight.copy_(weight)
        torch.testing.assert_close(logits(ours), logits(dense_model), atol=1e-6, rtol=0)
        assert (logits(ours) - logits(build("llama").double())).abs().max() > 1e-3
    with pytest.raises(CheckpointError, match="DoRA"):
        combine({"de": 1.0, "nl": 1.0}, model=model, output_dir=tmp_path / "other")
    with pytest.raises(TargetError, match="is not the name of one"):
        combine({"de": 1.0, str(tmp_path / "out" / "none"): 1.0}, model=model, output_dir=tmp_path / "other")
    assert not (tmp_path / "other").exists()


NARROWED = {
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.0.self_attn.v_proj"]},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "pattern": {"target_modules": r".*layers\.1\..*_proj"},
    "all-linear": {"target_modules": "all-linear", "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
}


@pytest.mark.parametrize("case", NARROWED)
def test_targets_of_peft_are_those_of_the_result(case, tmp_path):
    theirs = _peft_pair(**NARROWED[case])
    combine(_write_pair(theirs, tmp_path), output_dir=tmp_path / "out")
    back = _added_by_peft(theirs, tmp_path / "out")
    ours = build("llama")
    report = load_peft(ours, tmp_path / "out")
    with torch.no_grad():
        expected = theirs(**inputs(ours)).logits
        torch.testing.assert_close(answers(ours), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(back(**inputs(ours)).logits, expected, atol=1e-5, rtol=0)
        assert (answers(build("llama")) - expected).abs().max() > 1e-2  # control
    again = build("llama")
    attach(again, LoRA(**read_manifest(tmp_path / "out").methods[0]["init_args"]))
    load_adapter(again, tmp_path / "out")
    torch.testing.assert_close(answers(again), answers(ours), atol=0, rtol=0)
    assert report.num_trainable > 0


def test_peft_computes_the_same_on_a_model_of_any_class(tmp_path):
    """On an embedding, a convolution and linear layers at once."""
    layout = Layout(LoRA(r=3, alpha=5, target_modules=["first", "conv", "table"]), 6)
    combine({str(write(layout, tmp_path / "in")): -0.7}, output_dir=tmp_path / "out", rank=2)
    ids = torch.arange(12).view(2, 6)
    ours = base()
    before = ours(ids)
    load_peft(ours, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "out").eval()
    torch.testing.assert_close(theirs(ids), ours(ids), atol=1e-4, rtol=1e-5)
    assert (before - ours(ids)).abs().max() > 1e-2  # control


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_a_cut_is_at_most_as_far_off_as_svd_of_peft(tmp_path, rank):
    theirs = _peft_pair(target_modules=["q_proj", "down_proj"])
    report = combine(_write_pair(theirs, tmp_path), output_dir=tmp_path / "out", rank=rank)
    reference = _sum_of(theirs)
    theirs.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "svd", combination_type="svd", svd_rank=rank)
    their_error = _theirs(theirs, "svd", reference)
    our_error = distance(read_dense(tmp_path / "out"), reference)
    assert our_error <= their_error + 1e-6
    assert math.isclose(report.error, our_error, rel_tol=1e-4, abs_tol=1e-6)
    assert report.error > 1e-3  # control: the cut takes something away


def test_linear_of_peft_is_what_it_is_and_far_from_the_sum(tmp_path):
    theirs = _peft_pair(target_modules=["q_proj", "down_proj"])
    report = combine(_write_pair(theirs, tmp_path), output_dir=tmp_path / "out", method="peft_linear")
    reference = _sum_of(theirs)
    theirs.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "linear", combination_type="linear")
    linear = {
        path: layer.get_delta_weight("linear").double()
        for path, layer in theirs.base_model.model.named_modules()
        if path in reference
    }
    assert distance(read_dense(tmp_path / "out"), linear) < 1e-6
    assert math.isclose(report.error, _theirs(theirs, "linear", reference), rel_tol=1e-5)
    assert report.error > 0.3  # it is not the sum


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_ties_elects_as_peft_does_on_dense_updates(density):
    updates = [torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(one)) for one in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peft_ties(updates, torch.full((3,), 0.8), density)
    torch.testing.assert_close(ties([0.8 * one for one in updates], density), expected, atol=1e-7, rtol=0)
    assert (ties(updates, density) - expected).abs().max() > 1e-2  # control


LAYOUTS = {
    "de": (Layout(LoRA(r=3, alpha=5, target_modules=["first", "conv"]), 1), 1.0),
    "fr": (Layout(LoRA(r=2, scaling="rslora", target_modules=["first", "conv", "table"]), 2), -0.5),
}


def _written(folder):
    return {name: (write(layout, folder / name), weight) for name, (layout, weight) in LAYOUTS.items()}


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties"])
def test_dense_methods_are_cut_with_their_error(tmp_path, method):
    adapters = _written(tmp_path)
    whole = combine(adapters, output_dir=tmp_path / "whole", method=method, density=0.5, rank=99)
    cut = combine(adapters, output_dir=tmp_path / "cut", method=method, density=0.5, rank=2)
    full, narrow = read_dense(tmp_path / "whole"), read_dense(tmp_path / "cut")
    assert whole.error == 0
    assert math.isclose(cut.error, distance(narrow, full), rel_tol=1e-4)
    assert distance(full, weighted(list(LAYOUTS.values()))) > 0.1  # control: it is not the sum
    if method == "ties":
        parts = [{path: weight * one for path, one in dense(layout).items()} for layout, weight in LAYOUTS.values()]
        for path in full:
            both = [part[path] for part in parts if path in part]
            torch.testing.assert_close(full[path], ties(both, 0.5), atol=1e-6, rtol=0)


def test_draws_come_from_the_seed_alone(tmp_path):
    adapters = _written(tmp_path)
    options = {"method": "dare", "density": 0.5, "rank": 99}
    combine(adapters, output_dir=tmp_path / "one", **options)
    torch.manual_seed(7)
    combine(dict(reversed(adapters.items())), output_dir=tmp_path / "two", seed=0, **options)
    combine(adapters, output_dir=tmp_path / "three", seed=1, **options)
    one, two, three = (read_dense(tmp_path / name) for name in ("one", "two", "three"))
    assert distance(two, one) < 1e-6
    assert distance(three, one) > 0.1


def test_dare_keeps_the_mean(tmp_path):
    """Dropped and rescaled, the elements add up to the sum on the average over seeds."""
    adapters = _written(tmp_path)
    total = {}
    for seed in range(40):
        out = tmp_path / f"out{seed}"
        combine(adapters, output_dir=out, method="dare", density=0.5, rank=99, seed=seed)
        for path, update in read_dense(out).items():
            total[path] = total.get(path, 0) + update / 40
    assert distance(total, weighted(list(LAYOUTS.values()))) < 0.25  # 1 / sqrt(40) = 0.16
    assert distance(read_dense(tmp_path / "out0"), weighted(list(LAYOUTS.values()))) > 0.6  # control


def test_task_is_the_sum(tmp_path):
    adapters = _written(tmp_path)
    combine(adapters, output_dir=tmp_path / "sum")
    combine(adapters, output_dir=tmp_path / "task", method="task")
    assert distance(read_dense(tmp_path / "task"), read_dense(tmp_path / "sum")) == 0


def test_a_weight_of_zero_takes_no_rank(tmp_path):
    (de, _), (fr, _) = _written(tmp_path).values()
    report = combine({str(de): 1.0, str(fr): 0.0}, output_dir=tmp_path / "out")
    assert report.ranks == {"first": 3, "conv": 3, "table": 1}
    result = read_dense(tmp_path / "out")
    assert float(result.pop("table").abs().max()) == 0
    assert distance(result, dense(LAYOUTS["de"][0])) < 1e-6


def test_adapters_of_different_layers_load_and_know_their_base(tmp_path):
    layouts = [Layout(LoRA(r=2, target_modules=[name]), seed) for seed, name in enumerate(["first", "second"])]
    adapters = {str(write(layout, tmp_path / str(index))): 1.0 for index, layout in enumerate(layouts)}
    combine(adapters, output_dir=tmp_path / "out")
    assert read_manifest(tmp_path / "out").base_fingerprint is None
    model = base()
    ids = torch.arange(12).view(2, 6)
    before = model(ids)
    load_peft(model, tmp_path / "out")
    expected = base()
    with torch.no_grad():
        for path, update in weighted([(layout, 1.0) for layout in layouts]).items():
            expected.get_submodule(path).weight += update.float()
    torch.testing.assert_close(model(ids), expected(ids), atol=1e-4, rtol=1e-5)
    assert (model(ids) - before).abs().max() > 1e-2
    with pytest.raises(CheckpointError, match="another base model"):
        load_peft(base(seed=5), tmp_path / "out")


def test_the_result_loads_as_any_adapter_of_this_library(tmp_path):
    combine(_written(tmp_path), output_dir=tmp_path / "out", max_error=0.3)
    model = base()
    manifest = read_manifest(tmp_path / "out")
    attach(model, LoRA(**manifest.methods[0]["init_args"]))
    load_adapter(model, tmp_path / "out")
    assert manifest.derived["operation"] == "combine"
    assert manifest.derived["adapters"]["fr"]["weight"] == -0.5


@pytest.mark.parametrize("architecture", ["mixtral", "gpt2"])
def test_experts_and_transposed_layers(architecture, tmp_path):
    targets = {"mixtral": ["experts", "q_proj"], "gpt2": ["c_attn", "wte"]}[architecture]
    models = {}
    for seed, name in enumerate(["a", "b"]):
        model = build(architecture)
        torch.manual_seed(seed)
        attach(model, LoRA(r=2 + seed, alpha=4, target_modules=targets))
        models[name] = perturb(model, seed=seed)
        export_peft(model, tmp_path / name)
    report = combine({"a": (tmp_path / "a", 1.0), "b": (tmp_path / "b", 0.0)}, output_dir=tmp_path / "out")
    assert set(report.ranks.values()) == {2}
    ours = build(architecture)
    load_peft(ours, tmp_path / "out")
    torch.testing.assert_close(answers(ours), answers(models["a"]), atol=1e-5, rtol=0)
    assert (answers(ours) - answers(models["b"])).abs().max() > 1e-2  # control
    summed = build(architecture)
    combine({"a": (tmp_path / "a", 1.0), "b": (tmp_path / "b", 0.5)}, output_dir=tmp_path / "both")
    load_peft(summed, tmp_path / "both")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(build(architecture), tmp_path / "both").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs(build(architecture))).logits, logits(summed), atol=1e-4, rtol=0)


def test_a_method_of_this_library_alone_needs_its_base(tmp_path):
    """What PEFT's format does not hold is computed on the base, given as `model`."""
    from lora_lightning.checkpoint import write_adapter_folder

    layout = Layout(AdaLoRA(target_r=1, init_r=3, target_modules=["first", "third"]), 4)
    model = base()
    attach(model, layout.method)
    write_adapter_folder(tmp_path / "own", perturb(model, seed=4, std=0.3))
    adapters = {"own": (tmp_path / "own", 1.0)}
    with pytest.raises(CheckpointError, match="only its base completes"):
        combine(adapters, output_dir=tmp_path / "out")
    bare = base()
    combine(adapters, output_dir=tmp_path / "out", model=bare)
    assert distance(read_dense(tmp_path / "out"), _adalora(model, layout.method)) < 1e-6
    assert not any("lora" in name for name, _ in bare.named_modules())  # the base is as it was


def _adalora(model, method):
    from lora_lightning.adapters import adapter_state_dict

    state = {name: one.double() for name, one in adapter_state_dict(model).items()}
    return {
        path: method.alpha
        / method.init_r
        * (state[f"{path}.lora_B"] * state[f"{path}.lora_E"])
        @ state[f"{path}.lora_A"]
        for path in ("first", "third")
    }
