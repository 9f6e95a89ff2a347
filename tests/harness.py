"""How tests run a function through the backend: `report_of` for what the passes say, `check` for what the program computes."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import attnfuse
from attnfuse.backend import listening
from attnfuse.remark import Remark, Report
from tests.numerics import assert_close

Function = Callable[..., Any]


def report_of(fn: Function, *args: object, **kwargs: object) -> Report:
    """What `attnfuse.explain` reports, for inputs that may ask for gradients."""
    return attnfuse.explain(fn, *args, **kwargs)


def spec_of(fn: Function, *args: object, **kwargs: object) -> str:
    """The text of the spec of the one attention in `fn`, or the code of its remark if it was not understood."""
    (remark,) = report_of(fn, *args, **kwargs).remarks
    return verdict(remark)


def verdict(remark: Remark) -> str:
    """The spec of an attention that was fused or kept, else the code of the remark with its reason."""
    if remark.kind in ("fused", "kept"):
        return str(remark.facts["spec"])
    return f"{remark.code} {remark.facts.get('why', '')}".strip()


def check(
    fn: Function,
    *inputs: object,
    options: Mapping[str, object] | None = None,
    dynamic: bool | None = None,
    gradients: bool = True,
) -> Report:
    """Compiles `fn` with the backend and compares it with eager, by the numerics contract.

    Compared are outputs (type, strides, values), inputs that were written to, and the gradients of all floating-point inputs,
    each against `fn` in its own types and in float64. `fn` has to compute in float64 where its inputs are float64.

    Args:
        inputs: tensors, or anything else that is handed on.
        options: the backend's; `downstream` is "aot_eager" if not given.
        dynamic: as in torch.compile.
        gradients: whether floating-point inputs ask for gradients.

    Returns:
        The report of the graphs that were compiled.
    """
    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(
        fn, backend="attnfuse", dynamic=dynamic, options={"downstream": "aot_eager", **(options or {})}
    )
    with listening(reports.append):
        compare(fn, compiled, *inputs, gradients=gradients)
    return Report(()).merge(*reports)


def compare(fn: Function, compiled: Function, *inputs: object, gradients: bool = True) -> None:
    """The comparison of `check`, for a function that is compiled already."""
    actual = _results(compiled, inputs, gradients)
    original = _results(fn, inputs, gradients)
    with Terms() as terms:
        exact = _results(fn, pytree.tree_map_only(Tensor, _double, inputs), gradients)
    assert actual.keys() == original.keys() == exact.keys()
    for name, mine in actual.items():
        theirs, true = original[name], exact[name]
        if not isinstance(mine, Tensor):
            assert mine == theirs, f"{name}: {mine} is not {theirs}"
            continue
        assert isinstance(theirs, Tensor), name
        assert isinstance(true, Tensor), name
        assert mine.dtype == theirs.dtype, f"{name}: {mine.dtype} is not {theirs.dtype}"
        if name.startswith("output"):
            assert _strides(mine) == _strides(theirs), f"{name}: strides {_strides(mine)} are not {_strides(theirs)}"
        if not mine.is_floating_point():
            assert torch.equal(mine, theirs), name
            continue
        scale = terms.greatest(true) if name.startswith("gradient") else None
        assert_close(mine, theirs, true, scale, what=name)


OLDER_TORCH: Final = torch.__version__ < "2.13"
since_2_13: Final = pytest.mark.skipif(OLDER_TORCH, reason="stock PyTorch before 2.13 fails at this too")


class Terms(TorchDispatchMode):
    """Follows, beside each value of a backward pass, what the last reduction gives for the absolute values of its terms: the
    scale of the numerics contract for gradients.

    The gradient of scores is a difference of two terms, and zero where all keys have the same value. So are then those of q, k
    and their projections: in the two products on the way there, the sums of terms stand for the factor.
    """

    _PRODUCTS = ("mm", "bmm", "dot", "mv", "addmm", "baddbmm", "convolution_backward")
    _LINEAR = (
        *("view", "_unsafe_view", "reshape", "transpose", "permute", "t", "expand", "unsqueeze", "squeeze", "select"),
        *("slice", "clone", "_to_copy", "alias", "detach", "sum", "add", "add_", "slice_backward", "select_backward"),
        *("embedding_dense_backward", "new_zeros", "index_put", "index_put_", "cat", "stack", "unbind", "split", "mul"),
    )
    _TO_THE_PRODUCTS = (
        *("view", "_unsafe_view", "reshape", "transpose", "permute", "t", "expand", "unsqueeze", "squeeze", "clone"),
        *("mul", "div", "where", "masked_fill", "sum", "add", "cat", "slice_backward", "select_backward"),
    )

    def __init__(self) -> None:
        super().__init__()
        self._sums = WeakIdKeyDictionary()
        self._of_scores: list[Any] = [WeakIdKeyDictionary(), WeakIdKeyDictionary()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        result = func(*args, **kwargs)
        with torch.no_grad():
            self._follow_scores(func, name, args, kwargs, result)
            if name in self._PRODUCTS:
                sums = func(*pytree.tree_map_only(Tensor, self._factor, args), **kwargs)
            elif name in ("add_", "index_put_"):
                first, *rest = pytree.tree_map_only(Tensor, self._of, args)
                self._sums[args[0]] = func(first.clone(), *rest, **kwargs)
                return result
            elif name == "copy_":
                # a gradient that is laid out anew
                self._sums[args[0]] = self._of(args[1])
                return result
            elif name in self._LINEAR and any(
                x in self._sums for x in pytree.tree_leaves(args) if isinstance(x, Tensor)
            ):
                sums = func(*pytree.tree_map_only(Tensor, self._of, args), **kwargs)
            elif name == "sum":
                sums = func(*pytree.tree_map_only(Tensor, _absolute, args), **kwargs)
            elif name in ("native_layer_norm_backward", "native_batch_norm_backward"):
                sums = self._of_norm(name, args, result)
            else:
                return result
            for x, y in zip(pytree.tree_leaves(result), pytree.tree_leaves(sums), strict=True):
                if isinstance(x, Tensor) and x.is_floating_point():
                    self._sums[x] = y.abs()
        return result

    def _follow_scores(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        scores, products = self._of_scores
        if name == "_softmax_backward_data":
            gradient, weights, dim, _ = args
            scores[result] = weights * (gradient.abs() + (weights * gradient.abs()).sum(dim, keepdim=True))
        elif name in ("mm", "bmm") and any(x in scores for x in args):
            products[result] = func(*map(self._factor, args))
        elif name in self._TO_THE_PRODUCTS:
            given = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
            for found in self._of_scores:
                if any(x in found for x in given):
                    found[result] = func(*pytree.tree_map_only(Tensor, self._factor, args), **kwargs).abs()

    def _factor(self, x: Tensor) -> Tensor:
        return next((found[x] for found in self._of_scores if x in found), _absolute(x))

    @staticmethod
    def _of_norm(name: str, args: Any, result: Any) -> tuple[Tensor | None, ...]:
        """The gradients of weight and bias are sums over all positions; that of the input is taken as it is."""
        gradient, given, *_ = args
        mean, deviation = args[3:5] if name == "native_layer_norm_backward" else args[5:7]
        dims = tuple(range(mean.dim() - 1)) if name == "native_layer_norm_backward" else (0, *range(2, given.dim()))
        shape = mean.shape if name == "native_layer_norm_backward" else (1, -1, *(1 for _ in range(2, given.dim())))
        normal = (given - mean.reshape(shape)) * deviation.reshape(shape)
        weight, bias = (gradient * normal).abs().sum(dims), gradient.abs().sum(dims)
        return tuple(None if x is None else y for x, y in zip(result, (result[0], weight, bias), strict=True))

    def _of(self, x: Tensor) -> Tensor:
        found = self._sums.get(x)
        # a change of its shape in place is not followed
        return found if found is not None and found.shape == x.shape else _absolute(x)

    def greatest(self, x: Tensor) -> float:
        """The scale of a gradient."""
        sums = self._of(x)
        return float(sums.masked_fill(~sums.isfinite(), 0.0).max()) if sums.numel() else 0.0


def _absolute(x: Tensor) -> Tensor:
    return x.abs() if x.is_floating_point() else x


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _strides(x: Tensor) -> tuple[int, ...]:
    return tuple(stride for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1)


def _results(fn: Function, inputs: tuple[object, ...], gradients: bool) -> dict[str, object]:
    """Outputs, inputs after the call, and gradients of a weighted sum of all outputs, by name."""

    def fresh(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        # the strides of the input are kept, also where elements overlap
        copy = x.detach().clone() if 0 not in x.stride() else x.detach()
        for dim in getattr(x, "_dynamo_dynamic_indices", ()):
            torch._dynamo.mark_dynamic(copy, dim)
        return copy.requires_grad_(gradients and x.is_floating_point())

    given = [fresh(x) for x in inputs]
    found: dict[str, object] = {}
    with torch.set_grad_enabled(gradients):
        outputs = pytree.tree_leaves(fn(*given))
        total = torch.zeros((), dtype=torch.float64)
        for at, out in enumerate(outputs):
            found[f"output {at}"] = out.detach() if isinstance(out, Tensor) else out
            found[f"gradient of output {at} is wanted"] = isinstance(out, Tensor) and out.requires_grad
            if isinstance(out, Tensor) and out.requires_grad:
                generator = torch.Generator().manual_seed(at)
                weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
                total = total + (out * weights).double().sum()
    if total.requires_grad:
        total.backward()
    for at, x in enumerate(given):
        if isinstance(x, Tensor):
            found[f"input {at}"] = x.detach()
            found[f"gradient {at}"] = x.grad
    return found


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed, the same in every run; bits beyond bfloat16 are dropped so that all types hold the same values."""
    generator = torch.Generator().manual_seed(hash((shape, seed)))
    return torch.randn(shape, generator=generator).bfloat16().to(dtype)


def qkv(
    B: int = 2,
    H: int = 4,
    M: int = 6,
    N: int | None = None,
    D: int = 4,
    *,
    Hkv: int | None = None,
    Dv: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, M, D], k [B, Hkv, N, D] and v [B, Hkv, N, Dv]; self-attention sizes unless told otherwise."""
    Hkv, N, Dv = Hkv or H, N or M, Dv or D
    return (
        randn(B, H, M, D, seed=1, dtype=dtype),
        randn(B, Hkv, N, D, seed=2, dtype=dtype),
        randn(B, Hkv, N, Dv, seed=3, dtype=dtype),
    )
