"""The oracle against the spellings that it stands for, written in plain PyTorch: values, gradients, rows without keys."""

import re
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close, gradient_scales
from scalar import Scalar, evaluate
from strategies import Case, Tensors, bools, cases, float_expressions, ints, spec_of
from torch import Tensor

from attnfuse.reference import Evaluator, attention
from attnfuse.score import Call, Const, Expr, Program, S, parse_expr
from attnfuse.spec import AttentionSpec, Shape, parse_spec

SHAPE = Shape(2, 4, 2, 5, 7, 8, 6)
INF = float("inf")
# Left padding: with the causal mask, the first three rows of the second batch have no key.
PAD = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 1, 1]], dtype=torch.bool)
M_INDEX, N_INDEX = torch.arange(SHAPE.M)[:, None], torch.arange(SHAPE.N)
CAUSAL = N_INDEX <= M_INDEX
VISIBLE = CAUSAL & PAD[:, None, None, :]  # [B, 1, M, N]

Spelling = Callable[..., Tensor]


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    return weights @ v.repeat_interleave(weights.shape[1] // v.shape[1], 1)


def lowest(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


def additive(allowed: Tensor, scores: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=scores.dtype).masked_fill(~allowed, lowest(scores))


def added_min(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = scores_of(q, k) * 0.25
    return weighted((scores + additive(CAUSAL & pad[:, None, None, :], scores)).softmax(-1), v)


def chosen_min(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = scores_of(q, k) / 4.0
    return weighted(torch.where(CAUSAL & pad[:, None, None, :], scores, lowest(scores)).softmax(-1), v)


def filled_with_inf(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = scores_of(q, k) * 0.25
    return weighted(scores.masked_fill(~(CAUSAL & pad[:, None, None, :]), -INF).softmax(-1), v)


def library(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    mask = (CAUSAL & pad[:, None, None, :]).expand(2, 4, 5, 7)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True)


def gpt_neo(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores = torch.where(CAUSAL & (N_INDEX > M_INDEX - 3), scores, lowest(scores))
    return weighted((scores + additive(pad[:, None, None, :], scores)).softmax(-1), v)


def added_twice(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores = scores + additive(CAUSAL, scores)
    return weighted((scores + additive(pad[:, None, None, :], scores)).softmax(-1), v)


def gpt_oss(q: Tensor, k: Tensor, v: Tensor, pad: Tensor, sinks: Tensor) -> Tensor:
    scores = scores_of(q, k) * 0.25
    scores = scores + additive(CAUSAL & pad[:, None, None, :], scores)
    scores = torch.cat((scores, sinks[None, :, None, None].expand(2, -1, 5, 1).to(scores.dtype)), -1)
    scores = scores - scores.amax(-1, keepdim=True)
    return weighted(scores.softmax(-1)[..., :-1], v)


def softcapped(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = 2.0 * torch.tanh(scores_of(q, k) * 0.25 / 2.0)
    return weighted((scores + additive(CAUSAL, scores)).softmax(-1), v)


def t5(q: Tensor, k: Tensor, v: Tensor, bucket: Tensor, table: Tensor) -> Tensor:
    bias = table[bucket[N_INDEX - M_INDEX + 4]].permute(2, 0, 1)[None]
    return weighted((scores_of(q, k) + bias).softmax(-1), v)


def alibi(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, pad: Tensor) -> Tensor:
    scores = scores_of(q, k) * 0.25 + slope[:, None, None] * N_INDEX
    return weighted(scores.masked_fill(~(CAUSAL & pad[:, None, None, :]), lowest(scores)).softmax(-1), v)


def dense_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)


def arithmetic_mask(q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
    scores = scores_of(q, k) * 0.25 + (1.0 - (CAUSAL & pad[:, None, None, :]).to(q.dtype)) * -10000.0
    return weighted(scores.softmax(-1), v)


# name: spec, spelling
PAD_LEAF = "pad: bool[:, :]; "
SPELLINGS: dict[str, tuple[str, Spelling]] = {
    "added min": (PAD_LEAF + "s*0.25 where n <= m & pad[b, n] else +min", added_min),
    "chosen min": (PAD_LEAF + "s/4.0 where n <= m & pad[b, n] else =min", chosen_min),
    "filled with -inf": (PAD_LEAF + "s*0.25 where n <= m & pad[b, n] else -inf", filled_with_inf),
    "library, bool mask": (PAD_LEAF + "s*0.25 where n <= m & pad[b, n] else 0row", library),
    "GPT-Neo": (PAD_LEAF + "s where n <= m & n > m - 3 else =min where pad[b, n] else +min", gpt_neo),
    "added twice": (PAD_LEAF + "s where n <= m else +min where pad[b, n] else +min", added_twice),
    "gpt-oss": (PAD_LEAF + "sinks: f32[:]; s*0.25 where n <= m & pad[b, n] else +min sink sinks[h]", gpt_oss),
    "softcap": (PAD_LEAF + "2.0*tanh(s*0.25/2.0) where n <= m else +min", softcapped),
    "T5": ("bucket: i64[:]; table: f32[:, :]; s + table[bucket[n - m + M - 1], h]", t5),
    "ALiBi": ("slope: f32[:]; pad: bool[:, :]; s*0.25 + slope[h]*n where n <= m & pad[b, n] else =min", alibi),
    "dense bias": (f"bias: f32[:, :, :, :]; s*{8**-0.5!r} + bias[b, h, m, n]", dense_bias),
    "arithmetic mask": (
        PAD_LEAF + "s*0.25 + where(n <= m & pad[b, n], 0.0, -10000.0)",
        arithmetic_mask,
    ),
}


def operands(spec: AttentionSpec, dtype: torch.dtype) -> Tensors:
    """The same numbers in every dtype."""
    x = Case(spec, SHAPE, 11).tensors(torch.float32)
    q, k, v, dout = (y.detach().to(dtype).requires_grad_() for y in (x.q, x.k, x.v, x.dout))
    leaves = [PAD if leaf.name == "pad" else y.detach() for leaf, y in zip(spec.leaves, x.leaves, strict=True)]
    leaves = [y.to(dtype).requires_grad_() if y.is_floating_point() else y for y in leaves]
    return Tensors(q, k, v, leaves, dout.detach(), None)


def gradients(out: Tensor, x: Tensors) -> dict[str, Tensor]:
    wanted = {"q": x.q, "k": x.k, "v": x.v, **{f"leaf {at}": y for at, y in enumerate(x.leaves) if y.requires_grad}}
    return dict(zip(wanted, torch.autograd.grad(out, tuple(wanted.values()), x.dout), strict=True))


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_in_float64(name: str) -> None:
    text, spelling = SPELLINGS[name]
    x = operands(parse_spec(text), torch.float64)
    expected = spelling(x.q, x.k, x.v, *x.leaves)
    out, _ = attention(parse_spec(text), x.q, x.k, x.v, x.leaves)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    theirs, ours = gradients(expected, x), gradients(out, x)
    for wanted, gradient in theirs.items():
        torch.testing.assert_close(
            ours[wanted], gradient, rtol=1e-11, atol=1e-12, equal_nan=True, msg=lambda text, w=wanted: f"{w}: {text}"
        )


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_in_float32(name: str) -> None:
    text, spelling = SPELLINGS[name]
    spec = parse_spec(text)
    x, wide = operands(spec, torch.float32), operands(spec, torch.float64)
    exact = spelling(wide.q, wide.k, wide.v, *wide.leaves)
    original = spelling(x.q, x.k, x.v, *x.leaves)
    actual, lse = attention(spec, x.q, x.k, x.v, x.leaves, dtype=torch.float32)
    assert actual.dtype == lse.dtype == torch.float32
    assert_close(actual, original, exact, what="out")
    scales = gradient_scales(spec, x.q, x.k, x.v, x.leaves, x.dout)
    ours, theirs, exactly = gradients(actual, x), gradients(original, x), gradients(exact, wide)
    named = {f"leaf {at}": leaf.name for at, leaf in enumerate(spec.leaves)}
    for wanted, gradient in ours.items():
        assert_close(gradient, theirs[wanted], exactly[wanted], scales[named.get(wanted, wanted)], wanted)


def test_rows_without_keys_in_value_and_gradient() -> None:
    def of(fill: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        spec = parse_spec(f"pad: bool[:, :]; s*0.25 where n <= m & pad[b, n] else {fill}")
        x = operands(spec, torch.float64)
        out, _ = attention(spec, x.q, x.k, x.v, x.leaves)
        return out[1, :, :3], x.v[1].mean(-2).repeat_interleave(2, 0)[:, None], gradients(out, x)

    out, _, grads = of("-inf")
    assert bool(out.isnan().all())
    assert bool(grads["v"][1].isnan().all())
    assert not bool(grads["q"][1, :, :3].any())
    out, _, grads = of("0row")
    assert not bool(out.any())
    assert not bool(grads["q"][1, :, :3].any())
    for fill, flows in (("+min", True), ("=min", False)):
        out, mean, grads = of(fill)
        torch.testing.assert_close(out, mean.expand_as(out))
        assert bool(grads["q"][1, :, :3].any()) == flows


# --- every program ---------------------------------------------------------------------------------------------------


def spelled_out(case: Case, x: Tensors, dtype: torch.dtype = torch.float64) -> Tensor:
    """The tiers one after the other on the scores, as a model would write them."""
    program = case.spec.program
    q, k, v = (y.to(dtype) for y in (x.q, x.k, x.v))
    raw = scores_of(q, k)
    values = Evaluator(case.spec, x.leaves, (), raw, case.shape.Hkv, dtype)
    scores = values.of(program.body).to(dtype)
    for tier in program.tiers:
        allowed = values.of(tier.allowed)
        if tier.fill == "+min":
            scores = scores + additive(allowed, scores)
            # what is excluded gives its body no gradient, not even NaN
            scores = scores.masked_fill(scores == -INF, -INF)
        else:
            scores = torch.where(allowed, scores, lowest(scores) if tier.fill == "=min" else -INF)
    if program.sink is not None:
        sink = values.of(program.sink)[..., :1].to(dtype)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
        if any(tier.fill == "0row" for tier in program.tiers):
            weights = weights.masked_fill((scores == -INF).all(-1, keepdim=True), 0.0)
    if x.keep is not None:
        weights = weights * x.keep / (1 - case.spec.dropout)  # NaN stays, as in F.dropout
    return weighted(weights, v)


@settings(max_examples=150)
@given(cases())
def test_any_program_is_its_tiers_spelled_out(case: Case) -> None:
    x = case.tensors(torch.float64)
    expected = spelled_out(case, x)
    out, _ = attention(case.spec, x.q, x.k, x.v, x.leaves, keep=x.keep)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    inputs = [y for y in (x.q, x.k, x.v, *x.leaves) if y.requires_grad]
    theirs = torch.autograd.grad(expected, inputs, x.dout, allow_unused=True)
    ours = torch.autograd.grad(out, inputs, x.dout, allow_unused=True)
    for actual, gradient in zip(ours, theirs, strict=True):
        if gradient is None or actual is None:
            assert not any(y is not None and bool(y.any()) for y in (actual, gradient))
            continue
        exact = actual.dtype == torch.float64  # leaves are float32, and so is the sum that is their gradient
        rtol, atol = (1e-10, 1e-12) if exact else (1e-5, 1e-5)
        torch.testing.assert_close(actual, gradient, rtol=rtol, atol=atol, equal_nan=True)


@settings(max_examples=200)
@given(st.one_of(ints(3, small=True), bools(3, small=True), float_expressions(3)), st.integers(0, 99))
def test_expressions_over_all_indices_are_those_of_each_index(expr: Expr, seed: int) -> None:
    case = Case(
        spec_of(Program(Call("where", (Call("eq", (expr, expr)), S, Const(0.0))))), Shape(2, 2, 1, 3, 4, 4, 4), seed
    )
    x = case.shape
    leaves = dict(zip((leaf.name for leaf in case.spec.leaves), case.tensors().leaves, strict=True))
    scores = torch.randn(x.B, x.H, x.M, x.N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = Evaluator(case.spec, list(leaves.values()), (), scores, x.Hkv, torch.float64).of(expr)
    sizes = {"B": x.B, "H": x.H, "Hkv": x.Hkv, "M": x.M, "N": x.N}

    def read(leaf: str, indices: tuple[int, ...]) -> Scalar:
        element = leaves[leaf][indices].item()
        return np.float64(element) if isinstance(element, float) else element

    for b, h, m, n in product(range(x.B), range(x.H), range(x.M), range(x.N)):
        env = {**sizes, "b": b, "h": h, "m": m, "n": n, "s": np.float64(scores[b, h, m, n].item())}
        assert found[b, h, m, n].item() == pytest.approx(evaluate(expr, env, read), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("text", ["n/3", "tanh(n)", "pow(n, 3)", "exp(m)", "sqrt(n)", "log(n + 1)", "rsqrt(n + 2)"])
def test_functions_of_integers_are_computed_in_the_dtype(text: str) -> None:
    scores = torch.zeros(1, 1, 1, 5, dtype=torch.float64)
    found = Evaluator(parse_spec("s"), [], (), scores, 1, torch.float64).of(parse_expr(text))
    assert found.dtype == torch.float64
    for n in range(5):
        expected = evaluate(parse_expr(text), {"n": n, "m": 0}, lambda leaf, indices: 0)
        assert found[0, 0, 0, n].item() == pytest.approx(expected, rel=1e-14)


def test_gpt_oss_gives_its_sink_a_gradient() -> None:
    spec = parse_spec(SPELLINGS["gpt-oss"][0])
    x = operands(spec, torch.float64)
    out, _ = attention(spec, x.q, x.k, x.v, x.leaves)
    assert bool(gradients(out, x)["leaf 1"].all())
    assert not bool(out[1, :, :3].any()), "beside a sink, min has no weight"


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    x = operands(parse_spec("sinks: f32[:]; s"), torch.float64)
    none = torch.full((4,), -INF, dtype=torch.float64, requires_grad=True)
    for fill in ("+min", "0row"):
        mask = f"where n < m else {fill}"
        with_sink, _ = attention(parse_spec(f"sinks: f32[:]; s {mask} sink sinks[h]"), x.q, x.k, x.v, [none])
        without, _ = attention(parse_spec(f"s {mask}"), x.q, x.k, x.v, [])
        torch.testing.assert_close(with_sink, without)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(with_sink, (x.q, none), x.dout))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads(kv_heads: int) -> None:
    x = Case(parse_spec("s"), SHAPE._replace(Hkv=kv_heads), 3).tensors(torch.float64)
    expected = F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, scale=0.25, enable_gqa=True)
    out, _ = attention(parse_spec("s*0.25 where n <= m else -inf"), x.q, x.k, x.v, [])
    torch.testing.assert_close(out, expected)


def test_dropout_keeps_and_scales() -> None:
    x = operands(parse_spec("s"), torch.float64)
    keep = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    out, lse = attention(parse_spec("dropout 0.4; s"), x.q, x.k, x.v, [], keep=keep)
    weights = scores_of(x.q, x.k).softmax(-1) * keep / 0.6
    torch.testing.assert_close(out, weighted(weights, x.v))
    torch.testing.assert_close(lse, scores_of(x.q, x.k).logsumexp(-1))
    plain, _ = attention(parse_spec("dropout 0.4; s"), x.q, x.k, x.v, [])
    torch.testing.assert_close(plain, weighted(scores_of(x.q, x.k).softmax(-1), x.v))


def test_lse_of_every_kind_of_row() -> None:
    x = operands(parse_spec("s"), torch.float64)
    raw = scores_of(x.q, x.k)
    of_keys = raw.masked_fill(N_INDEX >= M_INDEX, -INF).logsumexp(-1)
    for fill, empty in (
        ("-inf", -INF),
        ("0row", -INF),
        ("+min", torch.finfo(torch.float32).min),
        ("=min", torch.finfo(torch.float32).min),
        ("+min sink 0.5", -INF),
    ):
        _, lse = attention(parse_spec(f"s where n < m else {fill}"), x.q, x.k, x.v, [])
        assert bool((lse[:, :, 0] == empty).all())
        torch.testing.assert_close(lse[:, :, 1:], of_keys[:, :, 1:])


def test_the_program_knows_the_sizes() -> None:
    x = operands(parse_spec("s"), torch.float64)
    expected, _ = attention(parse_spec("s where n < 3 else -inf"), x.q, x.k, x.v, [])
    out, _ = attention(parse_spec("s where n < i1 + Hkv - 2 else -inf"), x.q, x.k, x.v, [], sizes=(9, 3))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("fill", ["-inf", "+min", "=min", "0row"])
def test_no_keys_at_all(fill: str) -> None:
    x = operands(parse_spec("s"), torch.float64)
    out, lse = attention(parse_spec(f"s where n <= m else {fill}"), x.q, x.k[:, :, :0], x.v[:, :, :0], [])
    assert out.shape == (2, 4, 5, 6)
    assert not bool(out.any())
    assert bool((lse == -INF).all())


# --- loads outside their leaf ----------------------------------------------------------------------------------------

OUTSIDE = "x: f32[:]; "


@pytest.mark.parametrize(
    "guarded",
    [
        "s + where(n >= m, x[n - m], 0.0)",
        "s + x[n - m] where n >= m else -inf",
        "s + x[n - m] where n >= m else 0row",
        "s + x[n - m] where n >= m else =min",
        "s + x[n - m - 3] where n >= m + 3 else =min",
        "s where n >= m & x[n - m] > 0.0 else +min",
        "s where n < m | x[n - m] > 0.0 else +min",
        "s where ~(n < m | x[n - m] <= 0.0) else +min",
        "s where n >= m else -inf where x[n - m] > 0.0 else +min",
        "s + x[max(n - m, 0)]",
        "s + where(m > 0, x[n // max(m, 1)], 0.0)",
        "s + where(m > 0, n // m, 0)",
        "s + where(n >= m & x[n - m] > 0.0, 1.0, 0.0)",
    ],
)
def test_guarded_loads_are_not_read(guarded: str) -> None:
    x = operands(parse_spec("s"), torch.float64)
    outside = (N_INDEX - M_INDEX) < 0
    by_difference = torch.linspace(-1, 1, 7, dtype=torch.float64)
    spread = by_difference[(N_INDEX - M_INDEX).clamp(min=0)].masked_fill(outside, torch.nan)
    out, _ = attention(parse_spec(OUTSIDE + guarded), x.q, x.k, x.v, [by_difference])
    assert not bool(out.isnan().any())
    if "x[n - m]" in guarded:
        # the same from a leaf of all (m, n) that is NaN where nothing may be read
        dense = parse_spec(f"x: f32[:, :]; {guarded.replace('x[n - m]', 'x[m, n]')}")
        expected, _ = attention(dense, x.q, x.k, x.v, [spread])
        torch.testing.assert_close(out, expected)


def test_a_guarded_load_gives_no_gradient_to_the_element_at_the_edge() -> None:
    x = operands(parse_spec("s"), torch.float64)
    leaf = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    out, _ = attention(parse_spec(OUTSIDE + "s + where(n > m, x[n - m], 0.0)"), x.q, x.k, x.v, [leaf])
    (gradient,) = torch.autograd.grad(out, leaf, x.dout)
    assert gradient[0] == 0
    assert bool(gradient[1:].all())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("s + x[n - m]", "x[n - m] reads dimension 0 of x [7] at -4 to 6"),
        ("s + x[n + 1]", "x[n + 1] reads dimension 0 of x [7] at 1 to 7"),
        ("s + x[n - m] where n >= m - 1 else -inf", "x[n - m] reads dimension 0 of x [7] at -4 to 6"),
        ("s where x[n - m] > 0.0 else -inf", "x[n - m] reads dimension 0 of x [7] at -4 to 6"),
        ("s where n >= m else -inf where x[n - m] > 0.0 else =min", "x[n - m] reads dimension 0 of x [7] at -4 to 6"),
        ("s + n // m", "n // m divides by zero"),
        ("s + where(x[n - m] > 0.0, 1.0, 0.0)", "x[n - m] reads dimension 0 of x [7] at -4 to 6"),
        ("s + x[n - m - 3] where n >= m + 3 else +min", "x[n - m - 3] reads dimension 0 of x [7] at -7 to 3"),
        ("s + x[n % m]", "n % m divides by zero"),
        ("s sink x[h + 5]", "x[h + 5] reads dimension 0 of x [7] at 5 to 8"),
    ],
)
def test_unguarded_loads_are_errors(text: str, fault: str) -> None:
    x = operands(parse_spec("s"), torch.float64)
    with pytest.raises(
        IndexError, match=re.escape(f"has no value where it is needed: {fault}. Guard it with where(…)")
    ):
        attention(parse_spec(OUTSIDE + text), x.q, x.k, x.v, [torch.zeros(7)])


# --- operands that do not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "q": a["q"][0]}, "q is torch.float64 [4, 5, 8]: expected a floating-point tensor of 4 dim"),
        (
            lambda a: {**a, "k": a["k"].long()},
            "k is torch.int64 [2, 2, 7, 8]: expected a floating-point tensor of 4 dim",
        ),
        (
            lambda a: {**a, "k": a["k"][..., :4]},
            "q [2, 4, 5, 8], k [2, 2, 7, 4], v [2, 2, 7, 6]: expected [B, H, M, D]",
        ),
        (lambda a: {**a, "v": a["v"][:, :, :3]}, "v [2, 2, 3, 6]: expected"),
        (lambda a: {**a, "q": a["q"][:, :3]}, "with H a multiple of Hkv"),
        (lambda a: {**a, "leaves": []}, "0 leaves given, the spec declares 1: pad: bool[:, :]; s"),
        (lambda a: {**a, "leaves": [PAD[0]]}, "leaf pad: bool[:, :] was given a torch.bool tensor of shape [7]"),
        (lambda a: {**a, "leaves": [PAD.int()]}, "leaf pad: bool[:, :] was given a torch.int32 tensor of shape [2, 7]"),
        (lambda a: {**a, "sizes": (3,)}, "1 sizes given, the program uses i0 to i1"),
    ],
)
def test_operands_that_do_not_fit(change: Callable[[dict[str, object]], dict[str, object]], message: str) -> None:
    x = operands(parse_spec("s"), torch.float64)
    spec = parse_spec("pad: bool[:, :]; s where pad[b, n] & n < i1 else -inf")
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(spec, **change({"q": x.q, "k": x.k, "v": x.v, "leaves": [PAD], "sizes": (3, 4)}))
