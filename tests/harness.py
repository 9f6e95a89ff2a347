"""How tests run a function through the backend: `report_of` for what the passes say, `check` for what the program computes."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import attnfuse
from attnfuse.backend import listening
from attnfuse.remark import Remark, Report
from tests.numerics import assert_close
from tests.terms import Terms

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
    times: float = 1.0,
) -> Report:
    """Compiles `fn` with the backend and compares it with eager, by the numerics contract.

    Compared are outputs (type, strides, values), inputs that were written to, and the gradients of all floating-point inputs,
    each against `fn` in its own types and in float64. `fn` has to compute in float64 where its inputs are float64.

    Args:
        inputs: tensors, or anything else that is handed on.
        options: the backend's; `downstream` is "aot_eager" if not given.
        dynamic: as in torch.compile.
        gradients: whether floating-point inputs ask for gradients.
        times: see `assert_close`.

    Returns:
        The report of the graphs that were compiled.
    """
    reports: list[Report] = []
    torch._dynamo.reset()
    compiled = torch.compile(
        fn, backend="attnfuse", dynamic=dynamic, options={"downstream": "aot_eager", **(options or {})}
    )
    with listening(reports.append):
        compare(fn, compiled, *inputs, gradients=gradients, times=times)
    return Report(()).merge(*reports)


def compare(fn: Function, compiled: Function, *inputs: object, gradients: bool = True, times: float = 1.0) -> None:
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
        assert_close(mine, theirs, true, scale, what=name, times=times)


OLDER_TORCH: Final = torch.__version__ < "2.13"
since_2_13: Final = pytest.mark.skipif(OLDER_TORCH, reason="stock PyTorch before 2.13 fails at this too")


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
