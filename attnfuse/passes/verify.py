"""`options={"verify": True}`: each original attention against its replacement, on random and degenerate inputs.

Both are cut out of the graph and run at the sizes of this compile on tensors made for it, so nothing of the user's data is read.
A difference beyond the numerics contract takes the replacement out again (AF044).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnfuse.passes.graph import fake
from attnfuse.passes.peel import Miss
from attnfuse.passes.site import Site
from attnfuse.passes.spell import Meaning, hint
from attnfuse.spec import AttentionSpec, parse_spec

LIMIT: Final = 2**26
"""Scores (B·H·M·N) beyond which the original, which holds them all, is not run."""


def checker(site: Site, what: Meaning, facts: dict[str, object]) -> Callable[[fx.Node, fx.Node], None]:
    """A function of an old and a new output that raises Miss AF044 where they differ; what was done goes into
    `facts["verified"]`."""

    def check(old: fx.Node, new: fx.Node) -> None:
        scores = what.shape.B * what.shape.H * what.shape.M * what.shape.N
        if scores > LIMIT:
            facts["verified"] = f"no: {scores} scores, the limit is {LIMIT}"
            return
        outside = [source for source in what.leaves if source.scope is not site.scope]
        if outside or what.sizes:
            facts["verified"] = "no: the mask reads what lies outside of this graph, or a size that is no tensor's"
            return
        operands = {site.q.node, site.k.node, site.v.node}
        trials = 0
        for values in _trials({*operands, *(node for source in what.leaves for node in source.given)}, operands):
            try:
                original = _run(old, values)
            except IndexError:
                # data that the model uses as an index is not large
                continue
            exact = _run(old, {node: _double(x) for node, x in values.items()}, double=True)
            with torch._C._DisableAutocast():
                # what is new casts by itself
                actual = _run(new, values)
            _compare(site, actual, original, exact)
            trials += 1
        facts["verified"] = f"{trials} sets of inputs"

    return check


def _trials(given: set[fx.Node], operands: set[fx.Node]) -> Iterator[dict[fx.Node, torch.Tensor]]:
    """Random inputs; others with large data, which casts round and wrap around; then every mask all false, and all true."""
    # The user's random state stays as it is.
    generator = torch.Generator().manual_seed(random.Random(0).getrandbits(32))
    kinds = {fake(node).dtype for node in given - operands}
    for mask, large in ((None, False), (None, True), (False, False), (True, False)):
        if (large and not kinds - {torch.bool}) or (mask is not None and torch.bool not in kinds):
            continue
        yield {node: _made(node, generator, mask, large=large and node not in operands) for node in given}


def _made(node: fx.Node, generator: torch.Generator, mask: bool | None, *, large: bool) -> torch.Tensor:
    like = fake(node)
    shape = [hint_of(size, node) for size in like.shape]
    if like.dtype == torch.bool:
        made = torch.rand(shape, generator=generator) < 0.7 if mask is None else torch.full(shape, mask)
    elif like.dtype.is_floating_point:
        made = torch.randn(shape, generator=generator, dtype=torch.float32)
        # neighbours that a half type rounds to the same value
        made = (made + 1000 if large else made).to(like.dtype)
    elif large:
        # a few values, some of them alike in their lowest bits
        few = torch.randint(0, 3, shape, generator=generator)
        greatest = torch.iinfo(like.dtype).max
        values = torch.tensor([min(x, greatest) for x in (1, 2**8 + 1, 2**32 + 1)])
        made = values[few].to(like.dtype)
    else:
        made = torch.randint(0, 2, shape, generator=generator, dtype=like.dtype)
    return made.to(like.device)


def hint_of(size: Any, node: fx.Node) -> int:
    """A size of the node's shape in this compile."""
    return size if isinstance(size, int) else hint(size.node.expr, node)


def _double(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def _run(out: fx.Node, values: Mapping[fx.Node, torch.Tensor], *, double: bool = False) -> torch.Tensor:
    """The node's value, given those of the nodes in `values`; dropout is left out.

    Args:
        double: compute in float64 wherever the graph names a floating-point type.
    """
    env: dict[fx.Node, Any] = dict(values)

    def value(node: fx.Node) -> Any:
        todo = [node]
        while todo:
            at = todo[-1]
            missing = [x for x in at.all_input_nodes if x not in env]
            if at in env or not missing:
                todo.pop()
                if at not in env:
                    env[at] = _computed(at, env, double)
            else:
                todo.extend(missing)
        return env[node]

    with torch.no_grad():
        result: torch.Tensor = value(out)
    return result


def _computed(node: fx.Node, env: Mapping[fx.Node, Any], double: bool) -> Any:
    if node.op == "get_attr":
        held: Any = node.graph.owning_module
        for name in str(node.target).split("."):
            held = getattr(held, name)
        return _double(held) if double and isinstance(held, torch.Tensor) else held
    if node.op == "placeholder":
        raise Miss("AF044", node, "the original reads an input that the replacement does not")
    args, kwargs = pytree.tree_map(
        lambda x: env[x] if isinstance(x, fx.Node) else _widened(x) if double else x, (node.args, dict(node.kwargs))
    )
    name = getattr(node.target, "__name__", "")
    if node.target is torch.ops.aten.dropout.default:
        return args[0]
    if node.target is torch.ops.attnfuse.attention.default:
        spec = parse_spec(args[7])
        args = (*args[:5], [] if double else args[5], None, str(AttentionSpec(spec.program, spec.leaves)), *args[8:])
    elif name.startswith("scaled_dot_product_attention"):
        args = (*args[:4], 0.0, *args[5:])
        kwargs = {k: v for k, v in kwargs.items() if k != "dropout_p"}
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _widened(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def _compare(site: Site, actual: torch.Tensor, original: torch.Tensor, exact: torch.Tensor) -> None:
    """Raises Miss AF044 unless `actual` is as close to `exact` as the numerics contract asks."""
    a, o, x = (t.double() for t in (actual, original, exact))
    finite = x.isfinite()
    if not torch.equal(a.isfinite(), o.isfinite()):
        raise Miss("AF044", site.out, "NaN or inf at other places than the original")

    def worst(t: torch.Tensor) -> float:
        return float((t - x).abs()[finite & o.isfinite()].max()) if bool((finite & o.isfinite()).any()) else 0.0

    scale = float(x[finite].abs().max()) if bool(finite.any()) else 0.0
    allowed = 2 * worst(o) + 4 * torch.finfo(actual.dtype).eps * scale
    if not worst(a) <= allowed:
        raise Miss("AF044", site.out, f"the error is {worst(a):.3g}, allowed is {allowed:.3g}")
