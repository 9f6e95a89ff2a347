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
from strategies import ALL_LEAVES, COMPARE, FLOAT_LOADS, bools, float_expressions, ints, rebuilt
from strategies import programs as whole_programs

from attnfuse.score import (
    FALSE,
    FILLS,
    FUNCTIONS,
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
from attnfuse.spec import AttentionSpec

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
    try:
        program = parse(text)
    except ScoreSyntaxError as error:
        assert 0 <= error.position <= len(text)
    else:
        assert parse(str(program)) == program


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


@settings(max_examples=1500)
@given(any_expression, st.integers(0, 30))
def test_call_changes_no_value_and_no_type(expr: Expr, seed: int) -> None:
    built, read = rebuilt(expr), Values(seed)
    assert typed_by.type_of(built) == typed_by.type_of(expr), f"{expr} became {built}"
    for cell in CELLS:
        before, after = value(expr, cell, read), value(built, cell, read)
        if before is not None:
            assert after is not None, f"{expr} became {built}"
            assert same(before, after), f"{expr} is {before}, {built} is {after} at {cell}"


@settings(max_examples=300)
@given(any_expression)
def test_simplify_is_idempotent(expr: Expr) -> None:
    once = simplify(expr)
    assert simplify(once) == once
