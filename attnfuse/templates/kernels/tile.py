"""What the Triton kernels share: which tile a program works on, which tiles it visits, loads, dropout, integer division.

Device functions only; each has one `return`, because Triton compiles what stands after another.  `Z` is the tuple of sizes
(B, H, Hkv, M, N, i0, …), `L` the tuple of leaves, both read by the functions that `score_function` writes.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# The log-sum-exp that marks a row which is uniform over keys filled with `min`: fp32's least finite value.
UNIFORM: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def place(program, tiles, heads, swizzle, DESCENDING: tl.constexpr):
    """The tile and the head of a program: `swizzle` heads, whose keys and values fit the L2 cache together, run side by side.

    Their tiles go from last to first if DESCENDING, so that the longest rows of a causal mask start first.
    """
    section = program // (swizzle * tiles)
    rest = program - section * swizzle * tiles
    width = tl.minimum(swizzle, heads - section * swizzle)
    tile = rest // width
    head = section * swizzle + rest % width
    if DESCENDING:
        tile = tiles - 1 - tile
    return tile, head


@triton.jit
def tile_list(Map, strides, b, h, tile, BLOCK: tl.constexpr, MAP: tl.constexpr):
    """The list of a block of rows (or keys) in a tile map, whose tiles are MAP wide; nothing where MAP is None."""
    found = Map
    if MAP is not None:
        found += (
            tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1] + tile * BLOCK // MAP * strides[2]
        )
    return found


@triton.jit
def visited(RANGE: tl.constexpr, Tiles, MAP: tl.constexpr, b, h, at, size, Z, L, BLOCK: tl.constexpr):
    """The tiles that a row block (or, with the transposed map, a key block) visits, as four tile numbers in order.

    Tiles [lo, full_lo) and [full_hi, hi) are partial, [full_lo, full_hi) lie inside the bounds of every row.  With a tile map
    they are numbers of entries of the list.

    Args:
        RANGE: gives the least and the past-the-end index of each of `at`; None where every index is inside.
        Tiles: the list of `tile_list`: how many full and how many partial tiles, then these.
        at: the rows (or keys), all of them valid.
        size: how many keys (or rows) there are.
    """
    if MAP is not None:
        lo, full_lo = 0, 0
        full_hi = tl.load(Tiles) * (MAP // BLOCK)
        hi = full_hi + tl.load(Tiles + 1) * (MAP // BLOCK)
    elif RANGE is None:
        lo, full_lo, full_hi, hi = 0, 0, size // BLOCK, tl.cdiv(size, BLOCK)
    else:
        low, high = RANGE(b, h, at, Z, L)
        first = tl.cast(tl.minimum(tl.maximum(tl.min(low, 0), 0), size), tl.int32)
        full_first = tl.cast(tl.minimum(tl.maximum(tl.max(low, 0), 0), size), tl.int32)
        last = tl.cast(tl.maximum(tl.minimum(tl.max(high, 0), size), 0), tl.int32)
        full_last = tl.cast(tl.maximum(tl.minimum(tl.min(high, 0), size), 0), tl.int32)
        lo = first // BLOCK
        hi = tl.where(first < last, tl.maximum(tl.cdiv(last, BLOCK), lo), lo)
        full_lo = tl.minimum(tl.maximum(tl.cdiv(full_first, BLOCK), lo), hi)
        full_hi = tl.minimum(tl.maximum(full_last // BLOCK, full_lo), hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def nth_tile(i, lo, full_lo, full_hi, Tiles, MAP: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Tile number i of the full ones, or of the partial ones on both sides of them, or after them in the list of a tile map."""
    if FULL:
        tile = full_lo + i
    else:
        left = full_lo - lo
        tile = tl.where(i < left, lo + i, full_hi + i - left)
    if MAP is not None:
        tile = tl.load(Tiles + 2 + tile // (MAP // BLOCK)) * (MAP // BLOCK) + tile % (MAP // BLOCK)
    return tile


@triton.jit
def tile_count(lo, full_lo, full_hi, hi, FULL: tl.constexpr):
    """How many tiles `nth_tile` counts."""
    if FULL:
        count = full_hi - full_lo
    else:
        count = (full_lo - lo) + (hi - full_hi)
    return count


@triton.jit
def pointer_tile(X, rows, strides, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of the matrix at X, zeros right of WIDTH; `rows` are all valid."""
    d = tl.arange(0, BLOCK_D)
    at = X + tl.cast(rows, tl.int64)[:, None] * strides[2] + d[None, :] * strides[3]
    if WIDTH == BLOCK_D:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=d[None, :] < WIDTH, other=0.0)
    return x


@triton.jit
def base(X, b, h, strides):
    """The matrix of one batch and head."""
    return X + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]


@triton.jit
def load_tile(
    X,
    b,
    h,
    start,
    size,
    strides,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Rows [start, start + BLOCK) of one batch and head, [BLOCK, BLOCK_D]; with TAIL, what lies beyond `size` has no meaning.

    X is a descriptor if TMA, else a pointer.
    """
    if TMA:
        x = X.load([b, h, start, 0]).reshape(BLOCK, BLOCK_D)
    else:
        rows = start + tl.arange(0, BLOCK)
        if TAIL:
            rows = tl.minimum(rows, size - 1)
        x = pointer_tile(base(X, b, h, strides), rows, strides, WIDTH, BLOCK_D)
    return x


@triton.jit
def store_tile(X, b, h, rows, valid, strides, value, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores [rows, BLOCK_D] where `valid`; `h` is one head, or the head of each row."""
    d = tl.arange(0, BLOCK_D)
    heads = tl.cast(h, tl.int64) * strides[1] + tl.cast(rows, tl.int64) * strides[2]
    at = X + tl.cast(b, tl.int64) * strides[0] + heads[:, None] + d[None, :] * strides[3]
    keep = valid[:, None]
    if WIDTH != BLOCK_D:
        keep = keep & (d[None, :] < WIDTH)
    tl.store(at, value.to(X.dtype.element_ty), mask=keep)


@triton.jit
def _mixed(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _next(x, index):
    return _mixed(x + (tl.cast(index, tl.int64) + 1) * -0x61C8864680B583EB)


@triton.jit
def row_hash(seed, b, h, m):
    """The two hashes of rows that `dropout.rows` defines, int32 in the shape of `m` and `h`."""
    x = _next(_next(_next(_mixed(seed + -0x61C8864680B583EB), b), h), m)
    return tl.cast(x, tl.int32) & -2, tl.cast(x >> 32, tl.int32)


@triton.jit
def dropped(seed, row0, row1, n, THRESHOLD: tl.constexpr):
    """Which cells `dropout.dropped` drops; the hashes of rows and `n` broadcast against each other."""
    x = _mixed(_mixed(seed ^ -0x61C8864680B583EB) - (tl.cast(n, tl.int64) + 1) * -0x61C8864680B583EB)
    key0 = tl.cast(x, tl.int32) | 1
    key1 = tl.cast(x >> 32, tl.int32)
    return (row0 ^ key0) * (row1 + key1) < THRESHOLD


@triton.jit
def floor_div(a, b):
    """a // b rounded down, as in Python; something of no meaning where b is 0."""
    b = tl.where(b == 0, 1, b)
    quotient = a // b
    return tl.where((a % b != 0) & ((a < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def floor_mod(a, b):
    """a - b·(a // b), which has the sign of b, as in Python; something of no meaning where b is 0."""
    b = tl.where(b == 0, 1, b)
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def tanh(x):
    """tanh to fp32's last digits: S. L. Moshier's Cephes (tanhf): a polynomial near 0, else by the exponential."""
    z = x * x
    near = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z) - (
        3.33332819422e-1
    )
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * z * near, tl.where(x < 0, -far, far))
