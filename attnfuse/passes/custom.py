"""Custom autograd functions whose backward is the one that autograd would find: a softmax, under a mask or not, and dropout.

`y = softmax(x.masked_fill(m, c)).masked_fill(m, 0)` with the gradient `y·(g - Σ y·g)`, which is that of these operators for any
`c`: where m holds, autograd gives 0 and so does y; elsewhere both sums run over the same keys. Dropout becomes the
operator, which draws other numbers of the same distribution.
"""

from __future__ import annotations

import operator
from typing import Any, Final, cast

import torch
from torch import fx

from attnfuse.passes.dynamo import called, recorded

__all__ = ["as_operators"]

_GRAD_SWITCH: Final = "_set_grad_enabled"
_WRITES: Final = ("setitem", "iadd", "isub", "imul", "itruediv", "iand", "ior", "ixor")


def as_operators(call: fx.Node, forward: fx.GraphModule, backward: fx.GraphModule) -> fx.Graph | None:
    """The forward of a call of `autograd_function_apply` as a graph that autograd differentiates alike, or None if it may not.

    The graph returns what the function returns; of that the call must use the first only.
    """
    if call.kwargs.get("non_differentiable_idx") or any(not _is_first(user) for user in call.users):
        return None
    found = _weights(forward, backward)
    return _dropout(forward, backward) if found is None and _takes_weights(call) else found


def _takes_weights(call: fx.Node) -> bool:
    """Whether a function is called on a softmax: what else is dropped keeps its random numbers."""
    node = call.args[2]
    while isinstance(node, fx.Node) and (called(node) in ("to", "type_as", "float") or node.target is operator.getitem):
        node = node.args[0]
    return isinstance(node, fx.Node) and (called(node) == "softmax" or str(node.target) == "autograd_function_apply")


def _weights(forward: fx.GraphModule, backward: fx.GraphModule) -> fx.Graph | None:
    """A softmax."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(forward.graph, copied)
    outputs, saved = _returned(forward)
    for node in list(graph.nodes):
        if called(node) == _GRAD_SWITCH:
            graph.erase_node(node)
    softmaxes = [node for node in graph.nodes if called(node) == "softmax"]
    if graph.find_nodes(op="get_attr") or len(softmaxes) != 1 or not isinstance(outputs[0], fx.Node):
        return None
    scores, dim = _softmax(softmaxes[0])
    weights, mask = _zeroed(softmaxes[0])
    source = scores
    if isinstance(scores, fx.Node) and called(scores) == "masked_fill" and scores.args[1:2] == (mask,):
        source = scores.args[0]
    if not isinstance(source, fx.Node) or source.op != "placeholder" or (mask is not None and source is scores):
        return None
    mine = {x for x in (source, scores, softmaxes[0], weights) if isinstance(x, fx.Node)}
    apart = all(not mine & {*node.all_input_nodes} for node in graph.nodes if node not in mine)
    computed = [node for node in graph.nodes if node.op != "placeholder" and node is not weights]
    in_place = any(called(node).endswith("_") or called(node) in _WRITES or "out" in node.kwargs for node in computed)
    returned = copied[outputs[0]] in (softmaxes[0], weights)
    if not (apart and returned and not in_place and type(dim) is int):
        return None
    at = [node for node in graph.nodes if node.op == "placeholder"].index(source)
    places = [place for place, x in enumerate(saved) if isinstance(x, fx.Node) and copied[x] in (softmaxes[0], weights)]
    if not places or not _is_softmax_backward(backward, at, [len(outputs) + place for place in places], dim):
        return None
    if weights is not softmaxes[0]:
        with graph.inserting_before(weights):
            filled = graph.call_method("masked_fill", weights.args)
        filled.meta = dict(weights.meta)
        weights.replace_all_uses_with(filled)
        graph.erase_node(weights)
        weights = filled
    graph.output(tuple(weights if copied.get(x) in (softmaxes[0], weights) else copied[x] for x in outputs))
    return graph


def _returned(forward: fx.GraphModule) -> tuple[Any, Any]:
    """The outputs of a forward, and what it saves."""
    return cast(tuple[Any, Any], forward.graph.output_node().args[0])


def _is_first(user: fx.Node) -> bool:
    return user.target is operator.getitem and bool(user.args[1] == 0)


def _softmax(node: fx.Node) -> tuple[Any, Any]:
    """What a softmax without another type is taken of, and over which dimension; nothing otherwise."""
    given = (*node.args, None)[:2]
    rest = {key: value for key, value in node.kwargs.items() if value is not None and key != "_stacklevel"}
    dim = rest.pop("dim", given[1])
    value = recorded(node)
    if len(node.args) > 2 or rest or not isinstance(value, torch.Tensor) or type(dim) is not int:
        return None, None
    return given[0], dim % value.dim()


def _zeroed(softmax: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The weights after they were set to zero where the mask holds, and the mask; or the softmax itself."""
    for user in softmax.users:
        if (
            called(user) in ("masked_fill", "masked_fill_")
            and user.args[0] is softmax
            and user.args[2:] in ((0,), (0.0,))
        ):
            mask = user.args[1]
            return (user, mask) if isinstance(mask, fx.Node) else (softmax, None)
    return softmax, None


def _is_softmax_backward(backward: fx.GraphModule, at: int, places: list[int], dim: int) -> bool:
    """Whether a backward gives the input at `at` the gradient of a softmax, of weights at `places`, and nothing to the others."""
    nodes = [node for node in backward.graph.nodes if called(node) != _GRAD_SWITCH]
    inputs = [node for node in nodes if node.op == "placeholder"]
    gradient, weights = inputs[0], [inputs[place] for place in places]
    given = backward.graph.output_node().args[0]
    if (
        not isinstance(given, tuple | list)
        or at >= len(given)
        or any(x is not None for place, x in enumerate(given) if place != at)
    ):
        return False
    found = given[at] if at < len(given) else None
    if (
        not isinstance(found, fx.Node)
        or called(found) != "_softmax_backward_data"
        or len(found.args) != 4
        or found.kwargs
    ):
        return False
    result, like = recorded(found), recorded(gradient)
    if not isinstance(result, torch.Tensor) or not isinstance(like, torch.Tensor):
        return False
    first, second, over, dtype = found.args
    plain = len(nodes) == len(inputs) + 2 and first is gradient and second in weights
    return plain and type(over) is int and over % result.dim() == dim and dtype == result.dtype == like.dtype


def _dropout(forward: fx.GraphModule, backward: fx.GraphModule) -> fx.Graph | None:
    """Elements set to zero where a drawn mask holds, and the others scaled, in both directions alike."""
    outputs, saved = _returned(forward)
    inputs = forward.graph.find_nodes(op="placeholder")
    source, mask, scale = _masked_and_scaled(outputs[0])
    keep = _drawn(mask, source)
    if keep is None or scale is None or len(inputs) != 1 or source is not inputs[0] or not 0 < keep < 1:
        return None
    steps = {called(node) for node in forward.graph.nodes}
    if (
        not steps <= {"", _GRAD_SWITCH, "empty_like", "bernoulli_", "sub", "to", "masked_fill", "mul"}
        or mask not in saved
    ):
        return None
    back: Any = backward.graph.output_node().args[0]
    gradient, again, factor = _masked_and_scaled(back[0] if isinstance(back, tuple | list) and len(back) == 1 else None)
    before = backward.graph.find_nodes(op="placeholder")
    same = gradient is before[0] and again is before[len(outputs) + list(saved).index(mask)] and factor == scale
    if not same or abs(scale * keep - 1) > 1e-12:
        return None
    graph = fx.Graph()
    x = graph.placeholder(str(source))
    # 1 - 0.9 is not 0.1
    graph.output((graph.call_function(torch.nn.functional.dropout, (x, float(f"{1 - keep:.12g}"), True)),))
    return graph


def _masked_and_scaled(node: object) -> tuple[fx.Node, fx.Node, float] | tuple[None, None, None]:
    """x, m and c of `x.masked_fill(m, 0) * c`."""
    if not isinstance(node, fx.Node) or called(node) != "mul" or len(node.args) != 2 or node.kwargs:
        return None, None, None
    filled, scale = node.args
    if not isinstance(filled, fx.Node) or called(filled) != "masked_fill" or filled.args[2:] not in ((0,), (0.0,)):
        return None, None, None
    source, mask = filled.args[:2]
    if not isinstance(source, fx.Node) or not isinstance(mask, fx.Node):
        return None, None, None
    return (source, mask, scale) if type(scale) is float else (None, None, None)


def _drawn(mask: fx.Node | None, like: fx.Node | None) -> float | None:
    """With what probability `(1 - empty_like(x).bernoulli_(p)).to(bool)` is false."""
    if mask is None or called(mask) != "to" or mask.args[1:] != (torch.bool,) or mask.kwargs:
        return None
    rest = mask.args[0]
    if (
        not isinstance(rest, fx.Node)
        or called(rest) != "sub"
        or rest.args[:1] != (1,)
        or len(rest.args) != 2
        or rest.kwargs
    ):
        return None
    drawn = rest.args[1]
    if not isinstance(drawn, fx.Node) or called(drawn) != "bernoulli_" or len(drawn.args) != 2 or drawn.kwargs:
        return None
    empty, keep = drawn.args
    fresh = isinstance(empty, fx.Node) and called(empty) == "empty_like" and empty.args == (like,) and not empty.kwargs
    return keep if fresh and type(keep) is float else None
