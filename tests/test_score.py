"""The score language: its text, its simplifications and its derivatives."""

import math
import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scalar import NoValueError, Scalar, evaluate
from strategies import ALL_LEAVES, COMPARE, FLOAT_LOADS, Case, bools, float_expressions, ints, rebuilt, spec_of
from strategies import programs as whole_programs

from attnfuse.reference import Evaluator
from attnfuse.score import (
    FILLS,
    TRUE,
    Call,
    Const,
    Expr,
    Load,
    Program,
    S,
    ScoreSyntaxError,
    Tier,
    Var,
    call,
    conjuncts,
    derivative,
    free_vars,
    linear,
    loads,
    parse,
    parse_expr,
    simplify,
    substitute,
    walk,
)
from attnfuse.spec import AttentionSpec, Leaf, Shape

any_expression = st.one_of(ints(3), bools(3), float_expressions(3))
typed_by = AttentionSpec(Program(S), ALL_LEAVES)


class Values:
    """Leaves and `s` with random elements; floats now and then not finite."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, leaf: str, indices: tuple[int, ...]) -> Scalar:
        mixed = hash((self.seed, len(leaf), ord(leaf[0]), *indices))
        kind = next(x.kind for x in ALL_LEAVES if x.name == leaf)
        if kind == "float":
            return np.float64(
                (math.nan, math.inf, -math.inf, 0.0, 1.0)[mixed % 5] if mixed % 4 == 0 else mixed % 7 / 4 - 1
            )
        return mixed % 3 > 0 if kind == "bool" else mixed % 11 - 3


CELLS = [
    {"B": B, "H": 2, "Hkv": 1, "M": M, "N": N, "b": b, "h": h, "m": m, "n": n}
    for B, M, N in ((1, 3, 4), (2, 1, 1), (1, 4, 2))
    for b, h, m, n in product(range(B), range(2), range(M), range(N))
]


def value(expr: Expr, cell: dict[str, int], read: Values) -> Scalar | None:
    try:
        return evaluate(expr, {**cell, "s": read("bias", (9, *cell.values()))}, read)
    except NoValueError:
        return None


def same(a: Scalar, b: Scalar) -> bool:
    return type(a) is type(b) and (a == b or (a != a and b != b))


# --- text ------------------------------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(any_expression, st.booleans())
def test_text_of_an_expression_reads_back(expr: Expr, through_call: bool) -> None:
    expr = rebuilt(expr) if through_call else expr
    assert parse_expr(str(expr)) == expr


@given(whole_programs, st.sampled_from((None, parse_expr("sinks[h]*0.5 - 1.0"))))
def test_text_of_a_program_reads_back(program: Program, sink: Expr | None) -> None:
    program = Program(program.body, program.tiers, sink)
    assert parse(str(program)) == program


@given(st.floats() | st.integers() | st.booleans())
def test_text_of_a_literal_reads_back(literal: float | int | bool) -> None:
    for expr in (Const(literal), Call("mul", (S, Const(literal))), Call("neg", (Const(literal),))):
        assert parse_expr(str(expr)) == expr
        assert parse_expr(str(Call("sub", (expr, expr)))) == Call("sub", (expr, expr))


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("s * 0.125", "s*0.125"),
        ("s*0.125where n<=m else-inf", "s*0.125 where n <= m else -inf"),
        ("(s)", "s"),
        ("((s + 1.0)) * 2.0", "(s + 1.0)*2.0"),
        ("s + (1.0 + 2.0)", "s + (1.0 + 2.0)"),
        ("s - 1.0 - 2.0", "s - 1.0 - 2.0"),
        ("s - (1.0 - 2.0)", "s - (1.0 - 2.0)"),
        ("s/2.0/3.0*4.0", "s/2.0/3.0*4.0"),
        ("s/(2.0*3.0)", "s/(2.0*3.0)"),
        ("m // 64*64 % 7", "m // 64*64 % 7"),
        ("m // (64*64)", "m // (64*64)"),
        ("-s*2.0", "-s*2.0"),
        ("-(s*2.0)", "-(s*2.0)"),
        ("-2*n", "-2*n"),
        ("-(2)*n", "-(2)*n"),
        ("--s", "--s"),
        ("2 - -2", "2 - -2"),
        ("s*1e-5 + 1E5 + .5 + 1.", "s*1e-05 + 100000.0 + 0.5 + 1.0"),
        ("s + inf - nan", "s + inf - nan"),
        ("s -inf", "s - inf"),
        ("s +min(s, 1.0)", "s + min(s, 1.0)"),
        ("s where ~(n <= m) & ~pad[b, n] else =min", "s where ~n <= m & ~pad[b, n] else =min"),
        ("s where a[n] & b[n] | c[n] else +min", "s where a[n] & b[n] | c[n] else +min"),
        ("s where a[n] & (b[n] | c[n]) else +min", "s where a[n] & (b[n] | c[n]) else +min"),
        ("s where ~(a[n] & b[n]) else 0row", "s where ~(a[n] & b[n]) else 0row"),
        ("s where (a[n] == b[n]) == c[n] else -inf", "s where (a[n] == b[n]) == c[n] else -inf"),
        ("s + t[bucket[n - m], h]", "s + t[bucket[n - m], h]"),
        ("s + t[]", "s + t[]"),
        ("where(n < i0, s, -1e4) sink sinks[h]", "where(n < i0, s, -10000.0) sink sinks[h]"),
        ("s where n <= m else =min where pad[b, n] else +min", "s where n <= m else =min where pad[b, n] else +min"),
        ("pow(rsqrt(abs(s)), 2.0)", "pow(rsqrt(abs(s)), 2.0)"),
    ],
)
def test_how_texts_print(text: str, printed: str) -> None:
    assert str(parse(text)) == printed
    assert parse(printed) == parse(text)


def test_text_of_real_attentions() -> None:
    assert parse("50.0*tanh(s*0.0625/50.0) where n <= m & n > m - 4096 else +min") == Program(
        Call("mul", (Const(50.0), Call("tanh", (Call("div", (Call("mul", (S, Const(0.0625))), Const(50.0))),)))),
        (
            Tier(
                Call(
                    "and",
                    (
                        Call("le", (Var("n"), Var("m"))),
                        Call("gt", (Var("n"), Call("sub", (Var("m"), Const(4096))))),
                    ),
                ),
                "+min",
            ),
        ),
    )


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", 0, "expected an expression, found the end"),
        ("   ", 0, "expected an expression, found the end"),
        ("s +", 3, "expected an expression, found the end"),
        ("s $ 2", 2, "unexpected '$'"),
        ("s ! 2", 2, "unexpected '!'"),
        ("s = 2", 2, "unexpected '='"),
        ("q*2.0", 0, "unknown name 'q': expected s, b, h, m, n, B, H, Hkv, M, N, i0…, or a leaf with indices"),
        ("s*x", 2, "unknown name 'x'"),
        ("__import__('os')", 11, 'unexpected "\'"'),
        ("__import__(s)", 0, "unknown name '__import__'"),
        ("s s", 2, "unexpected 's'"),
        ("s 2", 2, "unexpected '2'"),
        ("(s", 2, "expected ')', found the end"),
        ("s)", 1, "unexpected ')'"),
        ("x[n", 3, "expected ',', found the end"),
        ("x[n m]", 4, "expected ',', found 'm'"),
        ("x[n,]", 4, "expected an expression, found ']'"),
        ("tanh", 4, "expected '(', found the end"),
        ("tanh(s, s)", 10, "tanh takes 1 arguments, found 2"),
        ("where(s)", 8, "where takes 3 arguments, found 1"),
        ("s where n <= m", 14, "expected 'else', found the end"),
        ("s where n <= m else", 19, "expected a fill (-inf, +min, =min, 0row), found the end"),
        ("s where n <= m else 0", 20, "expected a fill (-inf, +min, =min, 0row), found '0'"),
        ("s where n <= m else -1.0", 20, "expected a fill (-inf, +min, =min, 0row), found '-'"),
        ("s where n <= m else -inf where", 30, "expected an expression, found the end"),
        ("s where n <= m else -inf n", 25, "unexpected 'n'"),
        ("s sink", 6, "expected an expression, found the end"),
        ("s sink 1.0 where n < m else -inf", 11, "unexpected 'where'"),
        ("0 <= n <= m", 7, "comparisons do not chain: join them with &"),
        ("n == m != 2", 7, "comparisons do not chain: join them with &"),
        ("s *", 3, "expected an expression, found the end"),
        ("* s", 0, "expected an expression, found '*'"),
    ],
)
def test_syntax_errors_show_where(text: str, position: int, message: str) -> None:
    with pytest.raises(ScoreSyntaxError) as caught:
        parse(text)
    assert caught.value.position == position
    assert caught.value.text == text
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(f"at column {position + 1}\n  {text}\n  {' ' * position}^")


@given(st.text(alphabet="snm0123456789.eE+-*/%&|~<>=()[], abwherltinfrow", max_size=30))
def test_any_text_parses_or_is_a_syntax_error(text: str) -> None:
    program, position = None, 0
    try:
        program = parse(text)
    except ScoreSyntaxError as error:
        position = error.position
    assert 0 <= position <= len(text)
    assert program is None or parse(str(program)) == program


def test_texts_beyond_all_measure_are_syntax_errors() -> None:
    for text in ("(" * 100_000 + "s" + ")" * 100_000, "s*" + "9" * 10_000, "-" * 100_000 + "s"):
        with pytest.raises(ScoreSyntaxError):
            parse(text)


def test_a_long_sum_is_no_fault() -> None:
    text = " + ".join(["s"] * 300)
    assert str(parse(text)) == text


def test_fills_are_checked() -> None:
    with pytest.raises(ValueError, match=re.escape("fill '-1e4': expected one of -inf, +min, =min, 0row")):
        Tier(TRUE, "-1e4")
    for fill in FILLS:
        assert parse(f"s where n <= m else {fill}").tiers == (Tier(parse_expr("n <= m"), fill),)


def test_literals_of_different_types_differ() -> None:
    distinct = [Const(1), Const(1.0), Const(True), Const(0), Const(0.0), Const(-0.0), Const(False)]
    assert len(set(distinct)) == len(distinct)
    assert Const(math.nan) == Const(math.nan)
    assert Const(1) != 1


# --- simplification --------------------------------------------------------------------------------------------------


@settings(max_examples=800)
@given(any_expression, st.integers(0, 30))
def test_call_changes_no_value_and_no_type(expr: Expr, seed: int) -> None:
    built, read = rebuilt(expr), Values(seed)
    assert typed_by.type_of(built) == typed_by.type_of(expr), f"{expr} became {built}"
    for cell in CELLS:
        before, after = value(expr, cell, read), value(built, cell, read)
        if before is not None:
            assert after is not None, f"{expr} became {built}"
            assert same(before, after), f"{expr} is {before}, {built} is {after} at {cell}"


@pytest.mark.parametrize("op", COMPARE)
def test_comparisons_at_the_edge_of_the_index_ranges(op: str) -> None:
    decided = 0
    for (index, size), factor, more in product(product("bmn", ("B", "M", "N")), (-1, 1, 2), range(-3, 4)):
        left = Call("mul", (Var(index), Const(factor)))
        right = Call("add", (Call("mul", (Var(size), Const(factor))), Const(more)))
        for expr in (Call(op, (left, right)), Call(op, (right, left)), Call(op, (left, Const(more)))):
            built = rebuilt(expr)
            decided += isinstance(built, Const)
            for cell in CELLS:
                assert value(built, cell, Values(0)) == value(expr, cell, Values(0)), f"{expr} became {built}"
    assert decided > 50


@settings(max_examples=300)
@given(any_expression)
def test_simplify_is_idempotent(expr: Expr) -> None:
    once = simplify(expr)
    assert simplify(once) == once


@pytest.mark.parametrize(
    ("text", "simplified"),
    [
        ("n - m <= 0", "n <= m"),
        ("m - n >= 0", "n <= m"),
        ("m + 1 > n", "n < m + 1"),
        ("2*n <= m", "n*2 <= m"),
        ("n + m - n", "m"),
        ("3*(m - 2) + 6", "m*3"),
        ("n < N", "True"),
        ("n >= 0 & n <= m", "n <= m"),
        ("n + N < N", "False"),
        ("m < M & h < H & b < B", "True"),
        ("n < M", "n < M"),
        ("~(n > m)", "n <= m"),
        ("~~pad[b, n]", "pad[b, n]"),
        ("~(s > 0.0)", "~s > 0.0"),
        ("~(s == 0.0)", "s != 0.0"),
        ("pad[b, n] & pad[b, n]", "pad[b, n]"),
        ("pad[b, n] & True & (n <= m & pad[b, n])", "pad[b, n] & n <= m"),
        ("pad[b, n] | False", "pad[b, n]"),
        ("pad[b, n] | pad[b, n]", "pad[b, n]"),
        ("pad[b, n] | True", "True"),
        ("where(n <= m, True, False)", "n <= m"),
        ("where(n <= m, False, True)", "n > m"),
        ("where(True, s, 0.0)", "s"),
        ("where(n <= m, s, s)", "s"),
        ("where(n < 1, n + 1, 1)", "1"),
        ("where(n < 1, n, 1)", "where(n < 1, 0, 1)"),
        ("where(n == 0, n, 0)", "0"),
        ("where(n <= 0, m + n, m)", "m"),
        ("where(n <= 1, n, 0)", "where(n <= 1, n, 0)"),
        ("where(n == 1, n, 0)", "where(n == 1, n, 0)"),
        ("where(n < 2, n, 0)", "where(n < 2, n, 0)"),
        ("where(M <= 0, M, 0)", "0"),
        ("where(n <= m, 0, 1) == 0", "n <= m"),
        ("where(n <= m, 0.0, 1.0) != 0.0", "n > m"),
        ("float(n <= m)", "where(n <= m, 1.0, 0.0)"),
        ("1.0 - where(n <= m, 1.0, 0.0)", "where(n <= m, 0.0, 1.0)"),
        ("float(3)", "3.0"),
        ("float(float(n))", "float(n)"),
        ("s*1.0 + 0.0", "s"),
        ("s*1", "s"),
        ("s/1.0", "s"),
        ("s*1.0*bias[b, h, m, n] + 0", "s*bias[b, h, m, n]"),
        # the type of a load is not known, that of an index is not that of the result
        ("bias[b, h, m, n]*1.0", "bias[b, h, m, n]*1.0"),
        ("n*1.0", "n*1.0"),
        ("n/1", "n/1"),
        ("where(True, n, s)", "float(n)"),
        ("min(1, 2.0)", "1.0"),
        # floating-point arithmetic keeps its order and its rounding
        ("s*0.5*0.5", "s*0.5*0.5"),
        ("s + 0.1 + 0.2", "s + 0.1 + 0.2"),
        ("0.1 + 0.2", "0.1 + 0.2"),
        ("1.0 + 1.0", "2.0"),
        ("16777216.0 + 1.0", "16777216.0 + 1.0"),
        ("min(1.0, nan)", "min(1.0, nan)"),
        ("max(nan, 1.0)", "max(nan, 1.0)"),
        ("s - s", "s - s"),
        ("s == s", "s == s"),
        ("s*0.0", "s*0.0"),
        ("inf - inf", "inf - inf"),
        ("7 // 0", "7 // 0"),
        ("-7 // 2 + -7 % 4", "-3"),
        ("--s", "s"),
    ],
)
def test_how_expressions_simplify(text: str, simplified: str) -> None:
    assert str(simplify(parse_expr(text))) == simplified


@settings(max_examples=300)
@given(ints(3))
def test_a_linear_form_is_the_expression(expr: Expr) -> None:
    form, read = linear(expr, loads_are_int=True), Values(0)
    assert form is not None
    assert not any(isinstance(atom, Const) for atom in form.terms)
    for cell in CELLS:
        expected = value(expr, cell, read)
        if expected is not None:
            assert value(form.expr(), cell, read) == expected


def test_linear_forms() -> None:
    form = linear(parse_expr("2*(n - m) - n + 3*h*2 - 4"))
    assert form is not None
    assert (dict(form.terms), form.constant) == ({Var("n"): 1, Var("m"): -2, Var("h"): 6}, -4)
    assert str(form.expr()) == "n + h*6 - m*2 - 4"
    for text in ("s", "n*0.5", "n <= m", "pos[b, m] + 1", "float(n)", "n/2"):
        assert linear(parse_expr(text)) is None
    assert linear(parse_expr("pos[b, m] + 1"), loads_are_int=True) is not None


# --- derivatives -----------------------------------------------------------------------------------------------------


def derivative_by_autograd(expr: Expr, wrt: Expr) -> tuple[torch.Tensor, torch.Tensor]:
    """d expr / d wrt over [B, H, M, N] by autograd, and by the expression that `derivative` gives."""
    probe = Load("probe", tuple(map(Var, "bhmn")))
    case = Case(spec_of(Program(Call("add", (expr, S)))), Shape(2, 2, 1, 3, 4, 4, 4), 7)
    spec = AttentionSpec(Program(S), (*case.spec.leaves, Leaf("probe", "f64", 4)))
    x = case.shape
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(x.B, x.H, x.M, x.N, generator=generator, dtype=torch.float64)
    at_probe = torch.zeros_like(scores).requires_grad_()
    leaves = [*(leaf.detach() for leaf in case.tensors().leaves), at_probe]
    values = Evaluator(spec, leaves, (), scores, x.Hkv, torch.float64)
    varied = values.of(substitute(expr, {wrt: Call("add", (wrt, probe))}))
    if varied.requires_grad:
        (by_autograd,) = torch.autograd.grad(varied.sum(), at_probe)
    else:
        by_autograd = torch.zeros_like(scores)
    return by_autograd, values.of(derivative(expr, wrt)).double()


@settings(max_examples=500)
@given(float_expressions(3), st.sampled_from((S, *FLOAT_LOADS)))
def test_derivative_is_that_of_autograd(expr: Expr, wrt: Expr) -> None:
    by_autograd, ours = derivative_by_autograd(expr, wrt)
    finite = by_autograd.isfinite()
    torch.testing.assert_close(ours[finite], by_autograd[finite], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "30.0*tanh(s*0.125/30.0)",
        "s*s*s - 1.0/s",
        "exp(s)/(1.0 + exp(s))",
        "log(abs(s) + 1.0) + sqrt(abs(s)) + rsqrt(s*s + 1.0)",
        "pow(abs(s), 2.5) + pow(s, 2.0) + pow(s, 0.0)",
        "pow(s*0.0, 0.0) + pow(s*0.0, 1.0)",
        "sigmoid(s*slope[h]) + slope[h]*n",
        "abs(s - s) + min(s, s) + max(s, s*1.0)",
        "min(s, 0.25) - max(s, -0.25)",
        "where(s > 0.0, s, s*0.1)",
        "where(n <= m, s, -10000.0)",
        "-s + float(n)*s",
        "bias[b, h, m, n]/slope[h]",
    ],
)
@pytest.mark.parametrize("wrt", [S, *FLOAT_LOADS], ids=str)
def test_derivatives_of_functions(text: str, wrt: Expr) -> None:
    by_autograd, ours = derivative_by_autograd(parse_expr(text), wrt)
    assert bool(by_autograd.isfinite().all())
    torch.testing.assert_close(ours, by_autograd, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "wrt", "printed"),
    [
        ("s*0.125", "s", "0.125"),
        ("s*0.125 + slope[h]*n", "slope[h]", "float(n)"),
        ("s*slope[h]", "s", "slope[h]"),
        ("s*slope[h] - s", "s", "slope[h] - 1.0"),
        ("1.0 - s*slope[h]", "s", "-slope[h]"),
        ("max(s*slope[h], 0.0)", "s", "where(s*slope[h] > 0.0, slope[h], where(s*slope[h] == 0.0, 0.5*slope[h], 0.0))"),
        ("s*0.125 + slope[h]*n", "s", "0.125"),
        ("s + table[bucket[n - m], h]", "table[bucket[n - m], h]", "1.0"),
        ("50.0*tanh(s/50.0)", "s", "50.0*((1.0 - tanh(s/50.0)*tanh(s/50.0))*(1.0/50.0))"),
        ("where(n < m, s, 0.0)", "s", "where(n < m, 1.0, 0.0)"),
        ("float(n)*0.5", "s", "0.0"),
        ("where(bias[b, h, m, n] > 0.0, s, 1.0)", "bias[b, h, m, n]", "0.0"),
    ],
)
def test_how_derivatives_print(text: str, wrt: str, printed: str) -> None:
    assert str(derivative(parse_expr(text), parse_expr(wrt))) == printed


def test_what_has_no_derivative_says_so() -> None:
    with pytest.raises(ValueError, match=re.escape("pow has no derivative with respect to s in pow(2.0, s)")):
        derivative(parse_expr("pow(2.0, s)"), S)


# --- reading expressions ---------------------------------------------------------------------------------------------


def test_what_an_expression_holds() -> None:
    expr = parse_expr("s + t[bucket[n - m], h] - t[bucket[n - m], h]*u[]")
    assert free_vars(expr) == {"s", "n", "m", "h"}
    assert tuple(map(str, loads(expr))) == ("t[bucket[n - m], h]", "bucket[n - m]", "u[]")
    assert next(walk(expr)) == expr
    assert tuple(map(str, conjuncts(parse_expr("n <= m & (a[n] | b[n]) & (True & c[n])")))) == (
        "n <= m",
        "a[n] | b[n]",
        "c[n]",
    )
    assert conjuncts(TRUE) == ()
    nothing = Call("and", (TRUE, TRUE))
    assert call("and", nothing, nothing) == TRUE


def test_substitution_replaces_whole_expressions() -> None:
    expr = parse_expr("t[n] + t[n + 1]*n")
    assert str(substitute(expr, {parse_expr("t[n]"): S, Var("n"): Const(2)})) == "s + t[3]*2"
