"""Putting the replacement in: a `Site` becomes `attnfuse::attention`, a plain scaled_dot_product_attention where that is
provably the same for all sizes and the better choice, or plain operators where it is small.

The new nodes stand right before the value matmul.  The output has the strides of the node that it replaces, unless the next
operation makes a contiguous copy anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp import autocast_mode
from torch.fx.experimental.proxy_tensor import make_fx

from attnfuse import ops
from attnfuse.passes.decide import Form
from attnfuse.passes.graph import aten, erase, fake, packet, shape
from attnfuse.passes.index import Digit, Index, Size, piece, same, sizes_of
from attnfuse.passes.lift import LeafSource, Scope, passed_by
from attnfuse.passes.peel import Miss
from attnfuse.passes.site import Layout, Operand, Site, layout
from attnfuse.passes.spell import Meaning, hint
from attnfuse.passes.views import PERMUTATIONS, cuts_gradient, permutation
from attnfuse.score import added_loads
from attnfuse.spec import AttentionSpec, parse_spec
from attnfuse.templates.inline import Inline, written_out
from attnfuse.templates.library import Call
from attnfuse.templates.tile_lists import has_no_ranges, mask_text, reads_leaves, worth_a_map
from attnfuse.templates.written_bias import WrittenBias, values

_AXES: Final = ("b", "h", "m", "e")


class Emitter:
    """Writes nodes before a given one, with fake values and the source position of the attention."""

    def __init__(self, site: Site, graph: fx.Graph | None = None) -> None:
        self.graph = site.scope.module.graph if graph is None else graph
        self.site = site
        mode = fake(site.out).fake_mode  # type: ignore[attr-defined]
        assert isinstance(mode, FakeTensorMode)
        self.mode = mode

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        values = fx.map_arg((args, kwargs), lambda x: x.meta["val"])
        with self.mode, torch.no_grad(), _no_autocast():
            value = target(*values[0], **values[1])
        # not before: a node without a value is left in no graph, should the operator refuse
        node = self.graph.create_node("call_function", target, args, kwargs)
        node.meta["val"] = value
        return self._attributed(node)

    def bare(self, target: Any, *args: Any) -> fx.Node:
        """A node without a value."""
        node = self.graph.create_node("call_function", target, args)
        node.meta["val"] = None
        return self._attributed(node)

    def copy(self, node: fx.Node, given: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """A node of another graph that was traced on the same fake tensors."""
        new = self.graph.node_copy(node, given.__getitem__)
        new.meta = {"val": node.meta["val"]}
        return self._attributed(new)

    def _attributed(self, node: fx.Node) -> fx.Node:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "custom", "seq_nr"):
            if key in self.site.out.meta:
                node.meta[key] = self.site.out.meta[key]
        return node


def _no_autocast() -> torch._C._DisableAutocast:
    return torch._C._DisableAutocast()


def insert(site: Site, what: Meaning, form: Form, check: Callable[[fx.Node, fx.Node], None] | None = None) -> None:
    """Writes the new nodes and makes the users of the old output, and of the old log-sum-exp, read the new one.

    Args:
        form: the scaled_dot_product_attention call, or plain operators, to emit instead of `attnfuse::attention`, or before it.
        check: is shown the old and the new while both stand; what it raises takes the new nodes out again.

    Raises:
        Miss: AF032 if the strides of the output cannot be kept, AF027 if the heads of k and v do not divide each other.
    """
    graph = site.scope.module.graph
    before = {id(n) for n in graph.nodes}
    with graph.inserting_before(site.place):
        emit = Emitter(site)
        try:
            pairs = _emit(emit, site, what, form)
            if check is not None:
                for old, new in pairs:
                    check(old, new)
        except Exception:
            # a new placeholder is an operand of the body's calls already; `prune_operands` takes it out again
            for node in reversed([n for n in graph.nodes if id(n) not in before and n.op != "placeholder"]):
                graph.erase_node(node)
            site.scope.written = {key: x for key, x in site.scope.written.items() if id(x[0]) in before}
            raise
    for old, new in pairs:
        new.meta = {**old.meta, "val": new.meta["val"]}
        old.replace_all_uses_with(new)
        site.scope.replaced[old] = new
    erase(graph, (*site.nodes, site.q.node, site.k.node, site.v.node, *_inputs(site)))


def _inputs(site: Site) -> Iterable[fx.Node]:
    for node in site.nodes:
        yield from node.all_input_nodes


def _emit(emit: Emitter, site: Site, what: Meaning, form: Form) -> list[tuple[fx.Node, fx.Node]]:
    """The old output and log-sum-exp, each with the node that takes its place."""
    q, k, v = (_arranged(emit, op, site, role) for op, role in ((site.q, "q"), (site.k, "k"), (site.v, "v")))
    k, v = _with_same_heads(emit, k, v, site)
    q, k, v = (_cast(emit, x, dtype) for x, dtype in ((q, site.dtype), (k, site.dtype), (v, fake(site.out).dtype)))
    if site.out.meta.get("attnfuse_no_grad") == "no_grad":
        # AOTAutograd would take it for the same attention with gradient
        q = emit(aten.detach.default, q)
    order = _out_order(site)
    # the backward reads the output: what the model writes to is a copy
    written = bool(site.scope.storage.writes(site.out))
    free = None if written else _is_made_contiguous(site.out)
    if isinstance(form, Inline):
        leaves = _leaves(emit, site, what)
        out = _written_out(emit, what.spec, [q, k, v, *leaves], rounded=site.rounded)
        placed = _like_original(emit, out, site, order, free)
    elif isinstance(form, Call):
        grouped = not same(shape(q)[1], shape(k)[1])
        out = emit(
            aten.scaled_dot_product_attention.default,
            q,
            k,
            v,
            None,
            site.dropout,
            form.is_causal,
            scale=form.scale,
            enable_gqa=grouped,
        )
        placed = _like_original(emit, out, site, order, free)
    else:
        leaves = _leaves(emit, site, what)
        sizes = [_number(expr, scope, node, site.scope) for expr, scope, node in what.sizes]
        seed = None
        if site.dropout:
            seed = emit(aten.randint.low, -(2**62), 2**62, [1], dtype=torch.int64, device=fake(q).device)
        if free:
            order = free
        tiles = _tile_map(emit, site, what, (q, k), leaves, sizes)
        spec = what.spec
        if form is not None:
            spec, leaves = form.spec, _with_bias_written_out(emit, what, form, leaves)
        given = q, k, v, leaves, sizes, tiles, seed, str(spec), list(order), ops.ABI
        pair = emit(torch.ops.attnfuse.attention.default, *given)
        out = emit(operator.getitem, pair, 0)
        placed = _placed(emit, out, site, site.out_index)
    if written:
        placed = emit(aten.clone.default, placed)
    if not free and not _same_strides(placed, site.out):
        raise Miss("AF032", site.out, f"strides {tuple(fake(site.out).stride())}")
    if fake(placed).dtype != fake(site.out).dtype or not all(map(same, shape(placed), shape(site.out))):
        raise AssertionError(f"the replacement is {fake(placed)}, the original {fake(site.out)}")
    pairs = [(site.out, placed)]
    if site.lse is not None:
        pairs.append((site.lse, _log_sum_exp(emit, emit(operator.getitem, pair, 1), site, site.lse)))
    return pairs


def _log_sum_exp(emit: Emitter, lse: fx.Node, site: Site, old: fx.Node) -> fx.Node:
    """The operator's [B, H, M] in the type and with the dimensions of the model's own."""
    dtype = fake(old).dtype
    if fake(lse).dtype != dtype:
        lse = emit(aten.to.dtype, lse, dtype)
        if all(tier.fill in ("+min", "=min") for tier in site.program.tiers) and site.program.tiers:
            # the least value of float32 is -inf in a narrower type
            lse = emit(aten.clamp_min.default, lse, torch.finfo(dtype).min)
    placed = _placed(emit, emit(aten.unsqueeze.default, lse, 3), site, site.lse_index)
    if not _same_strides(placed, old):
        raise Miss("AF032", old, f"strides {tuple(fake(old).stride())}")
    if cuts_gradient(old) and not cuts_gradient(site.out):
        placed = emit(aten.detach.default, placed)
    # the backward reads it: what the model writes to is a copy
    return emit(aten.clone.default, placed) if site.scope.storage.writes(old) else placed


def _like_original(
    emit: Emitter, out: fx.Node, site: Site, order: Sequence[int], free: tuple[int, ...] | None
) -> fx.Node:
    """[B, H, M, Dv] with the dimensions of the original output, copied where its strides could not be had otherwise."""
    placed = _placed(emit, out, site, site.out_index)
    if free or _same_strides(placed, site.out):
        return placed
    copied = _placed(emit, _stored(emit, out, order), site, site.out_index)
    erase(emit.graph, [placed])
    return copied


def _written_out(emit: Emitter, spec: AttentionSpec, operands: Sequence[fx.Node], *, rounded: bool) -> fx.Node:
    """The nodes of `inline.written_out`, in a region without autocast where there may be one that would round them."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *leaves: Tensor) -> Tensor:
        return written_out(spec, q, k, v, leaves, rounded=rounded)

    device = fake(operands[0]).device.type
    low = all(fake(x).dtype == torch.get_autocast_dtype(device) for x in operands[:3])
    # AOTAutograd caches no graph with such a region in it
    region = None
    if not (rounded and low) and _may_autocast(emit.site):
        region = emit.bare(autocast_mode._enter_autocast, device, None, False, None)
    result = _traced(emit, (str(spec), rounded), attention, operands)
    if region is not None:
        emit.bare(autocast_mode._exit_autocast, region)
    return result


def _with_bias_written_out(emit: Emitter, what: Meaning, form: WrittenBias, leaves: Sequence[fx.Node]) -> list[fx.Node]:
    """The leaves of `form.spec` from those of the spec as it was."""

    def bias(*leaves: Tensor) -> Tensor:
        return values(form, leaves, what.shape)

    written = _traced(emit, ("bias", str(form.of), what.shape), bias, leaves)
    named = dict(zip((leaf.name for leaf in form.of.leaves), leaves, strict=True))
    return [*(named[leaf.name] for leaf in form.spec.leaves[:-1]), written]


def _traced(emit: Emitter, key: Hashable, function: Callable[..., Tensor], operands: Sequence[fx.Node]) -> fx.Node:
    """The nodes of a function of tensors; one trace serves all layers that are alike, `key` says what else it was given."""
    tensors = [fake(node) for node in operands]
    places = tuple(next(at for at, x in enumerate(tensors) if x is value) for value in tensors)
    key = key, places, tuple(map(_described, tensors))
    traced = emit.site.scope.traced.get(key)
    if traced is None:
        with emit.mode, torch.no_grad(), _no_autocast():
            traced = make_fx(function, pre_dispatch=True)(*tensors)
        traced.graph.eliminate_dead_code()
        emit.site.scope.traced[key] = traced
    given = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    (out,) = traced.graph.output_node().args
    for node in traced.graph.nodes:
        if node.op == "call_function":
            given[node] = emit.copy(node, given)
        elif node.op not in ("placeholder", "output"):
            raise AssertionError(f"{node.format_node()} in the trace of {key}")
    result: fx.Node = given[out]
    return result


def _described(x: Tensor) -> tuple[object, ...]:
    """All of a tensor that decides what is traced on it."""
    numbers = sizes_of((*x.shape, *x.stride(), x.storage_offset()))
    return x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg(), numbers


def _may_autocast(site: Site) -> bool:
    """Whether autocast is on where the graph runs, or may be in a part of it."""
    scope: Scope | None = site.scope
    while scope is not None:
        if any(node.target is autocast_mode._enter_autocast for node in scope.module.graph.nodes):
            return True
        scope = scope.outer
    return torch.is_autocast_enabled(fake(site.out).device.type)


def _with_same_heads(emit: Emitter, k: fx.Node, v: fx.Node, site: Site) -> tuple[fx.Node, fx.Node]:
    """k and v with as many heads as the one of them that has more."""
    heads = [shape(k)[1], shape(v)[1]]
    if same(*heads):
        return k, v
    fewer, more = sorted(x for x in heads if isinstance(x, int)) if all(isinstance(x, int) for x in heads) else (0, 0)
    if not fewer or more % fewer:
        raise Miss("AF027", site.out, f"k has {heads[0]} heads and v has {heads[1]}")

    def repeated(x: fx.Node) -> fx.Node:
        if same(shape(x)[1], more):
            return x
        if fewer == 1:
            return emit(aten.expand.default, x, [-1, more, -1, -1])
        return emit(aten.repeat_interleave.self_int, x, more // fewer, 1)

    return repeated(k), repeated(v)


def _stored(emit: Emitter, out: fx.Node, order: Sequence[int]) -> fx.Node:
    """A copy of [B, H, M, Dv] with this memory order."""
    if list(order) == sorted(order):
        return emit(aten.clone.default, out, memory_format=torch.contiguous_format)
    moved = emit(aten.permute.default, out, list(order))
    copy = emit(aten.clone.default, moved, memory_format=torch.contiguous_format)
    return emit(aten.permute.default, copy, [order.index(dim) for dim in range(len(order))])


def _cast(emit: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if fake(node).dtype == dtype else emit(aten.to.dtype, node, dtype)


def _fx_sizes(sizes: Sequence[Size]) -> list[int]:
    """Sizes as arguments of a split: at most one of them is symbolic and is written as -1."""
    out = [size if isinstance(size, int) else -1 for size in sizes]
    if out.count(-1) > 1:
        raise Miss("AF033", None, f"a dimension splits into the symbols {', '.join(map(str, sizes))}")
    return out


def _arranged(emit: Emitter, operand: Operand, site: Site, role: str) -> fx.Node:
    """The operand as [B, heads, rows, depth]."""
    form = layout(operand, site.sizes, role)
    assert form is not None
    node = site.scope.current(operand.node)
    for dim in range(len(form.split) - 1, -1, -1):
        digits = form.split[dim]
        if not digits:
            node = emit(aten.squeeze.dim, node, dim)
        elif len(digits) > 1:
            node = emit(aten.unflatten.int, node, dim, _fx_sizes(digits))
    if list(form.order) != sorted(form.order):
        node = emit(aten.permute.default, node, list(form.order))
    node = _grouped(emit, node, form.groups)
    return _expanded(emit, node, form, site, role)


def _grouped(emit: Emitter, node: fx.Node, groups: Sequence[int]) -> fx.Node:
    """Neighbouring dimensions joined: `groups[i]` of them make up dimension i; none makes a dimension of size 1."""
    at = sum(groups)
    for count in reversed(groups):
        at -= count
        if count == 0:
            node = emit(aten.unsqueeze.default, node, at)
        elif count > 1:
            node = emit(aten.flatten.using_ints, node, at, at + count - 1)
    return node


def _expanded(emit: Emitter, node: fx.Node, form: Layout, site: Site, role: str) -> fx.Node:
    batch, heads = form.groups[0], form.groups[1]
    want: list[Any] = [-1, -1, -1, -1]
    if batch == 0 and not same(site.sizes.B, 1):
        want[0] = site.sizes.B
    if role == "q" and heads == 0 and not same(site.sizes.H, 1):
        want[1] = site.sizes.H
    if want == [-1] * 4:
        return node
    if not all(isinstance(x, int) for x in want):
        raise Miss("AF033", operand_of(site, role).node, f"{role} is broadcast over a symbolic size")
    return emit(aten.expand.default, node, want)


def operand_of(site: Site, role: str) -> Operand:
    """q, k or v by name."""
    return {"q": site.q, "k": site.k, "v": site.v}[role]


def _out_digits(site: Site, index: Sequence[Index]) -> tuple[dict[str, list[Digit]], list[tuple[str, int]]]:
    """For b, h, m and e their digits in an output, most significant first; and for each digit of the output in order, which
    digit of which variable it is."""
    found: dict[str, list[tuple[int, Digit, int]]] = {x: [] for x in _AXES}
    flat = [digit for dim in index for digit in dim]
    for at, digit in enumerate(flat):
        part = piece(digit)
        if part is None or part.var not in found:
            raise Miss("AF027", site.out, f"the output has a dimension {digit.expr}")
        found[part.var].append((part.stride, digit, at))
    place: dict[int, tuple[str, int]] = {}
    for var, parts in found.items():
        parts.sort(key=lambda x: -x[0])
        for rank, (_, _, at) in enumerate(parts):
            place[at] = (var, rank)
    return {v: [d for _, d, _ in parts] for v, parts in found.items()}, [place[at] for at in range(len(flat))]


def _placed(emit: Emitter, out: fx.Node, site: Site, index: Sequence[Index]) -> fx.Node:
    """The operator's [B, H, M, Dv] with the dimensions of an original output."""
    digits, order = _out_digits(site, index)
    node = out
    for dim in range(3, -1, -1):
        parts = digits[_AXES[dim]]
        if not parts:
            node = emit(aten.squeeze.dim, node, dim)
        elif len(parts) > 1:
            node = emit(aten.unflatten.int, node, dim, _fx_sizes([d.size for d in parts]))
    start = {}
    at = 0
    for var in _AXES:
        start[var] = at
        at += len(digits[var])
    permutation = [start[var] + rank for var, rank in order]
    if permutation != sorted(permutation):
        node = emit(aten.permute.default, node, permutation)
    return _grouped(emit, node, [len(dim) for dim in index])


def _out_order(site: Site) -> tuple[int, ...]:
    """The memory order of b, h, m, e (slowest first) that the original output has."""
    strides = sizes_of(fake(site.out).stride())
    hints = [hint(s, site.out) for s in strides]
    step = dict.fromkeys(_AXES, -1)
    for dim, index in enumerate(site.out_index):
        for digit in index:
            part = piece(digit)
            if part is not None:
                step[part.var] = max(step[part.var], hints[dim])
    present = sorted((x for x in _AXES if step[x] >= 0), key=lambda x: (-step[x], _AXES.index(x)))
    order = [x for x in _AXES if step[x] < 0] + present
    return tuple(_AXES.index(x) for x in order)


def _same_strides(new: fx.Node, old: fx.Node) -> bool:
    pairs = zip(sizes_of(fake(new).stride()), sizes_of(fake(old).stride()), shape(old), strict=True)
    return all(same(size, 1) or same(a, b) for a, b, size in pairs)


def _is_made_contiguous(node: fx.Node) -> tuple[int, ...] | None:
    """The op's memory order that saves a copy, if the output is only transposed and then made contiguous or reshaped.

    That holds for a 4-D output [B, H, M, Dv] whose one user is a permutation and whose users in turn all give a
    contiguous tensor whatever they read, none of them the graph's output itself.
    """
    users = list(node.users)
    if len(users) != 1 or packet(users[0]) not in PERMUTATIONS or len(shape(node)) != 4:
        return None
    moved = users[0]
    for user in moved.users:
        contiguous = packet(user) == "contiguous" or (
            packet(user) == "clone" and user.kwargs.get("memory_format") == torch.contiguous_format
        )
        joins = (
            packet(user) in ("reshape", "flatten")
            and not _same_strides_as_contiguous(moved)
            and _same_strides_as_contiguous(user)
        )
        if not (contiguous or joins) or any(x.op == "output" for x in user.users):
            return None
    if not moved.users:
        return None
    return tuple(permutation(moved))


def _same_strides_as_contiguous(node: fx.Node) -> bool:
    step: Size = 1
    for size, stride in zip(reversed(shape(node)), reversed(sizes_of(fake(node).stride())), strict=True):
        if not same(size, 1) and not same(stride, step):
            return False
        step = step * size
    return True


def _leaves(emit: Emitter, site: Site, what: Meaning) -> list[fx.Node]:
    """The leaves' tensors; those whose values only decide what is masked have no gradient, not even one of zeros."""
    program = what.spec.program
    tops = [program.body, *([] if program.sink is None else [program.sink])]
    valued = {load.leaf for top in tops for load in added_loads(top)}
    found = []
    for leaf, source in zip(what.spec.leaves, what.leaves, strict=True):
        node = _leaf(emit, source, site)
        if leaf.name not in valued and source.scope.may_require_grad(source.node):
            node = emit(aten.detach.default, node)
        found.append(node)
    return found


def _tile_map(
    emit: Emitter,
    site: Site,
    what: Meaning,
    q_and_k: tuple[fx.Node, fx.Node],
    leaves: Sequence[fx.Node],
    sizes: Sequence[fx.Node],
) -> list[fx.Node]:
    """The tile map of a mask that reads leaves, one for all attentions that share it; nothing where none is needed."""
    spec, scope = what.spec, site.scope
    if not (has_no_ranges(spec) and reads_leaves(spec) and worth_a_map(what.shape.M, what.shape.N)):
        return []
    mask = parse_spec(mask_text(str(spec)))
    read = {leaf.name for leaf in mask.leaves}
    sources = [source for leaf, source in zip(spec.leaves, what.leaves, strict=True) if leaf.name in read]
    if site.dtype == torch.float64 or any(source.scope.storage.writes(source.node) for source in sources):
        # the attention makes it itself, in its own type and of the values that it reads
        return []
    shape_ = [_size(emit, node, dim) for node, dim in zip((*(q_and_k[:1] * 2), q_and_k[1]), (0, 1, 1), strict=True)]
    shape_ += [_size(emit, node, 2) for node in q_and_k]
    q, k = map(shape, q_and_k)
    key = (str(mask), tuple(sources), tuple(expr for expr, _, _ in what.sizes), *q[:3], *k[1:3])
    known = scope.written.get(key)
    if known is None or not known[0] < site.place:
        named = [node for leaf, node in zip(spec.leaves, leaves, strict=True) if leaf.name in read]
        pair = emit(torch.ops.attnfuse.tile_map.default, named, sizes, shape_, str(mask), ops.ABI)
        known = scope.written[key] = [emit(operator.getitem, pair, at) for at in range(2)]
    return known


def _size(emit: Emitter, node: fx.Node, dim: int) -> fx.Node | int:
    size = shape(node)[dim]
    return size if isinstance(size, int) else emit(aten.sym_size.int, node, dim)


def _leaf(emit: Emitter, source: LeafSource, site: Site) -> fx.Node:
    """The leaf's tensor in this scope, its dimensions of size 1 dropped."""
    scope = site.scope
    if source.diagonal is not None:
        node = _diagonal(site, source)
        return node if source.scope is scope else scope.imported(source.scope, node)
    node = source.scope.current(source.node)
    if source in site.overwritten:
        node = _copied_before(emit, node, site.overwritten[source])
    if source.scope is not scope:
        node = scope.imported(source.scope, node)
    kept = set(source.dims)
    for dim in range(len(shape(source.node)) - 1, -1, -1):
        if dim not in kept:
            node = emit(aten.squeeze.dim, node, dim)
    written = bool(source.scope.storage.writes(source.node))
    return _in_order(emit, node, source, shared=not written)


def _diagonal(site: Site, source: LeafSource) -> fx.Node:
    """The elements of a leaf for each `n - m`, in the graph of the leaf, one for all attentions; see `LeafSource`."""
    assert source.diagonal is not None
    known = source.scope.written.get(source)
    if known is not None:
        return known[0]
    graph = source.scope.module.graph
    emit = Emitter(site, graph)
    with graph.inserting_before(source.node.next):
        node = source.diagonal.written(emit, source.scope.current)
        for dim in range(len(shape(source.node)) - 1, -1, -1):
            if dim not in source.dims or dim == source.diagonal.rows:
                node = emit(aten.squeeze.dim, node, dim)
        if source.order != tuple(range(source.rank)):
            node = emit(aten.permute.default, node, list(source.order))
        if not same(sizes_of(fake(node).stride())[-1], 1):
            node = emit(aten.clone.default, node, memory_format=torch.contiguous_format)
    source.scope.written[source] = [node]
    return node


def _in_order(emit: Emitter, node: fx.Node, source: LeafSource, *, shared: bool) -> fx.Node:
    """The tensor of a leaf with an element for each row and key, its axes in order, those of one row side by side in memory.

    Args:
        shared: whether attentions may read one copy: nothing writes to the source.
    """
    if not source.order:
        return node
    # a copy that is made under no_grad has no gradient
    key = (source, emit.site.out.meta.get("attnfuse_no_grad"))
    known = emit.site.scope.written.get(key)
    if shared and known is not None and known[0] < emit.site.place:
        return known[0]
    for dim in range(len(source.parts) - 1, -1, -1):
        if len(source.parts[dim]) > 1:
            node = emit(aten.unflatten.int, node, dim, _fx_sizes(source.parts[dim]))
    if source.order != tuple(range(source.rank)):
        node = emit(aten.permute.default, node, list(source.order))
    if not same(sizes_of(fake(node).stride())[-1], 1):
        node = emit(aten.clone.default, node, memory_format=torch.contiguous_format)
        if shared:
            emit.site.scope.written[key] = [node]
    return node


def _copied_before(emit: Emitter, node: fx.Node, write: fx.Node) -> fx.Node:
    """A copy of what the node holds before a write, one for all that read it there."""
    before = write.prev
    while before.meta.get("attnfuse_copy") is not None:
        if before.meta["attnfuse_copy"] is node:
            return before
        before = before.prev
    with emit.graph.inserting_before(write):
        copy = emit(aten.clone.default, node)
    copy.meta["attnfuse_copy"] = node
    return copy


def _number(expr: Any, scope: Scope, node: fx.Node, here: Scope) -> fx.Node:
    return node if scope is here else here.imported(scope, node)


def prune_operands(scope: Scope) -> None:
    """Operands that a body no longer reads are no longer passed to it, nor computed."""
    if scope.outer is None:
        return
    inputs = scope.module.graph.find_nodes(op="placeholder")
    given = [x for call in scope.calls for x in passed_by(call)]
    for call in scope.calls:
        passed = passed_by(call)
        read = (x for x, placeholder in zip(passed, inputs, strict=True) if placeholder.users)
        call.args = (*call.args[: len(call.args) - len(passed)], *read)
    for placeholder in inputs:
        if not placeholder.users:
            scope.module.graph.erase_node(placeholder)
    erase(scope.outer.module.graph, [x for x in given if isinstance(x, fx.Node)])


def hand_over(scope: Scope, number: int) -> None:
    """Makes a body that `invoke_subgraph` calls one that PyTorch has not seen, to be looked at anew.

    What it made of a body it keeps by the name in the call while Dynamo's graph is compiled. Should the rewritten graph fail
    downstream, the original must not find it; and bodies that had one name, the same code called in two graphs, may now differ.
    Which outputs ask for a gradient it reads off their `val`, where a retrace leaves none that do; without, it runs the body.

    Args:
        number: of the body among those of the graph.
    """
    for call in scope.calls:
        if call.target is torch.ops.higher_order.invoke_subgraph:
            call.update_arg(1, f"{call.args[1]}_attnfuse{number}")
            for out in scope.module.graph.output_node().all_input_nodes:
                out.meta.pop("val", None)
