"""The operators `attnfuse::attention`, `attention_backward` and `tile_map`, and `attention` for calling the first by hand.

    attention(q, k, v, leaves, sizes, tiles, seed, spec, out_order, abi) -> (out, lse)

q [B, H, M, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv], of any strides; `spec` is the text of an `AttentionSpec`, so that compiled
graphs can be cached on disk, `leaves` and `sizes` are its operands; `tiles` is empty, or the tile map of its mask, which
attentions under one mask share; `seed` is one int64 element, needed with dropout.
out [B, H, M, Dv] has v's type and is dense in `out_order`, its axes from slowest to fastest in memory.  lse [B, H, M] is the
natural log-sum-exp of the scores without the sink, contiguous, fp32 (fp64 where q is).  In a row without any allowed key it
is fp32's least finite value if the row is uniform over keys filled with `min`, else -inf.  Both results are differentiable
once, in reverse mode, with respect to q, k, v and floating-point leaves; those gradients are dense in `out_order` too.

There is no autocast rule: the caller writes casts down, and kernels run without autocast.  `abi` is `ABI`, so that a graph
from another version's cache stops with a message instead of reading its operands wrongly.

    tile_map(leaves, sizes, shape, spec, abi) -> (rows, keys)

`shape` is B, H, Hkv, M, N; `spec` the text of a spec whose mask reads leaves (where it reads none, attention computes the map
once and keeps it).  `rows` [B or 1, H or 1, row tiles, 2 + key tiles], int32, has for each block of rows how many tiles of keys
are FULL and how many PARTIAL, then the numbers of these; `keys` [B or 1, H or 1, key tiles, 2 + row tiles] is the same map
turned round.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnfuse.score import ScoreSyntaxError, loads, parse
from attnfuse.spec import AttentionSpec, Leaf, Shape, parse_spec
from attnfuse.templates.base import Cotangents, Inputs, Kernel, Target
from attnfuse.templates.choose import Refusal, choose
from attnfuse.templates.dense import Dense
from attnfuse.templates.launch import arch_of
from attnfuse.templates.tile_lists import list_shapes, lists_of

# Rises when a schema, a fake, a stride or autograd of the operators changes; tests/test_ops.py notices.
ABI: Final = 2

FORWARD_SCHEMA: Final = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] leaves, SymInt[] sizes, Tensor[] tiles, Tensor? seed, str spec, "
    "int[] out_order, int abi) -> (Tensor out, Tensor lse)"
)
BACKWARD_SCHEMA: Final = (
    "attention_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor[] leaves, SymInt[] sizes, "
    "Tensor[] tiles, Tensor out, Tensor lse, Tensor? seed, str spec, bool[] needs, int[] out_order, int abi) -> Tensor[]"
)
TILE_MAP_SCHEMA: Final = (
    "tile_map(Tensor[] leaves, SymInt[] sizes, SymInt[] shape, str spec, int abi) -> (Tensor rows, Tensor keys)"
)

_LIBRARY: Final[Any] = torch.library.Library("attnfuse", "DEF")  # type: ignore[no-untyped-call]
for _schema in (FORWARD_SCHEMA, BACKWARD_SCHEMA, TILE_MAP_SCHEMA):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
_FORWARD: Final = torch.ops.attnfuse.attention.default
_BACKWARD: Final = torch.ops.attnfuse.attention_backward.default

_BELOW_AUTOGRAD: Final = torch._C._after_autograd_keyset
# What is left of a call's dispatch keys when no mode, no wrapper and no lazy conjugation is in the way.
_DIRECT: Final = frozenset(
    torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
)
_LEAF_DTYPES: Final = {
    torch.bool: "bool",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
}
_FLOATS: Final = ("f16", "bf16", "f32", "f64")


class _Kind(NamedTuple):
    """What is checked of a call, hashable: shapes, types and which operands there are, no values."""

    text: str
    q: Sequence[int]
    k: Sequence[int]
    v: Sequence[int]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    devices: tuple[torch.device, torch.device, torch.device]
    leaves: tuple[tuple[torch.dtype, int, torch.device], ...]
    size_count: int
    tiles: tuple[tuple[int, ...], ...]
    has_seed: bool
    out_order: tuple[int, ...]
    abi: int


def _kind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    leaves: Sequence[Tensor],
    sizes: Sequence[int],
    tiles: Sequence[Tensor],
    seed: Tensor | None,
    spec: str,
    out_order: Sequence[int],
    abi: int,
) -> _Kind:
    kinds = tuple([(x.dtype, x.dim(), x.device) for x in leaves])
    dtypes, devices = (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device)
    maps = tuple([tuple(x.shape) for x in tiles])
    shapes, order = (q.shape, k.shape, v.shape), tuple(out_order)
    return _Kind(spec, *shapes, dtypes, devices, kinds, len(sizes), maps, seed is not None, order, abi)


def _checked(kind: _Kind) -> AttentionSpec:
    """The spec of a call that fits it; ValueError with what does not, its limit and the way out."""
    _check_abi(kind.abi)
    for name, x, dtype in zip("qkv", (kind.q, kind.k, kind.v), kind.dtypes, strict=True):
        if len(x) != 4:
            raise ValueError(
                f"{name} has {len(x)} dimensions, {list(x)}: attention takes 4, [batch, heads, length, depth]"
            )
        if _LEAF_DTYPES.get(dtype) not in _FLOATS:
            raise ValueError(f"{name} is {dtype}: attention takes float16, bfloat16, float32 or float64; cast it first")
    if kind.dtypes[0] != kind.dtypes[1]:
        raise ValueError(f"q is {kind.dtypes[0]} and k {kind.dtypes[1]}: attention takes one type for both; cast one")
    device = kind.devices[0]
    for name, where in zip("kv", kind.devices[1:], strict=True):
        if where != device:
            raise ValueError(f"q is on {device} and {name} on {where}: move one")
    shapes = f"q {list(kind.q)}, k {list(kind.k)}, v {list(kind.v)}"
    for what, a, b in (
        ("batches of q and k", kind.q[0], kind.k[0]),
        ("batches of k and v", kind.k[0], kind.v[0]),
        ("heads of k and v", kind.k[1], kind.v[1]),
        ("lengths of k and v", kind.k[2], kind.v[2]),
        ("depths of q and k", kind.q[3], kind.k[3]),
    ):
        if _differ(a, b):
            raise ValueError(f"{what} differ, {a} and {b}: {shapes}; expand or slice one")
    H, Hkv = kind.q[1], kind.k[1]
    if type(H) is int and type(Hkv) is int and (Hkv == 0 or H % Hkv):
        raise ValueError(f"{H} query heads over {Hkv} key heads: the first must be a multiple of the second; {shapes}")
    if sorted(kind.out_order) != [0, 1, 2, 3]:
        raise ValueError(f"out_order {list(kind.out_order)}: expected the axes 0, 1, 2, 3 from slowest to fastest")
    spec = parse_spec(kind.text)
    if len(kind.leaves) != len(spec.leaves):
        raise ValueError(f"{len(kind.leaves)} leaves given, the score declares {len(spec.leaves)}: {spec}")
    for leaf, (dtype, rank, where) in zip(spec.leaves, kind.leaves, strict=True):
        if where != device:
            raise ValueError(f"q is on {device} and leaf {leaf.name} on {where}: move one")
        if _LEAF_DTYPES.get(dtype) != leaf.dtype or rank != leaf.rank:
            found = f"a {dtype} tensor of {rank} dimensions"
            raise ValueError(f"leaf {leaf.name} is {found}, the score declares {leaf}: cast or reshape it")
    if kind.size_count < spec.size_count():
        raise ValueError(f"{kind.size_count} sizes given, the score uses {spec.size_count()} (i0 …): {spec}")
    if kind.tiles:
        expected = list_shapes(kind.text, (kind.q[0], H, Hkv, kind.q[2], kind.k[2]))
        fits = len(kind.tiles) == 2 and not any(
            len(x) != len(y) or any(map(_differ, x, y)) for x, y in zip(kind.tiles, expected, strict=True)
        )
        if not fits:
            raise ValueError(f"tiles have the shapes {kind.tiles}; a tile map of {kind.text} has {expected}")
    if spec.dropout and not kind.has_seed:
        raise ValueError(
            f"dropout {spec.dropout} needs a seed, one int64 element: seed=torch.randint(2**62, ()), or dropout 0"
        )
    return spec


def _differ(a: int, b: int) -> bool:
    """Whether two sizes are known to differ; symbolic ones get no guard for a check that the kernel repeats."""
    return type(a) is int and type(b) is int and a != b


@lru_cache(maxsize=4096)
def _kernel(kind: _Kind, device: str, training: bool) -> tuple[Kernel, AttentionSpec, Shape]:
    spec = _checked(kind)
    shape = Shape(kind.q[0], kind.q[1], kind.k[1], kind.q[2], kind.k[2], kind.q[3], kind.v[3])
    q_dtype, _, v_dtype = kind.dtypes
    arch = arch_of(kind.devices[0]) if device == "cuda" else ""
    target = Target(device, _LEAF_DTYPES[q_dtype], _LEAF_DTYPES[v_dtype], training=training, lse=True, arch=arch)
    choice = choose(spec, shape, target)
    template = None if isinstance(choice, Refusal) else choice.template
    return template if isinstance(template, Kernel) else Dense(), spec, shape


def _prepared(
    training: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    leaves: Sequence[Tensor],
    sizes: Sequence[int],
    tiles: Sequence[Tensor],
    seed: Tensor | None,
    spec: str,
    out_order: Sequence[int],
    abi: int,
) -> tuple[Kernel, Inputs]:
    kind = _kind(q, k, v, leaves, sizes, tiles, seed, spec, out_order, abi)
    kernel, parsed, shape = _kernel(kind, q.device.type, training)
    return kernel, Inputs(parsed, spec, shape, q, k, v, leaves, tuple(sizes), seed, kind.out_order, tiles)


def _forward(*operands: Any) -> tuple[Tensor, Tensor]:
    kernel, inputs = _prepared(False, *operands)
    if torch._C._is_any_autocast_enabled():
        with torch._C._DisableAutocast():
            return kernel.forward(inputs)
    return kernel.forward(inputs)


def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    leaves: Sequence[Tensor],
    sizes: Sequence[int],
    tiles: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    spec: str,
    needs: Sequence[bool],
    out_order: Sequence[int],
    abi: int,
) -> list[Tensor]:
    kernel, inputs = _prepared(True, q, k, v, leaves, sizes, tiles, seed, spec, out_order, abi)
    cotangents = Cotangents(out, lse, dout, dlse, tuple(needs))
    if torch._C._is_any_autocast_enabled():
        with torch._C._DisableAutocast():
            return kernel.backward(inputs, cotangents)
    return kernel.backward(inputs, cotangents)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    leaves: Sequence[Tensor],
    sizes: Sequence[int],
    tiles: Sequence[Tensor],
    seed: Tensor | None,
    spec: str,
    out_order: Sequence[int],
    abi: int,
) -> tuple[Tensor, Tensor]:
    _checked(_kind(q, k, v, leaves, sizes, tiles, seed, spec, out_order, abi))
    B, H, M, _ = q.shape
    out = torch.empty_permuted((B, H, M, v.shape[3]), list(out_order), dtype=v.dtype, device=q.device)
    return out, torch.empty((B, H, M), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def _backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    leaves: Sequence[Tensor],
    sizes: Sequence[int],
    tiles: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    spec: str,
    needs: Sequence[bool],
    out_order: Sequence[int],
    abi: int,
) -> list[Tensor]:
    _checked(_kind(q, k, v, leaves, sizes, tiles, seed, spec, out_order, abi))
    wanted = [(x, needed) for x, needed in zip((q, k, v, *leaves), needs, strict=True)]
    return [
        torch.empty_permuted(x.shape, list(out_order if at < 3 else range(x.dim())), dtype=x.dtype, device=x.device)
        for at, (x, needed) in enumerate(wanted)
        if needed
    ]


class _Attention(torch.autograd.Function):
    """The operator with its gradient; leaves come last, because autograd sees tensors only outside of lists."""

    @staticmethod
    def forward(
        ctx: Any,
        below: torch._C.DispatchKeySet,
        sizes: Sequence[int],
        tiles: Sequence[Tensor],
        spec: str,
        out_order: Sequence[int],
        abi: int,
        seed: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *leaves: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = _FORWARD.redispatch(below, q, k, v, list(leaves), sizes, tiles, seed, spec, out_order, abi)
        ctx.save_for_backward(seed, out, lse, q, k, v, *leaves, *tiles)
        ctx.call = sizes, len(leaves), spec, out_order, abi
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        seed, out, lse, q, k, v, *more = ctx.saved_tensors
        sizes, count, spec, out_order, abi = ctx.call
        leaves, tiles = more[:count], more[count:]
        needs = list(ctx.needs_input_grad[7:])
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        grads = iter(_BACKWARD(dout, dlse, q, k, v, leaves, sizes, tiles, out, lse, seed, spec, needs, out_order, abi))
        return (*(None,) * 7, *(next(grads) if needed else None for needed in needs))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        _refuse("forward-mode differentiation")


class _Once(torch.autograd.Function):
    """The gradients as a function that has none of its own."""

    @staticmethod
    def forward(ctx: Any, below: torch._C.DispatchKeySet, operands: tuple[Any, ...], *tensors: Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_BACKWARD.redispatch(below, *operands))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        _refuse("differentiating a second time")


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"attnfuse::attention does not support {what}; compute this attention with plain PyTorch operators, or through "
        f"torch.nn.functional.scaled_dot_product_attention with torch.nn.attention.SDPBackend.MATH"
    )


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


_unpack_dual: Any = forward_ad.unpack_dual


def _has_tangent(x: Tensor) -> bool:
    return _unpack_dual(x).tangent is not None


def _forward_autograd(
    keys: torch._C.DispatchKeySet,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    leaves: list[Tensor],
    sizes: list[int],
    tiles: list[Tensor],
    seed: Tensor | None,
    spec: str,
    out_order: list[int],
    abi: int,
) -> tuple[Tensor, Tensor]:
    below = keys & _BELOW_AUTOGRAD
    if forward_ad._current_level >= 0 and any(map(_has_tangent, (q, k, v, *leaves))):
        _refuse("forward-mode differentiation")
    if torch.is_grad_enabled() and torch._C._any_requires_grad(q, k, v, leaves):
        if torch._C._are_functorch_transforms_active():
            _refuse("torch.func transforms")
        return _apply(_Attention, below, sizes, tiles, spec, out_order, abi, seed, q, k, v, *leaves)  # type: ignore[no-any-return]
    if below.raw_repr() in _DIRECT:
        return _forward(q, k, v, leaves, sizes, tiles, seed, spec, out_order, abi)
    with torch._C._AutoDispatchBelowAutograd():
        return _FORWARD.redispatch(below, q, k, v, leaves, sizes, tiles, seed, spec, out_order, abi)  # type: ignore[no-any-return]


def _backward_autograd(keys: torch._C.DispatchKeySet, *operands: Any) -> list[Tensor]:
    below = keys & _BELOW_AUTOGRAD
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
        tensors = [
            x for part in operands for x in (part if isinstance(part, list) else (part,)) if isinstance(x, Tensor)
        ]
        return list(_apply(_Once, below, operands, *tensors))
    with torch._C._AutoDispatchBelowAutograd():
        return _BACKWARD.redispatch(below, *operands)  # type: ignore[no-any-return]


def _forward_vmap(*operands: Any) -> NoReturn:
    _refuse("vmap (fold the mapped axis into the batch)")


def _check_abi(abi: int) -> None:
    if abi != ABI:
        raise ValueError(
            f"attnfuse was called with abi {abi}, this version has abi {ABI}: the graph was compiled by another version of "
            f"attnfuse; compile it again (torch.compiler.reset() and an empty compile cache)"
        )


def _tile_map(
    leaves: Sequence[Tensor], sizes: Sequence[int], shape: Sequence[int], spec: str, abi: int
) -> tuple[Tensor, Tensor]:
    _check_abi(abi)
    return lists_of(spec, leaves, tuple(sizes), shape, leaves[0].device)


def _tile_map_fake(
    leaves: Sequence[Tensor], sizes: Sequence[int], shape: Sequence[int], spec: str, abi: int
) -> tuple[Tensor, Tensor]:
    _check_abi(abi)
    rows, keys = list_shapes(spec, shape)
    return leaves[0].new_empty(rows, dtype=torch.int32), leaves[0].new_empty(keys, dtype=torch.int32)


for _name, _kernel_of, _autograd_of, _fake_of in (
    ("attention", _forward, _forward_autograd, _forward_fake),
    ("attention_backward", _backward, _backward_autograd, _backward_fake),
    ("tile_map", _tile_map, None, _tile_map_fake),
):
    _LIBRARY.impl(_name, _kernel_of, "CompositeExplicitAutograd")
    if _autograd_of is not None:
        _LIBRARY.impl(_name, _autograd_of, "Autograd", with_keyset=True)
    _LIBRARY.impl(_name, _forward_vmap, "FuncTorchBatched")
    torch.library.register_fake(f"attnfuse::{_name}", _fake_of, lib=_LIBRARY)


def attention(
    q: Tensor, k: Tensor, v: Tensor, score: str, *, dropout: float = 0.0, seed: Tensor | None = None, **leaves: Tensor
) -> Tensor:
    """Attention with a score program: `attention(q, k, v, "s*0.125 where n <= m & pad[b, n] else -inf", pad=pad)`.

    Args:
        q: [B, H, M, D].
        k: [B, Hkv, N, D] with H a multiple of Hkv; query head h reads head h // (H // Hkv).
        v: [B, Hkv, N, Dv].
        score: what is computed between the dot product `s` and the softmax, in the score language.
        dropout: probability with which a weight is dropped.
        seed: one int64 element that decides the dropout mask; drawn from torch's generator if not given.
        leaves: the tensors that the score loads from, by name.  An index outside a leaf, which only cells that the mask
            excludes should have, reads its nearest element.

    Returns:
        [B, H, M, Dv] in v's type, differentiable once with respect to q, k, v and floating-point leaves.

    Raises:
        ScoreSyntaxError: a score that does not parse, with the position.
        ValueError: operands that do not fit each other or the score.
    """
    kinds = tuple([(name, _leaf_dtype(name, x), x.dim()) for name, x in leaves.items()])
    # a literal zero, because torch.compile(dynamic=True) makes a symbol of an argument's default
    text = _spec_text(score, dropout if dropout else 0.0, kinds)
    if dropout and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (), device=q.device)
    heads_inside = q.dim() == 4 and q.stride(1) < q.stride(2)
    order = [0, 2, 1, 3] if heads_inside else [0, 1, 2, 3]
    out, _ = _FORWARD(q, k, v, list(leaves.values()), [], [], seed, text, order, ABI)
    return out  # type: ignore[no-any-return]


def _leaf_dtype(name: str, x: Tensor) -> str:
    if x.dtype not in _LEAF_DTYPES:
        raise ValueError(f"leaf {name} is {x.dtype}: the score language takes {', '.join(map(str, _LEAF_DTYPES))}")
    return _LEAF_DTYPES[x.dtype]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _spec_text(score: str, dropout: float, leaves: tuple[tuple[str, str, int], ...]) -> str:
    return _cached_spec_text(score, dropout, leaves)


@lru_cache(maxsize=4096)
def _cached_spec_text(score: str, dropout: float, leaves: tuple[tuple[str, str, int], ...]) -> str:
    if not isinstance(score, str):
        raise ValueError(
            f"the score is {score!r} of type {type(score).__name__}; "
            "it is a text such as 's*0.125 where n <= m else -inf'"
        )
    if ";" in score:
        raise ScoreSyntaxError("unexpected ';': leaves and dropout are arguments", score, score.index(";"))
    spec = AttentionSpec(parse(score), tuple(Leaf(*leaf) for leaf in leaves), dropout)
    used = {load.leaf for expr in spec.program.expressions() for load in loads(expr)}
    unused = [name for name, _, _ in leaves if name not in used]
    if unused:
        raise ValueError(
            f"{score}: nothing is loaded from {', '.join(unused)}; leave it out, or load from it as in {unused[0]}[b, n]"
        )
    if spec.size_count():
        raise ValueError(f"{score}: i0 … are entries of the operator's sizes; write the number, or load it from a leaf")
    return str(spec)
