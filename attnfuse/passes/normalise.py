"""Dynamo's torch-level graph as ATen operators before dispatch, one spelling for each operation: `normalise`.

The graph is run once more on the fake tensors that Dynamo recorded, under `make_fx(pre_dispatch=True)`: softmax, matmul,
linear, dropout, scaled_dot_product_attention, grad-mode and autocast switches stay single nodes. The graph given is not
changed, so it can be compiled as it stands when anything further on goes wrong.

Kept by hand, because tracing would lose it: higher-order operators (a custom backward, the checkpoint's tags), and what runs
under `vmap`, which is copied as it stands. The bodies in `NORMALISED_BODIES` are normalised as graphs of their own, others are
copied as they stand. Constants go into the graph's text: as attributes AOTAutograd would take them for parameters that Dynamo
did not declare. What cannot be retraced exactly raises `NormaliseError`.

Running an operator on fake tensors is what costs: about 1 ms, 5 ms with symbolic sizes. A call whose operator, arguments
and modes were seen before, in an earlier layer, is therefore not run: its node is written down again, with the value that
Dynamo recorded.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import sympy
import torch
from sympy.core.relational import Relational
from torch import fx
from torch._C._functorch import get_inplace_requires_grad_allowed, set_inplace_requires_grad_allowed
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, disable_fake_tensor_cache
from torch.amp import autocast_mode
from torch.autograd import grad_mode
from torch.fx import traceback
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.fx.proxy import _COPY_META_FIELDS
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import bound_sympy

from attnfuse.passes.custom import as_operators
from attnfuse.passes.dynamo import VMAP_OUT, NormaliseError, batched, module_of, name_of, outdates, recorded, refuse
from attnfuse.passes.unbacked import BINDINGS, Unbacked

__all__ = ["NormaliseError", "normalise"]

aten = torch.ops.aten
Sym: Final = (torch.SymInt, torch.SymFloat, torch.SymBool)

# Higher-order operators whose bodies are normalised like the graph around them, with the number of arguments that stand before
# the operands, the body among them. AOTAutograd runs a checkpoint's node by node; an `invoke_subgraph` it traces by itself.
NORMALISED_BODIES: Final[Mapping[str, int]] = {"tag_activation_checkpoint": 1, "invoke_subgraph": 2}
NORMALISED: Final = "attnfuse_normalised"
"""In `meta` of a call of such an operator: its body is normalised too."""

BATCHED: Final = "attnfuse_vmap"
"""In `meta` of a node that runs under vmap."""

# Dynamo puts it around requires_grad_(); FX would take it for dead.
fx.node.has_side_effect(set_inplace_requires_grad_allowed)

# What Dynamo sets on the graph module for those who compile it.
_ATTRIBUTES: Final = ("_param_name_to_source", "_source_to_user_stacks", "_backend_id", "compile_subgraph_reason")

# Calls that may leave no node: a check that holds for all sizes, an entry in a log.
_SILENT: Final = ("_log_api_usage_once", "_check", "_assert")

# Dynamo leaves comparisons of sizes behind whose results nothing reads.
_PURE: Final = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_PLAIN: Final = (
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    types.EllipsisType,
)


def normalise(gm: fx.GraphModule) -> fx.GraphModule:
    """The same computation as `gm` in ATen operators, as they are before dispatch.

    Placeholders keep order, name, `meta` and `_dynamo_source`; `gm.meta` and what Dynamo set on `gm` are carried over.
    Every node has `meta["val"]` and the stack trace and module stack of the node it came from. No guard is added.

    Args:
        gm: a graph as Dynamo hands it to a backend; it is not changed.

    Raises:
        NormaliseError: the graph has no tensor input, or something in it cannot be retraced exactly.
    """
    refuse(gm)
    inputs = (recorded(node) for node in gm.graph.find_nodes(op="placeholder"))
    fake_mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)
    if fake_mode is None:
        raise NormaliseError("the graph has no tensor input")
    env: Any = fake_mode.shape_env
    pending = [] if env is None else list(env.pending_fresh_unbacked_symbols)
    try:
        with fake_mode, _no_new_guards(fake_mode), _no_questions_of_layout():
            # Else nonzero() would answer with the symbol that it made when the graph was run before.
            fake_mode.epoch += 1
            try:
                return _Retrace(fake_mode, recall=not outdates(gm)).trace(gm)
            except _OutdatedError:
                fake_mode.epoch += 1
                return _Retrace(fake_mode, recall=False).trace(gm)
    except Exception as error:
        if env is not None:
            # what was left half done made symbols that nobody binds; the original is compiled beside them
            env.pending_fresh_unbacked_symbols[:] = pending
        if isinstance(error, NormaliseError):
            raise
        text = str(error).strip().splitlines() or [""]
        raise NormaliseError(f"the retrace raised {type(error).__name__}: {text[0]}") from error


class _OutdatedError(Exception):
    """An operator changes sizes, strides or autograd state in place: Dynamo's records show the state after it."""


@dataclass(frozen=True)
class _Operand:
    """Place of a call's tensor or symbol, in the order in which they appear in its arguments."""

    index: int


@dataclass(frozen=True)
class _Step:
    """Place of a node among those that a call became."""

    index: int


@dataclass(frozen=True)
class _Call:
    """The nodes that a call became: operator, arguments, keyword arguments, value; the last is the result, if there is one."""

    nodes: tuple[tuple[Any, Any, Any, object], ...]
    result: _Operand | _Step
    metadata: tuple[object, ...]


@dataclass(frozen=True)
class _Batched:
    """What a node under vmap gives, which nothing outside reads."""

    proxy: fx.Proxy


@dataclass(frozen=True)
class _Body:
    """A call of a body that is to be normalised once the graph around it is done, and the modes that hold there."""

    call: fx.Node
    module: fx.GraphModule
    operands: Sequence[object]
    grad: bool
    autocasts: tuple[tuple[Any, ...], ...]


class _Retrace:
    """The retrace of a graph and the bodies in it, which share the calls seen before."""

    def __init__(self, fake_mode: FakeTensorMode, *, recall: bool) -> None:
        self.fake_mode = fake_mode
        self.recall = recall
        self.calls: dict[object, _Call] = {}
        self.symbols = Unbacked(fake_mode)

    def own(self, value: object) -> object:
        """The value, of which the retrace may change shape and autograd state if it does not rely on what Dynamo recorded."""
        return value if self.recall else pytree.tree_map_only(torch.Tensor, aten.alias, value)

    def trace(self, gm: fx.GraphModule, values: Sequence[object] | None = None) -> fx.GraphModule:
        """`gm` normalised, its inputs `values`, or else what Dynamo recorded for them."""
        if values is None:
            values = [recorded(node) for node in gm.graph.find_nodes(op="placeholder")]
        values = [self.own(value) for value in values]
        replay = _Replay(gm, self)
        with (
            replay.modes_restored(),
            self.symbols.answered(),
            enable_python_dispatcher(),
            traceback.preserve_node_meta(),
            _use_lazy_graph_module(True),
        ):
            new = proxy_tensor.make_fx(replay.run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(
                *values
            )
        for node in new.graph.nodes:
            if node.op == "call_function":
                node.meta.setdefault("val", None)
        _carry_over(gm, new)
        _write_constants(new, own=set(replay.attributes))
        for name, child in list(new.named_children()):
            if isinstance(child, fx.GraphModule):
                setattr(new, name, _copied(child))
        for name, calls in replay.bodies.items():
            first = calls[0]
            if not all(_alike(first, other) for other in calls):
                continue
            with torch.set_grad_enabled(first.grad), contextlib.ExitStack() as stack:
                for args in first.autocasts:
                    stack.enter_context(_autocast(*args))
                setattr(new, name, self._body(first))
            for body in calls:
                body.call.meta[NORMALISED] = True
        return new

    def _body(self, body: _Body) -> fx.GraphModule:
        own = [recorded(node) for node in body.module.graph.find_nodes(op="placeholder")]
        if len(own) == len(body.operands) and all(map(_same_metadata, own, body.operands)):
            new = self.trace(body.module)
        else:
            new = _Retrace(self.fake_mode, recall=False).trace(body.module, body.operands)
        # PyTorch reads off it which outputs have no gradient
        outputs = (pytree.tree_leaves(module.graph.output_node().args) for module in (body.module, new))
        for old, out in zip(*outputs, strict=True):
            if isinstance(old, fx.Node) and isinstance(out, fx.Node) and "example_value" in old.meta:
                out.meta.setdefault("example_value", old.meta["example_value"])
        return new


class _Replay(fx.Interpreter):
    """Runs a graph under `make_fx`; writes a node by hand where running it would lose something or was done before."""

    def __init__(self, gm: fx.GraphModule, retrace: _Retrace) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.retrace = retrace
        self.bodies: dict[str, list[_Body]] = {}
        self.attributes: dict[str, fx.Proxy] = {}
        # What higher-order operators give; made before the tracing begins, which would see an alias being taken.
        kept = (n for n in gm.graph.nodes if isinstance(n.target, HigherOrderOperator) or n.target is VMAP_OUT)
        self.kept = {n: retrace.own(recorded(n)) for n in kept}
        self.batched = batched(gm)
        self._node: fx.Node
        self._autocasts: list[tuple[tuple[Any, ...], torch.amp.autocast]] = []
        self._metadata: dict[int, tuple[torch.Tensor, tuple[object, ...]]] = {}

    @contextlib.contextmanager
    def modes_restored(self) -> Iterator[None]:
        """Undo what the graph switches, wherever the run ends."""
        grad, inplace = torch.is_grad_enabled(), get_inplace_requires_grad_allowed()
        try:
            yield
        finally:
            while self._autocasts:
                self._autocasts.pop()[1].__exit__(None, None, None)
            torch._C._set_grad_enabled(grad)
            set_inplace_requires_grad_allowed(inplace)

    @property
    def tracer(self) -> Any:
        mode = proxy_tensor.get_proxy_mode()
        assert mode is not None, "the replay runs under make_fx"
        return mode.tracer

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        if n in self.batched:
            return self._copy(n)
        if n.op not in ("call_function", "call_method") or isinstance(n.target, HigherOrderOperator):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        # Without this each look at a tensor's shape goes through the modes of make_fx.
        with torch._C.DisableTorchFunction():
            if n.target is operator.getitem and isinstance(args[0], tuple | list):
                return args[0][args[1]]
            if not n.users and name_of(n) in _PURE and not any(isinstance(x, torch.Tensor) for x in args):
                return None
            if n.target == "size" and isinstance(args[0], torch.Tensor):
                return args[0].size(*args[1:], **kwargs)
            if n.target is aten.sym_size.int and not kwargs:
                # the operator would give a number where Dynamo's checks say what the symbol is, and the checks would be lost
                return args[0].size(args[1])
            if n.target == "item" and isinstance(recorded(n), Sym) and BINDINGS not in n.meta:
                return self._item(n, args[0])
            if (product := self._product(n, args, kwargs)) is not None:
                return product
            if n.target is torch.tensor and self.retrace.recall and (made := self._number(n, args, kwargs)) is not None:
                return made
            operands: list[Any] = []
            key = self._key(n, args, kwargs, operands) if self.retrace.recall else None
            if key is not None and (call := self.retrace.calls.get(key)) is not None:
                if isinstance(call.result, _Operand):
                    return operands[call.result.index]
                value = recorded(n)
                if isinstance(value, FakeTensor) and self._describe(value) == call.metadata:
                    return self._write(n, call, operands, value)
            places = {self._node_of(x): _Operand(i) for i, x in enumerate(operands) if isinstance(x, torch.Tensor)}
            nodes = self.tracer.graph.nodes
            count = len(nodes)
        self.retrace.symbols.expect(n)
        with self._set_current_node(n):
            result = getattr(self, n.op)(n.target, args, kwargs)
        written = [node for node, _ in zip(reversed(nodes), range(len(nodes) - count), strict=False)][::-1]
        with torch._C.DisableTorchFunction():
            self._check(n, result, written)
            if key is not None:
                places |= {
                    self._node_of(x): _Operand(i) for i, x in enumerate(operands) if not isinstance(x, torch.Tensor)
                }
                self._learn(key, written, places, operands, result)
        return result

    # Calls seen before

    def _key(self, n: fx.Node, args: object, kwargs: object, operands: list[Any]) -> object | None:
        """All that decides which operators a call becomes, or None if that cannot be told. Fills `operands`."""
        if BINDINGS in n.meta or not (isinstance(n.target, str) or _is_torch(n.target)):
            return None
        places: dict[int, int] = {}

        def key(x: object) -> object:
            if isinstance(x, torch.Tensor | torch.SymInt | torch.SymFloat):
                place = places.setdefault(id(x), len(operands))
                if place == len(operands):
                    operands.append(x)
                if isinstance(x, torch.Tensor):
                    return place, self._describe(x)
                # Two layers' scales are two symbols; what is decided on a float is decided by its hint.
                if isinstance(x, torch.SymInt):
                    return place, x.node.expr
                if x.node.hint is not None:
                    return place, torch.SymFloat, x.node.hint
                raise LookupError
            if isinstance(x, slice):
                return slice, key(x.start), key(x.stop), key(x.step)
            if isinstance(x, tuple | list):
                return type(x), tuple(key(y) for y in x)
            if isinstance(x, dict):
                return dict, tuple((name, key(y)) for name, y in x.items())
            if x is None or isinstance(x, _PLAIN):
                return type(x), repr(x) if isinstance(x, float | complex) else x
            raise LookupError

        modes = torch.is_grad_enabled(), tuple(args for args, _ in self._autocasts)
        try:
            return n.target, key(args), key(kwargs), modes
        except LookupError:
            return None

    def _describe(self, x: torch.Tensor) -> tuple[object, ...]:
        known = self._metadata.get(id(x))
        if known is None:
            known = self._metadata[id(x)] = (x, (x.requires_grad, *_metadata(x)))
        return known[1]

    def _learn(
        self,
        key: object,
        written: list[fx.Node],
        places: dict[Any, Any],
        operands: list[Any],
        result: object,
    ) -> None:
        if not isinstance(result, torch.Tensor):
            return
        if not written:
            place = next((i for i, x in enumerate(operands) if x is result), None)
            if place is not None:
                self.retrace.calls[key] = _Call((), _Operand(place), ())
            return
        nodes = []
        for i, node in enumerate(written):
            op = node.target
            if "val" not in node.meta:
                return
            if isinstance(op, OpOverload):
                if op.namespace != "aten" or op._schema.is_mutable:
                    return
            elif not isinstance(node.meta.get("val"), Sym):
                return
            # A size that an earlier node computes is looked up again; any other value from elsewhere is not repeatable.
            places |= {
                arg: arg.meta["val"] for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), Sym)
            } | places
            if not places.keys() >= set(node.all_input_nodes):
                return
            nodes.append((op, *fx.node.map_arg((node.args, node.kwargs), places.__getitem__), node.meta["val"]))
            places[node] = _Step(i)
        if self._node_of(result) is written[-1]:
            self.retrace.calls[key] = _Call(tuple(nodes), _Step(len(written) - 1), self._describe(result))

    def _write(self, n: fx.Node, call: _Call, operands: list[Any], value: FakeTensor) -> FakeTensor:
        given = [self._node_of(x) for x in operands]
        done: list[fx.Node] = []

        def fill(x: Any) -> Any:
            if isinstance(x, _Operand):
                return given[x.index]
            if isinstance(x, _Step):
                return done[x.index]
            if isinstance(x, Sym):
                return self._node_of(x)
            return type(x)(map(fill, x)) if isinstance(x, tuple | list) else x

        for op, args, kwargs, val in call.nodes:
            done.append(self._create(n, op, fill(args), {name: fill(x) for name, x in kwargs.items()}))
            done[-1].meta["val"] = val
        done[-1].meta["val"] = value
        proxy_tensor.set_proxy_slot(
            value, self.tracer, proxy_tensor._ProxyTensor(fx.Proxy(done[-1], self.tracer), None)
        )
        return value

    def _create(self, n: fx.Node, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        name = op._opname if isinstance(op, OpOverload) else None
        node: fx.Node = self.tracer.graph.create_node("call_function", op, args, kwargs, name)
        with self._set_current_node(n):
            current = traceback.get_current_meta()
            node.meta = {field: current[field] for field in ("stack_trace", *_COPY_META_FIELDS) if field in current}
        return node

    def _product(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FakeTensor | None:
        """A product of symbolic sizes with the value of Dynamo: run once more, torch.matmul would ask about sizes of its own."""
        value = recorded(n)
        if (
            n.target not in (torch.matmul, operator.matmul, "matmul", "__matmul__")
            or kwargs
            or self._autocasts
            or not self.retrace.recall
        ):
            return None
        if not isinstance(value, FakeTensor) or not value._has_symbolic_sizes_strides:
            return None
        if torch.is_autocast_enabled(value.device.type):
            return None
        node = self._create(n, aten.matmul.default, tuple(map(self._node_of, args)), {})
        node.meta["val"] = value
        proxy_tensor.set_proxy_slot(value, self.tracer, proxy_tensor._ProxyTensor(fx.Proxy(node, self.tracer), None))
        return value

    def _number(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FakeTensor | None:
        """`torch.tensor(number)` as `_write_constants` would leave it; traced, it becomes five nodes."""
        value = recorded(n)
        plain = len(args) == 1 and type(args[0]) in (bool, int, float) and kwargs.keys() <= {"dtype", "device"}
        if not plain or not isinstance(value, FakeTensor) or value.dim():
            return None
        how = {"dtype": value.dtype, "device": value.device}
        node = self._create(n, aten.scalar_tensor.default, args, how)
        node.meta["val"] = value
        proxy_tensor.set_proxy_slot(value, self.tracer, proxy_tensor._ProxyTensor(fx.Proxy(node, self.tracer), None))
        return value

    def _node_of(self, x: object) -> Any:
        proxy = self.tracer.unwrap_proxy(x)
        if isinstance(proxy, Sym):
            raise NormaliseError(f"`{self._node}` depends on {proxy}, which no node computes")
        return proxy.node if isinstance(proxy, fx.Proxy) else proxy

    def _check(self, n: fx.Node, result: object, written: list[fx.Node]) -> None:
        """Raise if the run of `n` lost an effect, gave another value than Dynamo's, or outdated what Dynamo recorded."""
        recall = self.retrace.recall
        if recall and any(_writes_metadata(node) for node in written):
            raise _OutdatedError
        name = name_of(n)
        in_place = name.endswith("_") and not name.endswith("__")
        if not written and (in_place or not _is_value(result)) and not name.startswith(_SILENT):
            raise NormaliseError(f"`{n}` has an effect that the retrace would lose")
        known = recorded(n)
        if BINDINGS in n.meta:
            self.retrace.symbols.bind(n, result)
        elif recall and isinstance(result, FakeTensor) and isinstance(known, FakeTensor):
            now, then = self._describe(result)[1:], self._describe(known)[1:]
            if now != then and not self._equal(now, then):
                raise NormaliseError(f"`{n}` is {now} in the retrace and {then} in Dynamo's graph")

    def _equal(self, now: object, then: object) -> bool:
        """Whether two descriptions are the same for all sizes; the symbols in Dynamo's may have been replaced since."""
        if isinstance(now, tuple) and isinstance(then, tuple):
            return len(now) == len(then) and all(map(self._equal, now, then))
        env = self.retrace.fake_mode.shape_env
        if env is None or not (isinstance(now, sympy.Basic) and isinstance(then, sympy.Basic)):
            return now == then
        return bool(sympy.expand(env.simplify(now) - env.simplify(then)) == 0)

    # Kept by hand

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, HigherOrderOperator):
            bodies = [x for x in args[:2] if isinstance(x, fx.GraphModule)]
            if str(target) == "autograd_function_apply" and len(bodies) == 2:
                graph = as_operators(self._node, *bodies)
                if graph is not None:
                    return self._inline(graph, args[2:])
            return self._keep(target, args, kwargs)
        if target is autocast_mode._enter_autocast:
            return self._enter_autocast(target, args)
        if target is autocast_mode._exit_autocast:
            return self._exit_autocast(target, *args)
        if target is grad_mode._enter_inference_mode:
            return self._enter_inference_mode(target, *args)
        if target is grad_mode._exit_inference_mode:
            return self._exit_inference_mode(target, *args)
        if target is set_inplace_requires_grad_allowed:
            self.tracer.create_node("call_function", target, args, {}).meta["val"] = None
            target(*args)
            return None
        return super().call_function(target, args, kwargs)

    def _inline(self, graph: fx.Graph, args: Sequence[Any]) -> Any:
        """Runs a body's nodes as if they stood here."""
        self.env.update(zip(graph.find_nodes(op="placeholder"), args, strict=True))
        for node in graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.env[node] = self.run_node(node)
        return fx.node.map_arg(graph.output_node().args[0], self.env.__getitem__)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "requires_grad_":
            return self._requires_grad(target, args, kwargs)
        return super().call_method(target, args, kwargs)

    def _item(self, n: fx.Node, x: torch.Tensor) -> object:
        """A float of the model that Dynamo made an input: running item() again would make another symbol of it."""
        value = recorded(n)
        node = self._create(n, aten.item.default, (self._node_of(x),), {})
        node.meta["val"] = value
        return proxy_tensor.track_tensor_tree(value, fx.Proxy(node, self.tracer), constant=None, tracer=self.tracer)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, torch.Tensor):
            return value
        known = recorded(self._node)
        fake = known if isinstance(known, FakeTensor) else self.retrace.fake_mode.from_tensor(value)
        proxy_tensor.set_proxy_slot(fake, self.tracer, proxy_tensor._ProxyTensor(self._attribute(target, value), None))
        return fake

    def _requires_grad(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        # No operator; make_fx would not see it. What follows reads its result, so that it is never dead.
        x: torch.Tensor = args[0]
        source = self._node_of(x)
        # The cache of AOTAutograd knows a method of a tensor by this.
        source.meta.setdefault("example_value", x)
        node = self.tracer.create_node("call_method", target, (source, *args[1:]), kwargs)
        node.meta["val"] = x.requires_grad_(*args[1:], **kwargs)
        proxy_tensor.set_proxy_slot(x, self.tracer, proxy_tensor._ProxyTensor(fx.Proxy(node, self.tracer), None))
        return x

    def _attribute(self, name: str, value: object) -> fx.Proxy:
        if "." in name:
            raise NormaliseError(f"`{self._node}` reads an attribute of a submodule, {name}")
        if name not in self.attributes:
            setattr(self.tracer.root, name, value)
            proxy = self.attributes[name] = self.tracer.create_proxy("get_attr", name, (), {})
            proxy.node.meta.setdefault("val", None)
        return self.attributes[name]

    def _enter_autocast(self, target: Any, args: tuple[Any, ...]) -> tuple[fx.Node, torch.amp.autocast]:
        # make_fx would write the node and leave autocast off, and the values inside would have another dtype.
        node = self.tracer.create_node("call_function", target, args, {})
        node.meta["val"] = None
        mode = _autocast(*args)
        # under make_fx it would write a node of its own
        with torch._C.DisableTorchFunction():
            mode.__enter__()  # type: ignore[no-untyped-call]
        self._autocasts.append((args, mode))
        return node, mode

    def _exit_autocast(
        self, target: Any, region: tuple[fx.Node, torch.amp.autocast]
    ) -> tuple[fx.Node, torch.amp.autocast]:
        entered, mode = region
        if not self._autocasts or self._autocasts[-1][1] is not mode:
            raise NormaliseError(f"`{self._node}` leaves an autocast region that is not the innermost")
        self.tracer.create_node("call_function", target, (entered,), {}).meta["val"] = None
        self._autocasts.pop()
        with torch._C.DisableTorchFunction():
            mode.__exit__(None, None, None)
        return region

    def _enter_inference_mode(self, target: Any, enabled: bool) -> tuple[fx.Node, bool]:
        # Entering it would leave dispatch state behind, and its tensors cannot be traced: values are made without gradient.
        node = self.tracer.create_node("call_function", target, (enabled,), {})
        node.meta["val"] = None
        before = torch.is_grad_enabled()
        with torch._C.DisableTorchFunction():
            torch._C._set_grad_enabled(not enabled)
        return node, before

    def _exit_inference_mode(self, target: Any, region: tuple[fx.Node, bool]) -> None:
        entered, before = region
        self.tracer.create_node("call_function", target, (entered,), {}).meta["val"] = None
        with torch._C.DisableTorchFunction():
            torch._C._set_grad_enabled(before)

    def _copy(self, n: fx.Node) -> object:
        """A node that runs under vmap, as Dynamo wrote it."""

        def proxy(arg: fx.Node) -> Any:
            operand = self.env[arg]
            return (
                operand.proxy if isinstance(operand, _Batched) else pytree.tree_map(self.tracer.unwrap_proxy, operand)
            )

        with self._set_current_node(n):
            out = self.tracer.create_proxy(n.op, n.target, *fx.node.map_arg((n.args, n.kwargs), proxy))
        out.node.meta.update({"val": None, BATCHED: True})
        if n.target is not VMAP_OUT or any(user in self.batched for user in n.users):
            return _Batched(out)
        out.node.meta["val"] = value = self.kept[n]
        return proxy_tensor.track_tensor_tree(value, out, constant=None, tracer=self.tracer)

    def _keep(self, target: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        n = self._node
        if "example_value" not in n.meta and n.users:
            raise NormaliseError(f"Dynamo recorded no value for `{n}`")
        value = self.kept[n]

        def proxy(arg: fx.Node) -> Any:
            operand = self.env[arg]
            if isinstance(operand, torch.nn.Module):
                return self._attribute(str(arg.target), operand)
            return pytree.tree_map(self.tracer.unwrap_proxy, operand)

        out = self.tracer.create_proxy("call_function", target, *fx.node.map_arg((n.args, n.kwargs), proxy))
        out.node.meta["val"] = value
        if BINDINGS in n.meta:
            out.node.meta[BINDINGS] = n.meta[BINDINGS]
        leading = NORMALISED_BODIES.get(str(target))
        if leading is not None and not any(isinstance(x, fx.Node) for x in n.kwargs.values()):
            autocasts = tuple(args for args, _ in self._autocasts)
            body = _Body(out.node, args[0], args[leading:], torch.is_grad_enabled(), autocasts)
            self.bodies.setdefault(str(n.all_input_nodes[0].target), []).append(body)
        return proxy_tensor.track_tensor_tree(value, out, constant=None, tracer=self.tracer)


def _carry_over(gm: fx.GraphModule, new: fx.GraphModule) -> None:
    """What Dynamo says about the graph and its inputs: AOTAutograd reads static inputs and duplicates off it."""
    old_inputs, new_inputs = (list(g.graph.find_nodes(op="placeholder")) for g in (gm, new))
    for old, node in zip(old_inputs, new_inputs, strict=True):
        node.target, node.type = old.target, old.type
        node._rename(old.name)
        node.meta = {**old.meta, "val": node.meta.get("val", recorded(old))}
        if hasattr(old, "_dynamo_source"):
            node._dynamo_source = old._dynamo_source
    new.meta.update(gm.meta)
    new.training = gm.training
    for name in _ATTRIBUTES:
        if hasattr(gm, name):
            setattr(new, name, getattr(gm, name))
    used = {node.target for node in gm.graph.find_nodes(op="get_attr")}
    for name, child in gm.named_children():
        if name not in used:
            setattr(new, name, child)


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own for whoever compiles it to change; tensors are shared."""
    new = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    new.meta.update(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(new, name, _copied(child))
    return new


def _write_constants(new: fx.GraphModule, own: set[str]) -> None:
    """Put the tensors that the retrace made of Python numbers back into the text."""
    graph = new.graph
    for attribute in graph.find_nodes(op="get_attr"):
        value = getattr(new, attribute.target)
        if attribute.target in own or not isinstance(value, torch.Tensor):
            continue
        for fresh in list(attribute.users):
            if fresh.target is not aten.lift_fresh_copy.default:
                raise NormaliseError(f"`{fresh}` reads a constant that the retrace made")
            # torch.tensor() detaches the fresh tensor in place.
            detached = [user for user in fresh.users if user.target is aten.detach_.default]
            with graph.inserting_before(fresh):
                target = torch.tensor if value.dim() else aten.scalar_tensor.default
                node = graph.call_function(target, (value.tolist(),), {"dtype": value.dtype, "device": value.device})
            node.meta = dict(fresh.meta)
            for old in [*detached, fresh]:
                old.replace_all_uses_with(node)
                graph.erase_node(old)
        graph.erase_node(attribute)
        delattr(new, attribute.target)


@contextlib.contextmanager
def _no_new_guards(fake_mode: FakeTensorMode) -> Iterator[None]:
    """Let anything raise that would make the compiled program hold for fewer sizes than Dynamo's graph does."""
    shape_env = fake_mode.shape_env
    if shape_env is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        if shape_env.var_to_range:
            # what the cache holds is set up anew, by questions about the bytes of a storage
            stack.enter_context(disable_fake_tensor_cache(fake_mode))
            stack.enter_context(mock.patch.object(shape_env, "_maybe_evaluate_static", _factored(shape_env)))
        if hasattr(shape_env, "error_on_new_guards"):
            stack.enter_context(shape_env.error_on_new_guards())
        else:

            def refuse(expr: object, value: object) -> None:
                raise NormaliseError(f"the retrace would add the guard {expr} == {value}")

            stack.enter_context(mock.patch.object(shape_env, "_check_frozen", refuse))
        yield


def _factored(shape_env: ShapeEnv) -> Callable[..., sympy.Basic | None]:
    """`_maybe_evaluate_static`, which also looks at the sides of a relation, and at their difference, as products.

    A guard of Dynamo's may replace a symbol by a sum. Of 128·s0 - s0·s1, multiplied out, the ranges of the symbols no more tell
    that it is positive, so that asking whether a tensor of so many elements is empty would add a guard.
    """
    known = shape_env._maybe_evaluate_static

    def evaluate(expr: sympy.Basic, **kwargs: Any) -> sympy.Basic | None:
        found = known(expr, **kwargs)
        if found is not None or not isinstance(expr, Relational):
            return found
        sides = [sympy.expand(shape_env.simplify(side)) for side in (expr.lhs, expr.rhs)]
        for left, right in (sides, (sides[0] - sides[1], sympy.Integer(0))):
            lower, upper = (bound_sympy(sympy.factor(side), shape_env.var_to_range) for side in (left, right))
            below, above = lower.upper < upper.lower, lower.lower > upper.upper
            if below or above:
                # every pair of values is in the same relation as these two
                return sympy.sympify(expr.func(-1, 0) if below else expr.func(1, 0))
        return None

    return evaluate


@contextlib.contextmanager
def _no_questions_of_layout() -> Iterator[None]:
    """Keep make_fx from asking in which memory format a tensor of symbolic sizes is dense, for a note that nobody reads.

    The answer is a guard: a graph that slices `x[1:]` could not be retraced.
    """

    def of_known_sizes(value: torch.Tensor) -> object:
        return None if value._has_symbolic_sizes_strides else _extract_tensor_metadata(value)

    with mock.patch.object(proxy_tensor, "_extract_tensor_metadata", of_known_sizes):
        yield


def _autocast(device: str, dtype: torch.dtype | None, enabled: bool, cache: bool | None) -> torch.amp.autocast:
    # make_fx turns the cache of casts off: it would hand out tensors that the tracer has not seen.
    return torch.amp.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _is_torch(target: object) -> bool:
    if isinstance(
        target, types.BuiltinFunctionType | types.MethodDescriptorType | OpOverload | torch._ops.OpOverloadPacket
    ):
        return True
    return module_of(target).partition(".")[0] == "torch"


def _is_value(x: object) -> bool:
    if isinstance(x, tuple | list | dict):
        return all(y is None or _is_value(y) for y in (x.values() if isinstance(x, dict) else x))
    return isinstance(x, (torch.Tensor, *Sym, slice, *_PLAIN))


def _writes_metadata(node: fx.Node) -> bool:
    if not (isinstance(node.target, OpOverload) and torch.Tag.inplace_view in node.target.tags):
        return False
    source = node.args[0]
    return not (isinstance(source, fx.Node) and source.target is aten.lift_fresh_copy.default)


def _metadata(x: torch.Tensor) -> tuple[object, ...]:
    """The tensor's dtype, device, shape and layout, to be compared and hashed without a guard."""
    if x.layout is not torch.strided:
        return x.dtype, x.device, _exprs(x.shape), x.layout
    return (
        x.dtype,
        x.device,
        _exprs(x.shape),
        _exprs(x.stride()),
        _exprs((x.storage_offset(),)),
        x.is_conj(),
        x.is_neg(),
    )


def _exprs(sizes: Sequence[int | torch.SymInt]) -> tuple[object, ...]:
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes)


def _alike(a: _Body, b: _Body) -> bool:
    """Whether one normalised body can stand for both calls."""
    if (a.module, a.grad, a.autocasts, a.call.target) != (b.module, b.grad, b.autocasts, b.call.target):
        return False
    return len(a.operands) == len(b.operands) and all(map(_same_metadata, a.operands, b.operands))


def _same_metadata(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.requires_grad, *_metadata(a)) == (b.requires_grad, *_metadata(b))
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return type(a) is type(b) and a == b
