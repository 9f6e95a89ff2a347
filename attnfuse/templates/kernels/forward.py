"""Kernels of the forward: online softmax over the key tiles that the mask leaves (T. Dao, FlashAttention-2, arXiv:2307.08691).

`attend` works on a block of rows of one head, or, PACKED, on rows of all query heads that share a KV head; SPLIT, on a part of
their keys, whose results `combine` puts together (flash decoding).  The log-sum-exp that is stored is natural.
"""

import triton
import triton.language as tl

from attnfuse.templates.kernels.tile import (
    LN2,
    LOG2E,
    dropped,
    load_tile,
    nth_tile,
    place,
    row_hash,
    store_tile,
    tile_count,
    tile_list,
    visited,
)


@triton.jit
def _over_keys(
    acc,
    total,
    top,
    q,
    K,
    V,
    b,
    hkv,
    h,
    m,
    lo,
    full_lo,
    full_hi,
    tiles,
    start,
    stop,
    KS,
    VS,
    Z,
    L,
    seed,
    row0,
    row1,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    MASK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    FULL: tl.constexpr,
    MAP: tl.constexpr,
    TMA: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Key tiles number `start` to `stop` of the full, or of the partial ones; h [BM, 1] or a scalar, m [BM, 1]."""
    N = Z[4]
    for i in tl.range(start, stop):
        n0 = nth_tile(i, lo, full_lo, full_hi, tiles, MAP, BLOCK_N, FULL) * BLOCK_N
        n = n0 + tl.arange(0, BLOCK_N)[None, :]
        k = load_tile(K, b, hkv, n0, N, KS, D, BLOCK_N, BLOCK_D, TMA, TAIL)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SCORE is not None:
            x = SCORE(x, b, h, m, n, Z, L)
        if MASK is not None:
            x = tl.where(MASK(b, h, m, n, Z, L), x, float("-inf"))
        if TAIL:
            x = tl.where(n < N, x, float("-inf"))
        highest = tl.max(x, 1)
        if SCORE is None:
            highest = highest * SCALE
        highest = tl.maximum(top, highest)
        # a row without a score above -inf so far
        around = tl.where(highest == float("-inf"), 0.0, highest)
        if SCORE is None:
            p = tl.exp2(x * SCALE - around[:, None])
            decay = tl.exp2(top - around)
        else:
            # not scaled before the subtraction: finfo.min in a bias would become -inf
            p = tl.exp2((x - around[:, None]) * SCALE)
            decay = tl.exp2((top - around) * SCALE)
        total = total * decay + tl.sum(p, 1)
        if THRESHOLD is not None:
            p = tl.where(dropped(seed, row0, row1, n, THRESHOLD), 0.0, p)
        v = load_tile(V, b, hkv, n0, N, VS, DV, BLOCK_N, BLOCK_DV, TMA, TAIL)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = highest
    return acc, total, top


@triton.jit
def _finish(value, lse, b, h, m, Z, L, SINK: tl.constexpr, ZERO: tl.constexpr):
    """The output of rows from their normalised values and natural log-sum-exps."""
    if SINK is not None:
        # beside a sink, rows whose scores are all -inf, or that have no key, are zeros
        share = tl.sigmoid(lse - SINK(b, h, m, Z, L))
        value = tl.where((share == 0.0)[:, None], 0.0, value * share[:, None])
    elif ZERO:
        value = tl.where((lse == float("-inf"))[:, None], 0.0, value)
    return value


@triton.jit(do_not_specialize=["row_tiles", "swizzle", "splits"])
def attend(
    Q,
    K,
    V,
    Out,
    Lse,
    Parts,
    Seed,
    Map,
    QS,
    KS,
    VS,
    OS,
    MS,
    Z,
    L,
    row_tiles,
    swizzle,
    splits,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    ALLOWED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    KEYS: tl.constexpr,
    SINK: tl.constexpr,
    ZERO: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    MAP: tl.constexpr,
    TMA: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out and lse of a block of rows, or of them and a part of their keys the fp32 values and log-sum-exp.

    Args:
        Parts: with SPLIT, fp32 [splits, B·H·M, BLOCK_DV], and Lse [splits, B·H·M] beside it.
        Map, MS, MAP: the tile map of rows, its strides and the width of its tiles, None without one; by KV head where PACKED.
        swizzle: see `place`, counted in heads of this grid: query heads, or KV heads where PACKED.
        SCALE, SCORE: see `Functions`: what takes a score to base 2, and what computes it, None where it is the dot product.
        KEEP: the factor that makes up for dropped weights.
    """
    B, H, Hkv, M, N = Z[0], Z[1], Z[2], Z[3], Z[4]
    group = H // Hkv
    program = tl.program_id(0)
    part = 0
    if SPLIT:
        part = program % splits
        program = program // splits
    if PACKED:
        tile, head = place(program, row_tiles, B * Hkv, swizzle, True)
        b, hkv = head // Hkv, head % Hkv
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = row < group * M
        row = tl.minimum(row, group * M - 1)
        h1, m1 = hkv * group + row // M, row % M
        h2 = h1[:, None]
    else:
        tile, head = place(program, row_tiles, B * H, swizzle, True)
        b, h1 = head // H, head % H
        hkv, h2 = h1 // group, h1
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = row < M
        m1 = tl.minimum(row, M - 1)
    m2 = m1[:, None]

    tiles = tile_list(Map, MS, b, hkv if PACKED else h1, 0 if PACKED else tile, BLOCK_M, MAP)
    lo, full_lo, full_hi, hi = visited(KEYS, tiles, MAP, b, h1, m1, N, Z, L, BLOCK_N)
    full = tile_count(lo, full_lo, full_hi, hi, True)
    partial = tile_count(lo, full_lo, full_hi, hi, False)
    full_start, full_stop, partial_start, partial_stop = 0, full, 0, partial
    if SPLIT:
        # tiles are dealt out in order, full ones first
        each = tl.cdiv(full + partial, splits)
        start, stop = part * each, tl.minimum((part + 1) * each, full + partial)
        full_start, full_stop = tl.minimum(start, full), tl.minimum(stop, full)
        partial_start, partial_stop = tl.maximum(start - full, 0), tl.maximum(stop - full, 0)

    d = tl.arange(0, BLOCK_D)
    heads = tl.cast(h1, tl.int64) * QS[1] + tl.cast(m1, tl.int64) * QS[2]
    at = Q + tl.cast(b, tl.int64) * QS[0] + heads[:, None] + d[None, :] * QS[3]
    if D == BLOCK_D:
        q = tl.load(at)
    else:
        q = tl.load(at, mask=d[None, :] < D, other=0.0)
    seed, row0, row1 = 0, 0, 0
    if THRESHOLD is not None:
        seed = tl.load(Seed)
        row0, row1 = row_hash(seed, b, h2, m2)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, total, top = _over_keys(
        acc,
        total,
        top,
        q,
        K,
        V,
        b,
        hkv,
        h2,
        m2,
        lo,
        full_lo,
        full_hi,
        tiles,
        full_start,
        full_stop,
        KS,
        VS,
        Z,
        L,
        seed,
        row0,
        row1,
        SCALE,
        SCORE,
        RESIDUAL,
        THRESHOLD,
        True,
        MAP,
        TMA,
        False,
        PRECISION,
        D,
        DV,
        BLOCK_D,
        BLOCK_DV,
        BLOCK_N,
    )
    if TAIL or KEYS is not None or MAP is not None:
        acc, total, top = _over_keys(
            acc,
            total,
            top,
            q,
            K,
            V,
            b,
            hkv,
            h2,
            m2,
            lo,
            full_lo,
            full_hi,
            tiles,
            partial_start,
            partial_stop,
            KS,
            VS,
            Z,
            L,
            seed,
            row0,
            row1,
            SCALE,
            SCORE,
            ALLOWED,
            THRESHOLD,
            False,
            MAP,
            TMA,
            TAIL,
            PRECISION,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_N,
        )
    if SCORE is None:
        top = top * LN2
    lse = top + tl.log(total)
    at_row = (tl.cast(b, tl.int64) * H + h1) * M + m1
    if SPLIT:
        # a part without a key has the weight zero
        value = tl.where((total == 0.0)[:, None], 0.0, acc / total[:, None])
        at_row = at_row + tl.cast(part, tl.int64) * B * H * M
        dv = tl.arange(0, BLOCK_DV)
        tl.store(Parts + at_row[:, None] * BLOCK_DV + dv[None, :], value, mask=valid[:, None])
        tl.store(Lse + at_row, lse, mask=valid)
    else:
        value = _finish(acc * KEEP / total[:, None], lse, b, h1, m1, Z, L, SINK, ZERO)
        tl.store(Lse + at_row, lse, mask=valid)
        store_tile(Out, b, h1, m1, valid, OS, value, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["splits"])
def combine(
    Parts,
    PartLse,
    Out,
    Lse,
    OS,
    Z,
    L,
    splits,
    SINK: tl.constexpr,
    ZERO: tl.constexpr,
    KEEP: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out and lse of one row from `splits` parts of its keys."""
    B, H, M = Z[0], Z[1], Z[3]
    row = tl.cast(tl.program_id(0), tl.int64)
    m = row % M
    h = (row // M) % H
    b = row // M // H
    s = tl.arange(0, BLOCK_S)
    rows = tl.cast(B, tl.int64) * H * M
    lse = tl.load(PartLse + s * rows + row, mask=s < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2((lse - tl.where(top == float("-inf"), 0.0, top)) * LOG2E)
    total = tl.sum(weight, 0)
    dv = tl.arange(0, BLOCK_DV)
    at = Parts + (s[:, None] * rows + row) * BLOCK_DV + dv[None, :]
    value = tl.sum(tl.load(at, mask=s[:, None] < splits, other=0.0) * weight[:, None], 0) * KEEP / total
    one = tl.zeros([1], tl.int64)
    lse = tl.zeros([1], tl.float32) + (top + tl.log(total))
    value = _finish(value[None, :], lse, b, h + one, m + one, Z, L, SINK, ZERO)
    tl.store(Lse + row + one, lse)
    store_tile(Out, b, h + one, m + one, one == 0, OS, value, DV, BLOCK_DV)
