"""What `normalise` claims: the same computation in ATen operators, with everything that others read off the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from attnfuse.passes.normalise import NORMALISED_BODIES, NormaliseError, _copied, _Replay, normalise
from tests.harness import OLDER_TORCH
from tests.harness import check as attention_check

aten = torch.ops.aten
Function = Callable[..., Any]


def bodies(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph and those of its higher-order operators."""
    return [child for child in gm.modules() if isinstance(child, fx.GraphModule)]


def nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of the graph and its bodies."""
    return [node for body in bodies(gm) for node in body.graph.nodes]


def calls(gm: fx.GraphModule) -> list[str]:
    """What the graph itself calls, in order."""
    return [str(node.target) for node in gm.graph.nodes if node.op.startswith("call")]


def described(x: object) -> object:
    """A recorded value: its type and, of a tensor, all that an operator may ask for."""
    if isinstance(x, Tensor):
        layout = (x.stride(), x.storage_offset()) if x.layout is torch.strided else x.layout
        return tuple(map(str, (type(x).__name__, x.dtype, x.device, x.shape, layout, x.requires_grad)))
    if isinstance(x, tuple | list):
        return type(x).__name__, *map(described, x)
    return f"{type(x).__name__} {x}"


def snapshot(gm: fx.GraphModule) -> list[object]:
    """Nodes with all of their meta data, attributes and their identity: nothing of it may change."""
    shown: list[object] = []
    for body in bodies(gm):
        shown.append(body.code)
        kept = {name: value for name, value in vars(body).items() if name not in ("_modules", "_lineno_map", "_code")}
        shown += [(name, id(value)) for name, value in sorted(kept.items())]
        shown += [sorted(body.meta), body.training, sorted(dict(body.named_children()))]
        for node in body.graph.nodes:
            value = node.meta.get("example_value")
            shown.append((node.format_node(), id(value), described(value), sorted(node.meta), id(node.meta)))
    return shown


def sizes_known(env: ShapeEnv | None) -> list[object]:
    """All that a shape environment holds that decides for which sizes a compiled program is used.

    Sizes that depend on values are left out: the retrace makes them anew and binds them to Dynamo's.
    """
    if env is None:
        return []
    replaced, ranges = (
        {symbol: x for symbol, x in found.items() if not str(symbol).startswith(("u", "zuf"))}
        for found in (env.replacements, env.var_to_range)
    )
    asserts = {str(symbol): [str(x.expr) for x in found] for symbol, found in env.deferred_runtime_asserts.items()}
    return [[str(guard.expr) for guard in env.guards], replaced, ranges, asserts, dict(env.axioms)]


class Capture:
    """A backend that normalises, checks what holds of every graph, and compiles the result, or keeps the error."""

    def __init__(self) -> None:
        self.pairs: list[tuple[fx.GraphModule, fx.GraphModule]] = []
        self.errors: list[NormaliseError] = []
        self.sources: list[list[str]] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        given = snapshot(gm)
        values = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
        env = next((x.fake_mode.shape_env for x in values if isinstance(x, torch._subclasses.FakeTensor)), None)
        known = sizes_known(env)
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        try:
            new = normalise(gm)
        except NormaliseError as error:
            self.errors.append(error)
            new = None
        finally:
            now = snapshot(gm)
            assert now == given, [(x, y) for x, y in zip(now, given, strict=False) if x != y]
            assert sizes_known(env) == known, "sizes are guarded or replaced"
            left = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            assert left == modes, f"modes are left switched: {left}, before {modes}"
        if new is None:
            return aot_eager(gm, inputs)
        check_form(gm, new)
        inputs_now = new.graph.find_nodes(op="placeholder")
        self.sources.append([node._dynamo_source.name for node in inputs_now if hasattr(node, "_dynamo_source")])
        self.pairs.append((_copied(gm), _copied(new)))  # AOTAutograd changes what it gets
        return aot_eager(new, inputs)


def normalised(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and the bodies in it that are not copies."""
    yield gm
    for node in gm.graph.nodes:
        if str(node.target) in NORMALISED_BODIES:
            yield from normalised(gm.get_submodule(node.args[0].target))


def check_form(gm: fx.GraphModule, new: fx.GraphModule) -> None:
    """What holds of every normalised graph."""
    for body in bodies(new):
        body.graph.lint()
    for node in (node for body in normalised(new) for node in body.graph.nodes):
        assert node.op in ("placeholder", "output", "get_attr", "call_function") or node.target == "requires_grad_"
        module = node.op == "get_attr" and isinstance(getattr(node.graph.owning_module, node.target), fx.GraphModule)
        assert node.op == "output" or module or "val" in node.meta, node.format_node()
    assert not list(new.parameters())[len(list(gm.parameters())) :]
    assert not list(new.buffers())[len(list(gm.buffers())) :]
    old_inputs, new_inputs = (list(g.graph.find_nodes(op="placeholder")) for g in (gm, new))
    assert [n.name for n in new_inputs] == [n.name for n in old_inputs]
    assert [n.target for n in new_inputs] == [n.target for n in old_inputs]
    for old, now in zip(old_inputs, new_inputs, strict=True):
        assert now.meta.keys() - {"val"} == old.meta.keys() - {"val"}
        assert all(now.meta[key] is old.meta[key] for key in old.meta)
        assert getattr(now, "_dynamo_source", None) is getattr(old, "_dynamo_source", None)


def fresh(x: object) -> object:
    """A leaf with the same values, strides and wish for a gradient."""
    if not isinstance(x, Tensor):
        return x
    return x.detach().clone().requires_grad_(x.requires_grad)


def results(fn: Function, inputs: Sequence[object], kept: nn.Module | None) -> list[object]:
    """Outputs, inputs after the call, gradients of inputs and parameters, state of the generator after forward and backward."""
    given = [fresh(x) for x in inputs]
    if kept is not None:
        kept.zero_grad()
    torch.manual_seed(0)
    out = fn(*given)
    states = [torch.get_rng_state()]
    leaves = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
    asked = [x for x in leaves if x.requires_grad]
    if asked:
        sum((x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in asked).backward()  # type: ignore[union-attr]
    states.append(torch.get_rng_state())
    tensors = [x for x in given if isinstance(x, Tensor)]
    gradients = [x.grad for x in tensors] + [p.grad for p in (kept.parameters() if kept is not None else ())]
    return [
        pytree.tree_map_only(Tensor, torch.Tensor.detach, out),
        [x.requires_grad for x in leaves],
        [x.detach() for x in tensors],
        [g if g is None else g.clone() for g in gradients],
        states,
    ]


def same(mine: object, theirs: object, where: str = "") -> None:
    """Asserts that two results are equal in every bit, type and stride."""
    mine_leaves, mine_tree = pytree.tree_flatten(mine)
    their_leaves, their_tree = pytree.tree_flatten(theirs)
    assert mine_tree == their_tree, where
    for at, (x, y) in enumerate(zip(mine_leaves, their_leaves, strict=True)):
        if isinstance(x, Tensor):
            assert isinstance(y, Tensor), (where, at)
            assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride()), (where, at, x.stride(), y.stride())
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y, (where, at)


def check(fn: Function, *inputs: object, dynamic: bool | None = None, kept: nn.Module | None = None) -> Capture:
    """Compiles the normalised graphs of `fn` and compares everything with eager, exactly; none may be refused."""
    capture = attempt(fn, *inputs, dynamic=dynamic, kept=kept)
    assert not capture.errors, capture.errors
    return capture


def attempt(fn: Function, *inputs: object, dynamic: bool | None = None, kept: nn.Module | None = None) -> Capture:
    """As `check`, for graphs that may be refused."""
    capture = Capture()
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=capture, dynamic=dynamic)
    mine = results(compiled, inputs, kept)
    torch._dynamo.reset()
    same(mine, results(torch.compile(fn, backend=aot_eager, dynamic=dynamic), inputs, kept))
    return capture


def one(capture: Capture) -> fx.GraphModule:
    """The only graph, normalised."""
    ((_, new),) = capture.pairs
    return new


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


X = randn(4, 6)
G = randn(4, 6, grad=True)


# The computation


EXACT: dict[str, tuple[Function, tuple[object, ...]]] = {}


def exact(*inputs: object, runs: bool = True) -> Callable[[Function], Function]:
    """Registers a function whose normalised graph has to compute what it does, for inputs that ask for a gradient or not.

    Args:
        runs: whether this PyTorch runs it at all.
    """

    def register(fn: Function) -> Function:
        if runs:
            EXACT[fn.__name__] = fn, inputs
        return fn

    return register


@exact(G)
def methods_and_operators(x: Tensor) -> Any:
    y = (x / 2 + x**2).softmax(-1).mul(3.0) - 1
    return y.sum(0), y[1:, ..., None], -y.size(0) * y, 2 // (y > -9).sum(), y.max(-1)


@exact(G, G)
def einsum_and_matmuls(x: Tensor, y: Tensor) -> Any:
    return torch.einsum("ij,kj->ik", x, y), x @ y.T, F.linear(x, y), torch.addmm(x[:, :4], x, y.mT)


@exact(G)
def indexing(x: Tensor) -> Any:
    rows = torch.tensor([2, 0])
    return x[rows], x[rows, 1:3], x[:, [0, 3]], x[x[:, 0] > -9, 2], x[None, -1], x[::2, 1::3]


@exact(G)
def constants(x: Tensor) -> Any:
    c = torch.tensor([1.0, 2.0, 0.1, -0.0, float("inf"), float("nan")])
    return x * c, x + torch.tensor(0.1), torch.tensor(3), torch.tensor([[True], [False]]), c.double() * 2


@exact(G)
def factories(x: Tensor) -> Any:
    return torch.arange(6) + x, x.new_full((2, 6), -1.5) + x[:2], torch.full_like(x, float("-inf")), torch.eye(6) @ x.T


@exact(G)
def writes_to_intermediates(x: Tensor) -> Any:
    y = x * 2
    y += 1
    y[0] = 3.0
    y[:, 1].mul_(4.0)
    z = y.clone().masked_fill_(y > 2, 0.0)
    z.view(-1)[3:5].copy_(x[0, :2])
    return y.exp(), z, y.relu_().sum()


@exact(X)
def writes_to_an_input(x: Tensor) -> Any:
    x.add_(1)
    return x * 2


@exact(X, G)
def writes_to_a_view_of_an_input(x: Tensor, g: Tensor) -> Any:
    row = x[1:].t()
    row.mul_(3)
    x[0].copy_(g.detach()[0])
    return x * g


@exact(G)
def writes_to_a_view_that_needs_a_gradient(x: Tensor) -> Any:
    y = x.clone()
    y.view(6, 4)[2:4] += x.view(6, 4)[:2]
    y.t()[0].zero_()
    return y.sin(), y


@exact(X)
def an_input_and_its_views_returned(x: Tensor) -> Any:
    return x, x[1:], x.t(), x.view(-1), x.detach()


@exact(G)
def the_same_output_twice(x: Tensor) -> Any:
    y = x + 1
    return y, y, [y, {"a": y.t()}], 5, None


@exact(G)
def transposed_in_place(x: Tensor) -> Any:
    y = x * 2
    y.t_()
    return y, y @ x


@exact(G)
def new_axis_in_place(x: Tensor) -> Any:
    y = x * 2
    z = y + 1
    y.unsqueeze_(0)
    w = y + z
    y.squeeze_(0).transpose_(0, 1)
    return w, y, z


@exact(G)
def as_strided_in_place(x: Tensor) -> Any:
    y = x * 2
    y.as_strided_((2, 2), (6, 1), 3)
    return y * 2


@exact(G)
def detached_in_place(x: Tensor) -> Any:
    y = x * 2
    y.detach_()
    return y * x, y


@exact(G)
def asks_for_a_gradient_inside(x: Tensor) -> Any:
    y = x.detach().clone().requires_grad_()
    return y * 2, y.sin() + x


@exact(G)
def gradients_off_in_a_region(x: Tensor) -> Any:
    with torch.no_grad():
        y = x.exp()
        with torch.enable_grad():
            z = x.sin()
    return y * x, y, z


@exact(G)
def gradients_off_from_here(x: Tensor) -> Any:
    y = x.exp()
    torch.set_grad_enabled(False)
    z = y.sin()
    torch.set_grad_enabled(True)
    return y, z * x


@exact(G, G)
def autocast_region(x: Tensor, y: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        z = x @ y.T
        with torch.autocast("cpu", enabled=False):
            w = x @ y.T + z.float()
        v = w @ x
        with torch.autocast("cpu", torch.float16):
            u = x.sin() @ y.cos().T
    return z, w, v, u, v.float() @ y.T


@exact(G)
def double_softmax_of_half(x: Tensor) -> Any:
    h = x.bfloat16()
    return F.softmax(h, -1, dtype=torch.float32).to(h.dtype), h.softmax(0), torch.log_softmax(h, 1)


@exact(randn(1, 2, 4, 4, grad=True))
def attentions(x: Tensor) -> Any:
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    return (
        F.scaled_dot_product_attention(x, x, x, is_causal=True),
        F.scaled_dot_product_attention(x, x, x, mask),
        F.scaled_dot_product_attention(x, x, x, scale=0.3, dropout_p=0.5),
    )


@exact(G)
def random_numbers(x: Tensor) -> Any:
    a = F.dropout(x, 0.5)
    b = torch.rand_like(x)
    unused = torch.randn(3)  # noqa: F841
    c = torch.bernoulli(b)
    d = F.dropout(x, 0.5, training=False) + torch.randint(0, 9, (6,)) + torch.randperm(6)
    x = x + torch.empty(6).normal_()
    return a, b, c, d, F.dropout(F.dropout(x, 0.1), 0.1), F.alpha_dropout(x, 0.3, training=True)


@exact(G)
def several_results(x: Tensor) -> Any:
    a, b = x.split(3, 1)
    c, d, e = x.chunk(3, 1)
    (values, indices), (u, s, v) = x.sort(), torch.linalg.svd(x, full_matrices=False)
    return a * b, [c, d * e], values * indices, x.topk(2).values, s * u.sum() * v.sum(), x.unbind()[2]


@exact(X.to(torch.complex64))
def complex_numbers(x: Tensor) -> Any:
    y = x.conj()
    return y * 2j, y.imag, torch.view_as_real(x), x.abs(), y.resolve_conj()


@exact(G)
def layers_of_one_kind(x: Tensor) -> Any:
    outs = []
    for scale in (2, 2.0, 0.0, -0.0, True, 0.5, 2, 0.5):
        x = (x * scale + 1).softmax(-1).clone()
        outs.append(x / 3)
        outs.append(torch.full((2,), scale, dtype=torch.float32))
        x = x.relu_().sum(0, keepdim=True).expand(4, 6)
    return outs


@exact(G)
def unused_results(x: Tensor) -> Any:
    x.sin()
    torch._check(x.size(0) == 4)
    assert x.size(1) > 1
    return x.shape[0] * x


@exact(randn(2, 3, 8, 8, grad=True), randn(4, 3, 3, 3, grad=True))
def convolution_and_norms(x: Tensor, w: Tensor) -> Any:
    y = F.conv2d(x, w, padding=1).to(memory_format=torch.channels_last)
    return F.group_norm(y, 2), F.layer_norm(y, (8, 8)), F.interpolate(y, scale_factor=2), F.max_pool2d(y, 2), F.gelu(y)


@exact(G)
def checkpointed(x: Tensor) -> Any:
    def layer(x: Tensor, factor: float) -> Tensor:
        return F.dropout((x * factor).sin(), 0.5).softmax(-1)

    for factor in (2.0, 3.0):
        x = checkpoint(layer, x, factor, use_reentrant=False)
    return x


@exact(G, X)
def checkpoint_with_modes(x: Tensor, y: Tensor) -> Any:
    def layer(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            z = x @ y.T
        with torch.no_grad():
            w = z.exp()
        return z.float() * w, z

    with torch.autocast("cpu", torch.bfloat16):
        a = checkpoint(lambda x: x @ y.T, x, use_reentrant=False)
    with torch.no_grad():
        b = checkpoint(layer, x, use_reentrant=False)
    return a, b, checkpoint(layer, x, use_reentrant=False)


@exact(G)
def checkpoint_in_a_checkpoint(x: Tensor) -> Any:
    def inner(x: Tensor) -> Tensor:
        return x.sin().exp()

    def outer(x: Tensor) -> Tensor:
        return checkpoint(inner, x * 2, use_reentrant=False) + checkpoint(inner, x, use_reentrant=False)

    return checkpoint(outer, x, use_reentrant=False).cos()


@exact(G)
def one_layer_checkpointed_on_other_shapes(x: Tensor) -> Any:
    def layer(x: Tensor) -> Tensor:
        return x.softmax(-1) * x.shape[0]

    y = checkpoint(layer, x, use_reentrant=False)
    return checkpoint(layer, y.T, use_reentrant=False), checkpoint(layer, x[:2].double(), use_reentrant=False)


@exact(G)
def checkpoint_after_a_change_of_shape(x: Tensor) -> Any:
    y = x * 2
    y.t_()
    return checkpoint(lambda y: y.softmax(-1) @ x, y, use_reentrant=False), y


class Doubled(torch.autograd.Function):
    """Its backward is not the derivative of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.sin() * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * 100 + x * ctx.factor, None


@exact(G)
def custom_backward(x: Tensor) -> Any:
    return Doubled.apply(x, 3.0) + Doubled.apply(x * 2, 3.0)  # type: ignore[no-untyped-call]


@exact(G)
def custom_backward_in_a_checkpoint(x: Tensor) -> Any:
    return checkpoint(lambda x: Doubled.apply(x.softmax(-1), 3.0) * x, x, use_reentrant=False)


@exact(X)
def branches(x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda x: (x.sin().clone(),), lambda x: (x.cos().clone(),), (x,))


@exact(G, runs=not OLDER_TORCH)
def scanned(x: Tensor) -> Any:
    from torch._higher_order_ops.scan import scan

    return scan(lambda carry, x: (carry + x.sin(), carry * 2), torch.zeros(6), x)


@exact(G)
def values_from_numpy(x: Tensor) -> Any:
    import numpy as np

    return x * torch.from_numpy(np.arange(6, dtype=np.float32))


@torch._dynamo.allow_in_graph
def _fails_in_the_retrace(x: Tensor) -> Tensor:
    mode = proxy_tensor.get_proxy_mode()
    if mode is not None and mode.pre_dispatch:
        raise ZeroDivisionError("injected")
    return x.sin()


REFUSED: dict[str, tuple[Function, tuple[object, ...], str, str]] = {}


def refused(code: str, reason: str, *inputs: object) -> Callable[[Function], Function]:
    """Registers a function whose graph cannot be retraced exactly, with the code and a part of the reason."""

    def register(fn: Function) -> Function:
        REFUSED[fn.__name__] = fn, inputs, code, reason
        return fn

    return register


@refused("AF041", "`t_` changes an input's shape", X)
def transposes_an_input_after_a_write(x: Tensor) -> Any:
    y = x.softmax(-1)
    x.mul_(2).t_()
    return x * 2, y


@refused("AF041", "`t_` changes an input's shape", X)
def transposes_the_input_of_a_checkpoint(x: Tensor) -> Any:
    return checkpoint(lambda y: y.t_().softmax(-1), x * 2, use_reentrant=False)


@refused("AF041", "`t_` changes", X)
def transposes_the_result_of_a_checkpoint(x: Tensor) -> Any:
    y = checkpoint(lambda x: x.softmax(-1), x, use_reentrant=False)
    z = y * 2
    y.t_()
    return y, z


@refused("AF041", "changes the storage", X)
def sets_a_storage(x: Tensor) -> Any:
    y = x * 2
    y.set_(x + 1)
    return y * 2


@refused("AF041", "changes the storage", X)
def sets_a_storage_with_modes_switched(x: Tensor) -> Any:
    torch.set_grad_enabled(False)
    with torch.autocast("cpu", torch.float16):
        y = x * 2
        y.set_(x + 1)
    torch.set_grad_enabled(True)
    return y * 2


@refused("AF041", "the retrace raised", X)
def fails_with_modes_switched(x: Tensor) -> Any:
    torch.set_grad_enabled(False)
    with torch.autocast("cpu", torch.float16):
        y = _fails_in_the_retrace(x * 2)
    torch.set_grad_enabled(True)
    return y * 2


@refused("AF041", "switches a mode under vmap", X)
def switches_under_vmap(x: Tensor) -> Any:
    def row(x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.softmax(-1)

    return torch.func.vmap(row)(x)


@refused("AF041", "part of a function transform", X)
def differentiates(x: Tensor) -> Any:
    return torch.func.grad(lambda x: x.softmax(-1).exp().sum())(x)


@refused("AF041", "no tensor input", 3)
def without_a_tensor(n: int) -> Any:
    return torch.arange(n).softmax(-1, dtype=torch.float32)


@refused("AF042", "is a TwoTensor", TwoTensor(X, X))
def subclass(x: Tensor) -> Any:
    return x.softmax(-1)


@refused("AF042", "is a NestedTensor", torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged))
def nested_tensor(x: Tensor) -> Any:
    return x * 2


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    """The error has a code and names the node; the given graph still compiles to what stock computes."""
    fn, inputs, code, reason = REFUSED[name]
    (error,) = attempt(fn, *inputs).errors
    assert error.code == code
    assert reason in error.reason


@pytest.mark.parametrize("name", EXACT)
def test_computes_what_stock_does(name: str) -> None:
    """Outputs, gradients, strides, written inputs and the generator's state are those of Dynamo's graph, in every bit."""
    fn, inputs = EXACT[name]
    check(fn, *inputs)


# What others read off the graph


class _Observed(fx.Interpreter):
    """Runs a graph and compares what each node gives with its value in the graph."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        value = n.meta.get("val")
        if isinstance(result, Tensor) and n.op != "placeholder":
            assert isinstance(value, Tensor), n.format_node()
            assert layout(result) == layout(value), n.format_node()
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if str(target) in NORMALISED_BODIES:
            return _Observed(args[0]).run(*args[1:])
        return super().call_function(target, args, kwargs)


def layout(x: Tensor) -> tuple[object, ...]:
    """Type, sizes, strides and offset, of symbols what they stand for."""
    return x.dtype, *map(hint, (*x.shape, *x.stride(), x.storage_offset()))


def hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def example(value: object) -> object:
    """A real value for a fake one."""
    if isinstance(value, Tensor):
        return torch.empty_strided([*map(hint, value.shape)], [*map(hint, value.stride())], dtype=value.dtype).fill_(1)
    return hint(value) if isinstance(value, torch.SymInt) else value


@pytest.mark.parametrize("name", EXACT)
def test_values_are_those_that_the_nodes_compute(name: str) -> None:
    fn, inputs = EXACT[name]
    for _, new in check(fn, *inputs).pairs:
        given = [example(node.meta["val"]) for node in new.graph.find_nodes(op="placeholder")]
        with torch.no_grad(), torch.enable_grad():
            _Observed(new).run(*given)


def test_operations_stay_single_nodes() -> None:
    """Each spelling of an operation becomes the one operator that it was before dispatch; modes stay in their places."""

    def fn(x: Tensor) -> Any:
        a = x.softmax(-1) + torch.softmax(x, -1) + F.softmax(x, -1)
        b = a @ x.mT + torch.matmul(a, x.transpose(0, 1))
        c = F.linear(b, b) + torch.einsum("ij,kj->ik", a, x)
        d = F.dropout(c, 0.5)[None, None]
        with torch.no_grad():
            e = F.scaled_dot_product_attention(d, d, d)
        with torch.autocast("cpu", torch.bfloat16):
            f = c @ c
        return d, e, f

    new = one(check(fn, G))
    assert not new.graph.find_nodes(op="call_method")
    names = [name.removeprefix("aten.") for name in calls(new)]
    assert [names.count(name) for name in ("softmax.int", "linear.default", "dropout.default")] == [3, 1, 1]
    assert names.count("scaled_dot_product_attention.default") == 1
    switches = [name for name in names if "grad_enabled" in name or "autocast" in name or "scaled" in name]
    off, attention, on, enter, leave = switches
    assert attention == "scaled_dot_product_attention.default"
    assert "grad_enabled" in off
    assert "grad_enabled" in on
    assert "_enter_autocast" in enter
    assert "_exit_autocast" in leave


class Block(nn.Module):
    """A layer with parameters, a buffer and a float that Dynamo makes an input where it differs between layers."""

    scales: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("scales", torch.linspace(0.5, 1.0, 6))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.linear(x) * self.scales * self.scale).softmax(-1)


class Stack(nn.Module):
    """Layers, some of them checkpointed."""

    def __init__(self, *scales: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(scale) for scale in scales)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_modules_keep_their_names_and_lines(checkpointed: bool, dynamic: bool) -> None:
    """Every operator has the stack trace and the module stack of a node that Dynamo wrote, in the same order."""
    model = Stack(0.5, 0.25, 0.5)
    model.checkpointed = checkpointed
    ((given, new),) = check(model, G, dynamic=dynamic, kept=model).pairs

    def places(gm: fx.GraphModule) -> list[tuple[str, str]]:
        found: dict[tuple[str, str], None] = {}
        for node in nodes(gm):
            if node.op.startswith("call") and str(node.target) not in NORMALISED_BODIES and "getitem" not in str(node):
                modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
                found[modules[-1] if modules else "", node.meta["stack_trace"]] = None
        return sorted(found)

    assert {module.rpartition(".")[2] for module, _ in places(new)} >= {"linear"}
    assert {module for module, _ in places(new)} - {""} == {module for module, _ in places(given)} - {""}
    assert set(places(new)) <= set(places(given))


def test_what_dynamo_says_about_inputs_is_carried_over() -> None:
    """Sources of the inputs, by which AOTAutograd knows parameters and duplicates, and what Dynamo set on the graph."""
    model = Stack(0.5)
    capture = check(model, G, kept=model)
    ((given, new),) = capture.pairs
    assert new.meta == given.meta
    (sources,) = capture.sources
    names = ("['weight']", "['bias']", "['scales']", "L['x']")
    assert {name for name in names for source in sources if source.endswith(name)} == set(names)


# Symbolic sizes


@pytest.mark.parametrize("name", ["methods_and_operators", "writes_to_intermediates", "attentions", "checkpointed"])
def test_symbolic_sizes_add_no_guard(name: str) -> None:
    """`Capture` compares the shape environment before and after; here it has symbols."""
    fn, inputs = EXACT[name]
    new = one(check(fn, *inputs, dynamic=True))
    assert any(isinstance(node.meta.get("val"), torch.SymInt) for node in new.graph.find_nodes(op="placeholder"))


def test_sizes_that_a_graph_computes_with() -> None:
    def fn(x: Tensor) -> Any:
        B, N = x.shape
        y = x.reshape(B * N).view(N, B) + torch.arange(B) * (N // 2)
        return (
            y[1:],
            (x * 2)[:, 1:],
            x.new_zeros(B + N, N),
            x[:, None].expand(B, 3, N).flatten(0, 1),
            torch.ones(N).sum(),
        )

    check(fn, G, dynamic=True)


@pytest.mark.parametrize("outputs", [False, True])
def test_sizes_that_depend_on_values(outputs: bool) -> None:
    """What nonzero() and item() give is a new symbol in the retrace, bound where it is made."""

    def fn(x: Tensor, n: Tensor) -> Any:
        rows = (x[:, 0] > 0).nonzero().squeeze(-1)
        size = n.item()
        torch._check(size >= 2)  # type: ignore[operator]
        return x[rows].softmax(-1), x[x > 0] * 2, torch.arange(size) + 1, rows

    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        new = one(check(fn, X if outputs else G, torch.tensor(3)))
    unbacked = [node for node in new.graph.nodes if "unbacked_bindings" in node.meta]
    assert {str(node.target) for node in unbacked} >= {"aten.nonzero.default", "aten.index.Tensor"}
    assert "aten.item.default" in calls(new)


def _attends(x: Tensor) -> Tensor:
    return (x @ x.mT).tanh().softmax(-1) @ x


def test_a_size_that_values_tell_is_a_miss_beside_what_is_fused() -> None:
    def fn(x: Tensor, n: Tensor) -> Any:
        size = n.sum().item()
        torch._check(size >= 2)  # type: ignore[operator]
        torch._check(size <= x.shape[-2])  # type: ignore[operator]
        return _attends(x[:, :, :size]), _attends(x)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        first, second = attention_check(fn, torch.randn(1, 2, 8, 4), torch.tensor(3)).remarks
    assert (first.code, second.code) == ("AF033", "AF000")
    assert "only the values of tensors tell the size" in str(first)


def test_a_retrace_that_fails_leaves_the_original_to_be_compiled() -> None:
    """Its symbols are in no node of the original."""

    def fn(x: Tensor, n: Tensor) -> Any:
        return _attends(x), *torch.tensor_split(x[0, 0] * 2, n)

    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        torch._dynamo.reset()
        x, n = torch.randn(1, 2, 8, 4, requires_grad=True), torch.tensor([3, 5])
        found = torch.compile(fn, backend="attnfuse", options={"downstream": "aot_eager", "strict": False})(x, n)
    for mine, theirs in zip(found, fn(x, n), strict=True):
        torch.testing.assert_close(mine, theirs)


def _numpy_size(x: Tensor, n: Tensor) -> Tensor:
    """NumPy's functions take a tensor for a number: one call makes a size and uses it."""
    return x.sum() * torch.from_numpy(np.zeros((2, n.sum().numpy()[()])) + 2).float()


def _number_as_size(x: Tensor, n: Tensor) -> Tensor:
    size = n.item()
    return x.new_zeros(size).sum() + torch.ones(size + 1, 3).cumsum(0)  # type: ignore[arg-type, operator]


def _number_in_arithmetic(x: Tensor, n: Tensor) -> Tensor:
    size = n.item()
    torch._check(size > 1)
    return x * size / (size - 1) + torch.arange(2 * size + 1).sum()


def _number_in_a_slice(x: Tensor, n: Tensor) -> Tensor:
    size = n.item()
    torch._check(size >= 0)
    torch._check(size < x.shape[1])
    return x[:, :size].softmax(-1) + x.narrow(1, 0, size)  # type: ignore[misc, arg-type]


def _float_of_a_tensor(x: Tensor, n: Tensor) -> Tensor:
    return x * (n * 0.5).item() + n.bool().item()


def _checks(gm: fx.GraphModule) -> list[str]:
    """The checks of a graph that ask something, by what they say."""
    asserts = gm.graph.find_nodes(op="call_function", target=aten._assert_scalar.default)
    return [node.args[1] for node in asserts if isinstance(node.args[0], fx.Node)]


@pytest.mark.parametrize(
    "fn", [_numpy_size, _number_as_size, _number_in_arithmetic, _number_in_a_slice, _float_of_a_tensor]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_numbers_of_tensors(fn: Function, dynamic: bool) -> None:
    """Sizes and numbers that item() gives are bound where they are made, and what Dynamo checks of them stays checked."""
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        capture = check(fn, G, torch.tensor(4), dynamic=dynamic)
    ((given, new),) = capture.pairs
    made = [node for node in new.graph.nodes if "unbacked_bindings" in node.meta]
    assert len(made) == sum(len(node.meta.get("unbacked_bindings", ())) for node in given.graph.nodes)
    assert _checks(new) == _checks(given)


def test_checks_of_numbers_hold_at_run_time() -> None:
    """Of a size that NumPy makes; stock forgets what Dynamo checks of it."""

    def fn(x: Tensor, n: Tensor) -> Tensor:
        return x * torch.from_numpy(np.ones((4, n.sum().numpy()[()]))).float()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch._dynamo.reset()
        compiled = torch.compile(fn, backend=Capture(), dynamic=False)
        compiled(X, torch.tensor(6))
        with pytest.raises(RuntimeError, match="Runtime assertion failed"):
            compiled(X, torch.tensor(5))


def test_numbers_that_stand_in_another_place() -> None:
    """A check was made of another number than that of Dynamo's in whose name it was answered."""

    def fn(x: Tensor, n: Tensor) -> Tensor:
        return x.sum() + torch.from_numpy(np.zeros((n.numpy()[0], n.numpy()[1])))

    def swapped(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        node = next(node for node in gm.graph.nodes if len(node.meta.get("unbacked_bindings", ())) == 2)
        first, second = node.meta["unbacked_bindings"]
        places = node.meta["unbacked_bindings"]
        node.meta["unbacked_bindings"] = {first: places[second], second: places[first]}
        with pytest.raises(NormaliseError, match="other sizes than Dynamo recorded"):
            normalise(gm)
        node.meta["unbacked_bindings"] = places
        return gm.forward

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch._dynamo.reset()
        torch.compile(fn, backend=swapped)(X, torch.tensor([2, 3]))


def test_floats_of_a_model_that_are_inputs() -> None:
    """A float that differs between layers becomes a symbol read off a tensor: each layer reads its own."""

    def fn(x: Tensor, scales: list[float]) -> Tensor:
        for scale in scales:
            x = (x * scale).softmax(-1) / scale
        return x

    with torch._dynamo.config.patch(specialize_float=False):
        capture = check(fn, G, [0.5, 0.25, 0.5, 2.0], dynamic=True)
    assert calls(one(capture)).count("aten.item.default") == 4


# Layers seen before


def _listing(gm: fx.GraphModule) -> list[object]:
    """The graph and its bodies as text with the values' types and layouts."""
    every = (node for body in normalised(gm) for node in body.graph.nodes)
    return [(node.format_node(), str(value(node.meta.get("val")))) for node in every]


def value(x: object) -> object:
    """What of a value does not depend on when it was written down."""
    return (x.dtype, x.shape, x.stride(), x.storage_offset()) if isinstance(x, Tensor) else x


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["layers_of_one_kind", "checkpointed", "random_numbers", "model"])
def test_layers_seen_before_are_written_as_they_would_be_traced(
    name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, operators, arguments and values do not tell which layer was run and which was written down again."""
    written: list[object] = []
    write = _Replay._write
    model = Stack(0.5, 0.25, 0.5, 2.0)
    fn, inputs = (model, (G,)) if name == "model" else EXACT[name]
    monkeypatch.setattr(_Replay, "_write", lambda *args: (written.append(args[1]), write(*args))[1])
    remembered = one(check(fn, *inputs, dynamic=dynamic))
    assert written, "no call came twice"
    count = len(written)
    monkeypatch.setattr(_Replay, "_key", lambda *args: None)
    traced = one(check(fn, *inputs, dynamic=dynamic))
    assert len(written) == count
    assert _listing(remembered) == _listing(traced)


# Bodies


def test_checkpoints_are_normalised_inside() -> None:
    fn, inputs = EXACT["checkpointed"]
    ((given, new),) = check(fn, *inputs).pairs
    tags = new.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint)
    assert [node.kwargs for node in tags] == [
        node.kwargs for node in given.graph.nodes if node.target is torch.ops.higher_order.tag_activation_checkpoint
    ]
    expected = ["aten.mul.Tensor", "aten.sin.default", "aten.dropout.default", "aten.softmax.int"]
    assert [calls(body) for body in bodies(new)[1:]] == [expected, expected]


def test_other_bodies_are_copied() -> None:
    """Whoever compiles the new graph may change its bodies: those of the given graph are others, with the same text."""
    for name in {"branches", "custom_backward", "scanned"} & EXACT.keys():
        fn, inputs = EXACT[name]
        ((given, new),) = check(fn, *inputs).pairs
        assert len(bodies(given)) > 1
        assert [body.code for body in bodies(new)[1:]] == [body.code for body in bodies(given)[1:]]
        assert not {id(body.graph) for body in bodies(given)} & {id(body.graph) for body in bodies(new)}


# Random numbers and constants


def test_random_operators_keep_order_and_number() -> None:
    fn, inputs = EXACT["random_numbers"]
    names = [name.split(".")[1] for name in calls(one(check(fn, *inputs)))]
    drawing = ("dropout", "rand_like", "randn", "bernoulli", "randint", "randperm", "normal_", "alpha_dropout")
    expected = ["dropout", "rand_like", "randn", "bernoulli", "dropout", "randint", "randperm", "normal_"]
    assert [name for name in names if name in drawing] == [*expected, "dropout", "dropout", "alpha_dropout"]


def test_constants_are_in_the_text() -> None:
    """AOTAutograd would take an attribute for a parameter that Dynamo did not declare."""
    fn, inputs = EXACT["constants"]
    new = one(check(fn, *inputs))
    assert not new.graph.find_nodes(op="get_attr")
    assert not new.state_dict()
    assert not [value for value in vars(new).values() if isinstance(value, Tensor)]


# What Dynamo does not write, by hand


def _by_hand(build: Callable[[fx.Graph, fx.Node], object], root: nn.Module | None = None) -> fx.GraphModule:
    """A graph of one input as Dynamo would hand it over."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    with torch._subclasses.FakeTensorMode() as mode:
        x.meta["example_value"] = mode.from_tensor(X)
    graph.output((build(graph, x),))
    return fx.GraphModule(root or nn.Module(), graph)


@pytest.mark.parametrize(
    ("build", "root", "reason"),
    [
        (lambda g, x: g.call_module("linear", (x,)), Block(1.0), "`linear` calls a module"),
        (lambda g, x: g.get_attr("linear.weight"), Block(1.0), "reads an attribute of a submodule, linear.weight"),
        (lambda g, x: (g.call_function(torch.manual_seed, (0,)), x)[1], None, "`manual_seed` has an effect"),
        (lambda g, x: g.call_method("t_", (x,)), None, "`t_` changes an input's shape"),
        (lambda g, x: g.call_method("requires_grad_", (x,)), None, "`requires_grad_` changes an input's"),
        (lambda g, x: g.call_method("resize_", (x, (2, 2))), None, "`resize_` changes the storage"),
    ],
)
def test_refuses_what_it_would_lose(build: Callable[..., object], root: nn.Module | None, reason: str) -> None:
    gm = _by_hand(build, root)
    given = snapshot(gm)
    with pytest.raises(NormaliseError) as caught:
        normalise(gm)
    assert caught.value.code == "AF041"
    assert reason in caught.value.reason
    assert snapshot(gm) == given
