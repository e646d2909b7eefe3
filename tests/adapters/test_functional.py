"""The autograd functions against plain formulas, autograd and float64."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import linear

from lora_lightning.adapters.functional import (
    compute_dtype,
    dora_linear,
    dora_norm,
    draw_seed,
    lora_linear,
    low_rank_update,
    seeded_dropout,
)
from tests.models import gap

SCALING = 0.7
RANK, NUM_IN, NUM_OUT = 2, 5, 4


def problem(
    dtype: torch.dtype = torch.float64, lead: tuple[int, ...] = (2, 3), *, bias: bool = True
) -> dict[str, Tensor | None]:
    """Draw an input, a frozen weight, trainable factors and a magnitude; all are leaves."""
    drawn = {
        "x": torch.randn(*lead, NUM_IN, dtype=dtype),
        "weight": torch.randn(NUM_OUT, NUM_IN, dtype=dtype),
        "bias": torch.randn(NUM_OUT, dtype=dtype) if bias else None,
        "lora_a": torch.randn(RANK, NUM_IN, dtype=dtype),
        "lora_b": torch.randn(NUM_OUT, RANK, dtype=dtype),
        "magnitude": torch.rand(NUM_OUT, dtype=dtype) + 0.5,
    }
    for name in ("x", "lora_a", "lora_b", "magnitude"):
        drawn[name].requires_grad_()
    return drawn


def plain(problem: dict[str, Tensor | None], p: float = 0.0, seed: Tensor | None = None, *, dora: bool) -> Tensor:
    """Compute LoRA or DoRA as the papers write it; the norm is a constant, as in DoRA's section 4.3."""
    x, weight, bias, a, b, magnitude = problem.values()
    dropped = x if seed is None else x * mask_of(x, p, seed)
    output = linear(x, weight) + SCALING * linear(linear(dropped, a), b)
    if dora:
        output = output * (magnitude / norm_of(problem))
    return output if bias is None else output + bias


def fast(problem: dict[str, Tensor | None], p: float = 0.0, seed: Tensor | None = None, *, dora: bool) -> Tensor:
    x, weight, bias, a, b, magnitude = problem.values()
    if dora:
        return dora_linear(x, weight, bias, a, b, magnitude, norm_of(problem), SCALING, p, seed)
    return lora_linear(x, weight, bias, a, b, SCALING, p, seed)


def norm_of(problem: dict[str, Tensor | None]) -> Tensor:
    return (problem["weight"] + SCALING * problem["lora_b"] @ problem["lora_a"]).norm(dim=1).detach()


def mask_of(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return the mask that a seed stands for: 0 where an element is dropped, else 1 / (1 - p)."""
    return seeded_dropout(torch.ones_like(x), p, seed).detach()


def gradients(output: Tensor, problem: dict[str, Tensor | None], *, dora: bool) -> list[Tensor]:
    wanted = [problem[name] for name in ("x", "lora_a", "lora_b", *(["magnitude"] if dora else []))]
    return list(torch.autograd.grad((output.float() if output.dtype is torch.bfloat16 else output).sin().sum(), wanted))


CASES = pytest.mark.parametrize(("dora", "bias", "p"), [(d, b, p) for d in (0, 1) for b in (0, 1) for p in (0.0, 0.4)])


@CASES
def test_gradcheck(dora, bias, p):
    drawn = problem(bias=bool(bias))
    seed, norm = (torch.tensor(5) if p else None), norm_of(drawn)
    x, weight, b, lora_a, lora_b, magnitude = drawn.values()
    if dora:
        assert gradcheck(
            lambda *v: dora_linear(v[0], weight, b, v[1], v[2], v[3], norm, SCALING, p, seed),
            (x, lora_a, lora_b, magnitude),
        )
    else:
        assert gradcheck(lambda *v: lora_linear(v[0], weight, b, v[1], v[2], SCALING, p, seed), (x, lora_a, lora_b))


@CASES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_plain_formula(dora, bias, p, dtype, tolerance):
    drawn, dora = problem(dtype, bias=bool(bias)), bool(dora)
    seed = torch.tensor(7) if p else None
    actual, expected = fast(drawn, p, seed, dora=dora), plain(drawn, p, seed, dora=dora)
    assert actual.dtype is dtype
    assert gap(actual, expected) <= tolerance
    ours, reference = gradients(actual, drawn, dora=dora), gradients(expected, drawn, dora=dora)
    assert all(gap(*both) <= 10 * tolerance for both in zip(ours, reference, strict=True))
    if p:
        other = plain(drawn, p, torch.tensor(8), dora=dora)
        assert gap(actual, other) > 1e-2


@pytest.mark.parametrize("lead", [(), (3,), (2, 3, 4), (0,)])
@pytest.mark.parametrize("dora", [False, True])
def test_any_leading_dimensions(lead, dora):
    drawn = problem(lead=lead)
    output = fast(drawn, dora=dora)
    assert output.shape == (*lead, NUM_OUT)
    torch.testing.assert_close(output, plain(drawn, dora=dora))
    gradients(output, drawn, dora=dora)


@pytest.mark.parametrize("dora", [False, True])
def test_an_input_without_gradient(dora):
    drawn = problem()
    drawn["x"] = drawn["x"].detach()
    fast(drawn, dora=dora).sum().backward()
    assert drawn["x"].grad is None
    assert drawn["weight"].grad is None
    assert drawn["lora_a"].grad.abs().max() > 0


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_base_under_float32_adapters(dora, bias):
    exact = problem(torch.float32, (64,), bias=bias)
    rounded = dict(exact)
    for name in ("x", "weight", "bias"):
        rounded[name] = None if exact[name] is None else exact[name].detach().bfloat16()
    rounded["x"].requires_grad_()
    output, expected = fast(rounded, dora=dora), plain(exact, dora=dora)
    assert output.dtype is torch.bfloat16
    assert gap(output, expected) <= 2e-2
    ours, reference = gradients(output, rounded, dora=dora), gradients(expected, exact, dora=dora)
    assert [grad.dtype for grad in ours] == [torch.bfloat16] + [torch.float32] * (len(ours) - 1)
    assert all(gap(*both) <= 4e-2 for both in zip(ours, reference, strict=True))


@pytest.mark.parametrize("dora", [False, True])
def test_autocast(dora):
    drawn = problem(torch.float32, (64,))
    expected = gradients(plain(drawn, dora=dora), drawn, dora=dora)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fast(drawn, dora=dora)
        update = low_rank_update(drawn["x"], drawn["lora_a"], drawn["lora_b"], SCALING)
    assert output.dtype is update.dtype is torch.bfloat16
    ours = gradients(output, drawn, dora=dora)
    assert all(grad.dtype is torch.float32 for grad in ours)
    assert all(gap(*both) <= 4e-2 for both in zip(ours, expected, strict=True))


def test_compute_dtype():
    x = torch.ones(1)
    assert compute_dtype(x) is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(x) is torch.bfloat16
        assert compute_dtype(x.double()) is torch.float64
        assert compute_dtype(x.to("meta")) is torch.float32


def test_in_place_operations_may_follow():
    drawn = problem()
    expected = gradients((plain(drawn, dora=False) + 1).relu(), drawn, dora=False)
    output = fast(drawn, dora=False)
    output += 1
    output.relu_()
    ours = gradients(output, drawn, dora=False)
    assert all(gap(*both) <= 1e-10 for both in zip(ours, expected, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(fast(drawn, dora=True).relu_(), drawn, dora=True)


@pytest.mark.parametrize("dora", [False, True])
def test_second_derivatives_are_refused(dora):
    drawn = problem()
    (slope,) = torch.autograd.grad(fast(drawn, dora=dora).sin().sum(), drawn["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_torch_func():
    drawn = problem(lead=(3,))
    x, weight, bias, a, b, _ = (None if value is None else value.detach() for value in drawn.values())
    slope = torch.func.grad(lambda a: lora_linear(x, weight, bias, a, b, SCALING).sin().sum())(a)
    assert gap(slope, gradients(plain(drawn, dora=False), drawn, dora=False)[1]) <= 1e-10


def test_low_rank_update_is_the_difference():
    drawn = problem()
    x, weight, bias, a, b, _ = drawn.values()
    seed = torch.tensor(3)
    for p, given in ((0.0, None), (0.4, seed)):
        update = low_rank_update(x, a, b, SCALING, p, given)
        assert gap(update, lora_linear(x, weight, bias, a, b, SCALING, p, given) - linear(x, weight, bias)) <= 1e-10
    assert gradcheck(lambda x, a, b: low_rank_update(x, a, b, SCALING, 0.4, seed), (x, a, b))


def test_a_magnitude_of_zero_stays():
    drawn = problem()
    with torch.no_grad():
        drawn["magnitude"][1] = 0
    *_, slope = gradients(fast(drawn, dora=True), drawn, dora=True)
    assert slope[1] == 0
    assert slope.isfinite().all()


# Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_statistics(p, dtype):
    x = torch.ones(300, 400, dtype=dtype)
    dropped = seeded_dropout(x, p, torch.tensor(1))
    assert dropped.dtype is dtype
    assert sorted(dropped.float().unique().tolist()) == pytest.approx([0, 1 / (1 - p)], rel=1e-2)
    share = (dropped == 0).double().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    assert dropped.double().mean().item() == pytest.approx(1, abs=2e-2)
    by_column = (dropped == 0).double().mean(0)
    assert by_column.std().item() == pytest.approx((p * (1 - p) / 300) ** 0.5, rel=0.2)


def test_the_seed_decides_the_mask():
    x = torch.randn(50, 40)
    first, again, other = (seeded_dropout(x, 0.5, torch.tensor(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first != other).float().mean() == pytest.approx(0.5, abs=0.1)


def test_dropout_ignores_the_global_generator():
    before = torch.get_rng_state()
    seeded_dropout(torch.ones(10), 0.5, torch.tensor(1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    seeds = [int(draw_seed()) for _ in range(3)]
    torch.manual_seed(1)
    assert [int(draw_seed()) for _ in range(3)] == seeds
    assert len(set(seeds)) == 3


def test_dropout_of_a_transposed_input_keeps_values_in_place():
    x = torch.arange(1.0, 13.0).view(3, 4).t()
    assert not x.is_contiguous()
    dropped = seeded_dropout(x, 0.5, torch.tensor(4))
    assert torch.equal(dropped, torch.where(dropped == 0, 0, x * 2))
    assert (dropped == 0).any()


def test_dropout_operator_is_sound():
    """Checks the schema, the fake kernel and the gradient, as torch.compile relies on them."""
    x = torch.randn(4, 3, requires_grad=True)
    torch.library.opcheck(seeded_dropout, (x, 0.5, torch.tensor(1)), test_utils=("test_schema", "test_faketensor"))
    assert gradcheck(lambda x: seeded_dropout(x, 0.5, torch.tensor(1)), x.double())


# The norm


def almost_cancelling(share: float, rank: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Draw W, A, B in float32 with ‖W + s B A‖ about `share` of ‖W‖: a low-rank W plus noise."""
    num_out, num_in = 48, 64
    a, b = torch.randn(rank, num_in), torch.randn(num_out, rank)
    low_rank = -SCALING * (b.double() @ a.double())
    noise = torch.randn(num_out, num_in, dtype=torch.float64)
    scale = low_rank.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True) / (1.0001 - share**2) ** 0.5
    return (low_rank + share * scale * noise).float(), a, b


def exact_norm(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (weight.double() + SCALING * b.double() @ a.double()).norm(dim=1)


def unguarded_norm(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    cross, update = ((weight @ a.t()) * b).sum(1), ((b @ (a @ a.t())) * b).sum(1)
    return (weight.square().sum(1) + 2 * SCALING * cross + SCALING**2 * update).clamp_min(0).sqrt()


def relative_error(norm: Tensor, exact: Tensor) -> float:
    return float(((norm.double() - exact) / exact).abs().max())


@pytest.mark.parametrize("share", [1.0, 0.1, 1e-2, 1e-3])
def test_norm_is_accurate(share):
    weight, a, b = almost_cancelling(share)
    exact = exact_norm(weight, a, b)
    assert (exact / weight.double().norm(dim=1)).median() == pytest.approx(share, rel=0.1)
    norm = dora_norm(weight, a, b, SCALING, weight.square().sum(1))
    assert norm.dtype is torch.float32
    assert relative_error(norm, exact) <= 1e-5
    if share <= 1e-2:
        assert relative_error(unguarded_norm(weight, a, b), exact) > 1e-4


def test_norm_with_some_rows_cancelling():
    weight, a, b = almost_cancelling(1e-3)
    weight[::2] = torch.randn(weight[::2].shape)
    assert relative_error(dora_norm(weight, a, b, SCALING, weight.square().sum(1)), exact_norm(weight, a, b)) <= 1e-5


def test_norm_of_a_bfloat16_weight_is_float32():
    weight, a, b = almost_cancelling(1.0)
    weight = weight.bfloat16()
    norm = dora_norm(weight, a, b, SCALING, weight.float().square().sum(1))
    assert norm.dtype is torch.float32
    assert relative_error(norm, exact_norm(weight, a, b)) <= 1e-5
    rounded = dora_norm(weight, a.bfloat16(), b.bfloat16(), SCALING, weight.square().sum(1))
    assert rounded.dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dora_norm(weight, a, b, SCALING, weight.float().square().sum(1)), norm)


def test_norm_of_nothing_is_positive():
    zero = torch.zeros(3, 4)
    norm = dora_norm(zero, torch.zeros(2, 4), torch.zeros(3, 2), SCALING, zero.sum(1))
    assert (norm > 0).all()
    assert (norm < 1e-20).all()


def test_norm_of_the_base_is_exact():
    """With B at zero the ratio m / ‖V‖ is exactly one, so the first forward is the base's."""
    weight, a, b = almost_cancelling(1.0)
    squared = weight.square().sum(1)
    assert torch.equal(dora_norm(weight, a, torch.zeros_like(b), SCALING, squared), squared.sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norm_operator_is_sound(dtype):
    weight, a, b = (tensor.to(dtype) for tensor in almost_cancelling(1.0))
    torch.library.opcheck(dora_norm, (weight, a, b, SCALING, weight.square().sum(1)), test_utils="test_faketensor")
