"""`AttentionSpec`: what one attention means.  The only value that passes and templates share.

It knows no graph, no tensor and no kernel.  `str(spec)` is its text, the operator's argument, and `parse_spec` reads it back:

    pad: bool[:, :]; dropout 0.1; s*0.125 where n <= m & pad[b, n] else +min

Sizes are not part of it: one spec serves every length, and `Shape` travels beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from attnfuse.score import (
    ALWAYS_FLOAT,
    BOOLEANS,
    Call,
    Const,
    Expr,
    Load,
    Program,
    ScoreSyntaxError,
    Var,
    free_vars,
    parse,
    walk,
)

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_LITERALS: Final = ("True", "False", "inf", "nan")
LEAF_DTYPES: Final = ("bool", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64")


class Shape(NamedTuple):
    """Sizes of one attention: q [B, H, M, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv]; query head h reads KV head h // (H // Hkv)."""

    B: int
    H: int
    Hkv: int
    M: int
    N: int
    D: int
    Dv: int

    def __str__(self) -> str:
        heads = f"H{self.H}" if self.H == self.Hkv else f"H{self.H}/{self.Hkv}"
        depth = f"D{self.D}" if self.D == self.Dv else f"D{self.D}/{self.Dv}"
        return f"B{self.B} {heads} M{self.M} N{self.N} {depth}"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor that the score reads: its name in the program, its element type (one of `LEAF_DTYPES`) and its rank.

    Raises ValueError for a name that a text could not hold, an unknown dtype or a negative rank.
    """

    name: str
    dtype: str
    rank: int

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in _LITERALS:
            raise ValueError(
                f"leaf name {self.name!r}: expected a name of letters, digits and _, not {', '.join(_LITERALS)}"
            )
        if self.dtype not in LEAF_DTYPES:
            raise ValueError(f"leaf {self.name}: dtype {self.dtype!r}: expected one of {', '.join(LEAF_DTYPES)}")
        if self.rank < 0:
            raise ValueError(f"leaf {self.name}: rank {self.rank}: expected 0 or more")

    @property
    def kind(self) -> str:
        """The type of an element in the score language: bool, int or float."""
        return "bool" if self.dtype == "bool" else "int" if self.dtype[0] in "iu" else "float"

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(':' * self.rank)}]"


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The meaning of one attention: `softmax(program(q·kᵀ))·v`, with dropout on the weights.

    Raises ValueError if a load names no leaf or has the wrong number of indices, if types do not fit, or if dropout is not in
    [0, 1).
    """

    program: Program
    leaves: tuple[Leaf, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout {self.dropout}: expected a probability in [0, 1)")
        names = [leaf.name for leaf in self.leaves]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"leaf {name!r} is declared twice")
        for expr in self.program.expressions():
            self.type_of(expr)
        self._expect(self.program.body, "float", "int")
        for tier in self.program.tiers:
            self._expect(tier.allowed, "bool")
            if "s" in free_vars(tier.allowed):
                raise ValueError(f"mask {tier.allowed} depends on s: write it as where(…) in the score")
        if self.program.sink is not None:
            self._expect(self.program.sink, "float", "int")
            if free_vars(self.program.sink) & {"s", "n"}:
                raise ValueError(f"sink {self.program.sink} depends on s or n: a sink is one score a row")

    def __str__(self) -> str:
        head = [str(leaf) for leaf in self.leaves]
        if self.dropout:
            head.append(f"dropout {self.dropout!r}")
        return "; ".join((*head, str(self.program)))

    def leaf(self, name: str) -> Leaf:
        """The declared leaf of that name; raises ValueError with the known names."""
        for leaf in self.leaves:
            if leaf.name == name:
                return leaf
        known = ", ".join(leaf.name for leaf in self.leaves) or "none"
        raise ValueError(f"the program loads from {name!r}, which is not declared (leaves: {known})")

    def size_count(self) -> int:
        """How many entries the operator's `sizes` needs: one more than the greatest `i…` in the program."""
        used = [int(v[1:]) for e in self._walk() if isinstance(e, Var) and re.fullmatch(r"i\d+", v := e.name)]
        return max(used, default=-1) + 1

    def _walk(self) -> Iterator[Expr]:
        for expr in self.program.expressions():
            yield from walk(expr)

    def _expect(self, expr: Expr, *types: str) -> None:
        found = self.type_of(expr)
        if found not in types:
            raise ValueError(f"{expr} is {found}, expected {' or '.join(types)}")

    def type_of(self, expr: Expr) -> str:
        """`bool`, `int` or `float`; raises ValueError where the types in `expr` do not fit together."""
        if isinstance(expr, Const):
            return {bool: "bool", int: "int", float: "float"}[type(expr.value)]
        if isinstance(expr, Var):
            return "float" if expr.name == "s" else "int"
        if isinstance(expr, Load):
            leaf = self.leaf(expr.leaf)
            if len(expr.indices) != leaf.rank:
                raise ValueError(f"{expr} has {len(expr.indices)} indices, leaf {leaf} takes {leaf.rank}")
            for index in expr.indices:
                self._expect(index, "int")
            return leaf.kind
        return self._type_of_call(expr)

    def _type_of_call(self, expr: Call) -> str:
        types = [self.type_of(a) for a in expr.args]
        if expr.op in ("and", "or", "not"):
            if set(types) != {"bool"}:
                raise ValueError(f"{expr}: {expr.op} takes truth values, found {' and '.join(types)}")
            return "bool"
        if expr.op == "where":
            if types[0] != "bool":
                raise ValueError(f"{expr}: where takes a truth value first, found {types[0]}")
            types = types[1:]
            if "bool" in types and types[0] != types[1]:
                raise ValueError(
                    f"{expr}: where takes two numbers or two truth values, found {types[0]} and {types[1]}"
                )
        if "bool" in types and expr.op not in ("eq", "ne", "float", "where"):
            raise ValueError(f"{expr}: {expr.op} takes numbers, found bool (write where(…, 1.0, 0.0) or float(…))")
        if expr.op in BOOLEANS:
            return "bool"
        if expr.op in ("floordiv", "mod") and "float" in types:
            raise ValueError(f"{expr}: {expr.op} takes integers, found float")
        if expr.op in ALWAYS_FLOAT:
            return "float"
        return "float" if "float" in types else types[0]


_DROPOUT: Final = re.compile(r"\s*dropout\s+([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")
_LEAF: Final = re.compile(r"\s*([A-Za-z_][A-Za-z_0-9]*)\s*:\s*(\w+)\s*\[\s*(:(?:\s*,\s*:)*)?\s*\]\s*")


@lru_cache(maxsize=4096)
def parse_spec(text: str) -> AttentionSpec:
    """The spec that `text` spells; `parse_spec(str(spec)) == spec`.

    Raises ScoreSyntaxError with a position, or ValueError where the parts do not fit together.
    """
    *head, program = text.split(";")
    leaves: list[Leaf] = []
    dropout: float | None = None
    at = 0
    for part in head:
        start = at + len(part) - len(part.lstrip())
        leaf, drop = _LEAF.fullmatch(part), _DROPOUT.fullmatch(part)
        if leaf and leaf[2] in LEAF_DTYPES and leaf[1] not in _LITERALS:
            leaves.append(Leaf(leaf[1], leaf[2], (leaf[3] or "").count(":")))
        elif drop and dropout is not None:
            raise ScoreSyntaxError("dropout is given twice", text, start)
        elif drop:
            dropout = float(drop[1])
        else:
            wanted = f"a leaf `name: dtype[:, …]` with a dtype of {', '.join(LEAF_DTYPES)}, or `dropout p`"
            raise ScoreSyntaxError(f"expected {wanted}", text, start)
        at += len(part) + 1
    try:
        return AttentionSpec(parse(program), tuple(leaves), dropout or 0.0)
    except ScoreSyntaxError as error:
        raise ScoreSyntaxError(str(error).partition(" at column")[0], text, at + error.position) from None
    except RecursionError:
        pass
    raise ScoreSyntaxError("nested too deeply", text, at)
