"""The numerics contract, the one measure of closeness in all tests: `assert_close`.  Its constants hold for every test."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnfuse.reference import Evaluator, attention
from attnfuse.score import Call, Const, Expr, Load, Program, S, Var, loads, substitute
from attnfuse.spec import AttentionSpec, Leaf

ERROR_FACTOR = 2  # of the original spelling's own error
EPSILONS = 4  # of the dtype, relative to the scale


class Errors(NamedTuple):
    """What the contract compares: the greatest errors of the tested result and of the original, S, and eps of the tested dtype."""

    tested: float
    original: float
    scale: float
    eps: float

    @property
    def limit(self) -> float:
        return ERROR_FACTOR * self.original + EPSILONS * self.eps * self.scale

    @property
    def within(self) -> bool:
        return self.tested <= self.limit

    def judge(self, what: str) -> None:
        """`assert_close`, once the tensors are gone."""
        if not self.within:
            terms = f"{ERROR_FACTOR}·{self.original:.3e} (error of the original) + {EPSILONS}·{self.eps:.3e} (eps)·{self.scale:.3e} (scale)"
            raise AssertionError(f"{what}: error {self.tested:.3e} is above the limit {self.limit:.3e} = {terms}")


def assert_close(
    actual: Tensor, original: Tensor, exact: Tensor, scale: float | None = None, what: str = "", *, times: float = 1.0
) -> None:
    """Asserts max|actual - exact| <= 2·max|original - exact| + 4·eps(actual.dtype)·scale, with NaN and inf in the same places.

    Args:
        actual: what is tested.
        original: what the replaced spelling gives in the same dtype.
        exact: what it gives in float64.
        scale: S of the contract; max|exact| if not given, which is right for outputs.  For a gradient: the greatest sum of
            absolute values of the terms that it adds up (`gradient_scales`).
        what: named in the failure message.
        times: the limit; more than 1 only for results that are listed with the reason.
    """
    found = errors(actual, original, exact, scale, what)
    if found.tested <= times * found.limit:
        return
    actual, original, exact = (x.detach().to("cpu", torch.float64) for x in (actual, original, exact))
    each = torch.where(exact.isfinite(), (actual - exact).abs(), 0.0)
    at = tuple(int(i) for i in torch.unravel_index(each.argmax(), each.shape))
    raise AssertionError(
        f"{what or 'result'}: error {found.tested:.3e} at {list(at)} (actual {actual[at]:.9g}, original {original[at]:.9g}, exact "
        f"{exact[at]:.9g}) is above the limit {found.limit:.3e} = {ERROR_FACTOR}·{found.original:.3e} (error of the "
        f"original) + {EPSILONS}·{found.eps:.3e} (eps)·{found.scale:.3e} "
        f"({'max|exact|' if scale is None else 'scale'}); {int((each > found.limit).sum())} of {each.numel()} elements are"
    )


def errors(actual: Tensor, original: Tensor, exact: Tensor, scale: float | None = None, what: str = "") -> Errors:
    """What `assert_close` compares.

    Raises:
        AssertionError: shapes differ, NaN and inf are not in the same places, or the scale is not finite.
    """
    name = what or "result"
    if not actual.shape == original.shape == exact.shape:
        shapes = f"actual {list(actual.shape)}, original {list(original.shape)}, exact {list(exact.shape)}"
        raise AssertionError(f"{name}: shapes differ: {shapes}")
    if exact.dtype != torch.float64:
        raise AssertionError(f"{name}: exact is {exact.dtype}, expected float64")
    eps = torch.finfo(actual.dtype).eps
    actual, original, exact = (x.detach().to("cpu", torch.float64) for x in (actual, original, exact))
    for which, x in (("actual", actual), ("original", original)):
        _assert_same_special(name, which, x, exact)
    finite = exact.isfinite()
    of_each = (torch.where(finite, x, 0.0) for x in ((actual - exact).abs(), (original - exact).abs(), exact.abs()))
    tested, of_original, greatest = map(_greatest, of_each)
    scale = greatest if scale is None else scale
    if not math.isfinite(scale):
        raise AssertionError(f"{name}: the scale is {scale}")
    return Errors(tested, of_original, scale, eps)


def assert_close_in_draws(draws: Sequence[Errors], what: str = "") -> None:
    """The contract for a result with several weights: of errors as shares of S, the median of either side.

    For gradients that amplify roundings, behind many layers in bfloat16, or jump, where a rounding moves an activation over a kink:
    one draw of the original's error says little about how great another may be.  What computes something else does so in most draws.
    """
    shares = [(x.tested / x.scale, x.original / x.scale) for x in draws if x.scale > 0]
    tested, original = (statistics.median(column) for column in zip(*shares, strict=True)) if shares else (0.0, 0.0)
    limit = ERROR_FACTOR * original + EPSILONS * max(x.eps for x in draws)
    if not (tested <= limit and all(x.within for x in draws if x.scale == 0)):
        raise AssertionError(
            f"{what or 'result'}: of {len(draws)} draws the median error, {tested:.3e} of the scale, is above the limit {limit:.3e} = "
            f"{ERROR_FACTOR}·{original:.3e} (error of the original) + {EPSILONS}·eps"
        )


def _greatest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _assert_same_special(name: str, which: str, x: Tensor, exact: Tensor) -> None:
    """NaN where exact has NaN, inf where it has inf, finite where it is finite."""
    same = (x == exact) | (x.isnan() & exact.isnan()) | (x.isfinite() & exact.isfinite())
    if not bool(same.all()):
        at = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(
            f"{name}: {which} and exact differ in NaN, inf or finite at {int((~same).sum())} of {same.numel()} elements, "
            f"first at {list(at)}: {which} {float(x[at])}, exact {float(exact[at])}"
        )


def gradient_scales(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    leaves: list[Tensor],
    dout: Tensor,
    sizes: tuple[int, ...] = (),
    keep: Tensor | None = None,
) -> dict[str, float]:
    """S of the contract for the gradients of q, k, v and each floating-point leaf, by name.

    Each is the maximum, in float64, of the reduction that makes the gradient, over the absolute values of its terms.
    """
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    B, H, M, _ = q.shape
    Hkv, N = k.shape[1:3]
    leaves = [x.detach().double() if x.is_floating_point() else x for x in leaves]
    floating = [leaf.name for leaf in spec.leaves if leaf.kind == "float"]
    body, sink = spec.program.body, spec.program.sink
    # A probe of zeros added to `s` and to every load has the terms as its gradient.
    probed: list[tuple[Expr, Expr]] = [(S, Var("n"))]
    probed += [(load, Var("n")) for load in loads(body) if load.leaf in floating]
    probed += [(load, Const(0)) for load in ([] if sink is None else loads(sink)) if load.leaf in floating]
    probes = [torch.zeros(B, H, M, N, dtype=torch.float64, requires_grad=True) for _ in probed]
    index = (Var("b"), Var("h"), Var("m"))
    with_probe = [
        {target: Call("add", (target, Load(f"probe{at}", (*index, last))))} for at, (target, last) in enumerate(probed)
    ]
    for target_and_sum, (_, last) in zip(with_probe, probed, strict=True):
        if last == Var("n"):
            body = substitute(body, target_and_sum)
        elif sink is not None:
            sink = substitute(sink, target_and_sum)
    program = Program(body, spec.program.tiers, sink)
    declared = (*spec.leaves, *(Leaf(f"probe{at}", "f64", 4) for at in range(len(probes))))
    out, _ = attention(AttentionSpec(program, declared, spec.dropout), q, k, v, [*leaves, *probes], sizes, keep)

    def gradients(of: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(out, probes, of, allow_unused=True, retain_graph=True)
        pairs = zip(probes, found, strict=True)
        return [torch.zeros_like(x) if g is None else g.abs().nan_to_num(0.0, 0.0, 0.0) for x, g in pairs]

    terms = gradients(dout)
    # a sink's gradient adds up weight·dout·out over D as well: with these signs nothing of that cancels
    of_sinks = gradients(dout.abs() * out.detach().sign().nan_to_num(0.0)) if sink is not None else terms
    terms = [of_sinks[at] if last == Const(0) else terms[at] for at, (_, last) in enumerate(probed)]

    def per_kv_head(x: Tensor) -> Tensor:
        return x.reshape(B, Hkv, H // Hkv, *x.shape[2:]).sum(2)

    group = H // Hkv
    eye = torch.eye(N, dtype=torch.float64).expand(B, Hkv, N, N)
    weights = attention(spec, q, k, eye, leaves, sizes, keep)[0].nan_to_num(0.0, 0.0, 0.0)
    scales = {
        "q": _greatest(terms[0] @ k.abs().repeat_interleave(group, 1)),
        "k": _greatest(per_kv_head(terms[0].mT @ q.abs())),
        "v": _greatest(per_kv_head(weights.mT @ dout.abs())),
    }
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in leaves]
    values = Evaluator(spec, inputs, sizes, q @ k.repeat_interleave(group, 1).mT, Hkv, torch.float64)
    gathered = torch.zeros((), dtype=torch.float64)
    for (target, _), term in zip(probed[1:], terms[1:], strict=True):
        gathered = gathered + (values.of(target, term != 0) * term).sum()
    for leaf, x in zip(spec.leaves, inputs, strict=True):
        if leaf.kind == "float":
            used = (
                torch.autograd.grad(gathered, x, retain_graph=True, allow_unused=True)[0]
                if gathered.requires_grad
                else None
            )
            scales[leaf.name] = 0.0 if used is None else _greatest(used)
    return scales
