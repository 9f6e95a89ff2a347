"""Banded attention that is computed in other coordinates than queries and keys, written as queries against keys.

Sliding windows are often computed in overlapping chunks: products of chunks, whose diagonals are then moved into columns, so that
the softmax runs over offsets and not over keys; the weights are moved back before the product with chunks of the values. With
`n(m, j)` for the key at offset j of query m that is

    softmax_j(q[m]·k[n(m, j)] + ...)  then  Σ_j w[m, j]·v[n(m, j)]
    softmax_n(q[m]·k[n] + ..., -inf outside of the band)  then  w @ v

which is proven for every cell (`origin`): each offset is the product of a row of q and a row of k or -inf, no key stands at two
offsets of a query, and its weight, once, meets the same key's value.  The second form is what recognition reads.

A softmax that is not fused in the end stays as it was; `RESPELLED` and `JOINED` tell which ones were rewritten.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx

from attnfuse.passes.contraction import Contraction, contraction
from attnfuse.passes.graph import MODE_SWITCHES, Storage, aten, bound, fake, is_tensor, mark_no_grad, packet, shape
from attnfuse.passes.join import JOINED, Maker
from attnfuse.passes.origin import (
    MOST_CELLS,
    ZERO,
    Arithmetic,
    Element,
    Number,
    Origins,
    Place,
    SplitError,
    Unproven,
    Value,
    has_product,
)
from attnfuse.passes.peel import score_input
from attnfuse.passes.respell import RESPELLED
from attnfuse.passes.views import cuts_gradient

_WINDOWS: Final = ("as_strided", "unfold")
_DEEPEST: Final = 12
_DEPTH, _QUERY, _KEY = "depth", "query", "key"


def unband(graph: fx.Graph, leave: Container[str] = ()) -> int:
    """Rewrites each banded attention, but for those named in `leave`; returns how many there were."""
    if not any(packet(node) in _WINDOWS for node in graph.nodes):
        return 0
    mark_no_grad(graph)
    count = 0
    for node in list(graph.nodes):
        if packet(node) not in ("softmax", "_softmax") or node.name in leave:
            continue
        storage = Storage(graph)
        product = _product_below(node, storage)
        if product is None or not any(map(_reads_windows, product.all_input_nodes)):
            continue
        try:
            _Band(graph, storage, node, product).write()
        except Unproven:
            continue
        count += 1
    return count


def _product_below(softmax: fx.Node, storage: Storage) -> fx.Node | None:
    """The product that the weights go into, and nothing else reads on the way."""
    node = softmax
    for _ in range(2 * _DEEPEST):
        users = list(node.users)
        if len(users) != 1 or not is_tensor(users[0]) or storage.writes(node):
            return None
        node = users[0]
        if contraction(node) is not None:
            return node
    return None


def _reads_windows(node: fx.Node) -> bool:
    for _ in range(_DEEPEST):
        if packet(node) in _WINDOWS:
            return True
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or contraction(node) is not None:
            return False
        node = source
    return False


@dataclass
class _Below:
    """From the weights to the product with the values, over the product's rows and summed terms.

    Attributes:
        extents: the sizes of the variables, which are digits of dimensions of the output.
        labels: for each label of the output that is no row, its variables, most significant first.
        dims: which dimension of the weights each variable is.
        queries: the dimension of the weights that is the output's rows.
        steps: the casts and the dropout that the weights go through.
        emptied: rows that are set to zero: masks, with their places in the weights' coordinates.
        value: the other factor, of the cells in `with_value`; offset, row: where in the weights a cell is, if it is in `read`.
    """

    extents: dict[str, int]
    labels: dict[str, tuple[str, ...]]
    value: Element
    offset: Tensor
    row: Tensor
    read: Tensor
    with_value: Tensor
    depth: str = ""
    dims: dict[str, int] = field(default_factory=dict)
    queries: int = -1
    steps: list[fx.Node] = field(default_factory=list)
    emptied: list[Element] = field(default_factory=list)


class _Band:
    """One attention, from its softmax to the product with the values."""

    def __init__(self, graph: fx.Graph, storage: Storage, softmax: fx.Node, product: fx.Node) -> None:
        self.graph, self.storage, self.softmax, self.product = graph, storage, softmax, product
        self.scores, self.dim = score_input(softmax)
        self.sizes = [x for x in shape(self.scores) if isinstance(x, int)]
        if len(self.sizes) != len(shape(self.scores)) or len(self.sizes) < 2:
            raise Unproven("sizes that are not known")
        self.found = self._plain(product)

    def _plain(self, product: fx.Node) -> Contraction:
        found = contraction(product)
        assert found is not None
        if found.alpha != 1 or (found.added is not None and found.beta != 0):
            raise Unproven("a product that is scaled or added to something")
        return found

    def write(self) -> None:
        """Proves the form and puts the other one in its place."""
        below = self._below()
        self.names = {dim: f"x{dim}" for dim in range(len(self.sizes)) if dim not in (self.dim, below.queries)}
        self.extents = {name: self.sizes[dim] for dim, name in self.names.items()}
        self.rows = self.sizes[below.queries]
        self.row = torch.arange(self.rows, device="cpu")[:, None]
        tree = self._scores(below.queries)
        products = list(_products(tree))
        if len(products) != 1:
            raise Unproven("scores that more than one product goes into")
        found = self._plain(products[0].node)
        origins = Origins(self.storage, self.extents)
        q, k = self._operands(origins, found, products[0])
        band = self._distances()
        self._check_values(below)
        unread = self._unread()
        leaves = [x.node for x in _elements(tree) if x.node is not found.node]
        masks = [mask.node for mask in self.emptied]
        self._check_place(found.node, unread, [q.node, k.node, self.v.node, *leaves, *masks])
        last = self.product.prev
        try:
            with self.graph.inserting_before(self.product):
                out = self._emit(below, tree, q, k, band, found)
        except Unproven:
            while self.product.prev is not last:
                self.graph.erase_node(self.product.prev)
            raise
        unread = self._unread()
        self.product.replace_all_uses_with(out)
        for node in reversed(list(self.graph.nodes)):
            if node in unread:
                self.graph.erase_node(node)

    def _scores(self, queries: int) -> Value:
        """What the softmax reads in the cells of the band, whose places go into `seen`; elsewhere it is -inf."""
        cells = self.rows, self.sizes[self.dim]
        _bounded(math.prod(cells))
        places = [
            Place(ZERO.table, ((self.names[dim], 1),)) if dim in self.names else ZERO for dim in range(len(self.sizes))
        ]
        places[queries], places[self.dim] = Place(self.row), Place(torch.arange(cells[1], device="cpu"))
        everywhere = torch.ones(cells, dtype=torch.bool, device="cpu")
        origins = Origins(self.storage, self.extents)
        cases = origins.at(self.scores, tuple(places), everywhere, self.storage.position[self.softmax])
        kept = [case for case in cases if case.value != Number(-math.inf)]
        if len(kept) != 1 or not has_product(kept[0].value):
            raise Unproven("scores that are not all one product")
        self.seen = kept[0].where.expand_as(everywhere)
        return kept[0].value

    # Below the softmax

    def _below(self) -> _Below:
        """The first reading of the product's output, by which dimensions are tables, that can be followed."""
        sides = self.found.sides()
        weights, values = sorted(sides, key=lambda side: not self._is_below(side[0]))
        own = [label for label in weights[1] if label and label not in values[1]]
        depth = [label for label in values[1] if label and label not in weights[1]]
        shared = [label for label in weights[1] if label and label in values[1] and label != self.found.summed]
        if len(depth) != 1:
            raise Unproven("values with other dimensions than a depth")
        sizes = dict(zip(self.found.out_labels, shape(self.product), strict=True))
        terms = shape(weights[0])[weights[1].index(self.found.summed)]
        if not all(isinstance(size, int) for size in (*sizes.values(), terms)):
            raise Unproven("sizes that are not known")
        choices = [x for count in range(len(shared) + 1) for x in itertools.combinations(shared, count)]
        choices.sort(key=lambda x: math.prod(sizes[label] for label in x))
        for chosen in choices:
            rows = [label for label in self.found.out_labels if label in own or label in chosen]
            variables = {label: ((f"{label}:", sizes[label]),) for label in sizes if label not in rows}
            try:
                return self._read(weights, values, rows, variables, depth[0], {**sizes, self.found.summed: terms})  # type: ignore[arg-type]
            except Unproven:
                continue
        raise Unproven("weights that are not moved to the values' coordinates")

    def _is_below(self, node: fx.Node) -> bool:
        while node is not self.softmax:
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or contraction(node) is not None:
                return False
            node = source
        return True

    def _read(
        self,
        weights: tuple[fx.Node, tuple[str, ...]],
        values: tuple[fx.Node, tuple[str, ...]],
        rows: Sequence[str],
        variables: dict[str, tuple[tuple[str, int], ...]],
        depth: str,
        sizes: dict[str, int],
    ) -> _Below:
        tabled = (*rows, self.found.summed)
        _bounded(math.prod(sizes[label] for label in tabled))
        places = {
            label: Place(torch.arange(sizes[label], device="cpu").view(-1, *[1] * (len(tabled) - 1 - at)))
            for at, label in enumerate(tabled)
        }
        for label, digits in variables.items():
            place = ZERO
            for name, size in digits:
                place = place.moved(size, 0) + Place(ZERO.table, ((name, 1),))
            places[label] = place
        extents = {name: size for digits in variables.values() for name, size in digits}
        origins = Origins(self.storage, extents)
        everywhere = torch.ones([sizes[label] for label in tabled], dtype=torch.bool, device="cpu")
        now = self.storage.position[self.product]
        try:
            own = tuple(places.get(label, ZERO) for label in weights[1])
            below, at, read = self._climb(origins, weights[0], own, everywhere)
            their = tuple(places.get(label, ZERO) for label in values[1])
            cases = origins.at(values[0], their, read, now)
        except SplitError as split:
            split_up = {
                label: tuple(
                    digit
                    for name, size in digits
                    for digit in (
                        ((f"{name}^", size // split.low), (f"{name}_", split.low))
                        if name == split.name
                        else ((name, size),)
                    )
                )
                for label, digits in variables.items()
            }
            return self._read(weights, values, rows, split_up, depth, sizes)
        given = [case for case in cases if isinstance(case.value, Element)]
        if len(given) != 1 or not all(
            isinstance(x.value, Number) and math.isfinite(x.value.number) for x in cases if x not in given
        ):
            raise Unproven("values of more than one tensor")
        assert isinstance(given[0].value, Element)
        below.value = given[0].value
        below.read, below.depth = read, f"{depth}:"
        below.labels = {label: tuple(name for name, _ in digits) for label, digits in variables.items()}
        self._name(below, at, read, everywhere.shape, depth)
        below.with_value = given[0].where.expand_as(everywhere)
        return below

    def _climb(
        self, origins: Origins, node: fx.Node, places: tuple[Place, ...], where: Tensor
    ) -> tuple[_Below, tuple[Place, ...], Tensor]:
        """From the product's operand up to the softmax: the places there of the weights that are read, and where they are."""
        below = _Below(origins.extents, {}, Element(node, ()), ZERO.table, ZERO.table, where, where)
        now = self.storage.position[self.product]
        while True:
            cases = origins.at(node, places, where, now)
            kept = [case for case in cases if case.value != Number(0.0)]
            if len(kept) != 1 or not isinstance(kept[0].value, Element):
                raise Unproven("weights beside which something else stands")
            where, node, places = kept[0].where.expand_as(where), kept[0].value.node, kept[0].value.places
            if node is self.softmax:
                return below, places, where
            args, name = bound(node) if packet(node) else {}, packet(node)
            if (name in ("to", "_to_copy") and fake(node).dtype.is_floating_point) or (
                name == "dropout" and isinstance(args["p"], float | int)
            ):
                below.steps.insert(0, node)
            elif name == "masked_fill" and args["value"] == 0 and is_tensor(args["mask"]):
                mask = args["mask"]
                tail = places[len(places) - len(shape(mask)) :]
                own = tuple(ZERO if size == 1 else x for size, x in zip(shape(mask), tail, strict=True))
                found = origins.at(mask, own, where, self.storage.position[node])
                if len(found) != 1 or not isinstance(found[0].value, Element):
                    raise Unproven("weights that are set to zero under more than one mask")
                below.emptied.append(found[0].value)
            else:
                raise Unproven(f"{name} of the weights")
            source = node.args[0]
            if not isinstance(source, fx.Node) or shape(source) != shape(node):
                raise Unproven("weights that are expanded")
            # what is read is read by this step, and not by the product
            node, now = source, self.storage.position[node]

    def _name(self, below: _Below, at: tuple[Place, ...], read: Tensor, cells: Sequence[int], depth: str) -> None:
        """Which dimension of the weights is what in the product."""
        rows = math.prod(cells[:-1])
        for dim, place in enumerate(at):
            if dim == self.dim:
                if place.steps:
                    raise Unproven("offsets that other dimensions move")
                below.offset = place.table
            elif len(place.steps) == 1 and place.steps[0][1] == 1 and _agree(place.table, ZERO.table, read):
                below.dims[place.steps[0][0]] = dim
            elif not place.steps and self.sizes[dim] == rows and below.queries < 0:
                below.queries, below.row = dim, place.table
            elif self.sizes[dim] != 1 or place.steps:
                raise Unproven("a dimension of the weights that is neither rows nor in the output")
        variables = {name for label, names in below.labels.items() if label != depth for name in names}
        used = {name for name in variables if below.extents[name] != 1}
        whole = all(self.sizes[dim] == below.extents[name] for name, dim in below.dims.items())
        expected = torch.arange(rows, device="cpu").view(*cells[:-1], 1)
        in_order = below.queries >= 0 and _agree(below.row, expected, read)
        if (
            set(below.dims) & used != used
            or len(set(below.dims.values())) != len(below.dims)
            or not whole
            or not in_order
        ):
            raise Unproven("rows of the output that are not the weights'")

    def _check_values(self, below: _Below) -> None:
        """That each weight meets, once, the value of its key."""
        pair = (below.row * self.sizes[self.dim] + below.offset).expand_as(below.read)
        pair = pair.clamp(0, self.seen.numel() - 1)
        active = below.read & self.seen.reshape(-1)[pair]
        chosen = pair[active]
        if chosen.numel() != int(self.seen.sum()) or bool((torch.bincount(chosen) > 1).any()):
            raise Unproven("weights that are read more than once, or not at all")
        if not bool((below.with_value | ~active).all()):
            raise Unproven("a key without a value")
        laid = _laid(below.value, below.extents, active)
        keys = [digit for digit in laid.digits() if digit.table is not None]
        if len(keys) != 1 or keys[0].size != self.keys:
            raise Unproven("values of other keys")
        assert keys[0].table is not None
        if not torch.equal(keys[0].table.expand_as(active)[active], self.key.reshape(-1)[chosen]):
            raise Unproven("values of other keys")
        names = {name: f"x{dim}" for name, dim in below.dims.items()}
        self.v = laid.named(lambda digit: _KEY if digit.table is not None else names.get(digit.name, digit.name))
        self.emptied = []
        for mask in below.emptied:
            form = _laid(mask, below.extents, below.read)
            rows = [digit for digit in form.digits() if digit.table is not None]
            if any(d.size != self.rows or not _agree(d.table, below.row, below.read) for d in rows):
                raise Unproven("weights that are set to zero one by one")
            self.emptied.append(
                form.named(lambda digit: _QUERY if digit.table is not None else names.get(digit.name, digit.name))
            )

    # Above the softmax

    def _operands(self, origins: Origins, found: Contraction, score: Element) -> tuple[_Laid, _Laid]:
        """The rows of q and of k."""
        known = dict(zip(found.out_labels, score.places, strict=True))
        depth = shape(found.lhs)[found.lhs_labels.index(found.summed)]
        if not isinstance(depth, int):
            raise Unproven("sizes that are not known")
        origins.extents[_DEPTH] = depth
        known[found.summed] = Place(ZERO.table, ((_DEPTH, 1),))
        rows = []
        for node, labels in found.sides():
            places = tuple(known.get(label, ZERO) for label in labels)
            cases = origins.at(node, places, self.seen, self.storage.position[found.node])
            if len(cases) != 1 or not isinstance(cases[0].value, Element):
                raise Unproven("rows of more than one tensor")
            rows.append(_laid(cases[0].value, origins.extents, self.seen))
        tables = [[digit for digit in x.digits() if digit.table is not None] for x in rows]
        if any(len(x) != 1 for x in tables):
            raise Unproven("rows over several dimensions")
        for (q, k), (row, key) in ((rows, [x[0] for x in tables]), (rows[::-1], [x[0] for x in tables[::-1]])):
            if row.size == self.rows and _agree(row.table, self.row, self.seen):
                assert key.table is not None
                self.key, self.keys = key.table.expand_as(self.seen), key.size
                return (
                    q.named(lambda digit: _QUERY if digit.table is not None else digit.name),
                    k.named(lambda digit: _KEY if digit.table is not None else digit.name),
                )
        raise Unproven("queries that are not the rows")

    def _distances(self) -> tuple[int, int]:
        """The least and the greatest distance n - m; each row sees exactly the keys between them, each once."""
        distance = self.key - self.row
        lo, hi = int(distance[self.seen].min()), int(distance[self.seen].max())
        first = (self.row + lo).clamp(min=0)
        last = (self.row + hi).clamp(max=self.keys - 1)
        counted = self.seen.sum(1)
        if not torch.equal(counted, (last - first + 1)[:, 0]) or bool((counted == 0).any()):
            raise Unproven("no band")
        ordered = torch.where(self.seen, self.key, -1 - torch.arange(self.key.shape[1], device="cpu")).sort(1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise Unproven("a key at two offsets of one query")
        return lo, hi

    # The other form

    def _unread(self) -> set[fx.Node]:
        """What nothing reads once the product is replaced."""
        above: set[fx.Node] = set()
        by_place = {at: node for node, at in self.storage.position.items()}
        todo = [self.product]

        def read_by(node: fx.Node) -> list[fx.Node]:
            known = is_tensor(node) and node in self.storage.position
            writes = [by_place[at] for at in self.storage.writes(node)] if known else []
            return [*node.all_input_nodes, *writes]

        while todo:
            node = todo.pop()
            if node not in above and node.op == "call_function":
                above.add(node)
                todo += read_by(node)
        kept = [node for node in above if not packet(node) or self._has_effect(node)]
        live: set[fx.Node] = set()
        todo = [node for node in self.graph.nodes if node not in above] + kept
        while todo:
            node = todo.pop()
            if node in live or node is self.product:
                continue
            live.add(node)
            todo += read_by(node)
        return above - live

    def _has_effect(self, node: fx.Node) -> bool:
        """Whether a node writes to what may be seen outside of the graph."""
        if not node.target._schema.is_mutable:  # type: ignore[union-attr]
            return False
        return self.storage.entangled(node) or self.storage.root(node).op != "call_function"

    def _check_place(self, score: fx.Node, unread: set[fx.Node], read: Sequence[fx.Node]) -> None:
        """That the new operators may stand where the product with the values does."""
        if not {score, self.softmax} <= unread:
            raise Unproven("scores or weights that something else reads")
        first, last = self.storage.position[score], self.storage.position[self.product]
        for node, at in self.storage.position.items():
            if first < at < last and getattr(node.target, "__name__", "") in MODE_SWITCHES:
                raise Unproven("a switch of modes")
        floats = [x for x in unread if is_tensor(x) and fake(x).dtype.is_floating_point]
        if any(cuts_gradient(x) != cuts_gradient(self.product) for x in floats):
            raise Unproven("a gradient that ends on the way")
        if any(self.storage.writes(x) for x in (*read, self.product)):
            raise Unproven("operands that are written to")

    def _emit(
        self, below: _Below, tree: Value, q: _Laid, k: _Laid, band: tuple[int, int], found: Contraction
    ) -> fx.Node:
        """The nodes of the other form; returns its output, in the old one's shape."""
        make = Maker(self.graph, self.product)
        outer = [self.names[dim] for dim in self.names]
        score_type, out_type = fake(found.node).dtype, fake(self.product).dtype
        rows = _cast(make, q.written(make, (*outer, _QUERY, _DEPTH)), score_type)
        keys = _cast(make, k.written(make, (*outer, _DEPTH, _KEY)), score_type)
        if fake(rows).shape[-1] != fake(keys).shape[-2]:
            raise Unproven("a factor that is expanded over the depth")
        raw = make(aten.matmul.default, rows, keys)

        def written(value: Value | None) -> fx.Node:
            if isinstance(value, Element):
                return raw if value.node is found.node else self.leaf(value).written(make, (*outer, _QUERY, _KEY))
            assert isinstance(value, Arithmetic)
            args, name = bound(value.node), packet(value.node).rstrip("_")
            overload = getattr(getattr(aten, name), value.node.target._overloadname)  # type: ignore[union-attr]
            sides = [
                args[side] if one is None else written(one)
                for side, one in zip(("self", "other"), value.values, strict=True)
            ]
            extra = {"alpha": args["alpha"]} if args.get("alpha", 1) != 1 else {}
            node = make(overload, *sides, **extra)
            if fake(node).dtype != fake(value.node).dtype:
                raise Unproven("arithmetic in another type")
            return node

        scores = written(tree)
        outside = self._outside(make, *band)
        if outside is not None:
            scores = make(aten.masked_fill.Scalar, scores, outside, -math.inf)
        extra = {name: given for name, given in self.softmax.kwargs.items() if name != "dim"}
        weights = self.graph.create_node(
            "call_function", self.softmax.target, (scores, -1, *self.softmax.args[2:]), extra
        )
        with fake(self.softmax).fake_mode:  # type: ignore[attr-defined]
            value = torch.empty_like(fake(scores), dtype=fake(self.softmax).dtype)
        name = self.softmax.meta.get(RESPELLED, self.softmax.name)
        weights.meta = {**self.softmax.meta, "val": value, RESPELLED: name, JOINED: name}
        for step in below.steps:
            assert isinstance(step.target, torch._ops.OpOverload)
            weights = make(step.target, weights, *step.args[1:], **step.kwargs)
        values = _cast(make, self.v.written(make, (*outer, _KEY, below.depth)), out_type)
        out = make(aten.matmul.default, _cast(make, weights, out_type), values)
        for mask in self.emptied:
            out = make(aten.masked_fill.Scalar, out, mask.written(make, (*outer, _QUERY, _DEPTH)), 0.0)
        return self._placed(make, out, below, [*outer, _QUERY, below.depth])

    def _placed(self, make: Maker, out: fx.Node, below: _Below, dims: Sequence[str]) -> fx.Node:
        """The output with the dimensions of the original product."""
        names: list[str] = []
        for label in self.found.out_labels:
            if label not in below.labels:
                if _QUERY in names and names[-1] != _QUERY:
                    raise Unproven("rows that do not stand together")
                names += [_QUERY] if _QUERY not in names else []
            else:
                names += [
                    f"x{below.dims[x]}" if x in below.dims else x
                    for x in below.labels[label]
                    if x in below.dims or x == below.depth
                ]
        order = [*(at for at, name in enumerate(dims) if name not in names), *(dims.index(name) for name in names)]
        if order != sorted(order):
            out = make(aten.permute.default, out, order)
        if fake(out).numel() != fake(self.product).numel():
            raise Unproven("factors that are expanded over what no other varies with")
        out = make(aten.reshape.default, out, list(fake(self.product).shape))
        new, old = fake(out), fake(self.product)
        strides = zip(new.stride(), old.stride(), old.shape, strict=True)
        if any(a != b for a, b, size in strides if size != 1) or new.dtype != old.dtype:
            raise Unproven("an output that is laid out otherwise")
        return out

    def _outside(self, make: Maker, lo: int, hi: int) -> fx.Node | None:
        """Which keys a query does not see; None where it sees all."""
        device = fake(self.product).device
        rows = make(aten.unsqueeze.default, make(aten.arange.default, self.rows, device=device), -1)
        distance = make(aten.sub.Tensor, make(aten.arange.default, self.keys, device=device), rows)
        after, before = lo > 1 - self.rows, hi < self.keys - 1
        if after and before and lo == -hi:
            return make(aten.gt.Scalar, make(aten.abs.default, distance), hi)
        bounds = [make(aten.ge.Scalar, distance, lo)] if after else []
        bounds += [make(aten.le.Scalar, distance, hi)] if before else []
        if not bounds:
            return None
        inside = make(aten.logical_and.default, *bounds) if len(bounds) == 2 else bounds[0]
        return make(aten.logical_not.default, inside)

    def leaf(self, value: Element) -> _Laid:
        """A tensor that is added to the scores, over batch, heads, rows and keys."""
        form = _laid(value, self.extents, self.seen)

        def name(digit: _Digit) -> str:
            if digit.table is None:
                return digit.name
            if digit.size == self.keys and _agree(digit.table, self.key, self.seen):
                return _KEY
            if digit.size == self.rows and _agree(digit.table, self.row, self.seen):
                return _QUERY
            raise Unproven("a mask over other coordinates")

        return form.named(name)


@dataclass(frozen=True)
class _Digit:
    """One digit of a dimension: a variable, or what a table says."""

    name: str
    size: int
    table: Tensor | None = None


@dataclass(frozen=True)
class _Laid:
    """A tensor with the digits of each of its dimensions, most significant first."""

    node: fx.Node
    dims: tuple[tuple[_Digit, ...], ...]

    def digits(self) -> Iterator[_Digit]:
        return itertools.chain(*self.dims)

    def named(self, name: Callable[[_Digit], str]) -> _Laid:
        """With other names, and without tables."""
        dims = tuple(tuple(_Digit(name(digit), digit.size) for digit in dim) for dim in self.dims)
        names = [digit.name for dim in dims for digit in dim]
        if len(set(names)) != len(names):
            raise Unproven("a diagonal")
        return _Laid(self.node, dims)

    def written(self, make: Maker, order: Sequence[str]) -> fx.Node:
        """The tensor with one dimension for each name in `order`, of size 1 where it has no such digit."""
        node = self.node
        for dim in range(len(self.dims) - 1, -1, -1):
            digits = self.dims[dim]
            if not digits:
                node = make(aten.squeeze.dim, node, dim)
            elif len(digits) > 1:
                node = make(aten.unflatten.int, node, dim, [digit.size for digit in digits])
        names = [digit.name for digit in self.digits()]
        if not set(names) <= set(order):
            raise Unproven("a dimension that is not the attention's")
        places = [names.index(name) for name in order if name in names]
        if places != sorted(places):
            node = make(aten.permute.default, node, places)
        for at, name in enumerate(order):
            if name not in names:
                node = make(aten.unsqueeze.default, node, at)
        return node


def _laid(value: Element, extents: Mapping[str, int], where: Tensor) -> _Laid:
    dims = zip(value.places, shape(value.node), strict=True)
    return _Laid(value.node, tuple(_digits(place, size, extents, where) for place, size in dims))


def _digits(place: Place, size: Any, extents: Mapping[str, int], where: Tensor) -> tuple[_Digit, ...]:
    """A place as digits that make up all of a dimension."""
    if not isinstance(size, int):
        raise Unproven("sizes that are not known")
    steps = sorted((step, name) for name, step in place.steps if extents[name] != 1)
    table: Tensor | None = None if _agree(place.table, ZERO.table, where) else place.table
    out: list[_Digit] = []
    stride = 1
    while steps or table is not None:
        if steps and steps[0][0] == stride:
            name = steps.pop(0)[1]
            out.insert(0, _Digit(name, extents[name]))
        elif table is not None:
            whole = steps[0][0] if steps else size
            quotient = torch.div(table, stride, rounding_mode="floor")
            inside = (quotient >= 0) & (quotient < whole // stride)
            if whole % stride or not _agree(quotient * stride, table, where) or not bool((inside | ~where).all()):
                raise Unproven("a dimension that is read in part")
            out.insert(0, _Digit("", whole // stride, quotient))
            table = None
        else:
            raise Unproven("a dimension that is read in part")
        stride *= out[0].size
    if stride != size:
        raise Unproven("a dimension that is read in part")
    return tuple(out)


def _products(value: Value) -> Iterator[Element]:
    if isinstance(value, Arithmetic):
        for x in value.values:
            if x is not None:
                yield from _products(x)
    elif isinstance(value, Element) and contraction(value.node) is not None:
        yield value


def _elements(value: Value) -> Iterator[Element]:
    if isinstance(value, Arithmetic):
        for x in value.values:
            if x is not None:
                yield from _elements(x)
    elif isinstance(value, Element):
        yield value
    else:
        raise Unproven("a number beside scores")


def _agree(a: Tensor | None, b: Tensor, where: Tensor) -> bool:
    assert a is not None
    return bool(((a == b) | ~where).all())


def _cast(make: Maker, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if fake(node).dtype == dtype else make(aten.to.dtype, node, dtype)


def _bounded(cells: int) -> None:
    if cells > MOST_CELLS:
        raise Unproven(f"{cells} cells, at most {MOST_CELLS} are looked at")
