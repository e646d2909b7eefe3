"""Cutting to a budget: compared with every possible choice, and loaded here and in PEFT."""

import itertools
import math
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning import LoRA, at_rank, attach, export_peft, input_moments, load_peft, shrink
from lora_lightning.arithmetic import budget
from lora_lightning.arithmetic.budget import Spectrum, ranks_for_error, ranks_within
from lora_lightning.checkpoint import read_manifest
from lora_lightning.errors import ConfigError
from tests.arithmetic.layouts import Layout, attached, dense, distance, layouts, read_dense, write
from tests.models import build, inputs, logits, perturb

many = settings(max_examples=200, derandomize=True, deadline=None, database=None)


@st.composite
def spectra(draw):
    found = []
    for _ in range(draw(st.integers(1, 4))):
        squares = sorted(draw(st.lists(st.floats(0.01, 10), min_size=1, max_size=4)), reverse=True)
        found.append(Spectrum(torch.tensor(squares, dtype=torch.float64), draw(st.integers(1, 9)), len(squares)))
    return found


def _discarded(found, ranks):
    return sum(float(one.squares[rank:].sum()) for one, rank in zip(found, ranks, strict=True))


def _cost(found, ranks):
    return sum(one.cost * rank for one, rank in zip(found, ranks, strict=True))


def _every(found):
    return list(itertools.product(*(range(1, one.rank + 1) for one in found)))


@many
@given(spectra(), st.integers(0, 60))
def test_a_budget_is_spent_as_the_best_of_all_choices_would(found, extra):
    num_parameters = sum(one.cost for one in found) + extra
    ranks = ranks_within(found, num_parameters)
    assert _cost(found, ranks) <= num_parameters
    best = min(_discarded(found, one) for one in _every(found) if _cost(found, one) <= num_parameters)
    assert math.isclose(_discarded(found, ranks), best, rel_tol=1e-9, abs_tol=1e-12)


@many
@given(spectra(), st.floats(0.01, 0.9))
def test_an_error_is_kept_with_the_fewest_parameters(found, max_error):
    ranks = ranks_for_error(found, max_error)
    allowed = max_error**2 * sum(float(one.squares.sum()) for one in found)
    assert _discarded(found, ranks) <= allowed * (1 + 1e-9)
    cheapest = min(_cost(found, one) for one in _every(found) if _discarded(found, one) <= allowed * (1 - 1e-9))
    assert _cost(found, ranks) <= cheapest


def test_gain_per_parameter_alone_may_miss_the_best(monkeypatch):
    """A control: what replaces the exact choice in huge adapters is not always the best, and stays in the budget."""
    found = [Spectrum(torch.tensor([9.0, 6.0]), 5, 2), Spectrum(torch.tensor([9.0, 3.0]), 2, 2)]
    assert ranks_within(found, 7 + 5) == [2, 1]
    monkeypatch.setattr(budget, "MAX_STEPS", 0)
    assert ranks_within(found, 7 + 5) == [1, 2]  # 1.5 a parameter before 1.2
    assert _discarded(found, ranks_for_error(found, 0.3)) <= 0.09 * 27


def test_too_small_a_budget_is_refused():
    with pytest.raises(ConfigError, match="one rank for each of the 2 layers takes 7"):
        ranks_within([Spectrum(torch.ones(2), 5, 2), Spectrum(torch.ones(2), 2, 2)], 6)


@settings(many, max_examples=25)
@given(layouts(), st.integers(1, 5))
def test_one_rank_for_all_layers_is_the_cut_of_each(tmp_path_factory, layout, rank):
    folder = tmp_path_factory.mktemp("cut")
    report = shrink(write(layout, folder / "wide"), output_dir=folder / "narrow", rank=rank)
    exact, result = dense(layout), read_dense(folder / "narrow")
    for path, update in exact.items():
        u, values, v = torch.linalg.svd(update, full_matrices=False)
        best = u[:, :rank] @ torch.diag(values[:rank]) @ v[:rank]
        error = float((update - best).norm() / update.norm())
        assert math.isclose(float((result[path] - update).norm() / update.norm()), error, rel_tol=1e-4, abs_tol=1e-6)
    assert math.isclose(report.error, distance(result, exact), rel_tol=1e-4, abs_tol=1e-6)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Return a folder with an adapter of rank 16 on a tiny Llama: singular values fall quickly, from unlike heights."""
    model = build("llama")
    attach(model, LoRA(r=16, alpha=32, target_modules="all-linear"))
    perturb(model, std=0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter *= torch.logspace(0, -2, 16) * (3 if "mlp" in name else 1)
    folder = tmp_path_factory.mktemp("wide") / "adapter"
    export_peft(model, folder)
    return folder


def _ours(folder):
    model = build("llama")
    load_peft(model, folder)
    with torch.no_grad():
        return logits(model)


def _theirs(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(build("llama"), folder).eval()
    with torch.no_grad():
        return model(**inputs(build("llama"))).logits


def test_a_cut_adapter_loads_here_and_in_peft(wide, tmp_path):
    report = shrink(wide, output_dir=tmp_path / "narrow", num_parameters=6_000)
    assert report.num_parameters <= 6_000
    assert report.num_parameters > 5_800
    assert len(set(report.ranks.values())) > 2
    torch.testing.assert_close(_ours(tmp_path / "narrow"), _theirs(tmp_path / "narrow"), atol=1e-5, rtol=0)
    with torch.no_grad():
        base = logits(build("llama"))
    to_wide = (_ours(tmp_path / "narrow") - _ours(wide)).norm()
    assert to_wide < 0.5 * (base - _ours(wide)).norm()  # control: the base is farther from the wide adapter
    derived = read_manifest(tmp_path / "narrow").derived
    assert derived["layers"].keys() == report.ranks.keys()
    assert math.isclose(derived["error"], report.error)


def test_a_global_budget_is_nearer_than_a_uniform_cut(wide, tmp_path):
    uniform = shrink(wide, output_dir=tmp_path / "uniform", rank=3)
    dealt = shrink(wide, output_dir=tmp_path / "dealt", num_parameters=uniform.num_parameters)
    assert dealt.num_parameters <= uniform.num_parameters
    assert dealt.error < uniform.error
    exact = read_dense(wide)
    assert distance(read_dense(tmp_path / "dealt"), exact) < distance(read_dense(tmp_path / "uniform"), exact)


def test_nested_ranks_are_the_cuts_to_each(wide, tmp_path):
    report = shrink(wide, output_dir=tmp_path / "nested", nested=(2, 4, 8))
    assert list(report.nested) == [2, 4, 8]
    model = build("llama")
    load_peft(model, tmp_path / "nested")
    for rank, error in report.nested.items():
        alone = shrink(wide, output_dir=tmp_path / str(rank), rank=rank)
        assert math.isclose(alone.error, error, rel_tol=1e-9)
        with at_rank(model, rank), torch.no_grad():
            torch.testing.assert_close(logits(model), _ours(tmp_path / str(rank)), atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), _ours(tmp_path / "nested"), atol=0, rtol=0)  # as before
        with at_rank(model, 2):  # control
            assert (logits(model) - _ours(tmp_path / "nested")).abs().max() > 1e-3


def test_at_rank_refuses_an_adapter_in_another_order(wide):
    model = build("llama")
    load_peft(model, wide)
    with pytest.raises(ConfigError, match="not in the order of their singular values"), at_rank(model, 2):
        pass
    with pytest.raises(ConfigError, match="whole number from 1"), at_rank(model, 0):
        pass


def test_inputs_weigh_the_ranks(wide, tmp_path):
    """With the inputs' moments, the outputs of the layers on these inputs are nearer than without, and the best."""
    model = build("llama")
    load_peft(model, wide)
    batches = [inputs(model, seed=seed) for seed in range(3)]
    moments = input_moments(model, wide, batches, lambda batch: model(**batch))
    weighted = shrink(wide, output_dir=tmp_path / "weighted", rank=2, moments=moments)
    plain = shrink(wide, output_dir=tmp_path / "plain", rank=2)
    exact = read_dense(wide)
    fed = _inputs_of(model, batches)
    errors = {}
    for name in ("weighted", "plain"):
        updates = read_dense(tmp_path / name)
        squares = sum(float((fed[path] @ (updates[path] - exact[path]).T).square().mean(0).sum()) for path in exact)
        total = sum(float((fed[path] @ exact[path].T).square().mean(0).sum()) for path in exact)
        errors[name] = (squares / total) ** 0.5
    assert math.isclose(weighted.error, errors["weighted"], rel_tol=1e-4)
    assert errors["weighted"] < errors["plain"]
    assert plain.error < distance(read_dense(tmp_path / "weighted"), exact)  # control: of the weights, plain is nearer


def _inputs_of(model, batches):
    """Return what each adapted layer is fed, `[positions, in]`, by hooks on the layers themselves."""
    fed: dict[str, list[torch.Tensor]] = {}
    from lora_lightning.adapters import iter_adapters

    handles = [
        host.register_forward_pre_hook(
            lambda _, args, path=path: fed.setdefault(path, []).append(args[0].double().flatten(0, -2))
        )
        for path, host, _ in iter_adapters(model)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in fed.items()}


REFUSED = {
    "none": ({}, "exactly one"),
    "two": ({"rank": 2, "max_error": 0.1}, "got max_error and rank"),
    "rank": ({"rank": 0}, "whole number from 1"),
    "error": ({"max_error": 1.0}, "below 1"),
    "parameters": ({"num_parameters": 0}, "whole numbers from 1"),
    "few": ({"num_parameters": 9}, "too few"),
    "nested": ({"nested": (0, 4)}, "whole numbers from 1"),
    "empty": ({"nested": ()}, "nested is empty"),
    "moments": ({"rank": 2, "moments": {}}, "moments lacks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_write_nothing(case, wide, tmp_path):
    arguments, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        shrink(wide, output_dir=tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_layout_with_a_head_keeps_it(tmp_path):
    model = build("bert")
    attach(model, LoRA(r=4, target_modules=["query"], modules_to_save=["classifier"]))
    perturb(model)
    export_peft(model, tmp_path / "wide")
    shrink(tmp_path / "wide", output_dir=tmp_path / "exact", max_error=0.0)
    with torch.no_grad():
        expected = logits(model)
        other = build("bert")
        before = logits(other)
        load_peft(other, tmp_path / "exact")
        torch.testing.assert_close(logits(other), expected, atol=1e-5, rtol=0)
        assert (before - expected).abs().max() > 1e-2  # control


def test_the_exact_rank_of_a_relative_is_found(tmp_path):
    """LoRA started by PiSSA is exported at twice its rank."""
    layout = Layout(LoRA(r=2, init="pissa", target_modules=["first"]), 3)
    assert attached(layout).first is not None
    report = shrink(write(layout, tmp_path / "wide"), output_dir=tmp_path / "out", rank=8)
    assert report.ranks == {"first": 4}
    assert distance(read_dense(tmp_path / "out"), dense(layout)) < 1e-6
