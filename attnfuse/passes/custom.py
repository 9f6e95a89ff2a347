"""Custom autograd functions whose backward is the one that autograd would find: a softmax, under a mask or not.

`y = softmax(x.masked_fill(m, c)).masked_fill(m, 0)` with the gradient `y·(g - Σ y·g)`, which is that of these operators for any
`c`: where m holds, autograd gives 0 and so does y; elsewhere both sums run over the same keys.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch import fx

from attnfuse.passes.dynamo import name_of, recorded

__all__ = ["as_operators"]

_GRAD_SWITCH: Final = "_set_grad_enabled"


def as_operators(call: fx.Node, forward: fx.GraphModule, backward: fx.GraphModule) -> fx.Graph | None:
    """The forward of a call of `autograd_function_apply` as a graph that autograd differentiates alike, or None if it may not.

    The graph returns what the function returns; of that the call must use the first only.
    """
    if call.kwargs.get("non_differentiable_idx") or any(not _is_first(user) for user in call.users):
        return None
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(forward.graph, copied)
    given: Any = forward.graph.output_node().args[0]
    outputs, saved = given
    for node in list(graph.nodes):
        if name_of(node) == _GRAD_SWITCH:
            graph.erase_node(node)
    softmaxes = [node for node in graph.nodes if name_of(node) == "softmax"]
    if graph.find_nodes(op="get_attr") or len(softmaxes) != 1 or not isinstance(outputs[0], fx.Node):
        return None
    scores, dim = _softmax(softmaxes[0])
    weights, mask = _zeroed(softmaxes[0])
    source = scores
    if isinstance(scores, fx.Node) and name_of(scores) == "masked_fill" and scores.args[1] is mask:
        source = scores.args[0]
    if not isinstance(source, fx.Node) or source.op != "placeholder" or (mask is not None and source is scores):
        return None
    mine = {x for x in (source, scores, softmaxes[0], weights) if isinstance(x, fx.Node)}
    apart = all(not mine & {*node.all_input_nodes} for node in graph.nodes if node not in mine)
    computed = [node for node in graph.nodes if node.op != "placeholder" and node is not weights]
    in_place = any(name_of(node).endswith("_") for node in computed)
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
            name_of(user) in ("masked_fill", "masked_fill_")
            and user.args[0] is softmax
            and user.args[2:] in ((0,), (0.0,))
        ):
            mask = user.args[1]
            return (user, mask) if isinstance(mask, fx.Node) else (softmax, None)
    return softmax, None


def _is_softmax_backward(backward: fx.GraphModule, at: int, places: list[int], dim: int) -> bool:
    """Whether a backward gives the input at `at` the gradient of a softmax, of weights at `places`, and nothing to the others."""
    nodes = [node for node in backward.graph.nodes if name_of(node) != _GRAD_SWITCH]
    inputs = [node for node in nodes if node.op == "placeholder"]
    gradient, weights = inputs[0], [inputs[place] for place in places]
    given = backward.graph.output_node().args[0]
    if not isinstance(given, tuple | list) or any(x is not None for place, x in enumerate(given) if place != at):
        return False
    found = given[at]
    if not isinstance(found, fx.Node) or name_of(found) != "_softmax_backward_data" or found.kwargs:
        return False
    result, like = recorded(found), recorded(gradient)
    if not isinstance(result, torch.Tensor) or not isinstance(like, torch.Tensor):
        return False
    first, second, over, dtype = found.args
    plain = len(nodes) == len(inputs) + 2 and first is gradient and second in weights
    return plain and type(over) is int and over % result.dim() == dim and dtype == result.dtype == like.dtype
