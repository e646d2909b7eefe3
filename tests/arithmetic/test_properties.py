"""Properties of sums and cuts over random layouts of rank, scaling and method, each beside a control."""

import itertools
import math
import tempfile
from pathlib import Path

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lora_lightning import combine
from tests.arithmetic.layouts import Layout, dense, distance, layouts, read_dense, weighted, write

phases = (Phase.explicit, Phase.generate)  # an example takes a fifth of a second: what fails is not made smaller
many = settings(max_examples=200, derandomize=True, deadline=None, database=None, phases=phases)
some = settings(many, max_examples=25)
weights = st.floats(-2, 2).filter(lambda weight: abs(weight) > 0.05)


def _combined(folder: Path, terms: list[tuple[Layout, float]], **options):
    """Write adapters, combine them, and return the report with the dense result."""
    given_terms = {
        f"a{index}": (write(layout, folder / f"in{index}"), weight) for index, (layout, weight) in enumerate(terms)
    }
    report = combine(given_terms, output_dir=folder / "out", **options)
    return report, read_dense(folder / "out")


@many
@given(layouts(), layouts(), weights, weights)
def test_the_exact_sum_is_the_sum_of_the_updates(one, other, w, v):
    with tempfile.TemporaryDirectory() as folder:
        report, result = _combined(Path(folder), [(one, w), (other, v)])
    reference = weighted([(one, w), (other, v)])
    assert distance(result, reference) < 1e-6
    assert report.error == 0
    for path, update in reference.items():
        at_least = max(int(torch.linalg.matrix_rank(update, rtol=1e-6)), 1)
        assert at_least <= report.ranks[path] <= min(update.shape)
    assert distance(result, weighted([(one, w), (other, 2 * v)])) > 1e-5  # control: another weight is noticed


@some
@given(layouts(), layouts(), weights)
def test_what_is_added_and_taken_away_leaves_the_first(one, other, w):
    with tempfile.TemporaryDirectory() as folder:
        report, result = _combined(Path(folder), [(one, 1.0), (other, w), (other, -w)])
        alone, _ = _combined(Path(folder) / "alone", [(one, 1.0)])
    reference = dense(one)
    rest = {path: update for path, update in result.items() if path not in reference}
    assert distance({path: result[path] for path in reference}, reference) < 1e-6
    assert all(float(update.abs().max()) < 1e-6 for update in rest.values())
    assert {path: report.ranks[path] for path in reference} == alone.ranks  # what cancels takes no rank
    added = weighted([(one, 1.0), (other, w)])
    assert distance(added, weighted([(one, 1.0), (other, 0.0)])) > 1e-3  # control


@some
@given(layouts(), layouts(), layouts(), st.integers(1, 5))
def test_order_does_not_matter(one, two, three, rank):
    terms = [(one, 1.0), (two, -0.5), (three, 0.7)]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for index, order in enumerate(itertools.permutations(terms)):
            results.append(_combined(Path(folder) / str(index), list(order), rank=rank))
    (first, reference), *others = results
    for report, result in others:
        assert math.isclose(report.error, first.error, rel_tol=1e-6, abs_tol=1e-9)
        assert distance(result, reference) < 1e-4 or _is_tied(terms, rank)
    assert distance(reference, weighted([*terms[:2], (three, 1.7)])) > 1e-3  # control


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
    with tempfile.TemporaryDirectory() as folder:
        report, result = _combined(Path(folder), [(one, 1.0), (other, w)], rank=rank)
    exact = weighted([(one, 1.0), (other, w)])
    values = {path: torch.linalg.svdvals(update) for path, update in exact.items()}
    discarded = sum(float(one_values[rank:].square().sum()) for one_values in values.values())
    total = sum(float(one_values.square().sum()) for one_values in values.values())
    assert math.isclose(report.error, (discarded / total) ** 0.5, rel_tol=1e-6, abs_tol=1e-6)
    assert math.isclose(report.error, distance(result, exact), rel_tol=1e-4, abs_tol=1e-6)
    for layer in report.layers:
        expected = float((values[layer.path][rank:].square().sum() / values[layer.path].square().sum()).sqrt())
        assert math.isclose(layer.error, expected, rel_tol=1e-6, abs_tol=1e-6)
        assert layer.rank <= rank


@some
@given(layouts(), layouts(), st.floats(0.01, 0.9))
def test_max_error_gives_the_lowest_rank_of_each_layer(one, other, max_error):
    with tempfile.TemporaryDirectory() as folder:
        report, _ = _combined(Path(folder), [(one, 1.0), (other, 1.0)], max_error=max_error)
    exact = weighted([(one, 1.0), (other, 1.0)])
    for layer in report.layers:
        values = torch.linalg.svdvals(exact[layer.path]).square()
        errors = [float((values[rank:].sum() / values.sum()).sqrt()) for rank in range(len(values) + 1)]
        assert errors[layer.rank] <= max_error + 1e-6
        assert layer.rank == 1 or errors[layer.rank - 1] > max_error - 1e-6  # control: one rank less is too few
