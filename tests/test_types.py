"""Mask arithmetic in other types than the kernels compute in: what rounds, wraps around or overflows in the model still does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnfuse.backend import listening
from attnfuse.passes.graph import SHORT_DTYPES
from attnfuse.remark import Report
from tests.harness import check, qkv

pytestmark = pytest.mark.parametrize("small", ["operator", "inline"], indirect=True)

MIN = torch.finfo(torch.float32).min
Condition = Callable[[Tensor], Tensor]


def over_keys(x: Tensor) -> tuple[Tensor, Tensor]:
    """Data [B, N] as keys and as queries."""
    return x[:, None, None, :], x[:, None, :, None]


def compared(cast: Callable[[Tensor], Tensor], op: Callable[[Tensor, Tensor], Tensor] = torch.gt) -> Condition:
    return lambda t: op(*over_keys(cast(t)))


POSITIONS = torch.arange(600.0).expand(2, 600)
THOUSANDS = torch.tensor([[1000.0, 1001, 1002, 1003, 1004, 1005]] * 2)
TIMES = 1.7e9 + torch.arange(120, dtype=torch.float64).view(2, 60) * 0.3
IDS = torch.tensor([[0, 256, 1, 257, 2, 3], [2**32, 0, 1, 2**32 + 1, 5, 5]])
SENTINEL = torch.tensor([[2**31 - 1, 1, 2, 3, 4, 5]] * 2, dtype=torch.int32)

EIGHTS = torch.tensor([[100, 1, 2, 120, 5, 6]] * 2, dtype=torch.int8)

CONDITIONS: dict[str, tuple[Tensor, Condition]] = {
    "rounded to bf16": (POSITIONS, compared(lambda t: t.bfloat16())),
    "rounded and widened": (THOUSANDS, compared(lambda t: t.bfloat16().float(), torch.eq)),
    "rounded to f16, then arithmetic": (
        THOUSANDS,
        lambda t: over_keys(t.half())[0] * 2 > over_keys(t.half())[1] + 1003,
    ),
    "integers rounded to f16": (
        torch.tensor([[0, 2048, 2049, 2050, 4097, 1]] * 2),
        compared(lambda t: t.half(), torch.ne),
    ),
    "integers rounded to f32": (2**24 + torch.arange(12).view(2, 6), compared(lambda t: t.float(), torch.ne)),
    "a constant rounded to bf16": (
        torch.tensor([[0.3, 0.30078125, 0.5, 0.2, 0.3, 1.0]] * 2),
        lambda t: over_keys(t.bfloat16() > 0.3)[0],
    ),
    "wrapped to uint8": (IDS, compared(lambda t: t.to(torch.uint8), torch.eq)),
    "wrapped to uint8, as truth": (IDS, lambda t: over_keys(t.to(torch.uint8) != 0)[0]),
    "wrapped to int32": (IDS, compared(lambda t: t.int(), torch.ne)),
    "times in float64": (TIMES, compared(lambda t: t)),
    "time differences in float64": (TIMES, lambda t: torch.sub(*over_keys(t)) > 0.5),
    "integer times, divided": (
        1_700_000_000_000 + torch.arange(120).view(2, 60) * 3,
        lambda t: torch.sub(*over_keys(t)) / 1000 > 0.05,
    ),
    "sums in int32": (SENTINEL, lambda t: (over_keys(t)[0] + torch.arange(6, dtype=torch.int32)[:, None]) > 3),
    "sums in int8": (torch.full((2, 6), 100, dtype=torch.int8), lambda t: over_keys(t + t)[0] < 0),
    "multiples in int8": (
        torch.tensor([[100, 1, 2, 120, 5, 6]] * 2, dtype=torch.int8),
        lambda t: torch.add(t[:, None, :, None], t[:, None, None, :], alpha=2) < 0,
    ),
    "constants in int8": (IDS, lambda t: (torch.full((6,), 100, dtype=torch.int8) * 2 < 0) & (torch.arange(6) > 2)),
    "compared in int8": (EIGHTS, lambda t: over_keys(t)[0] < torch.tensor(300)),
    "a large constant": (IDS, lambda t: (torch.full((6,), 2**62) * 4 == 0) & (torch.arange(6) > 2)),
    "truth in float64": (
        torch.tensor([[0.0, 1e-50, 1.0, 0.0, 2.0, 1e-60]] * 2, dtype=torch.float64),
        lambda t: ~over_keys(t.bool())[0],
    ),
    "a large constant in int32": (
        IDS,
        lambda t: torch.gt(*(torch.arange(6, dtype=torch.int32) + (2**31 - 3)).view(1, 6).expand(2, 6).unbind()),
    ),
    "counted in uint8": (
        POSITIONS[:, :300],
        lambda t: compared(lambda x: torch.ones_like(x, dtype=torch.uint8).cumsum(1, dtype=torch.uint8))(t),
    ),
    "grid in float64": (
        POSITIONS[:, :60],
        lambda t: compared(
            lambda x: torch.arange(60, dtype=torch.float64).expand(2, 60) * 0.1, lambda a, b: (a - b).abs() > 0.5
        )(t),
    ),
}


@pytest.mark.parametrize(("data", "condition"), CONDITIONS.values(), ids=CONDITIONS.keys())
def test_conditions(data: Tensor, condition: Condition) -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(condition(t), -1e9).softmax(-1) @ v

    q, k, v = qkv(M=data.shape[1])
    report = check(masked, q, k, v, data, gradients=not data.is_floating_point())
    assert [r.kind for r in report.remarks] == ["fused"]


@pytest.mark.parametrize("spelling", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mask_that_overflows_in_a_cast(dtype: torch.dtype, spelling: str) -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(dtype).to(q.dtype)
        if spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask)
        return (q @ k.mT + mask).softmax(-1) @ v

    mask = torch.zeros(2, 1, 1, 6)
    mask[0] = MIN
    mask[1, ..., 4:] = MIN
    report = check(masked, *qkv(dtype=dtype), mask, gradients=False)
    assert [r.kind for r in report.remarks] == ["fused"]


def test_a_bias_of_differences_in_float64() -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        near, far = over_keys(t)
        return (q @ k.mT - 0.1 * (near - far).abs().float()).softmax(-1) @ v

    check(biased, *qkv(M=60), TIMES, gradients=False)


def test_a_constant_of_the_size_of_finfo_min_moves_it() -> None:
    def moved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        m, n = torch.arange(6)[:, None], torch.arange(6)
        scores = (q @ k.mT).masked_fill((n > m) | (m > 3), MIN)
        return (scores + torch.where(n > 2, 1e38, 0.0).to(q.dtype)).softmax(-1) @ v

    check(moved, *qkv(), gradients=False)


def test_a_number_filled_into_a_type_that_rounds_it() -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor, x: Tensor, limit: Tensor) -> Tensor:
        allowed = x <= torch.full((6,), limit.item(), dtype=torch.bfloat16)
        return (q @ k.mT).masked_fill(~allowed, -1e9).softmax(-1) @ v

    x = torch.tensor([0.1, 0.2, 0.1, 0.05, 0.3, 0.1], dtype=torch.bfloat16)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        check(masked, *qkv(), x, torch.tensor(0.1), gradients=False)


def test_a_bias_that_overflows_float16_beside_its_least_value() -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        added = bias.half() + torch.where(torch.arange(6)[:, None] > 2, -65504.0, 0.0).to(torch.float16)
        return (q @ k.mT + added.to(q.dtype)).softmax(-1) @ v

    check(masked, *qkv(dtype=torch.float16), torch.full((6, 6), -100), gradients=False)


def test_an_alpha_that_keeps_a_product_within_float16() -> None:
    def scaled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        return torch.baddbmm(bias, flat[0], flat[1].mT, alpha=0.125).softmax(-1) @ flat[2]

    q, k, v = qkv(D=64, dtype=torch.float16)
    q, k = (torch.full_like(x, 40.0) + x for x in (q, k))
    bias = torch.where(torch.arange(6)[:, None] >= torch.arange(6), 0.0, -1e4).half().expand(8, 6, 6)
    check(scaled, q, k, v, bias, gradients=False)


@pytest.mark.parametrize("options", [{"padding_idx": 1}, {"scale_grad_by_freq": True}])
def test_gradients_of_embeddings_that_are_no_plain_sums(options: dict[str, Any]) -> None:
    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Embedding(5, 4, **options)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            distance = (torch.arange(6)[:, None] - torch.arange(6)).clamp(-2, 2) + 2
            return (q @ k.mT + self.bias(distance).permute(2, 0, 1)).softmax(-1) @ v

    torch.manual_seed(0)
    model = Relative()
    found = []
    for backend in ("eager", "attnfuse"):
        torch._dynamo.reset()
        model.zero_grad()
        chosen: dict[str, Any] = {"options": {"downstream": "aot_eager"}} if backend == "attnfuse" else {}
        torch.compile(model, backend=backend, **chosen)(*qkv()).square().sum().backward()
        assert model.bias.weight.grad is not None
        found.append(model.bias.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0])


def test_no_gradient_goes_through_item() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(0.5))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT * self.temperature.item()).softmax(-1) @ v

    model = Tempered()
    q, k, v = qkv()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(model, backend="attnfuse", options={"downstream": "aot_eager"})
        compiled(q.requires_grad_(), k, v).sum().backward()
    assert q.grad is not None
    assert model.temperature.grad is None


def test_a_mask_that_is_its_own_condition_keeps_its_gradient() -> None:
    def filled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias.masked_fill(bias.bool(), -1.0)).softmax(-1) @ v

    check(filled, *qkv(), (torch.arange(36.0) % 3).view(6, 6))


@pytest.mark.parametrize("use", ["scale of a call", "limit of a comparison"])
def test_numbers_taken_out_of_tensors(use: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, t: Tensor, x: Tensor) -> Tensor:
        if use == "scale of a call":
            return F.scaled_dot_product_attention(q, k, v, scale=t.item())
        return (q @ k.mT).masked_fill(x > t.item(), -1e9).softmax(-1) @ v

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        x = torch.linspace(0, 1, 6).bfloat16()
        check(attention, *qkv(), torch.tensor(0.3, requires_grad=False), x, gradients=False)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float8_e4m3fn])
def test_leaves_of_types_that_the_language_has_not(dtype: torch.dtype) -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill((t.float() > 1)[:, None, None], -1e9).softmax(-1) @ v

    report = check(masked, *qkv(), torch.tensor([[0.0, 1, 2, 3, 1, 0]] * 2).to(dtype), gradients=False)
    assert [r.kind for r in report.remarks] == ["fused"]


@pytest.mark.parametrize("at", ["first", "one in the middle", "one, kept", "one of the last"])
def test_slices_to_one_element(at: str) -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        part = {
            "first": bias[:, :1],
            "one in the middle": bias[:, 3:4],
            "one, kept": bias[:, 2][:, None],
            "one of the last": bias[:, -1:],
        }[at]
        return (q @ k.mT + part).softmax(-1) @ v

    report = check(biased, *qkv(), torch.linspace(-2, 2, 36).view(6, 6))
    assert [r.kind for r in report.remarks] == ["fused"]


def both(fn: Callable[..., Tensor], *given: Tensor) -> tuple[Report, Tensor, Tensor]:
    """The report, and the outputs with and without the backend: float64 would not tell which of them are NaN."""
    torch._dynamo.reset()
    reports: list[Report] = []
    with listening(reports.append):
        actual = torch.compile(fn, backend="attnfuse", options={"downstream": "aot_eager"})(*given)
    return Report(()).merge(*reports), actual, fn(*given)


def _rounded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scores in float32 that the softmax takes in the type of q."""
    return torch.softmax((q @ k.mT).float() * 0.5 + mask, -1, dtype=q.dtype) @ v


@pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
)
def test_scores_rounded_before_the_softmax(dtype: torch.dtype, least: torch.dtype) -> None:
    """The least float32 becomes -inf, and a row of it NaN; the least number of the type stays, and its row is uniform."""
    q, k, v = qkv(dtype=dtype)
    least_number = torch.finfo(least).min

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(6)
        mask = torch.zeros(6, 6).masked_fill(at >= at[:, None], least_number)
        return _rounded(q, k, v, mask)

    report, actual, expected = both(masked, q, k, v)
    assert [r.kind for r in report.remarks] == ["fused"]
    assert torch.equal(actual.isnan(), expected.isnan())
    assert expected[:, :, 0].isnan().all() == (least != dtype)
    check(lambda q, k, v: masked(q, k, v)[:, :, 1:], q, k, v, gradients=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_mask_on_scores_that_are_rounded(dtype: torch.dtype) -> None:
    """It may hold what becomes -inf: rows of it are NaN, as the model's are, and other keys have no weight."""
    q, k, v = qkv(dtype=dtype)
    dense = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), MIN)
    (remark,) = check(_rounded, q, k, v, dense, gradients=False).remarks
    tiers = f"where bias[m, n] != -inf else -inf where bias[m, n] != {MIN} else -inf"
    assert remark.score == f"{SHORT_DTYPES[dtype]}(s*0.5 + bias[m, n]) {tiers}"
    dense[2] = MIN
    dense[3] = -MIN
    _, actual, expected = both(_rounded, q, k, v, dense)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert expected.isnan().any(-1)[0, 0].tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_scores_that_were_float32_before_the_softmax(masked: bool) -> None:
    """What was added before the cast is one bfloat16 number (Funnel); a mask times a number is none that could be too large."""

    def widened(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.mT + a + b).float()
        if masked:
            scores = scores - 1e6 * (~mask).float()
        return torch.softmax(scores, -1, dtype=q.dtype) @ v

    a, b = (torch.linspace(start, -start, 36).view(6, 6).bfloat16() for start in (-2, 1))
    mask = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    (remark,) = check(widened, *qkv(dtype=torch.bfloat16), a, b, mask).remarks
    assert remark.kind == "fused"


_LEAST = torch.finfo(torch.bfloat16).min
OUT_OF_RANGE: dict[str, Callable[..., Tensor]] = {
    "made larger by a factor": lambda s, a, b: (s + torch.where(a > 0, _LEAST, 0.0).float()) * 1.5,
    "made larger by a divisor": lambda s, a, b: (s + torch.where(a > 0, _LEAST, 0.0).float()) / 0.5,
    "two that add up": lambda s, a, b: s + a.float() + b.float(),
    "a constant beside": lambda s, a, b: s + a.float() + torch.where(torch.arange(6) > 2, -(2.0**110), 0.0),
    "a negative of the greatest": lambda s, a, b: s - torch.where(a > 0, -_LEAST, 0.0) * 2,
    "an integer times the least": lambda s, a, b: s + torch.where(a > 0, _LEAST, 0.0) + (a > 1).int() * -(2.0**120),
    "cast before the softmax": lambda s, a, b: (s + (a > 0).float() * MIN + a.float()).bfloat16(),
}


@pytest.mark.parametrize("of", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE.keys())
def test_scores_that_rounding_may_make_infinite(of: Callable[..., Tensor]) -> None:
    """More than the least bfloat16 may arise somewhere, so that the program says where there are infinities."""

    def masked(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.softmax(of((q @ k.mT).float(), a, b), -1, dtype=q.dtype) @ v

    given = (*qkv(dtype=torch.bfloat16), *(torch.linspace(x, -x, 36).view(6, 6).bfloat16() for x in (-2, 1)))
    report, actual, expected = both(masked, *given)
    assert [r.kind for r in report.remarks] == ["fused"]
    assert "bf16(" in report.fused[0].score
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = expected.isfinite().all(-1).all(0).all(0)
    check(lambda *given: masked(*given)[:, :, finite], *given, gradients=False)


def test_a_softmax_that_is_narrower_than_all_around_it() -> None:
    """There the model means the rounding: nothing else in it has so few digits."""

    def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, -1, dtype=torch.bfloat16).to(q.dtype) @ v

    report = check(rounded, *qkv(), gradients=False)
    assert [r.code for r in report.remarks] == ["AF024"]


HALF: dict[str, Callable[[Tensor], Tensor]] = {
    "two masks": lambda s: (
        s + torch.where(torch.arange(6) > 2, -6e4, 0.0) + torch.where(torch.arange(6) > 1, -6e4, 0.0)
    ),
    "positions": lambda s: s + (torch.arange(6)[:, None] - torch.arange(6)) * 20000.0,
    "a product of numbers": lambda s: s + torch.full((6,), -1000.0) * 100.0,
    "a mask replaced": lambda s: s.masked_fill(torch.arange(6)[:, None] > 3, MIN),
}


@pytest.mark.parametrize("of", HALF.values(), ids=HALF.keys())
def test_scores_beyond_float16(of: Callable[[Tensor], Tensor]) -> None:
    """Sums and products that no float16 can hold are infinite after a cast, and their rows NaN; the gradient ends where the model's
    does."""

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return of((q @ k.mT).float()).half().softmax(-1) @ v

    given = [x.requires_grad_() for x in qkv(dtype=torch.float16)]
    report, actual, expected = both(masked, *given)
    assert [r.kind for r in report.remarks] == ["fused"]
    assert torch.equal(actual.isnan(), expected.isnan())
    grads = [torch.autograd.grad(out[:, :, :2].float().sum(), given[:1])[0] for out in (actual, expected)]
    assert torch.equal(grads[0].isnan()[:, :, 4:], grads[1].isnan()[:, :, 4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_infinite_scores_below_a_mask(dtype: torch.dtype) -> None:
    """Keys at -inf by rounding are lower than those at the least number: a row of both is uniform over the latter."""

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(6)
        low = ((q @ k.mT).float() + torch.where(at > 2, MIN, 0.0)).to(dtype)
        return low.masked_fill((at < 3) & (at[:, None] > 2), torch.finfo(dtype).min).softmax(-1) @ v

    report, actual, expected = both(masked, *qkv(dtype=dtype))
    assert [r.kind for r in report.remarks] == ["fused"]
    assert not actual.isnan().any()
    torch.testing.assert_close(actual[:, :, 3:], expected[:, :, 3:])
