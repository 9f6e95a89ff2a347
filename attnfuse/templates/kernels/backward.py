"""Kernels of the backward (FlashAttention-2, arXiv:2307.08691), without atomics, so that gradients are the same in every run.

`row_facts` prepares what each row needs; `gradient_of_keys` owns a block of keys and loops over the query heads and rows that
see it; `gradient_of_queries` owns a block of rows; `gradient_of_leaf` owns a block of what one load reads.

With x the score in base e, P = exp(x - lse) and dx = P·(dP - delta) the gradient of x.
"""

import triton
import triton.language as tl

from attnfuse.templates.kernels.tile import (
    LOG2E,
    UNIFORM,
    base,
    dropped,
    load_tile,
    nth_tile,
    place,
    pointer_tile,
    row_hash,
    store_tile,
    tile_count,
    tile_list,
    visited,
)


@triton.jit(do_not_specialize=["row_tiles"])
def row_facts(
    Out,
    Dout,
    Lse,
    Dlse,
    Lse2,
    Delta,
    OS,
    DS,
    Z,
    L,
    row_tiles,
    SINK: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BASE_2: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """For each row its log-sum-exp with the sink, and Σ dout·out - dlse·P(no sink)/P.

    The first is in base 2 if BASE_2, as the score is that is the dot product times a number.  It is NaN where no score is above
    -inf: weights are NaN in cells that are allowed, and 0 in others, as everywhere.
    """
    H, M = Z[1], Z[3]
    program = tl.program_id(0)
    tile, head = program % row_tiles, program // row_tiles
    b, h = head // H, head % H
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.minimum(row, M - 1)
    at = (tl.cast(b, tl.int64) * H + h) * M + m
    out = pointer_tile(base(Out, b, h, OS), m, OS, DV, BLOCK_DV).to(tl.float32)
    dout = pointer_tile(base(Dout, b, h, DS), m, DS, DV, BLOCK_DV).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    lse = tl.load(Lse + at)
    alone = lse
    if SINK is not None:
        sink = SINK(b, h, m, Z, L)
        highest = tl.maximum(lse, sink)
        lse = highest + tl.log(tl.exp(lse - highest) + tl.exp(sink - highest))
        lse = tl.where(highest == float("-inf"), highest, lse)
    if HAS_DLSE:
        factor = tl.where(alone > UNIFORM, tl.exp(lse - alone), 0.0)
        delta = delta - tl.load(Dlse + at).to(tl.float32) * factor
    lse = tl.where(lse == float("-inf"), float("nan"), lse)
    if BASE_2:
        lse = lse * LOG2E
    tl.store(Lse2 + at, lse, mask=row < M)
    tl.store(Delta + at, delta, mask=row < M)


@triton.jit(do_not_specialize=["row_tiles"])
def row_norms(
    Q,
    K,
    Lse2,
    Norm,
    QS,
    KS,
    Z,
    L,
    row_tiles,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    ALLOWED: tl.constexpr,
    KEYS: tl.constexpr,
    SINK: tl.constexpr,
    MOST: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """1 / Σ exp(x - lse) of each row: 1, but where the log-sum-exp is above MOST, so large that it lost digits of the sum.

    All keys of a row may have -1e9 added; then lse is -1e9 and every exp(x - lse) is 1.
    """
    H, Hkv, M, N = Z[1], Z[2], Z[3], Z[4]
    program = tl.program_id(0)
    tile, head = program % row_tiles, program // row_tiles
    b, h = head // H, head % H
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tl.minimum(row, M - 1)
    at = (tl.cast(b, tl.int64) * H + h) * M + m
    lse = tl.load(Lse2 + at)
    wanted = tl.abs(lse) > MOST
    norm = tl.full([BLOCK_M], 1.0, tl.float32)
    if tl.max(wanted.to(tl.int32), 0) > 0:
        lo, _full, _full_stop, hi = visited(KEYS, None, None, b, h, m, N, Z, L, BLOCK_N)
        q = pointer_tile(base(Q, b, h, QS), m, QS, D, BLOCK_D)
        keys = base(K, b, h // (H // Hkv), KS)
        total = tl.zeros([BLOCK_M], tl.float32)
        for i in tl.range(lo, hi):
            n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            k = pointer_tile(keys, tl.minimum(n, N - 1), KS, D, BLOCK_D)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            x = SCORE(x, b, h, m[:, None], n[None, :], Z, L)
            p = tl.where((n < N)[None, :], tl.exp2((x - lse[:, None]) * SCALE), 0.0)
            if ALLOWED is not None:
                p = tl.where(ALLOWED(b, h, m[:, None], n[None, :], Z, L), p, 0.0)
            total += tl.sum(p, 1)
        if SINK is not None:
            total += tl.exp(SINK(b, h, m, Z, L) - lse)
        norm = tl.where(wanted, 1.0 / total, 1.0)
    tl.store(Norm + at, norm, mask=row < M)


@triton.jit
def _gradient_of_scores(
    s,
    dp,
    b,
    h,
    m,
    n,
    lse,
    delta,
    norm,
    keep,
    Z,
    L,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    MASK: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Weights, and the gradient of the score in base e, of a tile: lse, delta and norm broadcast along the keys.

    Args:
        keep: the cells that dropout keeps, where KEEP is not None.
    """
    if SCORE is not None:
        p = tl.exp2((SCORE(s, b, h, m, n, Z, L) - lse) * SCALE)
    else:
        p = tl.exp2(s * SCALE - lse)
    if NORM:
        p = p * norm
    if KEEP is not None:
        dp = tl.where(keep, dp * KEEP, 0.0)
    dx = p * (dp - delta)
    if MASK is not None:
        # a row without an allowed key has NaN for its output, and so for delta
        allowed = MASK(b, h, m, n, Z, L)
        p, dx = tl.where(allowed, p, 0.0), tl.where(allowed, dx, 0.0)
    return p, dx


@triton.jit
def _sloped(dx, s, b, h, m, n, Z, L, SLOPE: tl.constexpr, MASK: tl.constexpr):
    """The gradient of the dot product where the slope is not the same everywhere; none where a cell is not allowed."""
    dx = dx * SLOPE(s, b, h, m, n, Z, L)
    if MASK is not None:
        dx = tl.where(MASK(b, h, m, n, Z, L), dx, 0.0)
    return dx


@triton.jit
def _over_rows(
    dk,
    dv,
    k,
    v,
    Q,
    Dout,
    Lse2,
    Delta,
    Norm,
    b,
    h,
    n,
    lo,
    full_lo,
    full_hi,
    tiles,
    count,
    QS,
    DS,
    Z,
    L,
    seed,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    SLOPE: tl.constexpr,
    MASK: tl.constexpr,
    NORM: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
    FULL: tl.constexpr,
    MAP: tl.constexpr,
    TMA: tl.constexpr,
    TAIL: tl.constexpr,
    WANTS_K: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Adds what the full, or the partial row tiles of one query head give; tiles are transposed, [BN, BM]."""
    H, M = Z[1], Z[3]
    at_row = (tl.cast(b, tl.int64) * H + h) * M
    for i in tl.range(0, count):
        m0 = nth_tile(i, lo, full_lo, full_hi, tiles, MAP, BLOCK_M, FULL) * BLOCK_M
        row = m0 + tl.arange(0, BLOCK_M)
        m = row
        if TAIL:
            m = tl.minimum(row, M - 1)
        q = load_tile(Q, b, h, m0, M, QS, D, BLOCK_M, BLOCK_D, TMA, TAIL)
        dout = load_tile(Dout, b, h, m0, M, DS, DV, BLOCK_M, BLOCK_DV, TMA, TAIL)
        lse = tl.load(Lse2 + at_row + m)
        delta = tl.load(Delta + at_row + m)
        norm = 1.0
        if NORM:
            norm = tl.load(Norm + at_row + m)[None, :]
        if TAIL:
            # rows past the end have no weights
            lse = tl.where(row < M, lse, float("inf"))
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        keep = 0
        if THRESHOLD is not None:
            row0, row1 = row_hash(seed, b, h, m[None, :])
            keep = dropped(seed, row0, row1, n, THRESHOLD) == 0
        p, dx = _gradient_of_scores(
            s, dp, b, h, m[None, :], n, lse[None, :], delta[None, :], norm, keep, Z, L, SCALE, SCORE, MASK, NORM, KEEP
        )
        if TAIL:
            dx = tl.where((row < M)[None, :], dx, 0.0)
            p = tl.where((row < M)[None, :], p, 0.0)
        kept = p
        if THRESHOLD is not None:
            kept = tl.where(keep, p * KEEP, 0.0)
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if WANTS_K:
            if SLOPE is not None:
                dx = _sloped(dx, s, b, h, m[None, :], n, Z, L, SLOPE, MASK)
            dk = tl.dot(dx.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["key_tiles", "swizzle"])
def gradient_of_keys(
    Q,
    K,
    V,
    Dout,
    Lse2,
    Delta,
    Norm,
    Dk,
    Dv,
    Seed,
    Map,
    QS,
    KS,
    VS,
    DS,
    DKS,
    DVS,
    MS,
    Z,
    L,
    key_tiles,
    swizzle,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    SLOPE: tl.constexpr,
    FACTOR: tl.constexpr,
    ALLOWED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
    TMA: tl.constexpr,
    TAIL: tl.constexpr,
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
    """dk and dv of a block of keys of one KV head, over all its query heads in order.

    Args:
        FACTOR: the slope of the score by s where it is one number, else 1.
        Map, MS, MAP: the tile map of keys, its strides and the width of its tiles, None without one.
        TAIL: M is no multiple of BLOCK_M.
    """
    B, H, Hkv, M, N = Z[0], Z[1], Z[2], Z[3], Z[4]
    group = H // Hkv
    tile, head = place(tl.program_id(0), key_tiles, B * Hkv, swizzle, False)
    b, hkv = head // Hkv, head % Hkv
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
    for of_group in tl.range(0, group, num_stages=1):
        h = hkv * group + of_group
        tiles = tile_list(Map, MS, b, h, tile, BLOCK_N, MAP)
        lo, full_lo, full_hi, hi = visited(ROWS, tiles, MAP, b, h, n1, M, Z, L, BLOCK_M)
        dk, dv = _over_rows(
            dk,
            dv,
            k,
            v,
            Q,
            Dout,
            Lse2,
            Delta,
            Norm,
            b,
            h,
            n,
            lo,
            full_lo,
            full_hi,
            tiles,
            tile_count(lo, full_lo, full_hi, hi, True),
            QS,
            DS,
            Z,
            L,
            seed,
            SCALE,
            SCORE,
            SLOPE,
            RESIDUAL,
            NORM,
            THRESHOLD,
            KEEP,
            True,
            MAP,
            TMA,
            False,
            WANTS_K,
            PRECISION,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_M,
        )
        if TAIL or ROWS is not None or MAP is not None:
            dk, dv = _over_rows(
                dk,
                dv,
                k,
                v,
                Q,
                Dout,
                Lse2,
                Delta,
                Norm,
                b,
                h,
                n,
                lo,
                full_lo,
                full_hi,
                tiles,
                tile_count(lo, full_lo, full_hi, hi, False),
                QS,
                DS,
                Z,
                L,
                seed,
                SCALE,
                SCORE,
                SLOPE,
                ALLOWED,
                NORM,
                THRESHOLD,
                KEEP,
                False,
                MAP,
                TMA,
                TAIL,
                WANTS_K,
                PRECISION,
                D,
                DV,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_M,
            )
    if WANTS_K:
        store_tile(Dk, b, hkv, n1, key < N, DKS, dk * FACTOR, D, BLOCK_D)
    if WANTS_V:
        store_tile(Dv, b, hkv, n1, key < N, DVS, dv, DV, BLOCK_DV)


@triton.jit
def _query_tiles(
    dq,
    q,
    dout,
    K,
    V,
    lse,
    delta,
    norm,
    b,
    hkv,
    h,
    m,
    lo,
    full_lo,
    full_hi,
    tiles,
    count,
    KS,
    VS,
    Z,
    L,
    seed,
    row0,
    row1,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    SLOPE: tl.constexpr,
    MASK: tl.constexpr,
    NORM: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
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
    N = Z[4]
    for i in tl.range(0, count):
        n0 = nth_tile(i, lo, full_lo, full_hi, tiles, MAP, BLOCK_N, FULL) * BLOCK_N
        key = n0 + tl.arange(0, BLOCK_N)
        n = key[None, :]
        k = load_tile(K, b, hkv, n0, N, KS, D, BLOCK_N, BLOCK_D, TMA, TAIL)
        v = load_tile(V, b, hkv, n0, N, VS, DV, BLOCK_N, BLOCK_DV, TMA, TAIL)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        keep = 0
        if THRESHOLD is not None:
            keep = dropped(seed, row0, row1, n, THRESHOLD) == 0
        _weights, dx = _gradient_of_scores(
            s, dp, b, h, m, n, lse, delta, norm, keep, Z, L, SCALE, SCORE, MASK, NORM, KEEP
        )
        if SLOPE is not None:
            dx = _sloped(dx, s, b, h, m, n, Z, L, SLOPE, MASK)
        if TAIL:
            dx = tl.where(n < N, dx, 0.0)
        dq = tl.dot(dx.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["row_tiles", "swizzle"])
def gradient_of_queries(
    Q,
    K,
    V,
    Dout,
    Lse2,
    Delta,
    Norm,
    Dq,
    Seed,
    Map,
    QS,
    KS,
    VS,
    DS,
    DQS,
    MS,
    Z,
    L,
    row_tiles,
    swizzle,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    SLOPE: tl.constexpr,
    FACTOR: tl.constexpr,
    ALLOWED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    KEYS: tl.constexpr,
    MAP: tl.constexpr,
    NORM: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
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
    """dq of a block of rows of one head."""
    B, H, Hkv, M, N = Z[0], Z[1], Z[2], Z[3], Z[4]
    tile, head = place(tl.program_id(0), row_tiles, B * H, swizzle, True)
    b, h = head // H, head % H
    hkv = h // (H // Hkv)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m1 = tl.minimum(row, M - 1)
    m = m1[:, None]
    q = pointer_tile(base(Q, b, h, QS), m1, QS, D, BLOCK_D)
    dout = pointer_tile(base(Dout, b, h, DS), m1, DS, DV, BLOCK_DV)
    at = (tl.cast(b, tl.int64) * H + h) * M + m1
    lse, delta = tl.load(Lse2 + at)[:, None], tl.load(Delta + at)[:, None]
    norm = 1.0
    if NORM:
        norm = tl.load(Norm + at)[:, None]
    seed, row0, row1 = 0, 0, 0
    if THRESHOLD is not None:
        seed = tl.load(Seed)
        row0, row1 = row_hash(seed, b, h, m)
    tiles = tile_list(Map, MS, b, h, tile, BLOCK_M, MAP)
    lo, full_lo, full_hi, hi = visited(KEYS, tiles, MAP, b, h, m1, N, Z, L, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _query_tiles(
        dq,
        q,
        dout,
        K,
        V,
        lse,
        delta,
        norm,
        b,
        hkv,
        h,
        m,
        lo,
        full_lo,
        full_hi,
        tiles,
        tile_count(lo, full_lo, full_hi, hi, True),
        KS,
        VS,
        Z,
        L,
        seed,
        row0,
        row1,
        SCALE,
        SCORE,
        SLOPE,
        RESIDUAL,
        NORM,
        THRESHOLD,
        KEEP,
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
        dq = _query_tiles(
            dq,
            q,
            dout,
            K,
            V,
            lse,
            delta,
            norm,
            b,
            hkv,
            h,
            m,
            lo,
            full_lo,
            full_hi,
            tiles,
            tile_count(lo, full_lo, full_hi, hi, False),
            KS,
            VS,
            Z,
            L,
            seed,
            row0,
            row1,
            SCALE,
            SCORE,
            SLOPE,
            ALLOWED,
            NORM,
            THRESHOLD,
            KEEP,
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
    store_tile(Dq, b, h, m1, row < M, DQS, dq * FACTOR, D, BLOCK_D)


@triton.jit(do_not_specialize=["batches", "heads", "row_tiles", "key_tiles", "before", "above"])
def gradient_of_leaf(
    Q,
    K,
    V,
    Dout,
    Lse2,
    Delta,
    Norm,
    Count,
    Grad,
    Seed,
    QS,
    KS,
    VS,
    DS,
    GS,
    Z,
    L,
    batches,
    heads,
    row_tiles,
    key_tiles,
    before,
    above,
    SCALE: tl.constexpr,
    SCORE: tl.constexpr,
    BY_LOAD: tl.constexpr,
    ALLOWED: tl.constexpr,
    KEYS: tl.constexpr,
    MINIMAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP: tl.constexpr,
    OF_ROWS: tl.constexpr,
    OF_KEYS: tl.constexpr,
    ALONG: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of what one load reads, fp32, at a block of its rows and keys, summed over the axes that it lacks.

    Args:
        batches, heads: how many batches and heads have a gradient of their own: all, or 1 for the sum over them.
        row_tiles, key_tiles: tiles of the gradient: 1 where it is summed over rows, over keys.
        Count, MINIMAL: keys of rows without an allowed key; MINIMAL is None where such rows give nothing.
        OF_ROWS, OF_KEYS: whether the gradient has an entry for each row, each key.
        ALONG: whether each program has a tile of its own instead, for the cells that a step to the next row and key leads from one
            to the other; then `key_tiles` counts them, and of the first row tile's keys the tile number `before` is the first one.
        above: of a gradient of some of the rows, how many tiles of rows lie before it.
    """
    B, H, Hkv, M, N = Z[0], Z[1], Z[2], Z[3], Z[4]
    program = tl.program_id(0)
    own_keys, program = program % key_tiles, program // key_tiles
    own_rows, program = program % row_tiles + above, program // row_tiles
    own_head, own_batch = program % heads, program // heads
    seed = 0
    if THRESHOLD is not None:
        seed = tl.load(Seed)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    m_first, m_stop = own_rows, own_rows + 1
    if not OF_ROWS:
        m_first, m_stop = 0, tl.cdiv(M, BLOCK_M)
    for member in tl.range(0, (B // batches) * (H // heads), num_stages=1):
        b = own_batch + member // (H // heads)
        h = own_head + member % (H // heads)
        hkv = h // (H // Hkv)
        keys, values = base(K, b, hkv, KS), base(V, b, hkv, VS)
        for m_tile in tl.range(m_first, m_stop, num_stages=1):
            row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
            m1 = tl.minimum(row, M - 1)
            m = m1[:, None]
            at = (tl.cast(b, tl.int64) * H + h) * M + m1
            lse, delta = tl.load(Lse2 + at)[:, None], tl.load(Delta + at)[:, None]
            norm = tl.load(Norm + at)[:, None]
            first, _full, _full_stop, stop = visited(KEYS, None, None, b, h, m1, N, Z, L, BLOCK_N)
            count = 1.0
            uniform = row < 0
            if MINIMAL is not None:
                # not told by lse: a row whose bias is finfo.min throughout has the same
                shared = tl.load(Count + at)
                count = shared[:, None]
                uniform = (shared > 0.0) & (row < M)
                some = tl.max(uniform.to(tl.int32), 0) > 0
                first, stop = tl.where(some, 0, first), tl.where(some, tl.cdiv(N, BLOCK_N), stop)
            start = 0
            if ALONG:
                start = m_tile * BLOCK_M + (own_keys - before) * BLOCK_N
                some = (start < stop * BLOCK_N) & (start + BLOCK_N > first * BLOCK_N)
                first, stop = 0, some.to(tl.int32)
            elif OF_KEYS:
                first, stop = tl.maximum(first, own_keys), tl.minimum(stop, own_keys + 1)
            q = pointer_tile(base(Q, b, h, QS), m1, QS, D, BLOCK_D)
            dout = pointer_tile(base(Dout, b, h, DS), m1, DS, DV, BLOCK_DV)
            row0, row1 = 0, 0
            if THRESHOLD is not None:
                row0, row1 = row_hash(seed, b, h, m)
            for n_tile in tl.range(first, stop):
                key = start + n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
                n1 = tl.minimum(tl.maximum(key, 0), N - 1)
                n = n1[None, :]
                inside = (row < M)[:, None] & ((key >= 0) & (key < N))[None, :]
                k = pointer_tile(keys, n1, KS, D, BLOCK_D)
                v = pointer_tile(values, n1, VS, DV, BLOCK_DV)
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
                keep = 0
                if THRESHOLD is not None:
                    keep = dropped(seed, row0, row1, n, THRESHOLD) == 0
                _weights, dx = _gradient_of_scores(
                    s, dp, b, h, m, n, lse, delta, norm, keep, Z, L, SCALE, SCORE, ALLOWED, True, KEEP
                )
                counted = inside
                if ALLOWED is not None:
                    counted = counted & ALLOWED(b, h, m, n, Z, L)
                if MINIMAL is not None:
                    if THRESHOLD is not None:
                        dp = tl.where(keep, dp * KEEP, 0.0)
                    _minimal, attached, _allowed = MINIMAL(b, h, m, n, Z, L)
                    dx = tl.where(uniform[:, None], (dp - delta) / count, dx)
                    counted = tl.where(uniform[:, None], inside & attached, counted)
                slope = BY_LOAD(s, b, h, m, n, Z, L)
                total += tl.where(counted, dx * slope, 0.0)
    Grad += tl.cast(own_batch, tl.int64) * GS[0] + tl.cast(own_head, tl.int64) * GS[1]
    rows = own_rows * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = own_keys * BLOCK_N + tl.arange(0, BLOCK_N)
    if ALONG:
        rows = own_keys * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tl.arange(0, BLOCK_N)
        tl.store(Grad + tl.cast(rows, tl.int64)[:, None] * GS[2] + cols[None, :] * GS[3], total)
    elif OF_ROWS and OF_KEYS:
        own = tl.cast(rows - above * BLOCK_M, tl.int64)
        at = Grad + own[:, None] * GS[2] + cols[None, :] * GS[3]
        tl.store(at, total, mask=(rows < M)[:, None] & (cols < N)[None, :])
    elif OF_ROWS:
        tl.store(Grad + tl.cast(rows, tl.int64) * GS[2], tl.sum(total, 1), mask=rows < M)
    else:
        tl.store(Grad + tl.cast(cols, tl.int64) * GS[3], tl.sum(total, 0), mask=cols < N)
