"""Attention alone: what each case means in attnfuse's language, in FlexAttention's, and as a dense mask."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnfuse.ops import ABI
from attnfuse.spec import parse_spec

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Size:
    """B, H, Hkv, M, N, D of one case, in bf16."""

    B: int
    H: int
    Hkv: int
    M: int
    N: int
    D: int

    def __str__(self) -> str:
        heads = f"H{self.H}" if self.H == self.Hkv else f"H{self.H}/{self.Hkv}"
        rows = f"N{self.N}" if self.M == self.N else f"M{self.M} N{self.N}"
        return f"B{self.B} {heads} {rows} D{self.D}"

    def tensors(self, *, grad: bool) -> list[Tensor]:
        """q, k, v as projections leave them: [B, length, heads, D] in memory."""
        made = []
        for heads, length in ((self.H, self.M), (self.Hkv, self.N), (self.Hkv, self.N)):
            x = torch.randn(self.B, length, heads, self.D, device="cuda", dtype=torch.bfloat16)
            made.append(x.transpose(1, 2).requires_grad_(grad))
        return made


@dataclass(frozen=True)
class Kind:
    """One mask and score.

    Args:
        program: in attnfuse's score language; `scale` stands for 1/√D.
        leaves: the tensors it reads, by name with their declaration.
        mask: FlexAttention's mask_mod from the leaves, None for all keys.
        score: its score_mod from the leaves, None for the plain score.
        causal: what `scaled_dot_product_attention(is_causal=True)` computes, so that library kernels are peers.
    """

    name: str
    program: str
    leaves: Callable[[Size], dict[str, tuple[str, Tensor]]] = lambda size: {}
    mask: Callable[[dict[str, Tensor], Size], Any] | None = None
    score: Callable[[dict[str, Tensor], Size], Any] | None = None
    causal: bool = False

    def operands(self, size: Size) -> tuple[str, dict[str, Tensor]]:
        """The spec's text and the leaves by name."""
        leaves = self.leaves(size)
        head = "".join(f"{declared}; " for declared, _ in leaves.values())
        text = head + self.program.replace("scale", repr(size.D**-0.5))
        return str(parse_spec(text)), {name: x for name, (_, x) in leaves.items()}

    def allowed(self, size: Size, leaves: dict[str, Tensor]) -> Tensor | None:
        """The mask as a dense Boolean tensor [B or 1, 1, M, N]."""
        if self.mask is None:
            return None
        mod = self.mask(leaves, size)
        b = torch.arange(size.B, device="cuda")[:, None, None]
        m = torch.arange(size.M, device="cuda")[:, None]
        n = torch.arange(size.N, device="cuda")
        return torch.as_tensor(mod(b, 0, m, n)).expand(size.B, size.M, size.N)[:, None]


def _documents(size: Size) -> Tensor:
    """Ids of documents of unlike lengths, the same packing for each batch."""
    edges = torch.linspace(0, 1, 13, device="cuda") ** 1.5 * size.N
    return (torch.arange(size.N, device="cuda")[:, None] >= edges[1:-1]).sum(1).expand(size.B, -1).contiguous()


def _slopes(size: Size) -> Tensor:
    return 2.0 ** (-8.0 * torch.arange(1, size.H + 1, device="cuda") / size.H)


def _padding(size: Size) -> Tensor:
    """Left padding: none in the first sequence, an eighth in the next ones."""
    pad = torch.ones(size.B, size.N, dtype=torch.bool, device="cuda")
    pad[1:, : size.N // 8] = False
    return pad


WINDOW = 512
CAUSAL = "n <= m + N - M"
KINDS = {
    kind.name: kind
    for kind in (
        Kind("full", "s*scale"),
        Kind(
            "causal",
            f"s*scale where {CAUSAL} else -inf",
            mask=lambda x, s: lambda b, h, m, n: n <= m + s.N - s.M,
            causal=True,
        ),
        Kind(
            "window",
            f"s*scale where {CAUSAL} & n > m + N - M - {WINDOW} else -inf",
            mask=lambda x, s: lambda b, h, m, n: (n <= m + s.N - s.M) & (n > m + s.N - s.M - WINDOW),
        ),
        Kind(
            "document",
            "s*scale where n <= m & doc[b, m] == doc[b, n] else -inf",
            lambda s: {"doc": ("doc: i64[:, :]", _documents(s))},
            mask=lambda x, s: lambda b, h, m, n: (n <= m) & (x["doc"][b, m] == x["doc"][b, n]),
        ),
        Kind(
            "alibi",
            f"s*scale + slope[h]*(n - m) where {CAUSAL} else -inf",
            lambda s: {"slope": ("slope: f32[:]", _slopes(s))},
            mask=lambda x, s: lambda b, h, m, n: n <= m + s.N - s.M,
            score=lambda x, s: lambda score, b, h, m, n: score + x["slope"][h] * (n - m),
        ),
        Kind(
            "softcap",
            f"50*tanh(s*scale/50) where {CAUSAL} else -inf",
            mask=lambda x, s: lambda b, h, m, n: n <= m + s.N - s.M,
            score=lambda x, s: lambda score, b, h, m, n: 50 * torch.tanh(score / 50),
        ),
        Kind(
            "padded",
            f"s*scale where {CAUSAL} & pad[b, n] else +min",
            lambda s: {"pad": ("pad: bool[:, :]", _padding(s))},
            mask=lambda x, s: lambda b, h, m, n: (n <= m + s.N - s.M) & x["pad"][b, n],
        ),
    )
}


def ours(kind: Kind, size: Size) -> Call:
    """attnfuse's own kernels, whatever the library could do."""
    import attnfuse.ops  # noqa: F401  (defines the operator)

    text, leaves = kind.operands(size)
    operands = list(leaves.values())

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.attnfuse.attention(q, k, v, operands, [], [], None, text, [0, 2, 1, 3], ABI)[0]
        return out

    return call


def sdpa(kind: Kind, size: Size, backend: SDPBackend | None) -> Call | None:
    """`scaled_dot_product_attention` with one of its kernels, or the one that it picks itself, where no dense mask is needed."""
    if kind.name not in ("full", "causal") or (kind.causal and size.M != size.N and size.M != 1):
        return None
    # the last row of a causal mask sees every key
    causal = kind.causal and size.M > 1

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=size.H != size.Hkv)

    return call


def flex(kind: Kind, size: Size) -> Call:
    """Compiled FlexAttention with a hand-written mask; making its block mask is not counted."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, leaves = kind.operands(size)
    block_mask = None
    if kind.mask is not None:
        by_batch = size.B if leaves and "slope" not in leaves else None
        block_mask = create_block_mask(kind.mask(leaves, size), by_batch, None, size.M, size.N, device="cuda")
    score = None if kind.score is None else kind.score(leaves, size)
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = compiled(q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=size.H != size.Hkv)
        return out

    return call


def _bias(kind: Kind, size: Size) -> Tensor | None:
    """What a model adds to its scores, bf16 [B or 1, H or 1, M, N]; None for a softcap, which no bias can say."""
    _, leaves = kind.operands(size)
    allowed = kind.allowed(size, leaves)
    if kind.name == "softcap":
        return None
    low = torch.finfo(torch.bfloat16).min
    bias = torch.zeros((), device="cuda", dtype=torch.bfloat16)
    if kind.score is not None:
        m = torch.arange(size.M, device="cuda")[:, None]
        n = torch.arange(size.N, device="cuda")
        h = torch.arange(size.H, device="cuda")[:, None, None]
        bias = kind.score(leaves, size)(bias, 0, h, m, n).to(torch.bfloat16)[None]
    return bias if allowed is None else torch.where(allowed, bias, low)


def stock_sdpa(kind: Kind, size: Size) -> Call | None:
    """Stock `torch.compile` of an SDPA call with the dense mask that models make."""
    bias = _bias(kind, size)
    if bias is None:
        return None

    @torch.compile(dynamic=False)
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=size.H != size.Hkv)

    return call


def eager(kind: Kind, size: Size) -> Call:
    """As models write it down: matmul, mask, softmax, matmul, keys and values repeated for their query heads."""
    bias = _bias(kind, size)
    _, leaves = kind.operands(size)
    allowed = kind.allowed(size, leaves) if bias is None else None

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(size.H // size.Hkv, 1) for x in (k, v))
        scores = q @ k.mT * size.D**-0.5
        if bias is None:
            scores = 50 * torch.tanh(scores / 50)
            if allowed is not None:
                scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        else:
            scores = scores + bias
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    return call


def flops(kind: Kind, size: Size) -> float:
    """Of a forward, counting allowed cells alone: 4·D for each."""
    _, leaves = kind.operands(size)
    allowed = kind.allowed(size, leaves)
    cells = size.B * size.M * size.N if allowed is None else int(allowed.expand(size.B, 1, size.M, size.N).sum())
    return 4.0 * size.D * size.H * cells


def wrong(call: Call, kind: Kind, size: Size) -> str:
    """What is wrong with a call's results and gradients at this size, by the contract of the tests; "" where nothing is."""
    from attnfuse import reference
    from benchmarks import gate

    text, leaves = kind.operands(size)
    spec = parse_spec(text)
    torch.manual_seed(1)
    tensors = size.tensors(grad=True)
    dout = torch.randn(size.B, size.H, size.M, size.D, device="cuda", dtype=torch.bfloat16)

    def results(run: Call, operands: list[Tensor], given: Tensor) -> dict[str, Tensor]:
        out = run(*operands)
        grads = torch.autograd.grad(out, operands, given.to(out.dtype))
        return {"out": out.detach(), "dq": grads[0], "dk": grads[1], "dv": grads[2]}

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(spec, q, k, v, list(leaves.values()))[0]

    double = [x.detach().double().requires_grad_() for x in tensors]
    return gate.fault(
        results(call, tensors, dout), results(eager(kind, size), tensors, dout), results(exact, double, dout)
    )
