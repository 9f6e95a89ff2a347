"""Where the elements of a tensor come from, worked out cell by cell through operators that only move data.

`Origins.at` takes the coordinates of many elements at once and follows each of them up: through views, overlapping windows,
padding, concatenations, flips, choices under constant masks and slices that are written to a fresh tensor.  What it gives is a
distinction of cases: a number, or an element of a tensor that is computed.  Nothing is sampled: the tables hold every cell.
Dimensions along which nothing but a stride changes (batch, heads, depth) are variables with coefficients instead, so that tables
stay as small as one head.

Sizes are ints; what cannot be decided raises `Unproven`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx

from attnfuse.passes.constants import constant
from attnfuse.passes.contraction import contraction
from attnfuse.passes.graph import Storage, bound, fake, is_tensor, packet, shape
from attnfuse.passes.rules import FILLED
from attnfuse.passes.views import PERMUTATIONS, cuts_gradient, permutation

MOST_CELLS: Final = 2**23
"""The largest table that is made."""


class Unproven(Exception):
    """Something that does not follow from the graph, or not at a cost that is worth it."""


class SplitError(Unproven):
    """A variable of which only a digit is seen: it has to be two, the lower one of size `low`."""

    def __init__(self, name: str, low: int) -> None:
        super().__init__(f"{name} splits by {low}")
        self.name, self.low = name, low


@dataclass(frozen=True, eq=False)
class Place:
    """Coordinates along one dimension: a table over the cells, plus a multiple of each variable."""

    table: Tensor
    steps: tuple[tuple[str, int], ...] = ()

    def moved(self, times: int, by: int) -> Place:
        """`times * self + by`."""
        return Place(self.table * times + by, tuple((name, step * times) for name, step in self.steps if times))

    def __add__(self, other: Place) -> Place:
        steps = dict(self.steps)
        for name, step in other.steps:
            steps[name] = steps.get(name, 0) + step
        return Place(self.table + other.table, tuple(sorted((n, s) for n, s in steps.items() if s)))


ZERO: Final = Place(torch.zeros((), dtype=torch.int64, device="cpu"))
TRUE: Final = torch.ones((), dtype=torch.bool, device="cpu")
FALSE: Final = ~TRUE
Places = tuple[Place, ...]


@dataclass(frozen=True)
class Number:
    """The same number in all cells."""

    number: float | int | bool


@dataclass(frozen=True, eq=False)
class Element:
    """An element of a tensor that is computed."""

    node: fx.Node
    places: Places


@dataclass(frozen=True, eq=False)
class Arithmetic:
    """What an operator of a graph that works element by element makes of values; None stands for what is no tensor."""

    node: fx.Node
    values: tuple[Value | None, ...]


Value = Number | Element | Arithmetic


@dataclass(frozen=True, eq=False)
class Case:
    """The value in the cells where `where` holds."""

    where: Tensor
    value: Value


_RESHAPES: Final = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "ravel")
_CUTS: Final = ("slice", "narrow", "select")
_COPIES: Final = ("contiguous", "clone", "alias", "lift_fresh_copy", "lift_fresh", "detach", "to", "_to_copy")
_EXPANSIONS: Final = ("expand", "expand_as", "broadcast_to")
_MOST_NUMBERS: Final = 4
_MOVES: Final = (*_RESHAPES, *_CUTS, *PERMUTATIONS, *_EXPANSIONS, "flip", "as_strided", "unfold")
_ARITHMETIC: Final = ("add", "sub", "mul", "div")
_OF_ELEMENTS: Final = ("copy_", "zero_", "fill_", "masked_fill_", "add_", "sub_", "mul_", "div_")


class Origins:
    """Follows elements of one graph's tensors.

    Args:
        storage: of the graph.
        extents: the size of each variable.
    """

    def __init__(self, storage: Storage, extents: Mapping[str, int]) -> None:
        self.storage, self.extents = storage, dict(extents)
        self._constants: dict[fx.Node, Tensor | None] = {}

    def at(self, node: fx.Node, places: Places, where: Tensor, time: int) -> list[Case]:
        """What the elements at `places` hold when the node at position `time` reads them; cases with the same origin are one.

        Raises:
            Unproven: a move that is not understood.
        """
        return _merged(self._at(node, places, where, time))

    def _at(self, node: fx.Node, places: Places, where: Tensor, time: int) -> list[Case]:
        if not is_tensor(node) or node not in self.storage.position:
            raise Unproven("no tensor of the graph")
        writes = [at for at in self.storage.writes(node) if at < time]
        if not writes:
            return self._made(node, places, where)
        root = self.storage.root(node)
        if self.storage.entangled(node) or root.op != "call_function":
            raise Unproven(f"{node} is written to, and is not of this graph")
        for view in self._views(node, root):
            places = self._through(view, places, where)
        cases = []
        for write in sorted(
            (n for n, at in self.storage.position.items() if at in writes), key=self._when, reverse=True
        ):
            inside, own = where, places
            for view in reversed(self._views(write, root)):
                own, seen = self._shown(view, own, inside)
                inside = inside & seen
            if inside.any():
                cases += self._written(write, own, inside)
            where = where & ~inside
            if not where.any():
                return cases
        return cases + self._made(root, places, where)

    def _when(self, node: fx.Node) -> int:
        return self.storage.position[node]

    def _views(self, node: fx.Node, root: fx.Node) -> list[fx.Node]:
        """The views between a tensor and the one that owns its storage, the last first; a write shows what it writes to."""
        found = []
        while node is not root:
            name, source = packet(node), node.args[0] if node.args else None
            if not isinstance(source, fx.Node):
                raise Unproven(f"{name} of no tensor")
            if name not in _OF_ELEMENTS:
                if name not in (*_CUTS, *PERMUTATIONS, "view", "unflatten", "unsqueeze", "squeeze"):
                    raise Unproven(f"{name} of a tensor that is written to")
                if _dtype(node) != _dtype(source):
                    raise Unproven("a view of another type")
                found.append(node)
            node = source
        return found

    def _written(self, write: fx.Node, places: Places, where: Tensor) -> list[Case]:
        """What a write leaves in the elements that it shows."""
        name, now = packet(write), self._when(write)
        args = bound(write)
        target = write.args[0]
        assert isinstance(target, fx.Node)
        if cuts_gradient(write) != cuts_gradient(self.storage.root(target)):
            raise Unproven("a write under no_grad")
        if name == "zero_":
            return [Case(where, _number(0, _dtype(target)))]
        if name in ("copy_", "fill_"):
            source = args["src" if name == "copy_" else "value"]
            given = self._operand(source, places, where, now)
            alike = is_tensor(source) and _dtype(source) == _dtype(target)
            return given if alike else _rounded(given, _dtype(target))
        if name == "masked_fill_":
            return self._chosen(write, args["mask"], args["value"], target, places, where, now)
        return self._computed(write, places, where, now)

    def _made(self, node: fx.Node, places: Places, where: Tensor) -> list[Case]:
        """What the operator of a node puts into the elements."""
        name, now = packet(node), self._when(node)
        itself = [Case(where, Element(node, places))]
        if node.op == "get_attr":
            return self._known(node, places, where) or itself
        if node.op != "call_function" or not name or node.target._schema.is_mutable:  # type: ignore[union-attr]
            return itself
        if name in FILLED:
            number = int(FILLED[name]) if FILLED[name] in "01" else bound(node)[FILLED[name]]
            return [Case(where, _number(number, _dtype(node)))] if isinstance(number, int | float) else itself
        if contraction(node) is not None:
            return self._product(node, places, where, now) or itself
        if name in ("where", "masked_fill"):
            args = bound(node)
            given = (
                (args["condition"], args["self"], args["other"])
                if name == "where"
                else (args["mask"], args["value"], args["self"])
            )
            return self._chosen(node, *given, places, where, now)
        if name in _ARITHMETIC:
            return self._computed(node, places, where, now)
        source = node.args[0] if node.args else None
        if name == "cat":
            return self._joined(node, places, where, now)
        if not isinstance(source, fx.Node) or not is_tensor(source) or (cuts_gradient(node) != cuts_gradient(source)):
            return itself
        if name in ("pad", "constant_pad_nd"):
            return self._padded(node, source, places, where, now)
        if name in ("tril", "triu"):
            return self._triangle(node, source, places, where, now)
        if name in _COPIES:
            if (name == "detach" and _dtype(node).is_floating_point) or fake(source).device != fake(node).device:
                return itself
            cases = self._at(source, places, where, now)
            if _dtype(source) == _dtype(node):
                return cases
            return _rounded(cases, _dtype(node)) if all(isinstance(x.value, Number) for x in cases) else itself
        if name in _MOVES and _dtype(source) == _dtype(node):
            return self._at(source, self._through(node, places, where), where, now)
        return self._known(node, places, where) or itself

    def _known(self, node: fx.Node, places: Places, where: Tensor) -> list[Case] | None:
        """A few numbers in a tensor that nothing goes into but what the graph itself says."""
        if node not in self._constants:
            self._constants[node] = constant(self.storage, node, MOST_CELLS, held=False)
        held = self._constants[node]
        if held is None or any(place.steps for place in places):
            return None
        indices = [place.table.clamp(0, size - 1) for place, size in zip(places, held.shape, strict=True)]
        numbers = held[tuple(indices)] if indices else held
        found: list[Case] = []
        rest = where & torch.ones_like(numbers, dtype=torch.bool)
        while rest.any():
            if len(found) == _MOST_NUMBERS:
                return None
            number = numbers.expand_as(rest)[rest][0]
            found.append(Case(rest & (numbers == number), Number(number.item())))
            rest = rest & (numbers != number)
            if number != number:
                return None
        return found

    def _operand(self, arg: Any, places: Places, where: Tensor, time: int) -> list[Case]:
        """An operand that is broadcast."""
        if not is_tensor(arg):
            if not isinstance(arg, int | float):
                raise Unproven("a number of the model's")
            return [Case(where, Number(arg))]
        sizes = _sizes(arg)
        own = tuple(
            ZERO if size == 1 else place for size, place in zip(sizes, places[len(places) - len(sizes) :], strict=True)
        )
        return self._at(arg, own, where, time)

    def _chosen(
        self, node: fx.Node, condition: Any, a: Any, b: Any, places: Places, where: Tensor, time: int
    ) -> list[Case]:
        """A choice under a mask that is known for each cell; under another one it is computed."""
        cases = []
        for case in self._operand(condition, places, where, time):
            if not isinstance(case.value, Number):
                return [Case(where, Element(node, places))] if not _is_write(node) else _refused("a mask of data")
            cases += _rounded(
                self._operand(a if case.value.number else b, places, case.where, time), _dtype(node), widen_only=True
            )
        return cases

    def _computed(self, node: fx.Node, places: Places, where: Tensor, time: int) -> list[Case]:
        """Arithmetic on scores; what no product goes into is an element of the result."""
        args = bound(node)
        sides = [self._operand(args[name], places, where, time) for name in ("self", "other")]
        has_score = any(has_product(case.value) for side in sides for case in side)
        numbers = all(isinstance(case.value, Number) for side in sides for case in side)
        if not has_score and not numbers:
            return (
                [Case(where, Element(node, places))] if not _is_write(node) else _refused("arithmetic on data in place")
            )
        cases = []
        for one, other in itertools.product(*sides):
            both = one.where & other.where
            if both.any():
                values = tuple(
                    x.value if is_tensor(y) else None for x, y in ((one, args["self"]), (other, args["other"]))
                )
                cases.append(Case(both, _folded(node, one.value, other.value, values)))
        return cases

    def _product(self, node: fx.Node, places: Places, where: Tensor, time: int) -> list[Case] | None:
        """The factor that a product over one term multiplies by one."""
        found = contraction(node)
        assert found is not None
        known = dict(zip(found.out_labels, places, strict=True))
        depth = shape(found.lhs)[found.lhs_labels.index(found.summed)]
        plain = found.alpha == 1 and (found.added is None or found.beta == 0)
        if depth != 1 or not plain or any(_dtype(x) != _dtype(node) for x, _ in found.sides()):
            return None
        sides = [
            _merged(self._at(x, tuple(known.get(label, ZERO) for label in labels), where, time))
            for x, labels in found.sides()
        ]
        for one, other in (sides, sides[::-1]):
            if [case.value for case in one] == [Number(1.0)]:
                return other
        return None

    def _joined(self, node: fx.Node, places: Places, where: Tensor, time: int) -> list[Case]:
        args = bound(node)
        dim = args["dim"] % len(places)
        start, cases = 0, []
        for part in args["tensors"]:
            size = _sizes(part)[dim]
            moved = places[dim].moved(1, -start)
            inside = where & self._within(moved, size, where)
            start += size
            if inside.any():
                found = self._at(part, (*places[:dim], moved, *places[dim + 1 :]), inside, time)
                cases += _rounded(found, _dtype(node), widen_only=True)
        return cases

    def _padded(self, node: fx.Node, source: fx.Node, places: Places, where: Tensor, time: int) -> list[Case]:
        args = bound(node)
        if args.get("mode", "constant") != "constant" or not all(isinstance(x, int) for x in args["pad"]):
            raise Unproven("padding with data")
        own, outside = list(places), FALSE
        for at, before in enumerate(args["pad"][::2]):
            dim = len(own) - 1 - at
            own[dim] = own[dim].moved(1, -before)
            outside = outside | ~self._within(own[dim], _sizes(source)[dim], where)
        cases = [Case(where & outside, _number(args["value"] or 0, _dtype(node)))] if (where & outside).any() else []
        inside = where & ~outside
        return cases + (self._at(source, tuple(own), inside, time) if inside.any() else [])

    def _triangle(self, node: fx.Node, source: fx.Node, places: Places, where: Tensor, time: int) -> list[Case]:
        row, column = places[-2:]
        edge = bound(node)["diagonal"]
        if row.steps or column.steps or not isinstance(edge, int):
            return [Case(where, Element(node, places))]
        distance = column.table - row.table
        kept = where & (distance <= edge if packet(node) == "tril" else distance >= edge)
        cases = self._at(source, places, kept, time) if kept.any() else []
        return [*cases, Case(where & ~kept, _number(0, _dtype(node)))]

    def _through(self, view: fx.Node, places: Places, where: Tensor) -> Places:
        """The places in its source of the elements that a view shows."""
        source, name = view.args[0], packet(view)
        assert isinstance(source, fx.Node)
        sizes, args = _sizes(source), bound(view)
        if name in _RESHAPES:
            return self._regrouped(places, _sizes(view), sizes, where)
        if name in PERMUTATIONS:
            order = permutation(view)
            return tuple(places[order.index(dim)] for dim in range(len(order)))
        if name in _EXPANSIONS:
            return tuple(
                ZERO if size == 1 else place
                for size, place in zip(sizes, places[len(places) - len(sizes) :], strict=True)
            )
        if name in _CUTS:
            dim, first, step = _cut(view)
            if name == "select":
                return (*places[:dim], ZERO.moved(1, first), *places[dim:])
            return (*places[:dim], places[dim].moved(step, first), *places[dim + 1 :])
        if name == "flip":
            flipped = [dim % len(sizes) for dim in args["dims"]]
            return tuple(p.moved(-1, sizes[at] - 1) if at in flipped else p for at, p in enumerate(places))
        if name == "unfold":
            dim = args["dimension"] % len(sizes)
            window = places[dim].moved(args["step"], 0) + places[-1]
            return (*places[:dim], window, *places[dim + 1 : -1])
        if name == "as_strided":
            return self._strided(places, args, source, where)
        raise Unproven(name)

    def _strided(self, places: Places, args: Mapping[str, Any], source: fx.Node, where: Tensor) -> Places:
        """The elements of a dense tensor that stand at offsets in its storage."""
        held = fake(source)
        sizes = _sizes(source)
        order = sorted((dim for dim in range(len(sizes)) if sizes[dim] != 1), key=lambda dim: -held.stride()[dim])
        inner = 1
        for dim in reversed(order):
            if held.stride(dim) != inner:
                raise Unproven("as_strided of a tensor that is not dense")
            inner *= sizes[dim]
        offset = args["storage_offset"]
        if held.storage_offset() != 0 or offset not in (None, 0) or not _are_ints(args["size"], args["stride"]):
            raise Unproven("as_strided that starts elsewhere")
        rest = ZERO
        for place, stride in zip(places, args["stride"], strict=True):
            rest = rest + place.moved(stride, 0)
        if not self._fits(rest, inner, where):
            raise Unproven("as_strided beyond the tensor")
        out = [ZERO] * len(sizes)
        for dim in order:
            out[dim], rest = self._divided(rest, int(held.stride(dim)), where)
        return tuple(out)

    def _shown(self, view: fx.Node, places: Places, where: Tensor) -> tuple[Places, Tensor]:
        """The places in a view of elements of its source, and where it shows them."""
        source, name = view.args[0], packet(view)
        assert isinstance(source, fx.Node)
        if name in PERMUTATIONS:
            return tuple(places[dim] for dim in permutation(view)), TRUE
        if name in _CUTS:
            dim, first, step = _cut(view)
            if step != 1:
                raise Unproven("a write in steps")
            moved = places[dim].moved(1, -first)
            if name == "select":
                return (*places[:dim], *places[dim + 1 :]), self._within(moved, 1, where)
            return (*places[:dim], moved, *places[dim + 1 :]), self._within(moved, _sizes(view)[dim], where)
        return self._regrouped(places, _sizes(source), _sizes(view), where), TRUE

    def _regrouped(self, places: Places, before: Sequence[int], after: Sequence[int], where: Tensor) -> Places:
        """Places of the same elements under another shape; dimensions that stay are not touched."""
        out: list[Place] = []
        i = j = 0
        while i < len(before) or j < len(after):
            if i < len(before) and before[i] == 1:
                i += 1
                continue
            if j < len(after) and after[j] == 1:
                out.append(ZERO)
                j += 1
                continue
            if i == len(before) or j == len(after):
                raise Unproven("a view of other elements")
            first, start = i, j
            one, other = before[i], after[j]
            i, j = i + 1, j + 1
            while one != other:
                if one < other:
                    one, i = one * before[i], i + 1
                else:
                    other, j = other * after[j], j + 1
            rest = places[first]
            for at in range(first + 1, i):
                rest = rest.moved(before[at], 0) + places[at]
            for at in range(start, j - 1):
                digit, rest = self._divided(rest, math.prod(after[at + 1 : j]), where)
                out.append(digit)
            out.append(rest)
        return tuple(out)

    def _divided(self, place: Place, by: int, where: Tensor) -> tuple[Place, Place]:
        """Quotient and remainder."""
        high = tuple((name, step // by) for name, step in place.steps if step % by == 0)
        low = tuple((name, step) for name, step in place.steps if step % by)
        quotient = torch.div(place.table, by, rounding_mode="floor")
        rest = Place(place.table - quotient * by, low)
        if low and not self._fits(rest, by, where):
            for name, step in low:
                part = by // step if step > 0 and by % step == 0 else 0
                if part > 1 and self.extents[name] % part == 0 and part < self.extents[name]:
                    raise SplitError(name, part)
            raise Unproven("digits that depend on each other")
        return Place(quotient, high), rest

    def _range(self, place: Place) -> tuple[Tensor, Tensor]:
        """The least and the greatest value that a place may have in each cell."""
        reach = [step * (self.extents[name] - 1) for name, step in place.steps]
        return place.table + sum(x for x in reach if x < 0), place.table + sum(x for x in reach if x > 0)

    def _fits(self, place: Place, size: int, where: Tensor) -> bool:
        """Whether a place lies in [0, size) in all cells."""
        least, most = self._range(place)
        if bool(least.min() >= 0) and bool(most.max() < size):
            return True
        return bool(((least >= 0) & (most < size) | ~where).all())

    def _within(self, place: Place, size: int, where: Tensor) -> Tensor:
        """Where a place lies in [0, size), whatever the variables are."""
        least, most = self._range(place)
        sure = (least >= 0) & (most < size)
        never = (most < 0) | (least >= size)
        if place.steps and bool((~sure & ~never & where).any()):
            raise Unproven("an edge that other dimensions move")
        return sure


def _joined_value(a: Value, b: Value, in_b: Tensor) -> Value | None:
    if isinstance(a, Element) and isinstance(b, Element) and a.node is b.node:
        if any(x.steps != y.steps for x, y in zip(a.places, b.places, strict=True)):
            return None
        tables = (torch.where(in_b, y.table, x.table) for x, y in zip(a.places, b.places, strict=True))
        return Element(a.node, tuple(Place(t, p.steps) for t, p in zip(tables, a.places, strict=True)))
    if isinstance(a, Arithmetic) and isinstance(b, Arithmetic) and a.node is b.node:
        values = []
        for x, y in zip(a.values, b.values, strict=True):
            joined = _joined_value(x, y, in_b) if x is not None and y is not None else None
            if joined is None and x is not None:
                return None
            values.append(joined)
        return Arithmetic(a.node, tuple(values))
    same = isinstance(a, Number) and isinstance(b, Number) and a.number == b.number
    return a if same else None


def _merged(cases: Sequence[Case]) -> list[Case]:
    out: list[Case] = []
    for case in cases:
        if not case.where.any():
            continue
        for at, other in enumerate(out):
            value = _joined_value(other.value, case.value, case.where)
            if value is not None:
                out[at] = Case(other.where | case.where, value)
                break
        else:
            out.append(case)
    return out


def has_product(value: Value) -> bool:
    """Whether a product of two tensors goes into a value."""
    if isinstance(value, Arithmetic):
        return any(x is not None and has_product(x) for x in value.values)
    return isinstance(value, Element) and contraction(value.node) is not None


def _folded(node: fx.Node, a: Value, b: Value, values: tuple[Value | None, ...]) -> Value:
    args = bound(node)
    if args.get("rounding_mode") is not None:
        raise Unproven("a rounded quotient")
    if isinstance(a, Number) and isinstance(b, Number):
        work: Callable[..., Tensor] = getattr(torch, packet(node).rstrip("_"))
        extra = {"alpha": args["alpha"]} if args.get("alpha", 1) != 1 else {}
        dtype = _dtype(node)
        # a number that is no tensor is not rounded to the type of the other
        both = (
            x.number if of is None else torch.tensor(x.number, dtype=dtype, device="cpu")
            for x, of in zip((a, b), values, strict=True)
        )
        number = work(*both, **extra).item()
        return Number(number)
    return Arithmetic(node, values)


def _rounded(cases: list[Case], dtype: torch.dtype, *, widen_only: bool = False) -> list[Case]:
    """Numbers in another type; data that would be rounded is refused."""
    out = []
    for case in cases:
        if isinstance(case.value, Number):
            out.append(Case(case.where, _number(case.value.number, dtype)))
        elif widen_only and _dtype(case.value.node) == dtype:
            out.append(case)
        else:
            raise Unproven(f"data that is copied as {dtype}")
    return out


def _number(number: float | int | bool, dtype: torch.dtype) -> Number:
    return Number(torch.tensor(number, dtype=torch.float64, device="cpu").to(dtype).item())


def _is_write(node: fx.Node) -> bool:
    return bool(node.target._schema.is_mutable)  # type: ignore[union-attr]


def _refused(why: str) -> list[Case]:
    raise Unproven(why)


def _cut(view: fx.Node) -> tuple[int, int, int]:
    """The dimension that a slice or a selection cuts, the first element that is left of it, and the step."""
    args, source = bound(view), view.args[0]
    assert isinstance(source, fx.Node)
    sizes = _sizes(source)
    dim = args["dim"] % len(sizes)
    first = args["index"] if packet(view) == "select" else args["start"]
    first, step = 0 if first is None else first, args.get("step") or 1
    if not isinstance(first, int) or not isinstance(step, int):
        raise Unproven("a symbolic slice")
    return dim, max(0, first + sizes[dim]) if first < 0 else first, step


def _are_ints(*lists: Sequence[Any]) -> bool:
    return all(isinstance(x, int) for given in lists for x in given)


def _sizes(node: fx.Node) -> tuple[int, ...]:
    sizes = tuple(fake(node).shape)
    if not _are_ints(sizes) or 0 in sizes:
        raise Unproven("a size that is not known")
    return tuple(int(size) for size in sizes)


def _dtype(node: fx.Node) -> torch.dtype:
    return fake(node).dtype
