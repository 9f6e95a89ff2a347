"""What the passes ask of a normalised FX graph: shapes, storage, writes, and where a node stands in the model's source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnfuse.passes.index import Size, sizes_of
from attnfuse.passes.normalise import BATCHED

aten = torch.ops.aten

SHORT_DTYPES: Final[Mapping[torch.dtype, str]] = {
    torch.bool: "bool",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
}

MODE_SWITCHES: Final = (
    "_set_grad_enabled",
    "_enter_autocast",
    "_exit_autocast",
    "_enter_inference_mode",
    "_exit_inference_mode",
)


def fake(node: fx.Node) -> torch.Tensor:
    """The fake tensor that stands for the node's value."""
    val = node.meta["val"]
    assert isinstance(val, torch.Tensor), f"{node} is no tensor"
    return val


def is_tensor(arg: object) -> bool:
    """Whether `arg` is a node whose value is one tensor."""
    return isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), torch.Tensor)


def shape(node: fx.Node) -> tuple[Size, ...]:
    """The node's shape as ints and sympy expressions; no guard is added."""
    return sizes_of(fake(node).shape)


_ALIASES: Final[Mapping[str, str]] = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "not_equal": "ne",
    "special_softmax": "softmax",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "adjoint": "mT",
    "mH": "mT",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
}


def packet(node: fx.Node) -> str:
    """The name of the ATen operator without its overload, such as `add`, or an empty string, also for one that runs under vmap.

    All aliases have one name; of the real numbers that attentions are made of, the conjugate is an alias too.
    """
    target = node.target
    plain = node.op == "call_function" and BATCHED not in node.meta
    if plain and isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        name = target._schema.name.removeprefix("aten::")
        if name in ("max", "min") and target._overloadname == "other":
            return f"{name}imum"
        if name.endswith("_") and not name.endswith("__"):
            return f"{_ALIASES.get(name[:-1], name[:-1])}_"
        return _ALIASES.get(name, name)
    return ""


def bound(node: fx.Node) -> dict[str, Any]:
    """The operator's arguments by schema name, defaults filled in."""
    schema = cast(torch._ops.OpOverload, node.target)._schema
    out: dict[str, Any] = {}
    for at, arg in enumerate(schema.arguments):
        if at < len(node.args) and not arg.kwarg_only:
            out[arg.name] = node.args[at]
        elif arg.name in node.kwargs:
            out[arg.name] = node.kwargs[arg.name]
        else:
            out[arg.name] = arg.default_value if arg.has_default_value() else None
    return out


class Storage:
    """Which nodes share storage and where it is written, read off the operators' schemas (conservatively: an operator that may
    return a view counts as one)."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position: dict[fx.Node, int] = {}
        self._root: dict[fx.Node, fx.Node] = {}
        self._inputs: dict[int, fx.Node] = {}
        self._origins: dict[fx.Node, set[fx.Node]] = {}
        self._writes: dict[fx.Node, list[int]] = {}
        self._entangled: dict[fx.Node, set[fx.Node]] = {}
        self.members: dict[fx.Node, list[fx.Node]] = {}
        for at, node in enumerate(graph.nodes):
            self.position[node] = at
            root = self._find(node, at)
            self._root[node] = root
            self.members.setdefault(root, []).append(node)

    def root(self, node: fx.Node) -> fx.Node:
        """The node that made the storage that `node` reads."""
        return self._root[node]

    def writes(self, node: fx.Node) -> list[int]:
        """Positions of all writes to the node's storage."""
        return self._writes.get(self._root[node], [])

    def is_input(self, node: fx.Node) -> bool:
        """Whether the node's storage is an input's."""
        return self._root[node].op == "placeholder"

    def entangled(self, node: fx.Node) -> bool:
        """Whether the node's storage may be another one's too, which came out of something that nobody looks into."""
        return self._root[node] in self._entangled

    def may_share(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two nodes may show the same storage."""
        return self._root[a] is self._root[b] or self._root[b] in self._entangled.get(self._root[a], ())

    def _write(self, root: fx.Node, at: int) -> None:
        for one in {root, *self._entangled.get(root, ())}:
            self._writes.setdefault(one, []).append(at)

    def _entangle(self, node: fx.Node, roots: Iterable[fx.Node]) -> None:
        """Takes `node`, whose value is a new root, for what may show the storage of any of `roots`, and they each other's."""
        together = {node, *roots}
        for root in list(together):
            together |= self._entangled.get(root, set())
        for root in together:
            self._entangled[root] = together - {root}

    def renew(self, written: fx.Node, new: fx.Node) -> None:
        """Records that `new` took the place of a write: a storage of its own, which later members of the old one now share."""
        root, at = self._root[written], self.position[written]
        later = [m for m in self.members[root] if self.position[m] > at]
        self.members[root] = [m for m in self.members[root] if self.position[m] < at]
        self.members[new] = [new, *later]
        self.position[new] = at
        writes = self._writes.pop(root, [])
        self._writes[root], self._writes[new] = [w for w in writes if w < at], [w for w in writes if w > at]
        for member in self.members[new]:
            self._root[member] = new

    def include(self, node: fx.Node, at: int) -> None:
        """Records a new node that shares storage with no other."""
        self.position[node], self._root[node], self.members[node] = at, node, [node]

    def _first_with_storage(self, node: fx.Node) -> fx.Node:
        """The first input that shares storage with this one (Dynamo's fake inputs alias as the real ones do)."""
        if not is_tensor(node):
            return node
        key = fake(node).untyped_storage()._cdata
        return self._inputs.setdefault(key, node)

    def _find_other(self, node: fx.Node, at: int) -> fx.Node:
        """The root of what is no ATen operator: an item of a result, or a higher-order operator, which may write to its operands
        and return views of them unless its body shows that it does not."""
        inputs = [x for x in node.all_input_nodes if x.op != "get_attr"]
        if getattr(node.target, "__name__", "") == "getitem":
            return self._root[inputs[0]] if inputs else node
        tensors = [x for x in inputs if is_tensor(x)]
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            if not _keeps_hands_off(node):
                for x in tensors:
                    self._write(self._root[x], at)
                self._entangle(node, (self._root[x] for x in tensors))
            return node
        return node

    def _find_batched(self, node: fx.Node, at: int) -> fx.Node:
        """The root of what runs under vmap, which may write to whatever went in and come out as a view of it. Its values are no
        tensors of the graph until the last of them."""
        inputs = node.all_input_nodes
        origins = {root for x in inputs for root in ({self._root[x]} if is_tensor(x) else self._origins.get(x, ()))}
        self._origins[node] = origins
        for root in origins:
            self._write(root, at)
        if is_tensor(node):
            self._entangle(node, origins)
        return node

    def _find(self, node: fx.Node, at: int) -> fx.Node:
        if BATCHED in node.meta:
            return self._find_batched(node, at)
        if node.op != "call_function":
            return self._first_with_storage(node)
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._find_other(node, at)
        root = node
        args = bound(node)
        for arg in node.target._schema.arguments:
            value = args[arg.name]
            values = value if isinstance(value, list | tuple) else [value]
            nodes = [x for x in values if isinstance(x, fx.Node)]
            if arg.alias_info is None or not nodes:
                continue
            if arg.alias_info.is_write:
                for x in nodes:
                    self._write(self._root[x], at)
            if any(r.alias_info is not None for r in node.target._schema.returns):
                root = self._root[nodes[0]]
        for x in self._hidden_writes(node, args):
            self._write(self._root[x], at)
        return root if root is not node else self._unannounced(node)

    def _unannounced(self, node: fx.Node) -> fx.Node:
        """The root of a result that shares storage with an operand though its schema does not say so (dropout in evaluation)."""
        if "dropout" in packet(node) and is_tensor(node.args[0]):
            # in evaluation it is its operand, which fake tensors do not show
            args = bound(node)
            if not (args.get("train") is True and isinstance(args.get("p"), float) and args["p"] > 0):
                return self._root[cast(fx.Node, node.args[0])]
        made = {_storage(x) for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)}
        for x in node.all_input_nodes:
            if is_tensor(x) and _storage(fake(x)) in made:
                return self._root[x]
        return node

    def _hidden_writes(self, node: fx.Node, args: Mapping[str, Any]) -> list[fx.Node]:
        """Running statistics that an operator updates though its schema does not say so."""
        if not any(name in packet(node) for name in ("batch_norm", "instance_norm")):
            return []
        return [x for name in ("running_mean", "running_var") if isinstance(x := args.get(name), fx.Node)]


def _storage(x: torch.Tensor) -> object:
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


def _keeps_hands_off(node: fx.Node) -> bool:
    """Whether a higher-order operator's bodies are graphs that write to no input and return none, nor a view of one."""
    module = node.graph.owning_module
    bodies = [getattr(module, str(x.target), None) for x in node.all_input_nodes if x.op == "get_attr"]
    if not bodies or not all(isinstance(body, fx.GraphModule) for body in bodies):
        return False
    for body in bodies:
        assert isinstance(body, fx.GraphModule)
        storage = Storage(body.graph)
        inputs = body.graph.find_nodes(op="placeholder")
        returned = body.graph.output_node().all_input_nodes
        if any(storage.writes(x) for x in inputs) or any(storage.root(x).op == "placeholder" for x in returned):
            return False
    return True


def erase(graph: fx.Graph, start: Iterable[fx.Node]) -> None:
    """Erases nodes without effect that nothing reads, and what only they read."""
    todo = list(start)
    while todo:
        node = todo.pop()
        if node._erased or node.users or node.op != "call_function" or node.graph is not graph:
            continue
        target = node.target
        pure = isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable
        if not pure and getattr(target, "__name__", "") != "getitem":
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        todo.extend(inputs)


def mark_no_grad(graph: fx.Graph) -> None:
    """Notes in `meta` which nodes run with gradients switched off, while other parts of the graph, or its caller, have them on."""
    names = ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")
    switches = {n: names.index(n.target.__name__) for n in graph.nodes if getattr(n.target, "__name__", "") in names}
    enabled = torch.is_grad_enabled()
    inference = False
    before: dict[fx.Node, tuple[bool, bool]] = {}
    if not switches:
        return
    for node in graph.nodes:
        if switches.get(node) == 0:
            enabled = bool(node.args[0])
        elif switches.get(node) == 1:
            before[node] = enabled, inference
            enabled, inference = not node.args[0], bool(node.args[0])
        elif switches.get(node) == 2:
            enabled, inference = before[node.args[0]]
        elif not enabled and node.op == "call_function":
            node.meta["attnfuse_no_grad"] = "inference_mode" if inference else "no_grad"


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that the node was traced in, such as `model.layers.0.self_attn`."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = list(stack.values())[-1]
    path = path[0] if isinstance(path, tuple) else path
    path = re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", str(path))
    path = re.sub(r"^L?\.?(self|L__self__|G__.*?)(?=\.|$)", "", path).replace("_modules.", "")
    return path.strip(".")


_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+)')


def source_line(node: fx.Node) -> str:
    """`file.py:line` of the statement that made the node, or an empty string."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    path, line = frames[-1]
    return f"{Path(path).name}:{line}"


def between(first: fx.Node, last: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that lie on a path from `first` to `last`, `last` included, `first` not."""
    reached: set[fx.Node] = set()
    todo = [last]
    visited = set()
    above: dict[fx.Node, set[fx.Node]] = {}
    while todo:
        node = todo.pop()
        if node in visited or node is first:
            continue
        visited.add(node)
        for x in node.all_input_nodes:
            above.setdefault(x, set()).add(node)
            todo.append(x)
    todo = list(above.get(first, ()))
    while todo:
        node = todo.pop()
        if node not in reached:
            reached.add(node)
            todo.extend(above.get(node, ()))
    return tuple(reached)
