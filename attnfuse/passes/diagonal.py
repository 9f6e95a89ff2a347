"""Biases that are the same along each diagonal: what a model computes for each row and key out of `n - m` alone (T5's buckets).

`along(lifter, node, rows, keys)` proves it from the graph: an integer tensor whose element lifts to a multiple of `n - m` and a
constant, element by element through operators that know no position, gathers from tables, and views that keep the two
dimensions apart.  `Diagonal.written` writes the same operators once more over the M + N - 1 values that `n - m` takes, so that
the values are the model's own and gradients reach the tables through its own nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import fx

from attnfuse.passes.graph import MODE_SWITCHES, aten, bound, fake, is_tensor, packet, shape
from attnfuse.passes.index import Index, Size, Unliftable, index_of, same, size_of
from attnfuse.passes.views import PERMUTATIONS, permutation
from attnfuse.score import Var, linear

if TYPE_CHECKING:
    from attnfuse.passes.lift import Lifter

__all__ = ["Diagonal", "along", "is_worth_it"]

# Up to so many elements for each head a tensor for all rows and keys is no larger than what kernels copy for diagonals.
_SMALL: Final = 1 << 16
# Positions are computed without a multiple that wraps around.
_LARGE: Final = 1 << 31
_MOST_STEPS: Final = 64
# Beside those that are tagged as pointwise.
_BY_ELEMENT: Final = (
    *("where", "floor_divide", "bitwise_and", "bitwise_or", "bitwise_xor", "to", "_to_copy", "contiguous", "clone"),
    *("full_like", "zeros_like", "ones_like"),
)
_DIFFERENCES: Final = ("sub", "rsub", "add", "neg", "mul")


@dataclass(frozen=True)
class _Step:
    """A node to be written once more; `factor`: for one that is `factor * (n - m) + offset` itself, else None.

    Args:
        more: nodes that hold numbers, and how often each is added to `offset`.
    """

    node: fx.Node
    rows: int
    keys: int
    factor: int | None = None
    offset: int = 0
    more: tuple[tuple[fx.Node | int, int], ...] = ()


@dataclass(frozen=True)
class Diagonal:
    """How the elements of a tensor depend on `n - m`, n being the index of its dimension `keys` and m that of `rows`.

    Args:
        steps: what is computed for each row and key, operands first, the tensor itself last.
        given: the tensors that go into it and are not larger for it: tables and slopes.
        sizes: of the two dimensions; where they are symbols, `numbers` holds nodes with their values.
    """

    rows: int
    keys: int
    steps: tuple[_Step, ...]
    given: tuple[fx.Node, ...]
    sizes: tuple[Size, Size]
    numbers: tuple[fx.Node | int, fx.Node | int]

    def written(self, emit: Callable[..., fx.Node], current: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """The tensor with one row, and in the place of its keys the element for each `n - m + M - 1`.

        Args:
            emit: writes a node.
            current: what stands in the place of a node of the graph.
        """
        rows, keys = self.numbers
        made: dict[fx.Node, fx.Node] = {}
        for step in self.steps:
            if step.factor is not None:
                made[step.node] = _positions(emit, step, rows, keys)
                continue
            operands = {x: made[x] if x in made else current(x) for x in step.node.all_input_nodes}
            args, kwargs = fx.map_arg((step.node.args, dict(step.node.kwargs)), operands.__getitem__)
            new = made[step.node] = emit(step.node.target, *args, **kwargs)
            if fake(new).dtype != fake(step.node).dtype:
                # it stands in a region of autocast, where its fake value was not made
                new.meta["val"] = fake(new).to(fake(step.node).dtype)
        return made[self.steps[-1].node]


def is_worth_it(rows: Size, keys: Size) -> bool:
    """Whether a tensor of that many rows and keys is so large, or may be, that it should not be in memory."""
    if not isinstance(rows, int) or not isinstance(keys, int):
        return True
    return rows * keys > _SMALL


def along(lifter: Lifter, node: fx.Node, rows: int, keys: int) -> Diagonal | None:
    """How a tensor of which `rows` and `keys` are two dimensions depends on `n - m` alone, where that is proven."""
    sizes = shape(node)[rows], shape(node)[keys]
    numbers = tuple(_number(lifter, node, size) for size in sizes)
    if any(x is None for x in numbers):
        return None
    search = _Search(lifter, sizes)
    try:
        search.visit(node, rows, keys)
    except Unliftable:
        return None
    steps = tuple(search.steps.values())
    position = lifter.scope.storage.position
    first = min(position[step.node] for step in steps if step.factor is None)
    for other, at in position.items():
        # what is computed anew is computed in one place
        if first < at < position[node] and getattr(other.target, "__name__", "") in MODE_SWITCHES:
            return None
    return Diagonal(rows, keys, steps, tuple(dict.fromkeys(search.given)), sizes, numbers)  # type: ignore[arg-type]


class _Search:
    """Collects the steps that lead to a tensor; raises Unliftable at what is not proven."""

    def __init__(self, lifter: Lifter, sizes: tuple[Size, Size]) -> None:
        self.lifter = lifter
        self.sizes = sizes
        self.steps: dict[fx.Node, _Step] = {}
        self.given: list[fx.Node] = []
        self.met = 0

    def visit(self, node: fx.Node, rows: int, keys: int) -> None:
        known = self.steps.get(node)
        if known is not None:
            if (known.rows, known.keys) != (rows, keys):
                raise Unliftable("a tensor that is read in two ways")
            return
        self.met += 1
        if self.met > _MOST_STEPS:
            raise Unliftable("too many operators")
        own = shape(node)
        if rows == keys or not (same(own[rows], self.sizes[0]) and same(own[keys], self.sizes[1])):
            raise Unliftable("another number of rows or keys")
        self._check(node)
        step = self._difference(node, rows, keys)
        if step is None:
            for operand, its_rows, its_keys in self._operands(node, rows, keys):
                self.visit(operand, its_rows, its_keys)
            step = _Step(node, rows, keys)
        self.steps[node] = step

    def _check(self, node: fx.Node) -> None:
        if self.lifter.scope.storage.writes(node):
            raise Unliftable("written in place")
        target = node.target
        plain = isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable
        if not plain or torch.Tag.nondeterministic_seeded in target.tags:  # type: ignore[union-attr]
            raise Unliftable(f"{node.target}")

    def _difference(self, node: fx.Node, rows: int, keys: int) -> _Step | None:
        """The step of a node that is linear in `n - m`."""
        others = [size for dim, size in enumerate(shape(node)) if dim not in (rows, keys)]
        integer = fake(node).dtype in (torch.int64, torch.int32)
        if not integer or packet(node) not in _DIFFERENCES or not all(same(size, 1) for size in others):
            return None
        index: list[Index] = [()] * len(shape(node))
        index[rows], index[keys] = index_of(Var("m"), self.sizes[0]), index_of(Var("n"), self.sizes[1])
        form = linear(self.lifter.lift(node, index))
        factor = 0 if form is None else form.coefficient(Var("n"))
        if form is None or not factor or form.coefficient(Var("m")) != -factor:
            return None
        symbols = self.lifter.scope.table.symbols
        more = []
        for atom, times in form.without(Var("n")).without(Var("m")).terms.items():
            known = symbols.get(str(atom)) if isinstance(atom, Var) else None
            number = None if known is None else _number(self.lifter, node, known[0])
            if number is None:
                return None
            more.append((number, times))
        if any(abs(x) >= _LARGE for x in (factor, form.constant, *(times for _, times in more))):
            return None
        return _Step(node, rows, keys, factor, form.constant, tuple(more))

    def _operands(self, node: fx.Node, rows: int, keys: int) -> list[tuple[fx.Node, int, int]]:
        """The operands that depend on rows and keys, with the places of these; the others are `given`."""
        name, args = packet(node), bound(node)
        if name == "unsqueeze":
            (source,) = node.all_input_nodes
            dim = args["dim"] % len(shape(node))
            return [(source, rows - (rows > dim), keys - (keys > dim))]
        if name in PERMUTATIONS:
            (source,) = node.all_input_nodes
            order = permutation(node)
            return [(source, order[rows], order[keys])]
        if name == "embedding":
            # the gradient would be divided by how often a row is read
            if args.get("scale_grad_by_freq") or args.get("sparse"):
                raise Unliftable("a gradient that is not the sum over the rows read, or sparse")
            return self._gathered(args["weight"], args["indices"], 0, rows, keys)
        if name == "index":
            chosen = [(dim, x) for dim, x in enumerate(args["indices"]) if x is not None]
            if len(chosen) != 1 or fake(chosen[0][1]).dtype not in (torch.int64, torch.int32):
                raise Unliftable("indexing by several tensors, or by a mask")
            return self._gathered(args["self"], chosen[0][1], chosen[0][0], rows, keys)
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        if name not in _BY_ELEMENT and torch.Tag.pointwise not in target.tags:
            raise Unliftable(name)
        return self._elements(node, rows, keys)

    def _gathered(
        self, table: fx.Node, chosen: fx.Node, dim: int, rows: int, keys: int
    ) -> list[tuple[fx.Node, int, int]]:
        inside = range(dim, dim + len(shape(chosen)))
        if rows not in inside or keys not in inside:
            raise Unliftable("a table with an element for each row or key")
        self._give(table)
        return [(chosen, rows - dim, keys - dim)]

    def _elements(self, node: fx.Node, rows: int, keys: int) -> list[tuple[fx.Node, int, int]]:
        rank = len(shape(node))
        found = []
        for operand in node.all_input_nodes:
            if not is_tensor(operand):
                continue
            sizes = shape(operand)
            behind = rank - len(sizes)
            there = [dim >= behind and not same(sizes[dim - behind], 1) for dim in (rows, keys)]
            if all(there):
                found.append((operand, rows - behind, keys - behind))
            elif any(there):
                raise Unliftable("something for each row, or for each key")
            else:
                self._give(operand)
        if not found:
            raise Unliftable("something that is expanded")
        return found

    def _give(self, node: fx.Node) -> None:
        if self.lifter.scope.storage.writes(node):
            raise Unliftable("written in place")
        self.given.append(node)


def _number(lifter: Lifter, node: fx.Node, size: Size) -> fx.Node | int | None:
    """The size as an int, or a node before `node` that holds it."""
    if isinstance(size, int):
        return size
    for other in lifter.scope.module.graph.nodes:
        if other is node:
            break
        val = other.meta.get("val")
        if isinstance(val, torch.SymInt) and same(size_of(val), size):
            found: fx.Node = other
            return found
    return None


def _positions(emit: Callable[..., fx.Node], step: _Step, rows: fx.Node | int, keys: fx.Node | int) -> fx.Node:
    """`factor * (n - m) + offset` for each n - m from 1 - M to N - 1, with the dimensions of the node."""
    assert step.factor is not None
    offset = _sum(emit, step.offset, *(_product(emit, number, times) for number, times in step.more))
    first = _sum(emit, step.factor, _product(emit, rows, -step.factor), offset)
    end = _sum(emit, _product(emit, keys, step.factor), offset)
    own = fake(step.node)
    positions = emit(aten.arange.start_step, first, end, step.factor, dtype=own.dtype, device=own.device)
    return emit(aten.view.default, positions, [-1 if dim == step.keys else 1 for dim in range(own.dim())])


def _product(emit: Callable[..., fx.Node], a: fx.Node | int, b: int) -> fx.Node | int:
    if isinstance(a, int):
        return a * b
    return a if b == 1 else emit(operator.mul, a, b)


def _sum(emit: Callable[..., fx.Node], *terms: fx.Node | int) -> fx.Node | int:
    out: fx.Node | int = sum(x for x in terms if isinstance(x, int))
    for term in terms:
        if isinstance(term, fx.Node):
            out = emit(operator.add, term, out)
    return out
