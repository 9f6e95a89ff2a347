"""The scales of gradients that a backward pass computes, for the numerics contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


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
