"""Biases of small attentions, written out as plain operators whose result the operator reads.

Inductor fuses them with what makes their leaves.  The CPU template would go through the expression step by step in each call:
of Swin's windows of 7 x 7 that takes half as long as the attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.score import INDICES, Expr, Load, Program, S, Var, call, loads
from attnfuse.spec import AttentionSpec, Leaf, Shape, parse_spec
from attnfuse.templates import diagonals
from attnfuse.templates.affine import Affine, affine, as_load, capped
from attnfuse.templates.evaluate import Block, Evaluator, axes_of, named_sizes, varies
from attnfuse.templates.work import tensor_of


class WrittenBias(NamedTuple):
    """A spec whose bias is a leaf, its last one.

    Args:
        axes: those of the leaf.
        of: the spec as it was, for whose leaves `bias` is written out.
    """

    spec: AttentionSpec
    axes: tuple[int, ...]
    of: AttentionSpec
    bias: Expr


# Cells of a bias that is larger than what it is made of: with 1.6 M and 3.1 M the attention takes as long either way, with 6.3 M
# 1.2 times as long as where the template computes it (float32, one core).
_MOST_CELLS: Final = 1 << 21


def written_bias(spec: AttentionSpec, shape: Shape) -> WrittenBias | None:
    """The spec with its bias as a leaf, where it pays: not one of more than 2 M cells that is made of smaller tensors."""
    found = _with_a_leaf(spec)
    if found is None:
        return None
    sizes = (shape.B, shape.H, shape.M, shape.N)
    cells = math.prod(sizes[axis] for axis in found.axes)
    grows = all(len(axes_of(load) or ()) < len(found.axes) for load in loads(found.bias))
    return None if grows and cells > _MOST_CELLS else found


@lru_cache(maxsize=1024)
def _with_a_leaf(spec: AttentionSpec) -> WrittenBias | None:
    """The spec with its bias as a leaf, where that is an expression of rows and keys beyond a leaf as it stands.

    A mask of rows and keys that reads leaves tells tiles apart by them: it has to find them in the bias.
    """
    form = affine(spec.program.body) or capped(spec.program.body)
    if form is None or form.bias is None:
        return None
    load = as_load(spec, form.bias)
    if load is not None and (axes_of(load) is not None or diagonals.along(load) is not None):
        return None
    if not {"m", "n"} <= varies(form.bias) or not loads(form.bias):
        return None
    if any({"m", "n"} <= varies(load) for tier in spec.program.tiers for load in loads(tier.allowed)):
        return None
    score = call("mul", S, form.scale)
    if not isinstance(form, Affine):
        score = call("mul", call("tanh", score), form.cap)
    axes = tuple(axis for axis, name in enumerate(INDICES) if name in varies(form.bias))
    taken = {leaf.name for leaf in spec.leaves}
    name = next(name for at in range(1, len(taken) + 3) if (name := f"bias{at}") not in taken)
    load = Load(name, tuple(Var(INDICES[axis]) for axis in axes))
    program = Program(call("add", score, load), spec.program.tiers, spec.program.sink)
    read = {x.leaf for expr in program.expressions() for x in loads(expr)}
    kept = tuple(leaf for leaf in spec.leaves if leaf.name in read)
    declared = (*kept, Leaf(name, "f32", len(axes)))
    return WrittenBias(AttentionSpec(program, declared, spec.dropout), axes, spec, form.bias)


def values(found: WrittenBias, leaves: Sequence[Tensor], shape: Shape) -> Tensor:
    """The bias in plain operators, none of them in place: fp32, contiguous, [the sizes of its axes].

    Args:
        leaves: the tensors of the leaves of `found.of`.
    """
    B, H, _, M, N, _, _ = shape
    named = {leaf.name: x for leaf, x in zip(found.of.leaves, leaves, strict=True)}
    block = Block(named, named_sizes(shape, ()), ((0, B), (0, H), (0, M), (0, N)), leaves[0].device, torch.float32)
    (value,) = _compiled(str(found.of))(block)
    cells = (B, H, M, N)
    x = tensor_of(value, torch.float32).expand([size if axis in found.axes else 1 for axis, size in enumerate(cells)])
    return x.reshape([cells[axis] for axis in found.axes]).contiguous()


@lru_cache(maxsize=1024)
def _compiled(text: str) -> Evaluator:
    found = _with_a_leaf(parse_spec(text))
    assert found is not None
    return Evaluator(found.of, [found.bias], pure=True)
