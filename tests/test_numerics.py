"""The numerics contract itself: what it lets pass, what it catches, and the scales of gradients."""

import re

import pytest
import torch
from hypothesis import given, settings
from numerics import Errors, assert_close, assert_close_in_draws, gradient_scales
from strategies import Case, cases

from attnfuse.reference import attention
from attnfuse.spec import Shape, parse_spec

EXACT = torch.tensor([1.0, -4.0, 0.5], dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def off_by(error: float) -> torch.Tensor:
    return torch.tensor([1.0, -4.0, 0.5 + error])


def test_an_exact_original_leaves_four_epsilons_of_the_scale() -> None:
    assert_close(off_by(3.9 * EPS * 4), EXACT.float(), EXACT)
    with pytest.raises(AssertionError, match=r"result: error 1\.9.*e-06 at \[2\].* is above the limit 1\.907e-06 = "):
        assert_close(off_by(4.1 * EPS * 4), EXACT.float(), EXACT)


def test_the_error_of_the_original_counts_twice() -> None:
    assert_close(off_by(1.99e-3), off_by(1e-3), EXACT)
    with pytest.raises(
        AssertionError, match=re.escape("= 2·1.000e-03 (error of the original) + 4·1.192e-07 (eps)·4.000e")
    ):
        assert_close(off_by(2.1e-3), off_by(1e-3), EXACT)


def test_a_scale_replaces_the_greatest_value() -> None:
    assert_close(off_by(3.9 * EPS * 100), EXACT.float(), EXACT, scale=100.0)
    with pytest.raises(AssertionError, match=re.escape("dq: error 3.994e-06 at [2]")) as caught:
        assert_close(off_by(4e-6), EXACT.float(), EXACT, 1.0, "dq")
    for part in ("actual 0.500003994", "original 0.5", "exact 0.5", "1.000e+00 (scale)", "1 of 3 elements are"):
        assert part in str(caught.value)


def test_epsilon_is_that_of_the_dtype() -> None:
    assert_close(off_by(0.03).bfloat16(), EXACT.bfloat16(), EXACT)
    with pytest.raises(AssertionError):
        assert_close(off_by(0.03).half(), EXACT.half(), EXACT)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_to_agree_in_place(special: float) -> None:
    exact, other = EXACT.clone(), EXACT.clone()
    exact[1] = special
    assert_close(exact.float(), exact.float(), exact)
    for actual, original, which in ((other, exact, "actual"), (exact, other, "original")):
        message = (
            f"result: {which} and exact differ in NaN, inf or finite at 1 of 3 elements, first at [1]: {which} -4.0"
        )
        with pytest.raises(AssertionError, match=re.escape(message)):
            assert_close(actual.float(), original.float(), exact)
    with pytest.raises(AssertionError):
        assert_close(-exact.float() if special == special else EXACT.float(), exact.float(), exact)


def test_operands_have_to_fit() -> None:
    with pytest.raises(AssertionError, match=re.escape("shapes differ: actual [2], original [3], exact [3]")):
        assert_close(EXACT[:2], EXACT, EXACT)
    with pytest.raises(AssertionError, match=re.escape("exact is torch.float32, expected float64")):
        assert_close(EXACT, EXACT, EXACT.float())
    empty = torch.zeros(0, 3)
    assert_close(empty, empty, empty.double())


def test_gradient_scales_are_sums_of_absolute_terms() -> None:
    spec = parse_spec("slope: f32[:]; s*0.5 + slope[h]*float(n) where n <= m else -inf")
    case = Case(spec, Shape(2, 4, 2, 5, 6, 4, 3), 5)
    x = case.tensors(torch.float64)
    plain = [y.detach() for y in (x.q, x.k, x.v, *x.leaves)]
    q, slope = plain[0], plain[3]
    k, v = (y.repeat_interleave(2, 1) for y in plain[1:3])
    scores = (q @ k.mT * 0.5 + slope[:, None, None] * torch.arange(6)).masked_fill(
        torch.arange(6) > torch.arange(5)[:, None], -torch.inf
    )
    weights = scores.softmax(-1)
    dP = x.dout @ v.mT
    dS = weights * (dP - (weights * dP).sum(-1, keepdim=True))
    scales = gradient_scales(spec, x.q, x.k, x.v, x.leaves, x.dout)
    grouped = (2, 2, 2, 6, 4)
    assert scales == pytest.approx(
        {
            "q": float(((dS * 0.5).abs() @ k.abs()).max()),
            "k": float(((dS * 0.5).abs().mT @ q.abs()).view(grouped).sum(2).max()),
            "v": float((weights.mT @ x.dout.abs()).view(2, 2, 2, 6, 3).sum(2).max()),
            "slope": float((dS.abs() * torch.arange(6)).sum((0, 2, 3)).max()),
        }
    )


@pytest.mark.parametrize("all_of_it", [False, True])
def test_a_sink_adds_up_terms_over_the_depth_too(all_of_it: bool) -> None:
    """They cancel in `dout·out`, in part or to nothing, which the scale has to tell."""
    spec = parse_spec("sinks: f32[:]; s sink sinks[h]")
    x = Case(spec, Shape(2, 3, 3, 5, 6, 4, 7), 1).tensors(torch.float64)
    q, k, v, sinks = (y.detach() for y in (x.q, x.k, x.v, *x.leaves))
    dout = x.dout
    if all_of_it:
        v, dout = torch.ones_like(v), torch.zeros_like(dout)
        dout[..., 0], dout[..., 1] = 1.0, -1.0
    sink = sinks[None, :, None, None].expand(2, 3, 5, 1)
    weights = torch.cat([q @ k.mT, sink], -1).softmax(-1)
    terms = weights[..., 6:] * dout * (weights[..., :6] @ v)
    assert gradient_scales(spec, x.q, x.k, v, x.leaves, dout)["sinks"] == pytest.approx(
        float(terms.abs().sum((0, 2, 3)).max())
    )


@settings(max_examples=60)
@given(cases())
def test_gradients_stay_below_their_scales(case: Case) -> None:
    x = case.tensors(torch.float64)
    out, _ = attention(case.spec, x.q, x.k, x.v, x.leaves, keep=x.keep)
    scales = gradient_scales(case.spec, x.q, x.k, x.v, x.leaves, x.dout, keep=x.keep)
    named = {"q": x.q, "k": x.k, "v": x.v}
    named |= {leaf.name: y for leaf, y in zip(case.spec.leaves, x.leaves, strict=True) if y.requires_grad}
    for name, gradient in zip(
        named, torch.autograd.grad(out, [*named.values()], x.dout, allow_unused=True), strict=True
    ):
        if gradient is not None and bool(gradient.isfinite().all()):
            assert float(gradient.abs().max()) <= scales[name] * (1 + 1e-6)


def test_a_gradient_that_is_zero_has_a_scale() -> None:
    spec = parse_spec("bias: f32[:, :]; s + bias[b, m]")
    x = Case(parse_spec("s"), Shape(1, 1, 1, 3, 4, 4, 4), 0).tensors(torch.float64)
    bias = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    out, _ = attention(spec, x.q, x.k, x.v, [bias])
    (gradient,) = torch.autograd.grad(out, bias, x.dout)
    assert float(gradient.abs().max()) < 1e-14
    assert gradient_scales(spec, x.q, x.k, x.v, [bias], x.dout)["bias"] > 0.1


class TestDraws:
    def test_one_beyond_the_limit_is_left_to_the_others(self) -> None:
        draws = [Errors(5.0, 0.1, 1.0, 0.01), Errors(0.2, 0.3, 1.0, 0.01), Errors(0.1, 0.1, 1.0, 0.01)]
        assert draws[0].tested > draws[0].limit
        assert_close_in_draws(draws)

    def test_errors_are_shares_of_each_scale(self) -> None:
        draws = [Errors(0.5, 0.1, 1.0, 0.01), Errors(50.0, 10.0, 100.0, 0.01), Errors(0.1, 3.0, 1.0, 0.01)]
        with pytest.raises(AssertionError, match=r"x: of 3 draws the median error, 5.000e-01 of the scale"):
            assert_close_in_draws(draws, "x")

    def test_what_is_wrong_in_most_draws(self) -> None:
        with pytest.raises(AssertionError, match=r"above the limit 2.000e-01 = 2·8.000e-02"):
            assert_close_in_draws([Errors(0.25, share, 1.0, 0.01) for share in (0.1, 0.08, 0.05)])

    @pytest.mark.parametrize("tested", [0.0, 0.1, float("nan")])
    def test_where_the_exact_result_is_zero(self, tested: float) -> None:
        draws = [Errors(tested, 0.0, 0.0, 0.01), Errors(0.1, 0.1, 1.0, 0.01)]
        if tested == 0:
            assert_close_in_draws(draws)
        else:
            with pytest.raises(AssertionError):
                assert_close_in_draws(draws)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_judges_nothing(scale: float) -> None:
    x = torch.ones(3)
    with pytest.raises(AssertionError, match=r"the scale is (nan|inf)"):
        assert_close(x, x, x.double(), scale)
