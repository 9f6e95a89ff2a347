"""Spellings of attention, composed from axes: for each axis a table of choices, and cases that take one choice of each.

A case is written out as the text of one plain function, so that a failure shows what was compiled.
"""

from __future__ import annotations

import functools
import itertools
import linecache
import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness import Function, randn

Choices = dict[str, str]


class Sizes(NamedTuple):
    B: int
    H: int
    Hkv: int
    M: int
    N: int
    D: int


class Rank(NamedTuple):
    """How scores of a rank are spelled: their dimensions before M, the letters of these, and permutations."""

    lead: str
    flat: str
    letters: str
    last_two: str
    heads_and_rows: str = ""
    merged: str = "B, M, H * D"


RANKS = {
    "heads": Rank("B, H", "B * H", "bh", "0, 1, 3, 2", "0, 2, 1, 3"),
    "flat": Rank("B * H", "B * H", "b", "0, 2, 1", "0, 2, 1, 3"),
    "groups": Rank("B, Hkv, G", "B * Hkv * G", "bhg", "0, 1, 2, 4, 3", "0, 2, 1, 3"),
    "windows": Rank("B, W, H", "B * W * H", "bwh", "0, 1, 2, 4, 3", "0, 1, 3, 2, 4", "B, W, M, H * D"),
}
WINDOWS = 2


class Layout(NamedTuple):
    """What is given for q, k and v, and how it becomes [B, H, M, D] or the form of another rank."""

    shapes: Callable[[Sizes], dict[str, tuple[int, ...]]]
    code: str = ""
    rank: str = "heads"


def three(shape: Callable[[Sizes, int, int], tuple[int, ...]]) -> Callable[[Sizes], dict[str, tuple[int, ...]]]:
    """Shapes of q, k and v, from the sizes and each tensor's heads and rows."""
    return lambda z: {"q": shape(z, z.H, z.M), "k": shape(z, z.Hkv, z.N), "v": shape(z, z.Hkv, z.N)}


LAYOUTS = {
    "heads-second": Layout(three(lambda z, h, n: (z.B, h, n, z.D))),
    "heads-third": Layout(three(lambda z, h, n: (z.B, n, h, z.D)), "q, k, v = (x.transpose(1, 2) for x in (q, k, v))"),
    "fused": Layout(
        three(lambda z, h, n: (z.B, n, h * z.D)),
        "q = q.view(B, M, H, D).transpose(1, 2)\n"
        "k = k.view(B, N, Hkv, D).transpose(1, 2)\n"
        "v = v.view(B, N, Hkv, D).transpose(1, 2)",
    ),
    "sequence-first": Layout(
        three(lambda z, h, n: (n, z.B, h * z.D)),
        "q = q.view(M, B, H, D).permute(1, 2, 0, 3)\n"
        "k = k.view(N, B, Hkv, D).permute(1, 2, 0, 3)\n"
        "v = v.view(N, B, Hkv, D).permute(1, 2, 0, 3)",
    ),
    "sequence-first-flat": Layout(
        three(lambda z, h, n: (n, z.B, h * z.D)),
        "q = q.view(M, B * H, D).transpose(0, 1)\n"
        "k = k.view(N, B * Hkv, D).transpose(0, 1)\n"
        "v = v.view(N, B * Hkv, D).transpose(0, 1)",
        "flat",
    ),
    "flat": Layout(three(lambda z, h, n: (z.B * h, n, z.D)), "", "flat"),
    "packed-unbind": Layout(
        lambda z: {"qkv": (z.B, z.M, 3, z.H, z.D)}, "q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))"
    ),
    "packed-chunk": Layout(
        lambda z: {"qkv": (z.B, z.M, 3 * z.H * z.D)},
        "q, k, v = (x.view(B, N, H, D).transpose(1, 2) for x in qkv.chunk(3, dim=-1))",
    ),
    "packed-split": Layout(
        lambda z: {"qkv": (z.B, z.M, (z.H + 2 * z.Hkv) * z.D)},
        "q, k, v = qkv.split([H * D, Hkv * D, Hkv * D], dim=-1)\n"
        "q = q.view(B, M, H, D).transpose(1, 2)\n"
        "k, v = (x.view(B, N, Hkv, D).transpose(1, 2) for x in (k, v))",
    ),
    "windows": Layout(three(lambda z, h, n: (z.B, WINDOWS, h, n, z.D)), "", "windows"),
}

SIZES = {"self": (2, 4, 6, 6, 8), "longer": (2, 4, 6, 9, 4), "equal": (4, 4, 4, 4, 4)}  # B, H, M, N, D

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

GROUPED: dict[str, tuple[int, str]] = {  # KV heads of four heads, and code
    "all": (4, ""),
    "repeat-kv": (2, "k, v = (x[:, :, None].expand(B, Hkv, G, N, D).reshape(B, H, N, D) for x in (k, v))"),
    "repeat-interleave": (2, "k, v = (x.repeat_interleave(G, -3) for x in (k, v))"),
    "broadcast-groups": (2, "q = q.reshape(B, Hkv, G, M, D)\nk, v = k[:, :, None], v[:, :, None]"),
    "one-kv-head": (1, ""),
    "one-kv-head-expanded": (1, "k, v = (x.expand(B, H, N, D) for x in (k, v))"),
}

SCALES: dict[str, tuple[str, str]] = {  # before and after the product
    "unscaled": ("", ""),
    "q*c": ("q = q * 0.5", ""),
    "k*c": ("k = k * 0.5", ""),
    "q/c": ("q = q / math.sqrt(D)", ""),
    "q*c,k*c": ("q, k = q * D**-0.25, k * D**-0.25", ""),
    "q*tensor": ("q = q * torch.tensor(0.5)", ""),
    "s*c": ("", "s = s * 0.5"),
    "s/c": ("", "s = s / math.sqrt(D)"),
    "s/tensor": ("", "s = s / torch.tensor(D**0.5, dtype=s.dtype)"),
    "s*learned": ("", "s = s * scale"),
}

_FLAT_KEYS = "k.expand({lead}, N, D).reshape(-1, N, D).mT"
_FLAT_VALUES = "torch.bmm(p.reshape(-1, M, N), v.expand({lead}, N, D).reshape(-1, N, D)).view({lead}, M, D)"

MATMULS: dict[str, tuple[str, str]] = {  # scores and output
    "@": ("q @ k.mT", "p @ v"),
    "matmul": ("torch.matmul(q, k.transpose(-2, -1))", "torch.matmul(p, v)"),
    "matmul-permute": ("q.matmul(k.permute({last_two}))", "p.matmul(v)"),
    "bmm": (f"torch.bmm(q.reshape(-1, M, D), {_FLAT_KEYS}).view({{lead}}, M, N)", _FLAT_VALUES),
    "baddbmm": (
        "torch.baddbmm(torch.empty({flat}, M, N, dtype=q.dtype), q.reshape(-1, M, D), "
        f"{_FLAT_KEYS}, beta=0, alpha=0.5).view({{lead}}, M, N)",
        _FLAT_VALUES,
    ),
    "einsum": (
        "torch.einsum('{letters}md,{letters}nd->{letters}mn', q, k)",
        "torch.einsum('{letters}mn,{letters}nd->{letters}md', p, v)",
    ),
    "einsum-k-q": (
        "torch.einsum('{letters}jd,{letters}id->{letters}ij', k, q)",
        "torch.einsum('{letters}jd,{letters}ij->{letters}id', v, p)",
    ),
    "einsum-ellipsis": ("torch.einsum('...md,...nd->...mn', q, k)", "torch.einsum('...mn,...nd->...md', p, v)"),
    "einsum-heads-third": (
        "torch.einsum('bqhd,bkhd->bhqk', q.transpose(1, 2), k.transpose(1, 2))",
        "torch.einsum('bhqk,bkhd->bqhd', p, v.transpose(1, 2)).transpose(1, 2)",
    ),
    "keys-by-queries": ("(k @ q.mT).mT", "(v.mT @ p.mT).mT"),
}

BIASES: dict[str, tuple[str, str]] = {  # what is given, and code
    "unbiased": ("", ""),
    "dense-bias": ("bias", ""),
    "alibi": ("slopes", "bias = slopes[:, None, None] * torch.arange(N)"),
    "relative-table": ("table", "bias = table[:, torch.arange(N) - torch.arange(M)[:, None] + (M - 1)]"),
}

_M_N = "m, n = torch.arange(M)[:, None] + (N - M), torch.arange(N)\n"

MASKS: dict[str, tuple[str, str]] = {  # what is given, and code
    "unmasked": ("", ""),
    "causal-tril": ("", "allowed = torch.ones(M, N, dtype=torch.bool).tril(N - M)"),
    "causal-triu": ("", "allowed = ~torch.ones(M, N).triu(N - M + 1).bool()"),
    "causal-arange": ("", _M_N + "allowed = n <= m"),
    "buffer": ("buffer", "allowed = buffer[N - M : N, :N]"),
    "padding": ("pad", "allowed = pad[:, None, None, :]"),
    "lengths": ("lengths", "allowed = (torch.arange(N) < lengths[:, None])[:, None, None, :]"),
    "window": ("", _M_N + "allowed = (n <= m) & (n > m - 3)"),
    "causal-and-padding": ("pad", _M_N + "allowed = (n <= m) & pad[:, None, None, :]"),
    "causal-and-left-padding": ("left", _M_N + "allowed = (n <= m) & left[:, None, None, :]"),
    "documents": ("ids", "allowed = ids[:, None, -M:, None] == ids[:, None, None, :]"),
}
_OF_BATCH = ("padding", "lengths", "causal-and-padding", "causal-and-left-padding", "documents")

FILLS = {"no-fill": "", "-inf": "float('-inf')", "min": "torch.finfo(s.dtype).min", "-1e4": "-1e4"}

APPLICATIONS = {
    "no-mask": "",
    "where": "s = torch.where(allowed, s, {fill})",
    "masked_fill": "s = s.masked_fill(~allowed, {fill})",
    "masked_fill_": "s.masked_fill_(~allowed, {fill})",
    "add-zeros-filled": "s = s + torch.zeros(allowed.shape, dtype=s.dtype).masked_fill(~allowed, {fill})",
    "add-where": "s = s + torch.where(allowed, torch.zeros((), dtype=s.dtype), {fill})",
    "add-triu-of-full": "s = s + torch.full((M, N), {fill}, dtype=s.dtype).triu(N - M + 1)",
    "add-one-minus-mask": "s = s + (1.0 - allowed.to(s.dtype)) * {fill}",
    "add-log": "s = s + allowed.to(s.dtype).log()",
}


class Cast(NamedTuple):
    operands: str = ""
    scores: str = ""
    masked: str = ""
    softmax: str = ""
    weights: str = "p = p.to(v.dtype)"


CASTS = {
    "no-cast": Cast(weights=""),
    "softmax-dtype": Cast(softmax=", dtype=wide(s)"),
    "upcast-scores": Cast(scores="s = s.to(wide(s))"),
    "upcast-masked-scores": Cast(masked="s = s.to(wide(s))"),
    "upcast-operands": Cast(operands="q, k = q.to(wide(q)), k.to(wide(k))"),
}

_EXP = "e = torch.exp(s - s.amax(-1, keepdim=True))\n"

SOFTMAXES = {
    "softmax": "p = s.softmax(-1{dtype})",
    "F.softmax": "p = F.softmax(s, dim=-1{dtype})",
    "softmax-positive-dim": "p = torch.softmax(s, {last}{dtype})",
    "exp-over-sum": f"{_EXP}p = e / e.sum(-1, keepdim=True)",
    "exp-times-reciprocal": f"{_EXP}p = e * (1.0 / e.sum(dim=-1, keepdim=True))",
    "normalised-after-product": f"{_EXP}p = e",
    "shifted-softmax": "p = (s - s.amax(dim=-1, keepdim=True)).softmax(-1{dtype})",
    "exp-of-log_softmax": "p = F.log_softmax(s, dim=-1{dtype}).exp()",
    "exp-minus-logsumexp": "p = torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True))",
}

P = 0.25
DROPOUTS = {
    "no-dropout": "",
    "dropout-0": "p = F.dropout(p, p=0.0)",
    "dropout-not-training": f"p = F.dropout(p, p={P}, training=False)",
    "dropout-training": f"p = F.dropout(p, p={P}, training=True)",
    "nn.Dropout-eval": "p = drop_in_eval(p)",
    "nn.Dropout-train": "p = drop_in_training(p)",
}
TRAINING = ("dropout-training", "nn.Dropout-train")

OUTPUTS = {
    "as-is": "return o",
    "transpose-reshape": "return o.transpose(-3, -2).reshape({merged})",
    "contiguous-view": "return o.transpose(-3, -2).contiguous().view({merged})",
    "permute-flatten": "return o.permute({heads_and_rows}).flatten(-2)",
    "transposed": "return o.transpose(-3, -2)",
    "sequence-first-out": "return o.permute(2, 0, 1, 3).reshape(M, B, H * D)",
    "einsum-out": "return torch.einsum('bhmn,bhnd->bmhd', p, v)",
}

AXES: dict[str, tuple[str, ...]] = {
    "layout": tuple(LAYOUTS),
    "mask": tuple(MASKS),
    "matmul": tuple(MATMULS),
    "scale": tuple(SCALES),
    "application": tuple(APPLICATIONS),
    "softmax": tuple(SOFTMAXES),
    "output": tuple(OUTPUTS),
    "grouped": tuple(GROUPED),
    "dropout": tuple(DROPOUTS),
    "cast": tuple(CASTS),
    "bias": tuple(BIASES),
    "fill": tuple(FILLS),
    "sizes": tuple(SIZES),
    "dtype": tuple(DTYPES),
}


def _but(axis: str, *choices: str) -> tuple[str, ...]:
    return tuple(choice for choice in AXES[axis] if choice not in choices)


_PACKED = ("packed-unbind", "packed-chunk", "packed-split")
_FOUR_DIMENSIONS = tuple(name for name, layout in LAYOUTS.items() if layout.rank == "heads")
_NOTHING = {"mask": "unmasked", "application": "no-mask", "fill": "no-fill"}

RULES: tuple[tuple[str, Collection[str], str, Collection[str]], ...] = (  # these of one axis take only those of another
    ("layout", _PACKED, "sizes", ("self", "equal")),
    ("layout", ("packed-unbind", "packed-chunk"), "grouped", ("all",)),
    ("layout", ("flat", "sequence-first-flat"), "grouped", ("all", "repeat-interleave")),
    ("layout", ("windows",), "grouped", ("all", "repeat-interleave", "one-kv-head")),
    ("layout", ("windows",), "output", _but("output", "sequence-first-out")),
    ("matmul", ("einsum-heads-third",), "layout", _FOUR_DIMENSIONS),
    ("matmul", ("einsum-heads-third",), "grouped", _but("grouped", "broadcast-groups")),
    ("output", ("einsum-out",), "layout", _FOUR_DIMENSIONS),
    ("output", ("einsum-out",), "grouped", _but("grouped", "broadcast-groups")),
    ("output", ("einsum-out",), "matmul", ("einsum", "einsum-k-q", "einsum-ellipsis", "einsum-heads-third")),
    ("softmax", ("exp-over-sum", "exp-times-reciprocal", "exp-minus-logsumexp"), "cast", _but("cast", "softmax-dtype")),
    ("softmax", ("normalised-after-product",), "cast", ("no-cast",)),
    ("softmax", ("normalised-after-product",), "output", _but("output", "einsum-out")),
    ("application", ("add-triu-of-full",), "mask", ("causal-triu",)),
    ("application", ("add-one-minus-mask",), "fill", ("min", "-1e4")),
    ("application", ("add-log",), "fill", ("-inf",)),
    ("application", ("add-log",), "mask", _but("mask", "causal-and-left-padding")),  # follows from _ROWS_OF_NAN
    *((a, (_NOTHING[a],), b, (_NOTHING[b],)) for a, b in itertools.permutations(_NOTHING, 2)),
)

# Gradients of rows of NaN are zero where eager's are NaN, if an infinity is added (docs/design.md).
_ROWS_OF_NAN = frozenset({("mask", "causal-and-left-padding"), ("fill", "-inf")})
_ADDING = tuple(x for x in AXES["application"] if x.startswith("add-"))

Pair = tuple[tuple[str, str], tuple[str, str]]


def _clashes() -> frozenset[Pair]:
    found: set[Pair] = set()
    for axis, choices, other, allowed in RULES:
        for pair in itertools.product(((axis, x) for x in choices), ((other, y) for y in _but(other, *allowed))):
            found |= {pair, pair[::-1]}
    return frozenset(found)


_CLASHES = _clashes()


@dataclass(frozen=True)
class Case:
    """One choice of each axis."""

    layout: str
    mask: str
    matmul: str
    scale: str
    application: str
    softmax: str
    output: str
    grouped: str
    dropout: str
    cast: str
    bias: str
    fill: str
    sizes: str
    dtype: str

    @property
    def choices(self) -> Choices:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def name(self) -> str:
        """The choices that are not the first of their axis."""
        return " ".join(x for axis, x in self.choices.items() if x != AXES[axis][0]) or "plain"

    @property
    def training(self) -> bool:
        """Whether dropout drops, so that values differ from call to call."""
        return self.dropout in TRAINING

    def valid(self) -> bool:
        return all(_fits(axis, choice, self.choices) for axis, choice in self.choices.items())

    @property
    def shape(self) -> Sizes:
        B, H, M, N, D = SIZES[self.sizes]
        return Sizes(B, H, GROUPED[self.grouped][0], M, N, D)

    @property
    def rank(self) -> str:
        return "groups" if self.grouped == "broadcast-groups" else LAYOUTS[self.layout].rank

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the inputs."""
        given = ("scale" if self.scale == "s*learned" else "", BIASES[self.bias][0], MASKS[self.mask][0])
        return (*LAYOUTS[self.layout].shapes(self.shape), *filter(None, given))

    def source(self) -> str:
        """The function as text."""
        rank, cast = RANKS[self.rank], CASTS[self.cast]
        scores, output = MATMULS[self.matmul]
        before, after = SCALES[self.scale]
        z = self.shape
        merges = self.output != "as-is" and self.rank in ("flat", "groups")
        lines = (
            f"B, H, Hkv, G, M, N, D, W = {z.B}, {z.H}, {z.Hkv}, {z.H // z.Hkv}, {z.M}, {z.N}, {z.D}, {WINDOWS}",
            LAYOUTS[self.layout].code,
            GROUPED[self.grouped][1],
            cast.operands,
            before,
            f"s = {scores}",
            cast.scores,
            self._fitted("scale", of_heads=True) if self.scale == "s*learned" else "",
            after,
            BIASES[self.bias][1],
            "" if self.bias == "unbiased" else self._fitted("bias", of_heads=True) + "\ns = s + bias",
            MASKS[self.mask][1],
            self._fitted("allowed", of_heads=False) if self.mask in _OF_BATCH else "",
            APPLICATIONS[self.application],
            cast.masked,
            SOFTMAXES[self.softmax],
            cast.weights,
            DROPOUTS[self.dropout],
            f"o = {output}" if self.output != "einsum-out" else "",
            "o = o / e.sum(-1, keepdim=True)" if self.softmax == "normalised-after-product" else "",
            "o = o.reshape(B, H, M, D)" if merges else "",
            OUTPUTS[self.output],
        )
        body = "\n".join(lines).format(
            **rank._asdict(), fill=FILLS[self.fill], dtype=cast.softmax, last=rank.lead.count(",") + 2
        )
        return text_of(self.parameters, body)

    def _fitted(self, name: str, *, of_heads: bool) -> str:
        """Brings a bias [H, M, N] or a mask [B, 1, M, N] into a form that broadcasts with scores of the rank."""
        forms = {
            "heads": ("", ""),
            "windows": ("", "[:, None]"),
            "flat": (".expand(B, -1, -1, -1).flatten(0, 1)", ".expand(-1, H, -1, -1).flatten(0, 1)"),
            "groups": (".unflatten(0, (Hkv, G))", "[:, :, None]"),
        }
        form = forms[self.rank][0 if of_heads else 1]
        return f"{name} = {name}{form}" if form else ""

    def function(self) -> Function:
        return compiled_text(self.name, self.source())

    def inputs(self) -> tuple[Tensor, ...]:
        z, dtype = self.shape, DTYPES[self.dtype]
        given = {
            name: randn(*shape, seed=seed, dtype=dtype)
            for seed, (name, shape) in enumerate(LAYOUTS[self.layout].shapes(z).items())
        }
        batch, keys = torch.arange(z.B)[:, None], torch.arange(z.N)
        given |= {
            "scale": randn(z.H, 1, 1, seed=4, dtype=dtype),
            "bias": randn(z.H, z.M, z.N, seed=5, dtype=dtype),
            "slopes": randn(z.H, seed=6, dtype=dtype) / 4,
            "table": randn(z.H, z.M + z.N - 1, seed=7, dtype=dtype),
            "buffer": torch.ones(12, 12, dtype=torch.bool).tril(),
            "pad": keys < z.N - batch % 3,
            "left": keys >= batch % 3,
            "lengths": z.N - torch.arange(z.B) % 3,
            "ids": (keys + batch) // 3,
        }
        return tuple(given[name] for name in self.parameters)


def wide(x: Tensor) -> torch.dtype:
    """The type in which a careful model takes its softmax."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def text_of(parameters: Iterable[str], body: str) -> str:
    """A function with this body, blank lines left out."""
    lines = [f"    {line}\n" for line in body.splitlines() if line]
    return f"def attention({', '.join(parameters)}):\n{''.join(lines)}"


def compiled_text(name: str, source: str) -> Function:
    """The function that a text defines; tracebacks and remarks find its lines."""
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names: dict[str, Any] = {
        "torch": torch,
        "F": F,
        "math": math,
        "wide": wide,
        "drop_in_eval": torch.nn.Dropout(P).eval(),
        "drop_in_training": torch.nn.Dropout(P),
    }
    exec(compile(source, file, "exec"), names)
    function: Function = names["attention"]
    return function


def _fits(axis: str, choice: str, chosen: Mapping[str, str]) -> bool:
    """Whether a choice goes with those that are made."""
    if any(((axis, choice), other) in _CLASHES for other in chosen.items()):
        return False
    every = {**chosen, axis: choice}
    return every.get("application") not in _ADDING or not every.items() >= _ROWS_OF_NAN


def _completed(
    chosen: Choices, preference: Callable[[str, Choices], Sequence[str]], order: Iterable[str] = tuple(AXES)
) -> Choices | None:
    """A choice for every axis, the preferred first, or None if there is no valid case with those that are made."""
    axis = next((axis for axis in order if axis not in chosen), None)
    if axis is None:
        return chosen
    for choice in preference(axis, chosen):
        if _fits(axis, choice, chosen):
            found = _completed({**chosen, axis: choice}, preference, order)
            if found is not None:
                return found
    return None


_ATTEMPTS = 5  # at each case of the pairwise set


def sample(count: int, seed: int) -> list[Case]:
    """Distinct valid cases, the same for the same seed; every choice of an axis is as likely as the axes before it allow."""
    generator = random.Random(seed)
    found: dict[Case, None] = {}
    while len(found) < count:
        chosen = _completed({}, lambda axis, _: generator.sample(AXES[axis], len(AXES[axis])))
        assert chosen is not None
        found[Case(**chosen)] = None
    return list(found)


def pairs_of(choices: Mapping[str, str]) -> list[Pair]:
    """All pairs of choices, in the order of the axes."""
    return list(itertools.combinations([(axis, choices[axis]) for axis in AXES], 2))


@functools.cache
def all_pairs() -> tuple[Pair, ...]:
    """Every pair of choices of two axes that some valid case has."""
    every = [(axis, choice) for axis, choices in AXES.items() for choice in choices]
    return tuple(
        (a, b)
        for a, b in itertools.combinations(every, 2)
        if a[0] != b[0] and _fits(*a, dict((b,))) and _completed(dict((a, b)), lambda axis, _: AXES[axis]) is not None
    )


@functools.cache
def pairwise() -> tuple[Case, ...]:
    """A small set of valid cases in which every pair of `all_pairs` occurs; greedy, the same in every process."""
    left = dict.fromkeys(all_pairs())
    generator = random.Random(0)

    def most_new(axis: str, chosen: Choices) -> list[str]:
        def new(choice: str) -> int:
            return sum(pair in left or pair[::-1] in left for pair in (((axis, choice), x) for x in chosen.items()))

        return sorted(generator.sample(AXES[axis], len(AXES[axis])), key=new, reverse=True)

    def attempt() -> Choices:
        order = generator.sample(tuple(AXES), len(AXES))
        found = _completed(dict(generator.choice(list(left))), most_new, order)
        assert found is not None
        return found

    cases = []
    while left:
        chosen = max((attempt() for _ in range(_ATTEMPTS)), key=lambda x: sum(pair in left for pair in pairs_of(x)))
        for pair in pairs_of(chosen):
            left.pop(pair, None)
        cases.append(Case(**chosen))
    return tuple(cases)
