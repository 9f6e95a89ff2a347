"""Kernels for rows in which no key is allowed, beside those that the other kernels have written.

`empty_rows` fills in their output; `uniform_queries` and `uniform_keys` add what they give to the gradients, which is nothing in
most calls and found out in one look at each row.
"""

import triton
import triton.language as tl

from attnfuse.templates.kernels.tile import (
    UNIFORM,
    base,
    dropped,
    pointer_tile,
    row_hash,
    store_tile,
)


@triton.jit(do_not_specialize=["row_tiles"])
def empty_rows(
    V,
    Out,
    Lse,
    Seed,
    VS,
    OS,
    Z,
    L,
    row_tiles,
    MINIMAL: tl.constexpr,
    SINK: tl.constexpr,
    ZERO: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows whose log-sum-exp came out as -inf and that have no allowed key: uniform over the keys filled with `min`, or zeros.

    Rows with an allowed key whose scores are all -inf keep what they have.
    """
    H, Hkv, M, N = Z[1], Z[2], Z[3], Z[4]
    program = tl.program_id(0)
    tile, head = program % row_tiles, program // row_tiles
    b, h = head // H, head % H
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.minimum(row, M - 1)
    at_row = (tl.cast(b, tl.int64) * H + h) * M + m
    wanted = (tl.load(Lse + at_row) == float("-inf")) & (row < M)
    if SINK is not None:
        wanted = wanted & (SINK(b, h, m, Z, L) == float("-inf"))
    if tl.max(wanted.to(tl.int32), 0) > 0:
        seed, row0, row1 = 0, 0, 0
        if THRESHOLD is not None:
            seed = tl.load(Seed)
            row0, row1 = row_hash(seed, b, h, m[:, None])
        v = base(V, b, h // (H // Hkv), VS)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        count = tl.zeros([BLOCK_M], tl.float32)
        some = tl.zeros([BLOCK_M], tl.int32)
        cells = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[None, :]
            minimal, _attached, allowed = MINIMAL(b, h, m[:, None], n, Z, L)
            weight = ((cells == 0) & minimal & (n < N)).to(tl.float32)
            some = tl.maximum(some, tl.max(((cells == 0) & allowed & (n < N)).to(tl.int32), 1))
            count += tl.sum(weight, 1)
            if THRESHOLD is not None:
                weight = tl.where(dropped(seed, row0, row1, n, THRESHOLD), 0.0, weight)
            values = pointer_tile(v, tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1), VS, DV, BLOCK_DV)
            acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)
        value = acc * KEEP / count[:, None]
        if ZERO:
            value = tl.where((count == 0.0)[:, None], 0.0, value)
        wanted = wanted & (some == 0)
        tl.store(Lse + at_row, tl.where(count > 0.0, UNIFORM, float("-inf")), mask=wanted)
        store_tile(Out, b, h, m, wanted, OS, value, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["row_tiles"])
def uniform_queries(
    Q,
    K,
    V,
    Dout,
    Lse,
    Delta,
    Count,
    Found,
    Dq,
    Seed,
    QS,
    KS,
    VS,
    DS,
    DQS,
    Z,
    L,
    row_tiles,
    MINIMAL: tl.constexpr,
    SLOPE: tl.constexpr,
    FACTOR: tl.constexpr,
    SINK: tl.constexpr,
    ZERO: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
    WANTS_Q: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows without an allowed key: how many keys share each of them (`Count`), their dq, and whether the tile has one (`Found`).

    A row that is neither empty nor uniform over filled keys has -1 in `Count`; one of no key at all, whose weights are NaN, 0.
    """
    H, Hkv, M, N = Z[1], Z[2], Z[3], Z[4]
    program = tl.program_id(0)
    tile, head = program % row_tiles, program // row_tiles
    b, h = head // H, head % H
    hkv = h // (H // Hkv)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m1 = tl.minimum(row, M - 1)
    m = m1[:, None]
    at = (tl.cast(b, tl.int64) * H + h) * M + m1
    lse = tl.load(Lse + at)
    wanted = (lse <= UNIFORM) & (row < M)
    if SINK is not None:
        wanted = wanted & (SINK(b, h, m1, Z, L) == float("-inf"))
    some = tl.max(wanted.to(tl.int32), 0)
    count = tl.full([BLOCK_M], -1.0, tl.float32)
    if some > 0:
        count = tl.zeros([BLOCK_M], tl.float32)
        allowed_keys = tl.zeros([BLOCK_M], tl.int32)
        cells = tl.zeros([BLOCK_M, BLOCK_N], tl.int32) == 0
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)[None, :]
            minimal, _attached, allowed = MINIMAL(b, h, m, n, Z, L)
            count += tl.sum((cells & minimal & (n < N)).to(tl.float32), 1)
            allowed_keys = tl.maximum(allowed_keys, tl.max((cells & allowed & (n < N)).to(tl.int32), 1))
        wanted = wanted & (allowed_keys == 0)
        count = tl.where(wanted, count, -1.0)
        if ZERO:
            count = tl.where(count == 0.0, -1.0, count)
        if WANTS_Q:
            seed, row0, row1 = 0, 0, 0
            if THRESHOLD is not None:
                seed = tl.load(Seed)
                row0, row1 = row_hash(seed, b, h, m)
            q = pointer_tile(base(Q, b, h, QS), m1, QS, D, BLOCK_D)
            dout = pointer_tile(base(Dout, b, h, DS), m1, DS, DV, BLOCK_DV)
            delta = tl.load(Delta + at)[:, None]
            keys, values = base(K, b, hkv, KS), base(V, b, hkv, VS)
            dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for n0 in tl.range(0, N, BLOCK_N):
                key = n0 + tl.arange(0, BLOCK_N)
                n1 = tl.minimum(key, N - 1)
                n = key[None, :]
                k = pointer_tile(keys, n1, KS, D, BLOCK_D)
                v = pointer_tile(values, n1, VS, DV, BLOCK_DV)
                dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                if THRESHOLD is not None:
                    dp = tl.where(dropped(seed, row0, row1, n, THRESHOLD), 0.0, dp * KEEP)
                _minimal, attached, _allowed = MINIMAL(b, h, m, n, Z, L)
                counted = (wanted & (count > 0.0))[:, None] & attached & (n < N)
                dx = (dp - delta) / count[:, None]
                if SLOPE is not None:
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                    dx = dx * SLOPE(s, b, h, m, n, Z, L)
                dq = tl.dot(tl.where(counted, dx, 0.0).to(k.dtype), k, dq, input_precision=PRECISION)
            store_tile(Dq, b, h, m1, wanted, DQS, dq * FACTOR, D, BLOCK_D)
    tl.store(Count + at, count, mask=row < M)
    tl.store(Found + program, tl.max((count >= 0.0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["row_tiles", "key_tiles"])
def uniform_keys(
    Q,
    K,
    V,
    Dout,
    Delta,
    Count,
    Found,
    Dk,
    Dv,
    Seed,
    QS,
    KS,
    VS,
    DS,
    DKS,
    DVS,
    Z,
    L,
    row_tiles,
    key_tiles,
    MINIMAL: tl.constexpr,
    SLOPE: tl.constexpr,
    FACTOR: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
    WANTS_K: tl.constexpr,
    WANTS_V: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds what rows without an allowed key give to dk and dv, fp32, of a block of keys."""
    H, Hkv, M, N = Z[1], Z[2], Z[3], Z[4]
    group = H // Hkv
    program = tl.program_id(0)
    tile, head = program % key_tiles, program // key_tiles
    b, hkv = head // Hkv, head % Hkv
    first = (b * H + hkv * group) * row_tiles
    some = tl.full([], 0, tl.int32)
    for start in tl.range(0, group * row_tiles, 1024):
        at = start + tl.arange(0, 1024)
        some = tl.maximum(some, tl.max(tl.load(Found + first + at, mask=at < group * row_tiles, other=0), 0))
    if some > 0:
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        n1 = tl.minimum(key, N - 1)
        n = n1[:, None]
        k = pointer_tile(base(K, b, hkv, KS), n1, KS, D, BLOCK_D)
        v = pointer_tile(base(V, b, hkv, VS), n1, VS, DV, BLOCK_DV)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        seed = 0
        if THRESHOLD is not None:
            seed = tl.load(Seed)
        for i in tl.range(0, group * row_tiles, num_stages=1):
            if tl.load(Found + first + i) > 0:
                h = hkv * group + i // row_tiles
                row = (i % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
                m1 = tl.minimum(row, M - 1)
                m = m1[None, :]
                at_row = (tl.cast(b, tl.int64) * H + h) * M + m1
                count = tl.where(row < M, tl.load(Count + at_row), -1.0)[None, :]
                dout = pointer_tile(base(Dout, b, h, DS), m1, DS, DV, BLOCK_DV)
                minimal, attached, _allowed = MINIMAL(b, h, m, n, Z, L)
                # a row of no key at all has NaN for its weights
                weight = tl.where((count > 0.0) & minimal, 1.0 / count, tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
                weight = tl.where(count == 0.0, float("nan"), weight)
                kept = weight
                if THRESHOLD is not None:
                    row0, row1 = row_hash(seed, b, h, m)
                    gone = dropped(seed, row0, row1, n, THRESHOLD)
                    kept = tl.where(gone & (count > 0.0), 0.0, weight * KEEP)
                dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
                if WANTS_K:
                    q = pointer_tile(base(Q, b, h, QS), m1, QS, D, BLOCK_D)
                    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
                    if THRESHOLD is not None:
                        dp = tl.where(gone, 0.0, dp * KEEP)
                    dx = (dp - tl.load(Delta + at_row)[None, :]) * weight
                    if SLOPE is not None:
                        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                        dx = dx * SLOPE(s, b, h, m, n, Z, L)
                    dx = tl.where((count > 0.0) & attached, dx, 0.0)
                    dk = tl.dot(dx.to(q.dtype), q, dk, input_precision=PRECISION)
        if WANTS_K:
            before = pointer_tile(base(Dk, b, hkv, DKS), n1, DKS, D, BLOCK_D).to(tl.float32)
            store_tile(Dk, b, hkv, n1, key < N, DKS, before + dk * FACTOR, D, BLOCK_D)
        if WANTS_V:
            before = pointer_tile(base(Dv, b, hkv, DVS), n1, DVS, DV, BLOCK_DV).to(tl.float32)
            store_tile(Dv, b, hkv, n1, key < N, DVS, before + dv, DV, BLOCK_DV)
