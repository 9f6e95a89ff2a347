"""Attentions that no pass looks into: calls of kernels that are IO-aware already, and what stands in the bodies of
higher-order operators that are left in place (a branch of `cond`, a step of `scan`, a custom autograd function) or under vmap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import fx

from attnfuse.passes.dynamo import called
from attnfuse.passes.graph import module_path, source_line
from attnfuse.passes.normalise import BATCHED, NORMALISED, NORMALISED_BODIES
from attnfuse.remark import Remark

_IO_AWARE: Final = (
    "flex_attention",
    "flash_attention",
    "flash_attn",
    "efficient_attention",
    "cudnn_attention",
    "varlen_attn",
)
_SOFTMAXES: Final = ("softmax", "_softmax", "scaled_dot_product_attention")
# Their first body is the forward pass, the second the model's own backward.
_FORWARD_AND_BACKWARD: Final = ("autograd_function_apply",)


def kept(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, Remark]]:
    """A remark for each such attention in a normalised graph, its rewritten bodies left out, with its node."""
    for node in graph.graph.nodes:
        name = called(node)
        if name in _SOFTMAXES and BATCHED in node.meta:
            yield node, _remark("AF036", node, "vmap")
        elif node.op == "call_function" and any(part in name for part in _IO_AWARE) and "backward" not in name:
            yield node, _remark("AF002", node, name)
        elif isinstance(node.target, torch._ops.HigherOrderOperator) and NORMALISED not in node.meta:
            why = f"{name}, whose calls differ in mode or layout" if name in NORMALISED_BODIES else name
            for found in _within(graph, node):
                kernel = called(found) not in _SOFTMAXES
                yield found, _remark("AF002", found, called(found)) if kernel else _remark("AF036", found, why)


def _within(graph: fx.GraphModule, call: fx.Node) -> Iterator[fx.Node]:
    """The softmaxes and attention calls in the bodies of a higher-order operator, and in bodies within them."""
    bodies = [getattr(graph, str(x.target), None) for x in call.all_input_nodes if x.op == "get_attr"]
    for body in bodies[:1] if called(call) in _FORWARD_AND_BACKWARD else bodies:
        if not isinstance(body, fx.GraphModule):
            continue
        for node in body.graph.nodes:
            if called(node) in _SOFTMAXES or any(part in called(node) for part in _IO_AWARE):
                yield node
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                yield from _within(body, node)


def _remark(code: str, node: fx.Node, why: str) -> Remark:
    return Remark.of(code, module=module_path(node), source=source_line(node), why=why)
