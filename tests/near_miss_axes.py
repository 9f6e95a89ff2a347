"""Attentions with one fact changed: each change to each base attention gives a near miss.

A base is a few lines of text, one for each stage; a change rewrites a stage, in which `{}` stands for what was there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tests.harness import Function, randn
from tests.spelling_axes import Sizes, compiled_text, text_of

STAGES = ("operands", "scores", "scale", "allowed", "masked", "weights", "output", "result")


class Base(NamedTuple):
    sizes: Sizes
    stages: dict[str, str]


_EQUAL = Sizes(B=4, H=4, Hkv=4, M=4, N=4, D=4)
_PLAIN = {
    "scores": "s = q @ k.mT",
    "scale": "s = s * 0.5",
    "weights": "p = s.softmax(-1)",
    "output": "o = p @ v",
    "result": "result = o",
}
_CAUSAL = {
    "allowed": "allowed = torch.ones(M, N, dtype=torch.bool).tril(N - M)",
    "masked": "s = s.masked_fill(~allowed, float('-inf'))",
}
_LEFT = {"allowed": "allowed = torch.ones(M, N, dtype=torch.bool).tril() & left[:, None, None, :]"}
_ADDED = "s = s + torch.where(allowed, torch.zeros((), dtype=s.dtype), torch.finfo(s.dtype).min)"

BASES = {
    "plain": Base(_EQUAL, _PLAIN),
    "causal": Base(_EQUAL, _PLAIN | _CAUSAL),
    "padded": Base(
        _EQUAL,
        _PLAIN
        | {
            "allowed": "allowed = pad[:, None, None, :]",
            "masked": _ADDED,
        },
    ),
    "grouped": Base(
        _EQUAL._replace(Hkv=2),
        _PLAIN | {"operands": "k, v = (x[:, :, None].expand(B, Hkv, 2, N, D).reshape(B, H, N, D) for x in (k, v))"},
    ),
    "rows of minima": Base(_EQUAL, _PLAIN | _LEFT | {"masked": _ADDED}),
    "rows of billions": Base(_EQUAL, _PLAIN | _LEFT | {"masked": "s = s + (~allowed).to(s.dtype) * -1e9"}),
    "longer": Base(Sizes(B=2, H=4, Hkv=4, M=3, N=5, D=4), _PLAIN | _CAUSAL),
}

SQUARE = ("plain", "causal", "padded", "grouped")
MASKED = ("causal", "padded", "longer")
# in which no row of another axis is masked throughout
DENSE = ("plain", "grouped")
# in which some row has no allowed key
EMPTY = ("rows of minima", "rows of billions")


@dataclass(frozen=True)
class Change:
    """One fact.

    Args:
        stage: which of `STAGES` is rewritten, or "weights and output".
        code: what it becomes.
        miss: the result is no attention, so nothing may take its place; else it is another attention, to be computed as such.
        bases: names of those that can be changed so.
        gradients: whether eager has them.
    """

    stage: str
    code: str
    miss: bool = False
    bases: tuple[str, ...] = SQUARE
    gradients: bool = True


_E = "e = torch.exp(s - s.amax(-1, keepdim=True))\n"
_RAW = "e = torch.exp(s)\n"
_TRIL = "tril = torch.ones(M, N, dtype=torch.bool).tril()\n"
_LESS = "t = s - s.amax(-1, keepdim=True)\n"
_SINK = "sink = w[0].view(1, H, 1, 1).expand(B, H, M, 1)\n"

CHANGES: dict[str, Change] = {
    # axes of the softmax
    "softmax over queries": Change("weights", "p = s.softmax(-2)", miss=True),
    "softmax over heads": Change("weights", "p = s.softmax(1)", miss=True, bases=(*DENSE, "padded")),
    "softmax over the batch": Change("weights", "p = s.softmax(0)", miss=True, bases=(*DENSE, "padded")),
    "softmax over queries and keys": Change("weights", "p = s.flatten(-2).softmax(-1).view(B, H, M, N)", miss=True),
    "softmax over heads and keys": Change(
        "weights", "p = s.transpose(1, 2).flatten(2).softmax(-1).view(B, M, H, N).transpose(1, 2)", miss=True
    ),
    "softmax over half of the keys": Change("weights", "p = s.view(B, H, M, 2, 2).softmax(-1).flatten(-2)", miss=True),
    "softmax over both": Change("weights", "p = s.softmax(-1) * s.softmax(-2)", miss=True),
    "softmax over one axis, product over another": Change("output", "o = p.mT @ v", miss=True),
    "softmax of the transposed scores": Change("weights", "p = s.mT.softmax(-1)"),
    "softmax of scores with batch and heads swapped": Change("weights", "p = s.transpose(0, 1).softmax(-1)"),
    "softmax of scores viewed otherwise": Change("weights", "p = s.reshape(B, M, H, N).softmax(-1)"),
    # operands
    "keys not transposed": Change("scores", "s = q @ k"),
    "keys in reverse": Change("operands", "{}\nk = k.flip(2)"),
    "keys rolled": Change("operands", "{}\nk = k.roll(1, 2)"),
    "keys of the next head": Change("operands", "{}\nk = k.roll(1, 1)"),
    "keys of the next of the batch": Change("operands", "{}\nk = k.roll(1, 0)"),
    "keys with batch and heads swapped": Change("operands", "{}\nk = k.transpose(0, 1)"),
    "keys with heads and rows swapped": Change("operands", "{}\nk = k.transpose(1, 2)"),
    "keys with batch and rows swapped": Change("operands", "{}\nk = k.transpose(0, 2)"),
    "keys and depth swapped twice": Change("scores", "s = q @ k.mT.mT"),
    "keys viewed as heads in another place": Change("operands", "{}\nk = k.reshape(B, N, H, D).transpose(1, 2)"),
    "keys with mixed depth": Change("operands", "{}\nk = k.reshape(B, H, D, N).mT"),
    "keys of the first row of the batch": Change("operands", "{}\nk = k[:1].expand(B, H, N, D)"),
    "keys of one head for all": Change("operands", "{}\nk = k[:, 1:2].expand(B, H, N, D)"),
    "keys of interleaved groups": Change(
        "operands", "k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)", bases=("grouped",)
    ),
    "keys grouped otherwise than values": Change(
        "operands", "k, v = k.repeat(1, 2, 1, 1), v.repeat_interleave(2, 1)", bases=("grouped",)
    ),
    "queries in reverse": Change("operands", "{}\nq = q.flip(2)"),
    "queries with heads and rows swapped": Change("operands", "{}\nq = q.transpose(1, 2)"),
    "queries and keys exchanged": Change("scores", "s = k @ q.mT"),
    "queries for keys": Change("scores", "s = q @ q.mT"),
    "keys for values": Change("output", "o = p @ k"),
    "values of the next head": Change("output", "o = p @ v.roll(1, 1)"),
    "values of picked heads": Change("output", "o = p @ v[:, [1, 0, 3, 3]]"),
    "values of the next of the batch": Change("output", "o = p @ v.roll(1, 0)"),
    "values in reverse": Change("output", "o = p @ v.flip(2)"),
    "values with batch and heads swapped": Change("output", "o = p @ v.transpose(0, 1)"),
    "values with heads and rows swapped": Change("output", "o = p @ v.transpose(1, 2)"),
    "values transposed": Change("output", "o = p @ v.mT"),
    "values by keys transposed": Change("output", "o = v.mT @ p", miss=True),
    "values and weights exchanged": Change("output", "o = v @ p", miss=True),
    "values by weights transposed": Change("output", "o = (v.mT @ p.mT).mT"),
    # products
    "half of the depth": Change("scores", "s = q[..., :2] @ k[..., :2].mT"),
    "depths summed by themselves": Change("scores", "s = torch.einsum('bhmd,bhne->bhmn', q, k)"),
    "summed over depth and the heads of keys": Change("scores", "s = torch.einsum('bhmd,bgnd->bhmn', q, k)"),
    "summed over depth and heads": Change(
        "scores", "s = torch.einsum('bhmd,bhnd->bmn', q, k)[:, None].expand(B, H, M, N)"
    ),
    "no sum over depth": Change("scores", "s = q * k", miss=True, bases=("plain", "padded", "grouped")),
    "distance of queries and keys": Change(
        "scores", "s = -(q[:, :, :, None] - k[:, :, None]).square().sum(-1)", miss=True
    ),
    "depth of queries is keys": Change("scores", "s = torch.einsum('bhmd,bhdn->bhmn', q, k)"),
    "rows paired across the batch": Change("scores", "s = torch.einsum('bhmd,hbnd->bhmn', q, k)"),
    "scores of queries transposed by einsum": Change("scores", "s = torch.einsum('bhmd,bhnd->bhnm', q, k)"),
    "scores with heads and rows swapped by einsum": Change("scores", "s = torch.einsum('bhmd,bhnd->bmhn', q, k)"),
    "output summed over queries by einsum": Change("output", "o = torch.einsum('bhmn,bhmd->bhnd', p, v)", miss=True),
    "output without a sum by einsum": Change("output", "o = torch.einsum('bhmn,bhnd->bhnd', p, v)", miss=True),
    "output summed over heads by einsum": Change("output", "o = torch.einsum('bhmn,bhnd->bmd', p, v)"),
    "output of all heads' values by einsum": Change("output", "o = torch.einsum('bhmn,bgnd->bhmd', p, v)"),
    "output over heads by einsum": Change("output", "o = torch.einsum('bhmn,bnhd->bhmd', p, v)"),
    "output of each head's query by einsum": Change("output", "o = torch.einsum('bhmn,bmnd->bhmd', p, v)", miss=True),
    "weights times values element by element": Change("output", "o = p * v", miss=True),
    "weights times weights": Change("output", "o = p @ p", miss=True),
    "weights times weights times values": Change("output", "o = p @ (p @ v)", miss=True),
    "weights times scores": Change("output", "o = p @ s", miss=True, bases=DENSE),
    "values plus weights": Change("output", "o = p @ (p + v)", miss=True),
    "heads merged before rows": Change("result", "result = o.reshape(B, M, H * D)"),
    "depth merged before heads": Change("result", "result = o.permute(0, 2, 3, 1).reshape(B, M, H * D)"),
    "output added to values": Change("output", "o = torch.baddbmm(v.flatten(0, 1), p.flatten(0, 1), v.flatten(0, 1))"),
    # the mask
    "mask inverted": Change("allowed", "{}\nallowed = ~allowed", bases=("causal", "padded")),
    "mask inverted, rows of NaN": Change("allowed", "{}\nallowed = ~allowed", bases=("longer",)),
    "mask shifted along the keys": Change("allowed", "{}\nallowed = allowed.roll(1, -1)", bases=MASKED),
    "mask shifted along the rows": Change("allowed", "{}\nallowed = allowed.roll(1, 0)", bases=MASKED),
    "mask in reverse": Change("allowed", "{}\nallowed = allowed.flip(-1)", bases=MASKED),
    "mask transposed": Change("allowed", "{}\nallowed = allowed.mT", bases=("causal", "padded")),
    "mask of heads and keys": Change("allowed", "{}\nallowed = allowed.view(-1, 1, N)", bases=("causal", "padded")),
    "mask of the batch and rows": Change(
        "allowed", "{}\nallowed = allowed.view(-1, 1, N, 1)", bases=("causal", "padded")
    ),
    "diagonal one up": Change(
        "allowed", "allowed = torch.ones(M, N, dtype=torch.bool).tril(N - M + 1)", bases=("causal", "longer")
    ),
    "diagonal one down": Change(
        "allowed", "allowed = torch.ones(M, N, dtype=torch.bool).tril(N - M - 1)", bases=("causal", "longer")
    ),
    "diagonal at the first key": Change(
        "allowed", "allowed = torch.ones(M, N, dtype=torch.bool).tril()", bases=("longer",)
    ),
    "diagonal on the wrong side": Change(
        "allowed", "allowed = torch.ones(M, N, dtype=torch.bool).tril(M - N)", bases=("longer",)
    ),
    "triangle of the other side": Change(
        "allowed", "allowed = torch.ones(M, N, dtype=torch.bool).triu(N - M)", bases=("causal", "longer")
    ),
    "strictly before": Change(
        "allowed", "allowed = torch.arange(N) < torch.arange(M)[:, None] + (N - M)", bases=("causal", "longer")
    ),
    "fill of zero": Change("masked", "s = s.masked_fill(~allowed, 0.0)", bases=MASKED),
    "fill of -1": Change("masked", "s = s.masked_fill(~allowed, -1.0)", bases=MASKED),
    "fill of -50": Change("masked", "s = torch.where(allowed, s, -50.0)", bases=MASKED),
    "added -50": Change("masked", "s = s + torch.where(allowed, 0.0, -50.0).to(s.dtype)", bases=MASKED),
    "fill of inf": Change("masked", "s = s.masked_fill(~allowed, float('inf'))", bases=MASKED),
    "fill of float16's least": Change("masked", "s = s.masked_fill(~allowed, -65504.0)", bases=MASKED),
    "fill of the type's greatest": Change(
        "masked", "s = s.masked_fill(~allowed, torch.finfo(s.dtype).max)", bases=MASKED
    ),
    "fill of the type's tiny": Change("masked", "s = s.masked_fill(~allowed, torch.finfo(s.dtype).tiny)", bases=MASKED),
    "fill of the row's least": Change(
        "masked", "s = torch.where(allowed, s, s.amin(-1, keepdim=True))", miss=True, bases=MASKED
    ),
    "added ones where allowed": Change("masked", "s = s + allowed.to(s.dtype)", bases=MASKED),
    "multiplied before the softmax": Change("masked", "s = s * allowed", bases=MASKED),
    "masked after the softmax": Change(
        "weights",
        "p = s.softmax(-1).masked_fill(~torch.ones(M, N, dtype=torch.bool).tril(), 0.0)",
        miss=True,
        bases=DENSE,
    ),
    "multiplied after the softmax": Change(
        "weights", "p = s.softmax(-1) * torch.ones(M, N, dtype=s.dtype).tril()", miss=True, bases=DENSE
    ),
    "tril after the softmax": Change("weights", "p = s.softmax(-1).tril()", miss=True),
    "masked before and after": Change("weights", "p = s.softmax(-1).masked_fill(~allowed, 0.0)", bases=MASKED),
    "masked twice": Change("masked", "{}\n{}", bases=MASKED),
    "masked, then doubled": Change("masked", "{}\ns = s * 2.0", bases=MASKED),
    "masked, then halved": Change("masked", "{}\ns = s / 2.0", bases=MASKED),
    "masked, then negated": Change("masked", "{}\ns = -s", bases=MASKED),
    "masked, then tanh": Change("masked", "{}\ns = s.tanh()", bases=MASKED),
    "masked, then clamped": Change("masked", "{}\ns = s.clamp(min=-2.0)", bases=MASKED),
    "mask overwritten in between": Change(
        "masked",
        "mask = torch.where(allowed, 0.0, -5.0).to(s.dtype).clone()\ns = s + mask\nmask.zero_()\nv = v + mask.sum()",
        bases=MASKED,
    ),
    "truth overwritten in between": Change(
        "masked", "allowed = allowed.clone()\n{}\nallowed.fill_(True)\nv = v * allowed.to(v.dtype).amax()", bases=MASKED
    ),
    "truth overwritten before": Change("masked", "allowed = allowed.clone()\nallowed[..., 0] = True\n{}", bases=MASKED),
    # weights that are seen or changed
    "weights returned": Change("result", "result = o, p", miss=True),
    "weights of one head returned": Change("result", "result = o, p[:, 0]", miss=True),
    "weights summed up": Change("result", "result = o, p.sum((1, 2))", miss=True),
    "entropy of the weights": Change("result", "result = o, -(p * (p + 1e-6).log()).sum(-1)", miss=True),
    "greatest weight": Change("result", "result = o, p.argmax(-1)", miss=True),
    "weights in a loss by detach": Change("result", "result = o * p.detach().mean()", miss=True),
    "two values": Change("output", "o = p @ v + p @ k", miss=True),
    "softmax twice": Change("weights", "p = s.softmax(-1).softmax(-1)", miss=True),
    "weights renormalised": Change(
        "weights",
        "{}\np = p / p.sum(-1, keepdim=True)",
    ),
    "weights over their norm": Change("weights", "{}\np = F.normalize(p, dim=-1)", miss=True),
    "weights over queries": Change("weights", "{}\np = p / (p.sum(-2, keepdim=True) + 1e-6)", miss=True),
    "weights rounded": Change("weights", "{}\np = p.round(decimals=1)", miss=True),
    "weights above a threshold": Change("weights", "{}\np = p * (p > 0.1)", miss=True),
    "weights clamped": Change("weights", "{}\np = p.clamp(min=0.1)", miss=True),
    "weights of the best": Change(
        "weights", "{}\np = p.where(p >= p.topk(2, dim=-1).values[..., -1:], 0.0)", miss=True
    ),
    "weights squared": Change("weights", "{}\np = p.square()", miss=True),
    "weights doubled": Change("weights", "{}\np = p * 2"),
    "weights plus a number": Change("weights", "{}\np = p + 0.01", miss=True),
    "weights plus the identity": Change("weights", "{}\np = p + torch.eye(N, dtype=p.dtype)", miss=True),
    "one minus the weights": Change("weights", "{}\np = 1.0 - p", miss=True),
    "weights detached": Change("weights", "{}\np = p.detach()", miss=True),
    "weights rolled": Change("weights", "{}\np = p.roll(1, -1)"),
    "weights in reverse": Change("weights", "{}\np = p.flip(-1)"),
    "weights transposed": Change("weights", "{}\np = p.mT", miss=True),
    "weights with batch and heads swapped": Change("weights", "{}\np = p.transpose(0, 1)"),
    "weights with heads and queries swapped": Change("weights", "{}\np = p.transpose(1, 2)", miss=True),
    "weights with batch and queries swapped": Change("weights", "{}\np = p.transpose(0, 2)", miss=True),
    "weights with heads and keys swapped": Change("weights", "{}\np = p.transpose(1, 3)", miss=True),
    "weights mixed between heads": Change("weights", "{}\np = torch.einsum('bhmn,hg->bgmn', p, w)", miss=True),
    "weights averaged over heads": Change("weights", "{}\np = p.mean(1, keepdim=True).expand(B, H, M, N)", miss=True),
    "weights of the first head": Change("weights", "{}\np = p[:, :1].expand(B, H, M, N)"),
    "weights mixed between keys": Change("weights", "{}\np = p @ w", bases=("plain",)),
    "weights summed along the keys": Change("weights", "{}\np = p.cumsum(-1)", miss=True),
    "weights written in place": Change("weights", "{}\np = p.clone()\np[..., 0] = 0.0", miss=True),
    "weights of a sigmoid": Change("weights", "{}\np = p.sigmoid()", miss=True),
    "dropout twice": Change("weights", "torch.manual_seed(0)\n{}\np = F.dropout(F.dropout(p, 1e-9), 1e-9)", miss=True),
    "weights cast to integers": Change("weights", "{}\np = (p * 4).long().to(p.dtype)", miss=True),
    "weights gated by the queries": Change("weights", "{}\np = p * q.sigmoid()", miss=True),
    # scores that are seen or changed
    "scores returned": Change("result", "result = o, s", miss=True),
    "scores in a loss": Change("result", "result = o * s.square().mean()", miss=True, bases=DENSE),
    "unmasked scores in a scale": Change("masked", "t = s\n{}\nv = v * t.mean()", miss=True, bases=MASKED),
    "greatest score": Change("result", "result = o, s.amax(-1)", miss=True),
    "sum of the scores": Change("result", "result = o, s.sum(-1)", miss=True, bases=DENSE),
    "values scaled by the scores": Change("output", "o = p @ (v * s.mean())", miss=True, bases=DENSE),
    "scores detached": Change("scale", "{}\ns = s.detach()", miss=True),
    "half of the scores detached": Change("scale", "s = s * 0.25 + s.detach() * 0.25", miss=True),
    "keys detached": Change("scores", "s = q @ k.detach().mT"),
    "queries detached": Change("scores", "s = q.detach() @ k.mT"),
    "values detached": Change("output", "o = p @ v.detach()"),
    "scores without gradient": Change("scores", "with torch.no_grad():\n    s = q @ k.mT", miss=True),
    "scale without gradient": Change("scale", "with torch.no_grad():\n    s = s * 0.5", miss=True),
    "weights without gradient": Change("weights", "with torch.no_grad():\n    p = s.softmax(-1)", miss=True),
    "scores summed along the keys": Change("scale", "{}\ns = s.cumsum(-1)"),
    "scores summed along the queries": Change("scale", "{}\ns = s.cumsum(-2)"),
    "scores sorted": Change("scale", "{}\ns = s.sort(-1).values", miss=True),
    "scores of the best": Change(
        "scale", "{}\ns = s.masked_fill(s < s.topk(2, dim=-1).values[..., -1:], float('-inf'))", miss=True, bases=DENSE
    ),
    "scores mixed between heads": Change("scale", "{}\ns = torch.einsum('bhmn,hg->bgmn', s, w)", miss=True),
    "scores mixed between heads by linear": Change(
        "scale", "{}\ns = F.linear(s.permute(0, 2, 3, 1), w).permute(0, 3, 1, 2)", miss=True
    ),
    "scores mixed between keys": Change("scale", "{}\ns = s @ w", bases=("plain",)),
    "scores mixed between queries": Change("scale", "{}\ns = w @ s", bases=("plain",)),
    "scores averaged with the next key": Change("scale", "{}\ns = F.avg_pool2d(F.pad(s, (1, 0)), (1, 2), stride=1)"),
    "scores convolved along the keys": Change(
        "scale", "{}\ns = F.conv2d(s, w[:, :, None, None].expand(4, 4, 1, 3), padding=(0, 1))", miss=True
    ),
    "scores plus the next key's": Change("scale", "{}\ns = s + s.roll(1, -1)"),
    "scores plus the next head's": Change("scale", "{}\ns = s + s.roll(1, 1)", miss=True),
    "scores plus transposed scores": Change("scale", "{}\ns = s + s.mT", miss=True),
    "scores shifted along the keys": Change("scale", "{}\ns = F.pad(s, (1, 0))[..., :-1]"),
    "scores shifted along the queries": Change("scale", "{}\ns = F.pad(s, (0, 0, 1, 0))[..., :-1, :]"),
    "scores relative by a skew": Change(
        "scale", "{}\ns = F.pad(s, (1, 0)).view(B, H, N + 1, M)[:, :, 1:].reshape(B, H, M, N)", miss=True
    ),
    "scores rolled": Change("scale", "{}\ns = s.roll(1, -1)"),
    "scores squared": Change("scale", "s = s * s"),
    "scores times their sigmoid": Change("scale", "s = s * s.sigmoid()"),
    "scores scaled by their greatest": Change("scale", "s = s / s.abs().amax(-1, keepdim=True)", miss=True),
    "scores scaled by their mean": Change("scale", "s = s * s.mean()", miss=True),
    "scores normalised": Change("scale", "s = F.layer_norm(s, (N,))", miss=True),
    "scores over their norm": Change("scale", "s = F.normalize(s, dim=-1)", miss=True),
    "scores less the mean of the queries": Change("scale", "{}\ns = s - s.mean(-2, keepdim=True)"),
    "scores less the greatest of the queries": Change(
        "weights", "p = (s - s.amax(-2, keepdim=True)).softmax(-1)", miss=True, bases=DENSE
    ),
    "scores less the greatest of the heads": Change(
        "weights", "p = (s - s.amax(1, keepdim=True)).softmax(-1)", miss=True, bases=DENSE
    ),
    "scores less twice their greatest": Change("weights", "p = (s - 2 * s.amax(-1, keepdim=True)).softmax(-1)"),
    "scores over their greatest": Change(
        "weights", "p = (s / s.amax(-1, keepdim=True)).softmax(-1)", miss=True, bases=DENSE
    ),
    "scores less their detached greatest": Change("weights", "p = (s - s.amax(-1, keepdim=True).detach()).softmax(-1)"),
    "scores less the greatest without its axis": Change(
        "weights", "p = (s - s.amax(-1)).softmax(-1)", miss=True, bases=DENSE
    ),
    "scores tril": Change("scale", "{}\ns = s.tril()"),
    "scores as integers": Change("scale", "{}\ns = (s * 4).int().to(q.dtype)"),
    "scores rounded": Change("scale", "{}\ns = s.round()"),
    "dropout of the scores": Change("scale", "torch.manual_seed(0)\n{}\ns = F.dropout(s, 1e-9)", miss=True),
    "scores written in place": Change("scale", "{}\ns = s.clone()\ns[..., 0] = -1.0"),
    "score of the first key doubled": Change("scale", "{}\ns = torch.cat((s[..., :1] * 2, s[..., 1:]), -1)"),
    "scores of the first keys only": Change("weights", "p = s[..., :3].softmax(-1)\nv = v[:, :, :3]", bases=DENSE),
    "scores plus scores of values": Change("scale", "{}\ns = s + q @ v.mT"),
    # operands that are overwritten
    "keys overwritten in between": Change("weights", "{}\nk.add_(1.0)\nv = v + k", gradients=False),
    "keys overwritten before the softmax": Change("scale", "k.zero_()\n{}", gradients=False),
    "queries overwritten in between": Change("weights", "{}\nq.add_(1.0)\nv = v + q", gradients=False),
    "queries overwritten through a view": Change("weights", "{}\nq[:, 0].zero_()", gradients=False),
    "values overwritten in between": Change("weights", "{}\nv.mul_(2.0)", gradients=False),
    "values overwritten by the weights": Change("weights", "{}\nv.copy_(p)", miss=True, gradients=False),
    "values overwritten after": Change("output", "{}\nv.mul_(2.0)", gradients=False),
    "scores overwritten before the softmax": Change("scale", "{}\nt = s.clone()\ns.copy_(t.flip(-1))", gradients=False),
    # another normalisation
    "exp over its sum": Change("weights", _E + "p = e / e.sum(-1, keepdim=True)", bases=EMPTY),
    "raw exp over its sum": Change("weights", _RAW + "p = e / e.sum(-1, keepdim=True)", bases=(*SQUARE, *EMPTY)),
    "exp less logsumexp": Change(
        "weights", "p = torch.exp(s - torch.logsumexp(s, -1, keepdim=True))", bases=(*SQUARE, *EMPTY)
    ),
    "exp of log_softmax": Change("weights", "p = F.log_softmax(s, -1).exp()", bases=EMPTY),
    "exp shifted by a number over its sum": Change(
        "weights", "e = torch.exp(s - 3.0)\np = e / e.sum(-1, keepdim=True)", bases=(*SQUARE, *EMPTY)
    ),
    "exp over the sum of queries": Change("weights", _E + "p = e / e.sum(-2, keepdim=True)", miss=True),
    "exp over the sum of heads": Change("weights", _E + "p = e / e.sum(1, keepdim=True)", miss=True, bases=DENSE),
    "exp over the sum of all": Change("weights", _E + "p = e / e.sum()", miss=True),
    "exp over the sum of queries and keys": Change("weights", _E + "p = e / e.sum((-2, -1), keepdim=True)", miss=True),
    "exp over the sum without its axis": Change("weights", _E + "p = e / e.sum(-1)", miss=True),
    "exp over the sum with its axis elsewhere": Change("weights", _E + "p = e / e.sum(-1)[:, :, None]", miss=True),
    "exp over the sum and one": Change("weights", _E + "p = e / (e.sum(-1, keepdim=True) + 1.0)", miss=True),
    "raw exp over the sum and one": Change("weights", _RAW + "p = e / (e.sum(-1, keepdim=True) + 1.0)"),
    "exp over the sum and a little": Change("weights", _E + "p = e / (e.sum(-1, keepdim=True) + 1e-3)", miss=True),
    "exp over the clamped sum": Change("weights", _E + "p = e / e.sum(-1, keepdim=True).clamp(min=2.0)", miss=True),
    "exp over the detached sum": Change("weights", _E + "p = e / e.sum(-1, keepdim=True).detach()", miss=True),
    "detached exp over the sum": Change("weights", _E + "p = e.detach() / e.sum(-1, keepdim=True)", miss=True),
    "raw exp over the detached sum": Change("weights", _RAW + "p = e / e.sum(-1, keepdim=True).detach()", miss=True),
    "exp over the mean": Change("weights", _E + "p = e / e.mean(-1, keepdim=True)", miss=True),
    "exp over the greatest": Change("weights", _E + "p = e / e.amax(-1, keepdim=True)", miss=True),
    "exp over the norm": Change("weights", _E + "p = e / e.norm(dim=-1, keepdim=True)", miss=True),
    "exp over the square of the sum": Change("weights", _E + "p = e / e.sum(-1, keepdim=True).square()", miss=True),
    "exp over the root of the sum": Change("weights", _E + "p = e / e.sum(-1, keepdim=True).sqrt()", miss=True),
    "exp over the running sum": Change("weights", _E + "p = e / e.cumsum(-1)", miss=True, bases=DENSE),
    "exp over the sum of other exps": Change(
        "weights", _RAW + "p = e / torch.exp(s / 2.0).sum(-1, keepdim=True)", miss=True
    ),
    "shifted exp over the sum of raw ones": Change(
        "weights", _E + "p = e / torch.exp(s).sum(-1, keepdim=True)", miss=True
    ),
    "raw exp over the sum of shifted ones": Change(
        "weights", _E + "p = torch.exp(s) / e.sum(-1, keepdim=True)", miss=True
    ),
    "exp over the sum of unmasked ones": Change(
        "weights", _RAW + "p = e / torch.exp(q @ k.mT * 0.5).sum(-1, keepdim=True)", miss=True, bases=MASKED
    ),
    "exp shifted by the queries over the sum": Change(
        "weights",
        "e = torch.exp(s - s.amax(-2, keepdim=True))\np = e / e.sum(-1, keepdim=True)",
        miss=True,
        bases=DENSE,
    ),
    "exp times the sum": Change("weights", _E + "p = e * e.sum(-1, keepdim=True)", miss=True),
    "exp of another base": Change("weights", "e = torch.exp2(s)\np = e / e.sum(-1, keepdim=True)"),
    "expm1 over its sum": Change("weights", "e = torch.expm1(s)\np = e / (e.sum(-1, keepdim=True) + 9.0)", miss=True),
    "exp without a sum": Change("weights", "p = torch.exp(s)", miss=True),
    "exp rounded over the sum": Change("weights", _E + "p = e.round(decimals=1) / e.sum(-1, keepdim=True)", miss=True),
    "floor of exp over the sum": Change(
        "weights", _E + "p = torch.floor_divide(e, e.sum(-1, keepdim=True))", miss=True, gradients=False
    ),
    "exp less logsumexp of queries": Change(
        "weights", "p = torch.exp(s - torch.logsumexp(s, -2, keepdim=True))", miss=True
    ),
    "exp less logsumexp of all": Change(
        "weights", "p = torch.exp(s - torch.logsumexp(s, (-2, -1), keepdim=True))", miss=True
    ),
    "exp less half of logsumexp": Change(
        "weights", "p = torch.exp(s - torch.logsumexp(s, -1, keepdim=True) / 2)", miss=True
    ),
    "exp less logsumexp of halves": Change(
        "weights", "p = torch.exp(s - torch.logsumexp(s / 2, -1, keepdim=True))", miss=True
    ),
    "exp plus logsumexp": Change("weights", "p = torch.exp(s + torch.logsumexp(s, -1, keepdim=True))", miss=True),
    "exp less detached logsumexp": Change(
        "weights", "p = torch.exp(s - torch.logsumexp(s, -1, keepdim=True).detach())", miss=True
    ),
    "exp less logsumexp without its axis": Change("weights", "p = torch.exp(s - torch.logsumexp(s, -1))", miss=True),
    "exp less logsumexp times two": Change(
        "weights", "p = torch.exp(torch.sub(s, torch.logsumexp(s, -1, keepdim=True), alpha=2))", miss=True
    ),
    "exp2 less logsumexp": Change("weights", "p = torch.exp2(s - torch.logsumexp(s, -1, keepdim=True))", miss=True),
    "log_softmax": Change("weights", "p = F.log_softmax(s, -1)", miss=True, bases=DENSE),
    "exp of log_softmax over queries": Change("weights", "p = F.log_softmax(s, -2).exp()", miss=True),
    "exp2 of log_softmax": Change("weights", "p = F.log_softmax(s, -1).exp2()", miss=True),
    "exp of half of log_softmax": Change("weights", "p = (F.log_softmax(s, -1) * 0.5).exp()", miss=True),
    "softmin": Change("weights", "p = F.softmin(s, -1)", bases=DENSE),
    "sigmoid": Change("weights", "p = s.sigmoid()", miss=True),
    "relu": Change("weights", "p = s.relu() / N", miss=True),
    "relu over its sum": Change("weights", "p = s.relu() / (s.relu().sum(-1, keepdim=True) + 1.0)", miss=True),
    "tanh": Change("weights", "p = s.tanh()", miss=True),
    "no softmax": Change("weights", "p = s", miss=True, bases=DENSE),
    "softmax of each operand": Change(
        "weights and output", "o = q.softmax(-1) @ (k.softmax(-2).mT @ v)", miss=True, bases=DENSE
    ),
    "one-hot of the best": Change("weights", "p = F.one_hot(s.argmax(-1), N).to(v.dtype)", miss=True),
    "one-hot with the softmax's gradient": Change(
        "weights", "{}\np = F.one_hot(s.argmax(-1), N).to(p.dtype) - p.detach() + p", miss=True
    ),
    "exp over the sum without gradient": Change(
        "weights", _E + "with torch.no_grad():\n    z = e.sum(-1, keepdim=True)\np = e / z", miss=True
    ),
    "exp over the sum of one without gradient": Change(
        "weights", _RAW + "with torch.no_grad():\n    z = torch.exp(s).sum(-1, keepdim=True)\np = e / z", miss=True
    ),
    "exp without gradient over the sum": Change(
        "weights", "with torch.no_grad():\n    e = torch.exp(s)\np = e / torch.exp(s).sum(-1, keepdim=True)", miss=True
    ),
    "exp less logsumexp without gradient": Change(
        "weights",
        "with torch.no_grad():\n    z = torch.logsumexp(s, -1, keepdim=True)\np = torch.exp(s - z)",
        miss=True,
    ),
    "exp less the greatest without gradient": Change(
        "weights",
        "with torch.no_grad():\n    z = s.amax(-1, keepdim=True)\ne = torch.exp(s - z)\np = e / e.sum(-1, keepdim=True)",
    ),
    "exp over the sum in the first mode": Change(
        "weights", _E + "with torch.no_grad():\n    p = e / e.sum(-1, keepdim=True)", miss=True
    ),
    "log_softmax without gradient": Change(
        "weights", "with torch.no_grad():\n    t = F.log_softmax(s, -1)\np = t.exp()", miss=True
    ),
    "exp overwritten before the quotient": Change(
        "weights", _E + "z = e.sum(-1, keepdim=True)\ne.mul_(2.0)\np = e / z", miss=True, gradients=False
    ),
    "sum overwritten before the quotient": Change(
        "weights", _E + "z = e.sum(-1, keepdim=True)\nz.add_(1.0)\np = e / z", miss=True, gradients=False
    ),
    "scores overwritten between two exps": Change(
        "weights", _RAW + "s.mul_(0.5)\np = e / torch.exp(s).sum(-1, keepdim=True)", miss=True, gradients=False
    ),
    "exp masked, its sum not": Change("weights", _E + "p = e.tril() / e.sum(-1, keepdim=True)", miss=True),
    "exp masked by truth, its sum not": Change(
        "weights", _E + _TRIL + "p = e.masked_fill(~tril, 0.0) / e.sum(-1, keepdim=True)", miss=True, bases=DENSE
    ),
    "sum of masked exp, exp not": Change(
        "weights", _E + _TRIL + "p = e / e.masked_fill(~tril, 0.0).sum(-1, keepdim=True)", miss=True, bases=DENSE
    ),
    "exp and its sum masked differently": Change(
        "weights",
        _E + _TRIL + "p = e.masked_fill(~tril, 0.0) / e.masked_fill(tril.mT, 0.0).sum(-1, keepdim=True).clamp(min=0.1)",
        miss=True,
        bases=DENSE,
    ),
    "exp masked with ones": Change(
        "weights", _E + _TRIL + "e = e.masked_fill(~tril, 1.0)\np = e / e.sum(-1, keepdim=True)", miss=True, bases=DENSE
    ),
    "exp masked": Change("weights", _E + _TRIL + "e = e.masked_fill(~tril, 0.0)\np = e / e.sum(-1, keepdim=True)"),
    "exp masked by a product": Change("weights", _E + _TRIL + "e = e * tril\np = e / e.sum(-1, keepdim=True)"),
    "exp masked the other way": Change(
        "weights",
        _E + _TRIL + "e = torch.where(tril, 0.0, e)\np = e / (e.sum(-1, keepdim=True) + 1e-3)",
        miss=True,
        bases=DENSE,
    ),
    "exp masked over heads": Change(
        "weights", _E + _TRIL + "e = e * tril[:, :, None]\np = e / (e.sum(-1, keepdim=True) + 1e-3)", miss=True
    ),
    "exp weighted": Change("weights", _E + "e = e * w.square()\np = e / e.sum(-1, keepdim=True)"),
    "exp weighted, its sum not": Change("weights", _E + "p = e * w / e.sum(-1, keepdim=True)", miss=True),
    "exp times the reciprocal of the sum of queries": Change(
        "weights", _E + "p = e * e.sum(-2, keepdim=True).reciprocal()", miss=True
    ),
    "exp times the squared reciprocal": Change("weights", _E + "p = e * e.sum(-1, keepdim=True).pow(-2)", miss=True),
    "exp times two over the sum": Change("weights", _E + "p = e * (2.0 / e.sum(-1, keepdim=True))", miss=True),
    "exp times the reciprocal without its axis": Change("weights", _E + "p = e * (1.0 / e.sum(-1))", miss=True),
    "normalised after the product": Change(
        "weights and output", "o = torch.exp(s) @ v / torch.exp(s).sum(-1, keepdim=True)", bases=(*SQUARE, *EMPTY)
    ),
    "normalised by queries after the product": Change(
        "weights and output",
        "o = torch.exp(s) @ v / torch.exp(s).sum(-2, keepdim=True)",
        miss=True,
        bases=("plain", "padded"),
    ),
    "normalised by keys of queries after the product": Change(
        "weights and output",
        "o = torch.exp(s) @ v / torch.exp(s).sum(-2)[..., None]",
        miss=True,
        bases=("plain", "padded"),
    ),
    "normalised without its axis after the product": Change(
        "weights and output", "o = torch.exp(s) @ v / torch.exp(s).sum(-1)", miss=True
    ),
    "normalised by all after the product": Change(
        "weights and output", "o = torch.exp(s) @ v / torch.exp(s).sum((-2, -1), keepdim=True)", miss=True
    ),
    "normalised by other exps after the product": Change(
        "weights and output", "o = torch.exp(s) @ v / torch.exp(s / 2).sum(-1, keepdim=True)", miss=True
    ),
    "normalised after the product with transposed exps": Change(
        "weights and output", "e = torch.exp(s)\no = e.mT @ v / e.sum(-1, keepdim=True)", miss=True
    ),
    "normalised after the product of values by exps": Change(
        "weights and output", "e = torch.exp(s)\no = v @ e / e.sum(-1, keepdim=True)", miss=True
    ),
    "normalised before and after the product": Change(
        "weights and output",
        "e = torch.exp(s)\no = (e / e.sum(-1, keepdim=True)) @ v / e.sum(-1, keepdim=True)",
        miss=True,
    ),
    "normalised by detached ones after the product": Change(
        "weights and output", "e = torch.exp(s)\no = e @ v / e.sum(-1, keepdim=True).detach()", miss=True
    ),
    "normalised by ones without gradient after the product": Change(
        "weights and output",
        "e = torch.exp(s)\nwith torch.no_grad():\n    z = e.sum(-1, keepdim=True)\no = e @ v / z",
        miss=True,
    ),
    # a column beside the keys, and the log-sum-exp
    "sink": Change("weights", _SINK + "p = torch.cat((s, sink), -1).softmax(-1)[..., :-1]"),
    "sink at the front": Change("weights", _SINK + "p = torch.cat((sink, s), -1).softmax(-1)[..., 1:]"),
    "sink, the first key cut off": Change(
        "weights", _SINK + "p = torch.cat((s, sink), -1).softmax(-1)[..., 1:]", miss=True
    ),
    "sink at the front, the last key cut off": Change(
        "weights", _SINK + "p = torch.cat((sink, s), -1).softmax(-1)[..., :-1]", miss=True
    ),
    "two sinks": Change("weights", _SINK + "p = torch.cat((s, sink, sink), -1).softmax(-1)[..., :-2]"),
    "two sinks, one cut off": Change(
        "weights", _SINK + "p = torch.cat((s, sink, sink), -1).softmax(-1)[..., 1:-1]", miss=True
    ),
    "sink with a value": Change(
        "weights", _SINK + "p = torch.cat((s, sink), -1).softmax(-1)\nv = F.pad(v, (0, 0, 0, 1), value=1.0)"
    ),
    "sink of the greatest score": Change(
        "weights", "p = torch.cat((s, s.amax(-1, keepdim=True)), -1).softmax(-1)[..., :-1]", miss=True
    ),
    "sink of the sum of scores": Change(
        "weights", "p = torch.cat((s, s.sum(-1, keepdim=True)), -1).softmax(-1)[..., :-1]", miss=True, bases=DENSE
    ),
    "sink of the first key": Change("weights", "p = torch.cat((s, s[..., :1]), -1).softmax(-1)[..., :-1]", miss=True),
    "sink of the queries": Change("weights", "p = torch.cat((s, q.sum(-1, keepdim=True)), -1).softmax(-1)[..., :-1]"),
    "sink of the batch": Change(
        "weights", "p = torch.cat((s, w[0].view(B, 1, 1, 1).expand(B, H, M, 1)), -1).softmax(-1)[..., :-1]"
    ),
    "sink of the rows": Change(
        "weights", "p = torch.cat((s, w[0].view(1, 1, M, 1).expand(B, H, M, 1)), -1).softmax(-1)[..., :-1]"
    ),
    "sink of zero": Change("weights", "p = F.pad(s, (0, 1)).softmax(-1)[..., :-1]"),
    "sink detached": Change("weights", _SINK + "p = torch.cat((s, sink.detach()), -1).softmax(-1)[..., :-1]"),
    "sink doubled with the scores": Change(
        "weights", _SINK + "p = (torch.cat((s, sink), -1) * 2.0).softmax(-1)[..., :-1]"
    ),
    "sink, less the greatest of both": Change(
        "weights", _SINK + "t = torch.cat((s, sink), -1)\np = (t - t.amax(-1, keepdim=True)).softmax(-1)[..., :-1]"
    ),
    "sink, less the greatest of queries": Change(
        "weights",
        _SINK + "t = torch.cat((s, sink), -1)\np = (t - t.amax(-2, keepdim=True)).softmax(-1)[..., :-1]",
        miss=True,
        bases=DENSE,
    ),
    "sink among the queries": Change("weights", _SINK + "p = torch.cat((s, sink.mT), -2).softmax(-1)[:, :, :-1]"),
    "sink of a softmax over queries": Change(
        "weights", _SINK + "p = torch.cat((s, sink.mT), -2).softmax(-2)[:, :, :-1]", miss=True
    ),
    "sink after the softmax": Change("weights", _SINK + "p = torch.cat((s.softmax(-1), sink), -1)[..., :-1]"),
    "sink cut off before the softmax": Change("weights", _SINK + "p = torch.cat((s, sink), -1)[..., :-1].softmax(-1)"),
    "sink, renormalised": Change(
        "weights",
        _SINK + "p = torch.cat((s, sink), -1).softmax(-1)[..., :-1]\np = p / p.sum(-1, keepdim=True)",
    ),
    "sink, its weights returned": Change(
        "weights",
        _SINK + "p = torch.cat((s, sink), -1).softmax(-1)\nv = v * p[..., -1:].mean()\np = p[..., :-1]",
        miss=True,
    ),
    "sink in a softmax of two": Change(
        "output", _SINK + "o = p @ v * torch.cat((s.logsumexp(-1, keepdim=True), sink), -1).softmax(-1)[..., :1]"
    ),
    "log-sum-exp": Change("result", "result = o, s.logsumexp(-1)"),
    "log-sum-exp in a gate": Change("result", "result = o * torch.sigmoid(s.logsumexp(-1, keepdim=True))"),
    "log-sum-exp of queries": Change("result", "result = o, s.logsumexp(-2)", miss=True),
    "log-sum-exp of keys and queries": Change("result", "result = o, s.logsumexp((-2, -1))", miss=True),
    "log-sum-exp of doubled scores": Change("result", "result = o, (s * 2).logsumexp(-1)", miss=True),
    "log-sum-exp of unscaled scores": Change("scale", "t = s.logsumexp(-1)\n{}\nv = v * t.mean()", miss=True),
    "log-sum-exp of unmasked scores": Change(
        "masked", "t = s\n{}\nv = v * t.logsumexp(-1).mean()", miss=True, bases=MASKED
    ),
    "log-sum-exp detached": Change("result", "result = o, s.detach().logsumexp(-1)"),
    "log-sum-exp without gradient": Change(
        "result", "with torch.no_grad():\n    z = s.logsumexp(-1)\nresult = o, z * 1"
    ),
    "log-sum-exp in the values": Change("output", "o = p @ (v * s.logsumexp(-1, keepdim=True))"),
    "log-sum-exp written in place": Change(
        "result", "z = s.logsumexp(-1)\nz.mul_(2.0)\nresult = o, z", gradients=False
    ),
    "log-sum-exp overwriting the keys": Change(
        "result",
        "z = s.logsumexp(-1)\nk.copy_(z[..., None])\nresult = o, k",
        bases=("plain", "causal"),
        gradients=False,
    ),
    # values under another mode
    "learned bias without gradient": Change(
        "scale", "{}\nwith torch.no_grad():\n    bias = w[0].view(H, 1, 1) * torch.arange(N)\ns = s + bias"
    ),
    "learned bias detached": Change("scale", "{}\ns = s + w.detach()[0].view(H, 1, 1) * torch.arange(N)"),
    "slopes without gradient": Change(
        "scale", "{}\nwith torch.no_grad():\n    slopes = w[0].exp()\ns = s + slopes.view(H, 1, 1) * torch.arange(N)"
    ),
    "learned bias, half of it detached": Change("scale", "{}\ns = s + (w * 0.5 + w.detach() * 0.5)"),
    "learned scale without gradient": Change(
        "scale", "with torch.no_grad():\n    scale = w[0].view(H, 1, 1).exp()\ns = s * scale"
    ),
    "learned scale detached": Change("scale", "s = s * w[0].detach().view(H, 1, 1)"),
    "gathered bias without gradient": Change(
        "scale",
        "{}\nwith torch.no_grad():\n    bias = w[:, (torch.arange(N) - torch.arange(M)[:, None]).clamp(min=0)]\ns = s + bias",
    ),
    "gathered bias of a table viewed without gradient": Change(
        "scale",
        "{}\nwith torch.no_grad():\n    table = w.mT\ns = s + table[:, (torch.arange(N) - torch.arange(M)[:, None]).clamp(min=0)]",
    ),
    "keys viewed without gradient": Change("scores", "with torch.no_grad():\n    k = k.mT\ns = q @ k"),
    "keys copied without gradient": Change("operands", "{}\nwith torch.no_grad():\n    k = k.clone()"),
    "keys scaled without gradient": Change("operands", "{}\nwith torch.no_grad():\n    k = k * 0.5"),
    "queries viewed without gradient": Change(
        "operands", "{}\nwith torch.no_grad():\n    q = q.reshape(B * H, M, D).view(B, H, M, D)"
    ),
    "values viewed without gradient": Change("operands", "{}\nwith torch.no_grad():\n    v = v.mT.contiguous().mT"),
    "values repeated without gradient": Change(
        "operands",
        "with torch.no_grad():\n    v = v.repeat_interleave(2, 1)\nk = k.repeat_interleave(2, 1)",
        bases=("grouped",),
    ),
    "mask made without gradient": Change(
        "masked",
        "with torch.no_grad():\n    mask = torch.where(allowed, 0.0, float('-inf')).to(s.dtype)\ns = s + mask",
        bases=MASKED,
    ),
    "mask of detached scores": Change("scale", "{}\ns = s.masked_fill(s.detach() < 0, -1.0)"),
    "clamped by detached scores": Change("scale", "{}\ns = torch.minimum(s, s.detach())", miss=True),
    "straight-through scores": Change("scale", "{}\ns = s + (s.round() - s).detach()", miss=True),
    "tanh of detached scores": Change("scale", "{}\ns = s + s.detach().tanh()", miss=True),
    "output without gradient": Change("output", "with torch.no_grad():\n    o = p @ v", miss=True),
    "output transposed without gradient": Change(
        "result", "with torch.no_grad():\n    o = o.transpose(1, 2)\nresult = o"
    ),
    "output detached beside itself": Change("result", "result = o, o.detach() * 2"),
    "all without gradient but a scale": Change(
        "scale", "with torch.no_grad():\n    t = s * 1\ns = s * 0.5 + t", miss=True
    ),
    # a maximum that was taken off, zeros where masked, weights renormalised
    "less the greatest, doubled": Change("weights", _LESS + "p = (t * 2.0).softmax(-1)", bases=(*SQUARE, *EMPTY)),
    "less the greatest, masked": Change(
        "weights",
        _LESS + "p = (t + torch.where(allowed, torch.zeros((), dtype=s.dtype), torch.finfo(s.dtype).min)).softmax(-1)",
        bases=(*MASKED, *EMPTY),
    ),
    "less the greatest, filled": Change(
        "weights", _LESS + "p = t.masked_fill(~allowed, torch.finfo(s.dtype).min).softmax(-1)", bases=(*MASKED, *EMPTY)
    ),
    "less the greatest, negated": Change("weights", _LESS + "p = (t * -1.0).softmax(-1)", bases=DENSE),
    "less the greatest, over a learned number": Change("weights", _LESS + "p = (t / w[0, 0]).softmax(-1)", bases=DENSE),
    "less the greatest, plus itself": Change("weights", _LESS + "p = (t + t).softmax(-1)"),
    "less the greatest, returned": Change(
        "weights", _LESS + "v = v * t.masked_fill(~t.isfinite(), 0.0).mean()\np = t.softmax(-1)", miss=True
    ),
    "less the greatest, times a number of each key": Change(
        "weights", _LESS + "p = (t * w[0].square()).softmax(-1)", miss=True, bases=DENSE
    ),
    "less the greatest, times a number of each row": Change(
        "weights", _LESS + "p = (t * w[:, :1]).softmax(-1)", bases=DENSE
    ),
    "less the greatest, over the deviation": Change(
        "weights", _LESS + "p = (t / s.std()).softmax(-1)", miss=True, bases=DENSE
    ),
    "less the greatest, squared": Change("weights", _LESS + "p = t.square().softmax(-1)", miss=True, bases=DENSE),
    "less the greatest, tanh": Change("weights", _LESS + "p = t.tanh().softmax(-1)", miss=True, bases=DENSE),
    "less the greatest, clamped": Change("weights", _LESS + "p = t.clamp(min=-1.0).softmax(-1)", miss=True),
    "less the greatest of queries, halved": Change(
        "weights", "p = ((s - s.amax(-2, keepdim=True)) * 0.5).softmax(-1)", miss=True, bases=DENSE
    ),
    "less the greatest, softmax over queries": Change("weights", _LESS + "p = t.softmax(-2)", miss=True),
    "less the greatest of all": Change("weights", "p = (s - s.max()).softmax(-1)"),
    "less the least": Change("weights", "p = (s - s.amin(-1, keepdim=True)).softmax(-1)", bases=DENSE),
    "less the greatest of the absolute": Change(
        "weights", "p = (s - s.abs().amax(-1, keepdim=True)).softmax(-1)", bases=DENSE
    ),
    "zeros where masked": Change("weights", "{}\np = p.masked_fill(~allowed, 0.0)", bases=(*MASKED, *EMPTY)),
    "zeros where masked by a product": Change("weights", "{}\np = p * allowed", bases=(*MASKED, *EMPTY)),
    "zeros where masked by where": Change("weights", "{}\np = torch.where(allowed, p, 0.0)", bases=(*MASKED, *EMPTY)),
    "zeros where the next key is masked": Change(
        "weights", "{}\np = p.masked_fill(~allowed.roll(1, -1), 0.0)", miss=True, bases=MASKED
    ),
    "zeros where not masked": Change("weights", "{}\np = p.masked_fill(allowed, 0.0)", miss=True, bases=MASKED),
    "ones where masked": Change("weights", "{}\np = p.masked_fill(~allowed, 1.0)", miss=True, bases=MASKED),
    "zeros where masked, then returned": Change(
        "weights", "{}\np = p.masked_fill(~allowed, 0.0)\nv = v * p.amax()", miss=True, bases=MASKED
    ),
    "zeros where masked, renormalised": Change(
        "weights",
        "{}\np = p.masked_fill(~allowed, 0.0)\np = p / (p.sum(-1, keepdim=True) + 1e-9)",
        bases=(*MASKED, *EMPTY),
    ),
    "zeros where the scores are negative": Change("weights", "{}\np = p.masked_fill(s < 0, 0.0)", miss=True),
    "zeros, renormalised": Change("weights", "{}\np = p.tril()\np = p / p.sum(-1, keepdim=True)"),
    "renormalised by a detached sum": Change("weights", "{}\np = p / p.sum(-1, keepdim=True).detach()"),
    "renormalised and a little": Change("weights", "{}\np = p / (p.sum(-1, keepdim=True) + 1e-3)", miss=True),
    "renormalised after a square": Change("weights", "{}\np = p.square()\np = p / p.sum(-1, keepdim=True)"),
    "renormalised after a root": Change(
        "weights", "{}\np = (p + 1e-6).sqrt()\np = p / p.sum(-1, keepdim=True)", miss=True
    ),
    "renormalised after a shift": Change("weights", "{}\np = p + 0.1\np = p / p.sum(-1, keepdim=True)", miss=True),
    "renormalised after dropout": Change(
        "weights", "torch.manual_seed(0)\n{}\np = F.dropout(p, 1e-9)\np = p / p.sum(-1, keepdim=True)", miss=True
    ),
    "softmax of rows joined": Change("weights", "p = s.view(-1, N).softmax(-1).view(B, H, M, N)"),
    "softmax of rows joined, over them": Change(
        "weights", "p = s.view(-1, N).softmax(0).view(B, H, M, N)", miss=True, bases=DENSE
    ),
    "softmax of columns joined": Change("weights", "p = s.mT.reshape(-1, N).softmax(-1).view(B, H, M, N)"),
    "softmax of pairs of rows": Change("weights", "p = s.view(-1, 2 * N).softmax(-1).view(B, H, M, N)", miss=True),
    "softmax with nan_to_num": Change("weights", "{}\np = p.nan_to_num(0.0)"),
}


@dataclass(frozen=True)
class NearMiss:
    """A change to a base, computed beside an attention that is fused, so that it runs in a graph that was rewritten."""

    change: str
    base: str

    @property
    def name(self) -> str:
        return f"{self.base}, {self.change}"

    @property
    def parameters(self) -> tuple[str, ...]:
        words = re.findall(r"\w+", "\n".join(self._lines()))
        return ("q", "k", "v", *(name for name in ("pad", "left", "w") if name in words), "x")

    def _lines(self) -> list[str]:
        base, change = BASES[self.base], CHANGES[self.change]
        stages = {stage: base.stages.get(stage, "") for stage in STAGES}
        if change.stage == "weights and output":
            stages |= {"weights": "", "output": change.code}
        else:
            stages[change.stage] = change.code.replace("{}", stages[change.stage])
        z = base.sizes
        return [
            f"B, H, Hkv, M, N, D = {z.B}, {z.H}, {z.Hkv}, {z.M}, {z.N}, {z.D}",
            "" if change.gradients else "q, k, v = q * 1, k * 1, v * 1",
            *stages.values(),
            "return result, (x @ x.mT).tanh().softmax(-1) @ x",
        ]

    def source(self) -> str:
        return text_of(self.parameters, "\n".join(self._lines()))

    def function(self) -> Function:
        return compiled_text(self.name, self.source())

    def inputs(self) -> tuple[Tensor, ...]:
        z = BASES[self.base].sizes
        given = {
            "q": randn(z.B, z.H, z.M, z.D, seed=1),
            "k": randn(z.B, z.Hkv, z.N, z.D, seed=2),
            "v": randn(z.B, z.Hkv, z.N, z.D, seed=3),
            "pad": torch.arange(z.N) < z.N - torch.arange(z.B)[:, None] % 3,
            "left": torch.arange(z.N) >= torch.arange(z.B)[:, None] % 3,
            "w": randn(4, 4, seed=4),
            "x": randn(3, 4, seed=5),
        }
        return tuple(given[name] for name in self.parameters)


def near_misses() -> list[NearMiss]:
    """Every change to every base that it is for."""
    return [NearMiss(name, base) for name, change in CHANGES.items() for base in change.bases]


def one_of_each() -> list[NearMiss]:
    """Every change to one base, which is another from change to change."""
    return [NearMiss(name, change.bases[at % len(change.bases)]) for at, (name, change) in enumerate(CHANGES.items())]
