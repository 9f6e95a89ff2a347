"""The choice of a template: pure, with reasons; and the specs that a plain scaled_dot_product_attention is right for."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attnfuse.reference import attention as reference
from attnfuse.score import FILLS, Program, Tier, loads, parse, parse_expr
from attnfuse.spec import AttentionSpec, Shape, parse_spec
from attnfuse.templates import TEMPLATES
from attnfuse.templates.affine import affine, constant
from attnfuse.templates.base import Kernel, Target, Tiles
from attnfuse.templates.blocked import Blocked
from attnfuse.templates.choose import Choice, Refusal, choose
from attnfuse.templates.dense import Dense
from attnfuse.templates.flash import Decode, Flash
from attnfuse.templates.library import Call, Library, call_for
from tests.strategies import BODIES, MASKS, programs, shapes, spec_of

SHAPE = Shape(1, 8, 2, 256, 256, 64, 64)
CPU = Target("cpu")


def chosen(text: str, target: Target = CPU, shape: Shape = SHAPE) -> str:
    choice = choose(parse_spec(text), shape, target)
    return f"none ({choice})" if isinstance(choice, Refusal) else choice.template.name


def test_templates_are_named_and_ordered() -> None:
    assert [template.name for template in TEMPLATES] == ["library", "inline", "blocked", "decode", "flash"]
    assert not isinstance(TEMPLATES[0], Kernel), "the library template is a node of the graph"
    assert not isinstance(TEMPLATES[1], Kernel), "the inline template is nodes of the graph"
    assert all(isinstance(template, Kernel) for template in TEMPLATES[2:])
    assert isinstance(Dense(), Kernel)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("s*0.125", "library"),
        ("s*0.125 where n <= m else -inf", "library"),
        ("s*0.125 where n <= m else +min", "library"),
        ("s*0.125 where n < m else +min", "blocked"),
        ("s*0.125 where n <= m + N - M else -inf", "blocked"),
        ("s*0.125 where n <= m & n > m - 9 else +min", "blocked"),
        ("pad: bool[:, :]; s*0.125 where n <= m & pad[b, n] else +min", "blocked"),
        ("sinks: f32[:]; s*0.125 sink sinks[h]", "blocked"),
        ("dropout 0.1; s*0.125", "blocked"),
        ("50*tanh(s*0.125/50)", "blocked"),
    ],
)
def test_choice_on_the_cpu(text: str, name: str) -> None:
    assert chosen(text) == name


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        (CPU._replace(lse=True), SHAPE),
        (CPU._replace(v_dtype="bf16"), SHAPE),
        (CPU, SHAPE._replace(Dv=32)),
        (CPU._replace(unit_stride=False), SHAPE),
    ],
)
def test_calls_that_the_library_would_not_serve_well(target: Target, shape: Shape) -> None:
    assert chosen("s*0.125", target, shape) == "blocked"


CUDA = Target("cuda", "bf16", "bf16", arch="sm_90")


@pytest.mark.parametrize(
    ("text", "shape", "name"),
    [
        ("s*0.125 where n <= m else -inf", SHAPE, "library"),
        ("s*0.125 where n <= m & n > m - 9 else -inf", SHAPE, "flash"),
        ("s*0.125 where n <= m & n > m - 9 else -inf", SHAPE._replace(M=1), "decode"),
        ("s*0.125 where n <= m & n > m - 9 else -inf", SHAPE._replace(M=17), "flash"),
        ("50*tanh(s/50)", SHAPE._replace(M=16), "decode"),
        ("pow(s, 2.0)", SHAPE, "flash"),
    ],
)
def test_choice_on_a_gpu(text: str, shape: Shape, name: str) -> None:
    assert chosen(text, CUDA, shape) == name


@pytest.mark.parametrize(
    ("text", "target", "shape", "reason"),
    [
        ("s", CPU, SHAPE, "device cpu, runs on cuda"),
        ("s", CUDA._replace(arch="sm_75"), SHAPE, "sm_75, runs on sm_80 and later"),
        ("s", CUDA._replace(dtype="f64"), SHAPE, "q is f64, takes f16, bf16, f32"),
        ("s", CUDA._replace(v_dtype="f64"), SHAPE, "v is f64, takes f16, bf16, f32"),
        ("s", CUDA, SHAPE._replace(D=257), "D 257, takes 1 to 256"),
        ("s", CUDA, SHAPE._replace(Dv=0), "Dv 0, takes 1 to 256"),
        (
            "pow(s, 0.3)",
            CUDA,
            SHAPE,
            "pow(s, 0.3): takes exponents that are constant multiples of 0.5, up to 8",
        ),
        (f"s where n < {2**70} else -inf", CUDA, SHAPE, f"integer {2**70}: takes integers of 64 bits"),
    ],
)
def test_reasons_of_the_triton_templates(text: str, target: Target, shape: Shape, reason: str) -> None:
    assert Flash().reasons_against(parse_spec(text), shape, target) == (reason,)
    choice = choose(parse_spec("s + float(n)"), shape, target, (Decode(), Flash()))
    assert isinstance(choice, Choice) == text.startswith(("pow", "s where"))


def test_what_no_template_takes_says_why() -> None:
    refusal = choose(parse_spec("s*0.125 where n < m else -inf"), SHAPE, CUDA._replace(dtype="f64", v_dtype="f64"))
    assert isinstance(refusal, Refusal)
    reasons = dict(refusal.reasons)
    assert reasons["blocked"] == ("device cuda, runs on cpu",)
    assert reasons["flash"] == ("q is f64, takes f16, bf16, f32", "v is f64, takes f16, bf16, f32")
    assert reasons["decode"][-1] == "1024 rows of a KV head (M·H / Hkv), takes up to 64"
    assert str(refusal).startswith("library: ")


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        (SHAPE._replace(D=320, Dv=320), "bf16", "D 320 and Dv 320 on cuda, its fused kernels take up to 256"),
        (SHAPE, "f32", "f32 with H 8 and Hkv 2 on cuda, takes f16 or bf16"),
    ],
)
def test_library_reasons_on_a_gpu(shape: Shape, dtype: str, reason: str) -> None:
    assert Library().reasons_against(parse_spec("s"), shape, Target("cuda", dtype, dtype)) == (reason,)


def test_every_reason_has_its_value_and_its_limit() -> None:
    spec = parse_spec("dropout 0.1; tanh(s)")
    reasons = Library().reasons_against(spec, SHAPE._replace(Dv=32), Target("cpu", "f32", "bf16", True, True, False))
    assert reasons == (
        "tanh(s), takes only s*constant, over all keys or where n <= m",
        "lse asked for, the call returns none",
        "q is f32 and v bf16, takes one type",
        "dropout 0.1 on cpu, its flash kernel takes 0",
        "D 64 and Dv 32 on cpu, its flash kernel takes D = Dv",
        "last axis of q, k or v not dense on cpu, its flash kernel takes a stride of 1",
    )


def test_the_choice_is_memoised_and_can_be_asked_of_other_templates() -> None:
    spec = parse_spec("s*0.125")
    assert choose(spec, SHAPE, CPU) is choose(parse_spec("s*0.125"), SHAPE, CPU)
    only = (Blocked(),)
    choice = choose(spec, SHAPE, CPU, only)
    assert isinstance(choice, Choice)
    assert choice.template is only[0]
    assert isinstance(choice.tiles, Tiles)
    assert min(choice.tiles) >= 1


@given(programs, shapes, st.sampled_from(("cpu", "cuda")), st.booleans())
@settings(max_examples=50)
def test_a_template_is_chosen_exactly_if_it_has_no_reason(
    program: Program, shape: Shape, device: str, training: bool
) -> None:
    spec = spec_of(program)
    target = Target(device, training=training)
    choice = choose(spec, shape, target)
    reasons = {template.name: template.reasons_against(spec, shape, target) for template in TEMPLATES}
    free = [name for name, against in reasons.items() if not against]
    if isinstance(choice, Refusal):
        assert not free
        assert dict(choice.reasons) == reasons
    else:
        assert choice.template.name == free[0]


# --- the library's call ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s", Call(1.0, False, 0.0)),
        ("s*0.125", Call(0.125, False, 0.0)),
        ("0.125*s", Call(0.125, False, 0.0)),
        ("s/8.0", Call(0.125, False, 0.0)),
        ("-(s*0.5)*0.25", Call(-0.125, False, 0.0)),
        ("s*0.125 where n <= m else =min", Call(0.125, True, 0.0)),
        ("s*0.125 where n < m + 1 else 0row", Call(0.125, True, 0.0)),
        ("s*0.125 where m >= n else -inf where True else +min", Call(0.125, True, 0.0)),
        ("dropout 0.25; s*0.125", Call(0.125, False, 0.25)),
        ("s*0.125 + 1.0", None),
        ("s*0.125 where n <= m + 1 else -inf", None),
        ("s*0.125 where n >= m else -inf", None),
        ("s*0.125 where n <= m & n < N - 1 else -inf", None),
        ("s*0.125 where n <= m & (n + m) % 2 == 0 else -inf", None),
        ("s*0.125 where False else -inf", None),
        ("s*float(h)", None),
        ("s*float(N)", None),
        ("s*s", None),
        ("0.125/s", None),
        ("s where n <= i0 else -inf", None),
    ],
)
def test_what_the_library_says(text: str, expected: Call | None) -> None:
    assert call_for(parse_spec(text)) == expected


@given(
    st.sampled_from(("s*0.125", "s/3.0", "-s", "s*0.5*0.25", "0.25*s")),
    st.sampled_from(("", " where n <= m else -inf", " where n <= m else +min", " where n <= m else 0row")),
    shapes,
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_the_library_call_is_right_at_every_size(body: str, mask: str, shape: Shape, seed: int) -> None:
    spec = parse_spec(body + mask)
    call = call_for(spec)
    if body == "-s" and mask:
        assert call is None  # the library masks before it scales
        return
    assert call is not None
    hold_call_to_oracle(spec, call, shape, seed)


def hold_call_to_oracle(spec: AttentionSpec, call: Call, shape: Shape, seed: int) -> None:
    torch.manual_seed(seed)
    B, H, Hkv, M, N, D, Dv = shape
    q, k, v = (torch.randn(*size, dtype=torch.float64) for size in ((B, H, M, D), (B, Hkv, N, D), (B, Hkv, N, Dv)))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=call.is_causal, scale=call.scale, dropout_p=call.dropout_p, enable_gqa=H != Hkv
    )
    torch.testing.assert_close(out, reference(spec, q, k, v, ())[0])


# Masks over indices alone, of which few say what `is_causal` says.
index_masks = st.sampled_from([x for x in MASKS if not loads(x)] + [parse_expr("n < m + 1"), parse_expr("m >= n")])
index_programs = st.builds(
    lambda body, masks: Program(body, tuple(Tier(mask, fill) for mask, fill in masks)),
    st.sampled_from([x for x in BODIES if not loads(x)]),
    st.lists(st.tuples(index_masks, st.sampled_from(FILLS)), max_size=2),
)


@given(index_programs, shapes, st.integers(0, 99))
@settings(max_examples=200)
def test_programs_that_the_library_takes_are_right(program: Program, shape: Shape, seed: int) -> None:
    spec = spec_of(program)
    call = call_for(spec)
    if call is not None:
        hold_call_to_oracle(spec, call, shape, seed)


@pytest.mark.parametrize(
    ("text", "scale", "bias"),
    [
        ("s", "1.0", None),
        ("s*2.0 + n", "1.0*2.0", "n"),
        ("n - s", "1.0*-1.0", "n"),
        ("(s + n)*2.0", "1.0*2.0", "n*2.0"),
        ("(s + n)/2.0 - m", "1.0/2.0", "n/2.0 + m*-1"),
        ("(s*float(N) + 1.0) + 2.0", "1.0*float(N)", "1.0 + 2.0"),
    ],
)
def test_scores_that_are_affine_in_the_dot_product(text: str, scale: str, bias: str | None) -> None:
    form = affine(parse(text).body)
    assert form is not None
    assert (str(form.scale), None if form.bias is None else str(form.bias)) == (scale, bias)


@pytest.mark.parametrize(
    "text", ["s*s", "tanh(s)", "s*float(m)", "n*s", "max(s, 0.0)", "1.0/s", "where(n < m, s, s*2.0)"]
)
def test_scores_that_are_not(text: str) -> None:
    assert affine(parse(text).body) is None


@pytest.mark.parametrize(
    ("text", "sizes", "value"),
    [
        ("1.0/sqrt(4.0)", {}, 0.5),
        ("rsqrt(16.0)", {}, 0.25),
        ("float(N)*0.5", {"N": 6}, 3.0),
        ("i0 - 1", {"i0": 3}, 2.0),
        ("i0 - 1", {}, None),
        ("1.0/0.0", {}, None),
        ("sqrt(-1.0)", {}, None),
        ("exp(1.0)", {}, None),
    ],
)
def test_constants(text: str, sizes: dict[str, int], value: float | None) -> None:
    assert constant(parse(text).body, sizes) == value


@pytest.mark.parametrize(
    "make", [lambda: AttentionSpec(parse("s")), lambda: parse_spec("s*0.125 where n <= m else -inf")]
)
def test_dense_takes_everything(make: Callable[[], AttentionSpec]) -> None:
    assert Dense().reasons_against(make(), SHAPE, Target("cuda")) == ()
    assert Dense().tiles(make(), SHAPE, Target("cuda")) == Tiles(256, 256)
