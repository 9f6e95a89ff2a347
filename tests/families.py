"""Attentions that every kernel is held to: families of specs by shape, their tensors, and the comparison with the oracle."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import attnfuse.ops  # noqa: F401  (defines the operators)
from attnfuse.ops import ABI
from attnfuse.reference import Evaluator
from attnfuse.reference import attention as reference
from attnfuse.spec import AttentionSpec, Leaf, Shape, parse_spec
from attnfuse.templates import dropout
from tests.numerics import assert_close, gradient_scales
from tests.strategies import Case

OP = torch.ops.attnfuse.attention.default
SEED = torch.tensor([20240607])


class Call(NamedTuple):
    """Operands of one call and the gradient that comes back."""

    spec: AttentionSpec
    q: Tensor
    k: Tensor
    v: Tensor
    leaves: tuple[Tensor, ...] = ()
    sizes: tuple[int, ...] = ()
    order: tuple[int, ...] = (0, 2, 1, 3)

    @property
    def shape(self) -> Shape:
        (B, H, M, D), (_, Hkv, N, _) = self.q.shape, self.k.shape
        return Shape(B, H, Hkv, M, N, D, self.v.shape[3])

    def on(self, device: str) -> "Call":
        """The same call elsewhere, its operands leaves of autograd."""

        def moved(x: Tensor) -> Tensor:
            # strides are kept, as `to` does for dense tensors
            return x.detach().to(device).requires_grad_(x.requires_grad)

        q, k, v, *leaves = map(moved, (self.q, self.k, self.v, *self.leaves))
        return self._replace(q=q, k=k, v=v, leaves=tuple(leaves))

    def run(self) -> tuple[Tensor, Tensor]:
        seed = SEED.to(self.q.device) if self.spec.dropout else None
        return OP(
            self.q, self.k, self.v, list(self.leaves), list(self.sizes), [], seed, str(self.spec), self.order, ABI
        )


def made(
    text: str, shape: Shape, leaves: tuple[Tensor, ...] = (), dtype: torch.dtype = torch.float32, **more: Any
) -> Call:
    generator = torch.Generator().manual_seed(len(text))

    def normal(heads: int, length: int, depth: int) -> Tensor:
        # [B, N, H, D] in memory, as projections leave them
        x = torch.randn((shape.B, length, heads, depth), generator=generator).to(dtype)
        return x.transpose(1, 2).requires_grad_()

    q, k = normal(shape.H, shape.M, shape.D), normal(shape.Hkv, shape.N, shape.D)
    return Call(parse_spec(text), q, k, normal(shape.Hkv, shape.N, shape.Dv), leaves, **more)


def hold_to_oracle(call: Call, *, with_lse: bool = False, device: str = "cpu") -> None:
    """Asserts the numerics contract for out, lse and every gradient of the call as `device` runs it; the oracle is the CPU's."""
    for x in call.leaves:
        x.requires_grad_(x.is_floating_point())
    there, call = call.on(device), call.on("cpu")
    spec, dtype = call.spec, call.v.dtype
    keep = dropout.keep(SEED, spec.dropout, (*call.shape[:2], *call.shape[3:5])) if spec.dropout else None
    inputs = [call.q, call.k, call.v, *(x for x in call.leaves if x.is_floating_point())]
    names = ["q", "k", "v", *(leaf.name for leaf in spec.leaves if leaf.kind == "float")]
    out, lse = there.run()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(2)).to(lse.dtype) if with_lse else None

    def results_in(kind: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        values, sums = reference(spec, call.q, call.k, call.v, call.leaves, call.sizes, keep, kind)
        return values, sums, gradients(values, sums, inputs)

    def gradients(values: Tensor, sums: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        ends, given_ = [values], [dout.to(values.device, values.dtype)]
        if dlse is not None:
            ends, given_ = [*ends, sums], [*given_, dlse.to(sums.device, sums.dtype)]
        return torch.autograd.grad(ends, inputs, given_, allow_unused=True, materialize_grads=True)

    exact, exact_lse, exact_grads = results_in(torch.float64)
    original, original_lse, original_grads = results_in(dtype)
    assert_close(out.cpu(), original.to(dtype), exact, what=f"{spec} out")
    # half types have no room for fp32's least value
    original_lse = torch.where(exact_lse == torch.finfo(torch.float32).min, exact_lse, original_lse)
    assert_close(lse.cpu(), original_lse.to(lse.dtype), exact_lse, what=f"{spec} lse")
    scales = scales_of(call, dout, keep, dlse)
    found = gradients(out, lse, [there.q, there.k, there.v, *(x for x in there.leaves if x.is_floating_point())])
    for name, x, a, b, c in zip(names, inputs, found, original_grads, exact_grads, strict=True):
        # the oracle's gradients come back in the type of the operand
        assert_close(a.cpu(), b.to(x.dtype), c.double(), scales[name], what=f"{spec} d{name}")


def scales_of(call: Call, dout: Tensor, keep: Tensor | None, dlse: Tensor | None) -> dict[str, float]:
    """S of the contract for each gradient.

    To `gradient_scales` this adds that dS is itself a sum, P·dP - P·Σ P·dP (+ P·dlse), whose terms can cancel.
    """
    spec, shape = call.spec, call.shape
    scales = gradient_scales(spec, call.q, call.k, call.v, list(call.leaves), dout, call.sizes, keep)
    group = shape.H // shape.Hkv
    q, k, v = call.q.detach().double(), *(x.detach().double().repeat_interleave(group, 1) for x in (call.k, call.v))
    leaves = [x.detach().double() if x.is_floating_point() else x for x in call.leaves]
    declared = tuple(Leaf(x.name, "f64", x.rank) if x.kind == "float" else x for x in spec.leaves)
    exact = AttentionSpec(spec.program, declared, spec.dropout)
    eye = torch.eye(shape.N, dtype=torch.float64).expand(shape.B, shape.H, shape.N, shape.N)
    weights, _ = reference(exact, q, k, eye, leaves, call.sizes)
    weights = weights.nan_to_num(0.0)
    given = dout.double() @ v.mT
    if keep is not None:
        given = given * keep / (1 - spec.dropout)
    terms = weights * (given.abs() + (weights * given).sum(-1, keepdim=True).abs())
    if dlse is not None:
        terms = terms + weights * dlse.double().abs()[..., None]
    scores = (q @ k.mT).requires_grad_()
    watched = [x.requires_grad_() if x.is_floating_point() else x for x in leaves]
    body = Evaluator(exact, watched, call.sizes, scores, shape.Hkv, torch.float64).of(spec.program.body, terms != 0)
    body = body.double() + 0.0 * scores.sum()
    (by_s,) = torch.autograd.grad(body, scores, torch.ones_like(body), retain_graph=True)
    ds = (terms * by_s.abs()).nan_to_num(0.0)
    more = {"q": ds @ k.abs(), "k": (ds.mT @ q.abs()).reshape(shape.B, shape.Hkv, group, shape.N, -1).sum(2)}
    for leaf, x in zip(declared, watched, strict=True):
        if leaf.kind == "float":
            (grad,) = torch.autograd.grad(body, x, terms, retain_graph=True, allow_unused=True, materialize_grads=True)
            more[leaf.name] = grad.abs().nan_to_num(0.0)
    return scales | {name: scales[name] + (float(x.max()) if x.numel() else 0.0) for name, x in more.items()}


def padding(shape: Shape, left: tuple[int, ...], right: tuple[int, ...] = (0,)) -> Tensor:
    rows = []
    for _, lo, hi in zip(range(shape.B), itertools.cycle(left), itertools.cycle(right), strict=False):
        rows.append([lo <= n < shape.N - hi for n in range(shape.N)])
    return torch.tensor(rows)


def scattered(*size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(3)) < 0.6


def floats(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(4))


# the least number of bfloat16, as float32 and it hold it
MIN = torch.finfo(torch.bfloat16).min


def fills(rows: int, keys: int) -> Tensor:
    """An additive mask: numbers, MIN and -inf side by side; rows of only one or both of the fills."""
    mask = floats(rows, keys).masked_fill(~scattered(rows, keys), MIN).masked_fill(~scattered(1, keys), -torch.inf)
    mask[::5] = MIN
    mask[1::5, : keys // 2] = -torch.inf
    mask[1::5, keys // 2 :] = MIN
    return mask


Leaves = Callable[[Shape], tuple[Tensor, ...]]
FAMILIES: dict[str, tuple[str, Leaves]] = {
    "full": ("s*0.125", lambda x: ()),
    "causal": ("s*0.125 where n <= m else -inf", lambda x: ()),
    "negative scale": ("-s*0.125 where n <= m else -inf", lambda x: ()),
    "no scale": ("s*0.0 where n <= m else -inf", lambda x: ()),
    "negative scale, biased": ("n*0.01 - s where n <= m + 1 else -inf", lambda x: ()),
    "cross causal": ("s*0.125 where n <= m + N - M else -inf", lambda x: ()),
    "strictly causal": ("s*0.125 where n < m else +min", lambda x: ()),
    "window": ("s*0.125 where n <= m & n > m - 9 else +min", lambda x: ()),
    "chunk": ("s*0.125 where n // 16 == m // 16 else -inf", lambda x: ()),
    "strided": ("s*0.125 where (n - m) % 3 == 0 else 0row", lambda x: ()),
    "left padding": ("pad: bool[:, :]; s*0.125 where n <= m & pad[b, n] else +min", lambda x: (padding(x, (7, 0)),)),
    "right padding": ("pad: bool[:, :]; s*0.125 where pad[b, n] else =min", lambda x: (padding(x, (0,), (9, 0)),)),
    "holes": ("pad: bool[:, :]; s*0.125 where n <= m & pad[b, n] else +min", lambda x: (scattered(x.B, x.N),)),
    "int padding": ("pad: i64[:, :]; s*0.125 where pad[b, n] != 0 else -inf", lambda x: (padding(x, (3, 5)).long(),)),
    "lengths": (
        "stop: i32[:]; s*0.125 where n < stop[b] & n <= m else 0row",
        lambda x: (torch.tensor([x.N // 2, 0, 3], dtype=torch.int32)[: x.B],),
    ),
    "nested": (
        "pad: bool[:, :]; s*0.125 where n <= m else =min where pad[b, n] else +min",
        lambda x: (scattered(x.B, x.N),),
    ),
    "documents": (
        "doc: i64[:, :]; s*0.125 where n <= m & doc[b, m] == doc[b, n] else 0row",
        lambda x: (torch.arange(max(x.M, x.N)).expand(x.B, -1) // 11,),
    ),
    "static cache": ("pos: i64[:]; s*0.125 where n <= pos[m] else -inf", lambda x: (torch.arange(x.M) + 3,)),
    "jumping ends": ("pos: i64[:]; s*0.125 where n <= pos[m] else -inf", lambda x: (torch.arange(x.M) // 8 * 9 - 2,)),
    "by head": ("s*0.125 where n < h*7 else +min", lambda x: ()),
    "softcap": ("5*tanh(s*0.125/5) where n <= m else -inf", lambda x: ()),
    "alibi": ("slope: f32[:]; s*0.125 + slope[h]*n where n <= m else =min", lambda x: (floats(x.H),)),
    "alibi by distance": ("slope: f32[:]; s*0.125 - slope[h]*abs(n - m)", lambda x: (floats(x.H).abs(),)),
    "relative": (
        "table: f32[:, :]; bucket: i64[:]; s*0.25 + table[bucket[n - m + M - 1], h]",
        lambda x: (floats(6, x.H), torch.arange(x.M + x.N) % 6),
    ),
    "two dimensions": (
        "table: f32[:, :]; ids: i64[:, :]; s*0.25 + table[where(ids[m, n] < 0, ids[m, n] + 7, ids[m, n]), h] where n <= m + 5 else +min",
        lambda x: (floats(7, x.H), (torch.arange(x.M)[:, None] * 3 + torch.arange(x.N)) % 14 - 7),
    ),
    "table by batch": (
        "table: f16[:, :, :]; ids: i32[:, :, :]; s*0.25 + table[h, ids[b, m, n], b] - table[h, ids[b, n, m] // 2, b]",
        lambda x: (
            floats(x.H, 9, x.B).half(),
            torch.arange(x.B * max(x.M, x.N) ** 2, dtype=torch.int32).view(x.B, max(x.M, x.N), -1) * 5 % 9,
        ),
    ),
    "diagonals": (
        "pad: bool[:, :]; bias: f32[:, :]; s*0.125 + bias[h, n - m + M - 1] where n <= m + 5 & pad[b, n] else +min",
        lambda x: (scattered(x.B, x.N), floats(x.H, x.M + x.N - 1)),
    ),
    "dense bias": (
        "bias: f32[:, :, :, :]; s*0.125 + bias[b, 0, m, n]",
        lambda x: (floats(x.B, 1, x.M, x.N).masked_fill(~scattered(x.B, 1, x.M, x.N), -1e4),),
    ),
    "infinite bias": (
        "bias: f32[:, :, :, :]; s*0.125 + bias[b, 0, m, n]",
        lambda x: (
            floats(x.B, 1, x.M, x.N).masked_fill(torch.arange(x.N) > torch.arange(x.M)[:, None] - 2, -torch.inf),
        ),
    ),
    "sinks": ("sinks: f32[:]; s*0.125 where n <= m & n > m - 9 else +min sink sinks[h]", lambda x: (floats(x.H),)),
    "sinks, empty rows": (
        "sinks: f32[:]; s*0.125 where n < m else +min sink sinks[h]",
        lambda x: (floats(x.H).masked_fill(torch.arange(x.H) == 1, -torch.inf),),
    ),
    "dropout": ("dropout 0.3; s*0.125 where n <= m else -inf", lambda x: ()),
    "dropout, empty rows": (
        "pad: bool[:, :]; dropout 0.3; s*0.125 where n <= m & pad[b, n] else +min",
        lambda x: (scattered(x.B, x.N),),
    ),
    "dropout and a bias": (
        "bias: f32[:, :]; dropout 0.3; s*0.125 + bias[h, n] where n <= m else -inf",
        lambda x: (floats(x.H, x.N),),
    ),
    "sinks and a bias": (
        "sinks: f32[:]; slope: f32[:]; s*0.125 + slope[h]*n where n <= m else -inf sink sinks[h]",
        lambda x: (floats(x.H), floats(x.H) * 3),
    ),
    "softcap, empty rows": ("5*tanh(s*0.125/5) where n < m else +min", lambda x: ()),
    "bias, uniform rows": (
        "bias: f32[:, :]; s*0.125 + bias[h, n] where n < m else +min",
        lambda x: (floats(x.H, x.N),),
    ),
    "bias, zero rows": (
        "bias: f32[:, :]; s*0.125 + bias[h, n] where n < m else 0row",
        lambda x: (floats(x.H, x.N),),
    ),
    "zeros and uniform rows": (
        "pad: bool[:, :]; s*0.125 where n < m else 0row where pad[b, n] else +min",
        lambda x: (scattered(x.B, x.N),),
    ),
    "additive mask": (
        "bias: f32[:, :]; s*0.125 + bias[m, n] where bias[m, n] != -inf else -inf",
        lambda x: (floats(x.M, x.N).masked_fill(~scattered(x.M, x.N), -torch.inf),),
    ),
    "additive mask of least numbers": (
        f"bias: f32[:, :]; s*0.125 + bias[m, n] where bias[m, n] != -inf else -inf where bias[m, n] != {MIN} else +min",
        lambda x: (fills(x.M, x.N),),
    ),
    "additive mask of least numbers, zero rows": (
        f"bias: f32[:, :]; s*0.125 + bias[m, n] where bias[m, n] != -inf else 0row where bias[m, n] != {MIN} else +min",
        lambda x: (fills(x.M, x.N).index_fill(0, torch.arange(x.M)[2::5], -torch.inf),),
    ),
    "nothing allowed": ("s*0.125 where False else +min", lambda x: ()),
    "powers": ("pow(s, 2.0)*0.05 - pow(0.1 + s*s, 1.5)*0.01 + pow(1.0 + s*s, -0.5)", lambda x: ()),
    "no scores": ("bias: f32[:]; bias[n] where n <= m else -inf", lambda x: (floats(x.N),)),
}


def in_types(families: Mapping[str, tuple[str, Leaves]], *dtypes: torch.dtype) -> list[Any]:
    """Parameters text, leaves, dtype: each family in each type that holds its fills."""
    return [
        pytest.param(text, leaves, dtype, id=f"{name}-{dtype}")
        for name, (text, leaves) in families.items()
        for dtype in dtypes
        if str(MIN) not in text or -MIN <= torch.finfo(dtype).max
    ]


SHAPES = {
    "grouped": Shape(2, 6, 2, 40, 40, 16, 16),
    "wide values": Shape(1, 2, 2, 33, 33, 8, 24),
    "short": Shape(2, 4, 1, 12, 45, 16, 16),
    "long": Shape(2, 3, 3, 45, 12, 16, 16),
    "decode": Shape(3, 4, 2, 1, 37, 16, 16),
}


def values_of(case: Case) -> Call:
    made_ = case.tensors()
    return Call(case.spec, made_.q, made_.k, made_.v, tuple(made_.leaves))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "slice of a wider tensor": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "every other element": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    "depth outside": lambda x: x.mT.contiguous().mT,
    "expanded batch": lambda x: x[:1].contiguous().expand(x.shape),
    "expanded heads": lambda x: x[:, :1].contiguous().expand(x.shape),
}
