"""Properties of sums and cuts over random layouts of rank, scaling and method, each beside a control."""

import itertools
import math
import tempfile
from pathlib import Path

import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from lora_lightning import combine
from lora_lightning.arithmetic.combine import CombineSettings, combine_updates
from lora_lightning.arithmetic.reading import updates_of
from lora_lightning.arithmetic.report import total_error
from tests.arithmetic.layouts import attached, dense, distance, layouts, read_dense, weighted, write

phases = (Phase.explicit, Phase.generate)  # an example takes a tenth of a second: what fails is not made smaller
many = settings(max_examples=200, derandomize=True, deadline=None, database=None, phases=phases)
some = settings(many, max_examples=25)
weights = st.floats(-2, 2).filter(lambda weight: abs(weight) > 0.05)


def _combined(terms, rank=None, max_error=None):
    """Combine adapters in memory; return the cuts and the dense result."""
    return _combine({name: (_read(layout, name), weight) for name, (layout, weight) in _named(terms)}, rank, max_error)


def _named(terms):
    return [(f"a{index}", term) for index, term in enumerate(terms)]


def _read(layout, name):
    return updates_of(attached(layout), name)


def _combine(adapters, rank=None, max_error=None):
    weights = {name: weight for name, (_, weight) in adapters.items()}
    options = CombineSettings.of("sum", rank, max_error, None, None, weights)
    updates, cuts = combine_updates({name: one for name, (one, _) in adapters.items()}, weights, options)
    return cuts, {path: update.dense() for path, update in updates.items()}


def _ranks(cuts):
    return {cut.path: cut.rank for cut in cuts}


@some
@given(layouts(), layouts(), weights, weights)
def test_the_exact_sum_is_the_sum_of_the_updates(one, other, w, v):
    """Through folders, and as PEFT reads them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters = {"a": (write(one, folder / "a"), w), "b": (write(other, folder / "b"), v)}
        report = combine(adapters, output_dir=folder / "out")
        result = read_dense(folder / "out")
    reference = weighted([(one, w), (other, v)])
    assert distance(result, reference) < 1e-6
    assert report.error == 0
    assert distance(result, weighted([(one, w), (other, 2 * v)])) > 1e-5  # control: another weight is noticed


@many
@given(layouts(), layouts(), weights, weights)
def test_it_is_so_for_all_layouts_and_of_the_lowest_rank(one, other, w, v):
    cuts, result = _combined([(one, w), (other, v)])
    reference = weighted([(one, w), (other, v)])
    assert distance(result, reference) < 1e-6
    for path, update in reference.items():
        at_least = max(int(torch.linalg.matrix_rank(update, rtol=1e-6)), 1)
        assert at_least <= _ranks(cuts)[path] <= min(update.shape)
    assert distance(result, weighted([(one, w), (other, 2 * v)])) > 1e-5  # control


@many
@given(layouts(), layouts(), weights)
def test_what_is_added_and_taken_away_leaves_the_first(one, other, w):
    cuts, result = _combined([(one, 1.0), (other, w), (other, -w)])
    alone, _ = _combined([(one, 1.0)])
    reference = dense(one)
    rest = {path: update for path, update in result.items() if path not in reference}
    assert distance({path: result[path] for path in reference}, reference) < 1e-6
    assert all(float(update.abs().max()) < 1e-9 for update in rest.values())
    assert {path: _ranks(cuts)[path] for path in reference} == _ranks(alone)  # what cancels takes no rank
    added = weighted([(one, 1.0), (other, w)])
    assert distance(added, weighted([(one, 1.0), (other, 0.0)])) > 1e-5  # control


@many
@given(layouts(), layouts(), layouts(), st.integers(1, 5))
def test_order_does_not_matter(one, two, three, rank):
    terms = [(one, 1.0), (two, -0.5), (three, 0.7)]
    adapters = {name: (_read(layout, name), weight) for name, (layout, weight) in _named(terms)}
    (first, reference), *others = (
        _combine(dict(order), rank=rank) for order in itertools.permutations(adapters.items())
    )
    for cuts, result in others:
        assert math.isclose(total_error(cuts), total_error(first), rel_tol=1e-6, abs_tol=1e-9)
        assert distance(result, reference) < 1e-6 or _is_tied(terms, rank)
    _, other = _combine({**adapters, "a2": (adapters["a2"][0], 1.7)}, rank=rank)
    assert distance(other, reference) > 1e-5  # control


def _is_tied(terms, rank):
    """Tell whether a cut lies between two nearly equal singular values, where the best one is not unique."""
    for update in weighted(terms).values():
        values = torch.linalg.svdvals(update)
        if rank < len(values) and values[rank - 1] - values[rank] < 1e-3 * values[0]:
            return True
    return False


@many
@given(layouts(), layouts(), weights, st.integers(1, 5))
def test_the_error_of_a_cut_is_what_the_singular_values_say(one, other, w, rank):
    exact = weighted([(one, 1.0), (other, w)])
    assume(all(float(update.abs().max()) > 0 for update in exact.values()))
    cuts, result = _combined([(one, 1.0), (other, w)], rank=rank)
    values = {path: torch.linalg.svdvals(update) for path, update in exact.items()}
    discarded = sum(float(found[rank:].square().sum()) for found in values.values())
    total = sum(float(found.square().sum()) for found in values.values())
    assert math.isclose(total_error(cuts), (discarded / total) ** 0.5, rel_tol=1e-6, abs_tol=1e-6)
    assert math.isclose(total_error(cuts), distance(result, exact), rel_tol=1e-6, abs_tol=1e-6)
    for cut in cuts:
        found = values[cut.path].square()
        expected = float((found[rank:].sum() / found.sum()).sqrt())
        assert math.isclose(cut.error, expected, rel_tol=1e-6, abs_tol=1e-6)
        assert cut.rank <= rank
        one_less = float((found[max(rank - 1, 0) :].sum() / found.sum()).sqrt())
        assert one_less > cut.error or cut.rank < rank  # control: a rank less is farther off


@many
@given(layouts(), layouts(), st.floats(0.01, 0.9))
def test_max_error_gives_the_lowest_rank_of_each_layer(one, other, max_error):
    cuts, _ = _combined([(one, 1.0), (other, 1.0)], max_error=max_error)
    exact = weighted([(one, 1.0), (other, 1.0)])
    for cut in cuts:
        values = torch.linalg.svdvals(exact[cut.path]).square()
        errors = [float((values[rank:].sum() / values.sum()).sqrt()) for rank in range(len(values) + 1)]
        assert errors[cut.rank] <= max_error + 1e-6
        assert cut.rank == 1 or errors[cut.rank - 1] > max_error - 1e-6  # control: one rank less is too few
