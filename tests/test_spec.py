"""AttentionSpec: its text, the types of its program, and every way in which its parts do not fit."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import programs, spec_of

from attnfuse.score import Call, Const, Load, Program, S, ScoreSyntaxError, Tier, Var, parse, parse_expr
from attnfuse.spec import LEAF_DTYPES, AttentionSpec, Leaf, Shape, parse_spec

LEAVES = "pad: bool[:, :]; doc: i64[:, :]; slope: f32[:]; "


@given(programs, st.floats(0, 1, exclude_max=True, allow_subnormal=False))
def test_text_reads_back(program: Program, dropout: float) -> None:
    spec = spec_of(program, dropout)
    assert parse_spec(str(spec)) == spec


def test_how_specs_print() -> None:
    spec = AttentionSpec(
        parse("s*0.125 where n <= m & pad[b, n] else +min sink sinks[h]"),
        (Leaf("pad", "bool", 2), Leaf("sinks", "bf16", 1), Leaf("unused", "f64", 0)),
        0.1,
    )
    text = (
        "pad: bool[:, :]; sinks: bf16[:]; unused: f64[]; dropout 0.1; "
        "s*0.125 where n <= m & pad[b, n] else +min sink sinks[h]"
    )
    assert str(spec) == text
    assert parse_spec(text) == spec
    assert str(parse_spec(" pad :bool[ : ,: ] ;  dropout 1e-1;s where pad[b,n] else 0row ")) == (
        "pad: bool[:, :]; dropout 0.1; s where pad[b, n] else 0row"
    )
    assert str(parse_spec("s")) == "s"


@pytest.mark.parametrize("dtype", LEAF_DTYPES)
def test_every_dtype_of_a_leaf(dtype: str) -> None:
    spec = parse_spec(f"x: {dtype}[:]; s")
    assert spec.leaves == (Leaf("x", dtype, 1),)
    assert spec.leaves[0].kind == {"b": "bool", "i": "int", "u": "int", "f": "float"}[dtype.replace("bf", "f")[0]]


@pytest.mark.parametrize(
    ("text", "type_"),
    [
        ("s", "float"),
        ("n", "int"),
        ("Hkv + i3", "int"),
        ("True", "bool"),
        ("1", "int"),
        ("1.0", "float"),
        ("pad[b, n]", "bool"),
        ("doc[b, n]", "int"),
        ("slope[h]", "float"),
        ("n + m*2 - -h", "int"),
        ("n + 1.0", "float"),
        ("n*slope[h]", "float"),
        ("n/2", "float"),
        ("n // 2 % 3", "int"),
        ("abs(n - m)", "int"),
        ("abs(s)", "float"),
        ("min(n, m)", "int"),
        ("max(n, 0.0)", "float"),
        ("n <= m", "bool"),
        ("s == 1", "bool"),
        ("pad[b, n] == 0", "bool"),
        ("pad[b, n] == pad[b, m]", "bool"),
        ("~pad[b, n] & n < m | n > 3", "bool"),
        ("where(n < m, n, m)", "int"),
        ("where(n < m, n, 0.5)", "float"),
        ("where(n < m, pad[b, n], True)", "bool"),
        ("float(n)", "float"),
        ("float(pad[b, n])", "float"),
        ("pow(n, 2)", "float"),
        ("tanh(n)", "float"),
    ],
)
def test_types(text: str, type_: str) -> None:
    assert parse_spec(LEAVES + "s").type_of(parse_expr(text)) == type_


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dropout 1.0; s", "dropout 1.0: expected a probability in [0, 1)"),
        ("dropout -0.5; s", "dropout -0.5: expected a probability in [0, 1)"),
        ("x: f32[:]; x: f32[:, :]; s", "leaf 'x' is declared twice"),
        ("s*slopes[h]", "the program loads from 'slopes', which is not declared (leaves: pad, doc, slope)"),
        ("s where mask[b, n] else -inf", "the program loads from 'mask', which is not declared"),
        ("s*slope[b, h]", "slope[b, h] has 2 indices, leaf slope: f32[:] takes 1"),
        ("s*slope[]", "slope[] has 0 indices, leaf slope: f32[:] takes 1"),
        ("s*slope[s]", "s is float, expected int"),
        ("s*slope[n/2]", "n/2 is float, expected int"),
        ("s*slope[pad[b, n]]", "pad[b, n] is bool, expected int"),
        ("n <= m", "n <= m is bool, expected float or int"),
        ("s where n else -inf", "n is int, expected bool"),
        ("s where slope[h] else -inf", "slope[h] is float, expected bool"),
        ("s where s > 0.0 else -inf", "mask s > 0.0 depends on s: write it as where(…) in the score"),
        ("s sink pad[b, m]", "pad[b, m] is bool, expected float or int"),
        ("s sink slope[n]", "sink slope[n] depends on s or n: a sink is one score a row"),
        ("s sink s*2.0", "sink s*2.0 depends on s or n: a sink is one score a row"),
        ("s where n & m else -inf", "n & m: and takes truth values, found int and int"),
        ("s where pad[b, n] | n else -inf", "pad[b, n] | n: or takes truth values, found bool and int"),
        ("s where ~n else -inf", "~n: not takes truth values, found int"),
        ("where(n, s, 0.0)", "where(n, s, 0.0): where takes a truth value first, found int"),
        (
            "where(n < m, s, True)",
            "where(n < m, s, True): where takes two numbers or two truth values, found float and bool",
        ),
        ("s*where(n < m, pad[b, n], 1)", "where takes two numbers or two truth values, found bool and int"),
        ("s + pad[b, n]", "s + pad[b, n]: add takes numbers, found bool (write where(…, 1.0, 0.0) or float(…))"),
        ("s*(n <= m)", "s*(n <= m): mul takes numbers, found bool"),
        ("tanh(n <= m)", "tanh(n <= m): tanh takes numbers, found bool"),
        ("s where pad[b, n] < True else -inf", "pad[b, n] < True: lt takes numbers, found bool"),
        ("s // 2", "s // 2: floordiv takes integers, found float"),
        ("n % 2.0", "n % 2.0: mod takes integers, found float"),
    ],
)
def test_parts_that_do_not_fit(text: str, message: str) -> None:
    declared = "" if text.startswith("x:") else LEAVES
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_spec(declared + text)
    assert not isinstance(caught.value, ScoreSyntaxError)


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", 0, "expected an expression, found the end"),
        ("pad: bool[:, :]", 3, "unexpected ':'"),
        ("pad: bool[:, :]; ", 16, "expected an expression, found the end"),
        ("pad: bool[:, :]; s +", 20, "expected an expression, found the end"),
        ("pad: int8[:]; s", 0, "expected a leaf `name: dtype[:, …]` with a dtype of bool, u8,"),
        ("x: f32[:]; pad; s", 11, "expected a leaf"),
        ("x: f32[3]; s", 0, "expected a leaf"),
        ("x: f32[:::]; s", 0, "expected a leaf"),
        ("x: f32[,:]; s", 0, "expected a leaf"),
        ("1x: f32[:]; s", 0, "expected a leaf"),
        ("inf: f32[:]; s", 0, "expected a leaf"),
        ("x: f32[:]; dropout; s", 11, "expected a leaf"),
        ("dropout 1..2; s", 0, "expected a leaf"),
        ("dropout e; s", 0, "expected a leaf"),
        ("dropout 0.1; dropout 0.2; s", 13, "dropout is given twice"),
        ("x: f32[:];; s", 10, "expected a leaf"),
        ("x: f32[:]; s*y", 13, "unknown name 'y'"),
    ],
)
def test_syntax_errors_show_where(text: str, position: int, message: str) -> None:
    with pytest.raises(ScoreSyntaxError) as caught:
        parse_spec(text)
    assert caught.value.position == position
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(f"at column {position + 1}\n  {text}\n  {' ' * position}^")


@given(st.text(alphabet="snm0123456789.eE+-*/&<=()[]:;, pad bool i64 dropout where else-inf", max_size=40))
def test_any_text_is_a_spec_or_an_error(text: str) -> None:
    try:
        spec = parse_spec(text)
    except ValueError:
        return
    assert parse_spec(str(spec)) == spec


def test_a_program_nested_beyond_all_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_spec(" + ".join(["s"] * 5000))


@pytest.mark.parametrize("name", ["", "a b", "1x", "inf", "nan", "True", "False", "x.y", "é"])
def test_names_that_a_text_could_not_hold(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"leaf name {name!r}: expected a name of letters, digits and _")):
        Leaf(name, "f32", 1)


@pytest.mark.parametrize("name", ["where", "else", "sink", "min", "tanh", "s", "n", "i0", "N", "_1", "dropout"])
def test_names_that_a_text_can_hold(name: str) -> None:
    load = Load(name, (Var("n"),))
    spec = AttentionSpec(
        Program(Call("add", (S, load)), (Tier(Call("lt", (load, load)), "-inf"),)), (Leaf(name, "f32", 1),)
    )
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (
            ("x", "float32", 1),
            "leaf x: dtype 'float32': expected one of bool, u8, i8, i16, i32, i64, f16, bf16, f32, f64",
        ),
        (("x", "f32", -1), "leaf x: rank -1: expected 0 or more"),
    ],
)
def test_leaves_that_no_tensor_could_be(leaf: tuple[str, str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Leaf(*leaf)


def test_leaf_by_name() -> None:
    spec = parse_spec(LEAVES + "s")
    assert spec.leaf("doc") == Leaf("doc", "i64", 2)
    with pytest.raises(ValueError, match=re.escape("'x', which is not declared (leaves: none)")):
        parse_spec("s").leaf("x")


def test_size_count() -> None:
    assert parse_spec("s").size_count() == 0
    assert parse_spec("s where n < i0 else -inf").size_count() == 1
    assert parse_spec(LEAVES + "s where n < i2 else -inf sink slope[h + i11]").size_count() == 12


def test_specs_are_values() -> None:
    text = LEAVES + "dropout 0.5; s*slope[h]"
    assert parse_spec(text) is parse_spec(text)
    assert hash(parse_spec(text)) == hash(AttentionSpec(*_parts(text)))
    assert parse_spec("s*1.0") != parse_spec("s*1")
    with pytest.raises(AttributeError):
        parse_spec("s").dropout = 0.5  # type: ignore[misc]


def _parts(text: str) -> tuple[Program, tuple[Leaf, ...], float]:
    spec = parse_spec(text)
    return parse(str(spec.program)), tuple(Leaf(x.name, x.dtype, x.rank) for x in spec.leaves), spec.dropout


def test_shapes_print() -> None:
    assert str(Shape(2, 8, 8, 128, 256, 64, 64)) == "B2 H8 M128 N256 D64"
    assert str(Shape(1, 32, 8, 1, 4096, 192, 128)) == "B1 H32/8 M1 N4096 D192/128"


def test_literal_types_of_a_program_count() -> None:
    assert parse_spec("s*2").program.body == Call("mul", (S, Const(2)))
