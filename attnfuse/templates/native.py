"""attnfuse's own flash kernels for processors with AVX-512, `cpp`: built once a machine, through Inductor's cache.

They serve `s*scale + bias`, softcapped or not, with dropout or without, where each row sees the keys from one to another, all of
them or those that a mask allows, on processors on which they were measured to be faster (`is_faster_in`).  PyTorch's kernel for the
CPU serves the rest.
"""

from __future__ import annotations

import ctypes
import logging
import math
import struct
import sys
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from attnfuse.templates.dropout import threshold

log = logging.getLogger(__name__)

_SOURCES: Final = Path(__file__).parent / "cpp"
_TYPES: Final = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# A thread more has that many products to make: to start it, and to wait for it beside other work, costs more than fewer.
_PRODUCTS: Final = 1 << 22
# Scores of all heads of which there are many, to write out and to read: 1 MiB in float32.
MANY_SCORES: Final = 1 << 18
# `Call` of `common.h`
_CALL: Final = struct.Struct("18P54q4d")


class Processor(NamedTuple):
    """A kind of processor on which these kernels were measured beside the library's: where they are as fast, or faster.

    Args:
        name: as users know it.
        pairs: whether instructions for pairs of bfloat16 beat those for float32, of which each does half as much.
        fewest_rows: from so many rows that read the keys of a KV head on, in float32 and in narrower types.
        fewest_scores: from so many scores a head on in float32, fewer where those of all heads do not fit the caches
            (`MANY_SCORES`).
    """

    name: str
    pairs: bool
    fewest_rows: tuple[int, int]
    fewest_scores: int


# With AVX-512.  The library leaves vectors unused: in float32 MKL takes AVX2's, in narrower types the kernel converts to float32.
# To pack keys and values costs more in float32 than fewer rows gain: with 2,048 keys of 4 x 16 heads 1 row takes 2.1 times, 32 rows
# 1.05 times as long as by the library's, in bfloat16 1/4 and 0.6 times; with 48 keys of 64 x 8 heads 48 rows take 0.9 times as long
# in float32.
AMD: Final = Processor("AMD", pairs=True, fewest_rows=(48, 1), fewest_scores=0)
# Since Sapphire Rapids, which has AVX-512 for float16.  The library takes whole vectors: in float32 ours take 0.85 to 1 times as
# long, 0.5 to 0.8 where half of the keys are masked; up to 128 x 128 scores plain operators do better.  In bfloat16, 8 x 8 heads of
# 512 tokens (D 64), the library takes 32 ms, ours 30 with pairs and 18 without.  8 rows take as long as the library's or longer.
INTEL: Final = Processor("Intel", pairs=False, fewest_rows=(48, 16), fewest_scores=16_385)


class Keys(NamedTuple):
    """Row m of a call sees the keys from first + down·m up to, without, last + right·m, as far as there are any.

    Args:
        rows: instead, the first and last of each row, contiguous int64 [2, M].
    """

    first: int
    last: int
    down: int = 0
    right: int = 0
    rows: Tensor | None = None


class Cells(NamedTuple):
    """A bias or a mask: something for each batch, head, row and key, anywhere in the memory of a tensor.

    Args:
        x: a bias is fp32, or of the operands' type, a mask bool.
        strides: of the four axes, in elements; that of keys 0 or 1, others of any sign.
        offset: of the first element, beside the storage offset of x.
    """

    x: Tensor
    strides: tuple[int, int, int, int]
    offset: int = 0

    @classmethod
    def of(cls, x: Tensor) -> Cells:
        """A tensor [B, H, M, N], sizes of 1 or strides of 0 for what is the same."""
        if x.shape[3] > 1 and x.stride(3) not in (0, 1):
            x = x.contiguous()
        b, h, m, n = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return cls(x, (b, h, m, n))


class Dropout(NamedTuple):
    """Weights that are zeros instead, those that are kept 1 / (1 - p) times as great.

    Args:
        p: the share of them, more than 0 and less than 1.
        rows: the hashes of the rows (`dropout.rows`), contiguous int32 [2, B, H, M].
        keys: those of the keys, contiguous int32 [2, N].
    """

    p: float
    rows: Tensor
    keys: Tensor


class Score(NamedTuple):
    """`s*scale + bias`, or, with a cap that is not 0, `cap*tanh(s*scale / cap) + bias`; of keys that a mask does not allow -inf."""

    scale: float
    cap: float = 0.0
    bias: Cells | None = None
    mask: Cells | None = None
    dropout: Dropout | None = None


@cache
def _library(name: str) -> Any:
    """The functions of a file of `cpp`, built if they were not before, or a text that says why there are none."""
    try:
        from torch._inductor.codecache import CppCodeCache

        on = processor()
        source = f"#define FAST_PAIRS {int(on is not None and on.pairs)}\n"
        source += "".join((_SOURCES / file).read_text() for file in ("common.h", f"{name}.cpp"))
        # what is built for one processor may stop another one that finds it in the same cache
        source += f"// {_facts().get('flags', '')}\n"
        library = CppCodeCache.load(source, extra_flags=("-ffp-contract=off",))
        for dtype in _TYPES.values():
            run, floats = getattr(library, f"{name}_{dtype}"), getattr(library, f"{name}_floats_{dtype}")
            run.argtypes, run.restype = (ctypes.c_char_p,), None
            floats.argtypes, floats.restype = (ctypes.c_char_p,), ctypes.c_int64
        return library
    except Exception as error:
        # whatever a compiler, and Inductor about it, may raise: the library's kernel serves instead
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        reason = f"{type(error).__name__}: {lines[-1].strip() if lines else error}"
        log.warning("attnfuse's CPU kernels could not be built, PyTorch's are used: %s", reason)
        return reason


def has(feature: str) -> bool:
    """Whether torch says that the processor has a feature, `avx512`, `amx_tile`, …."""
    # neither public nor the same in all versions
    known = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return known is not None and bool(known())


@cache
def _facts() -> dict[str, str]:
    """What Linux says of the first processor, nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts


@cache
def multiplies_float16() -> bool:
    """Whether the processor has instructions for products of float16.

    With AVX-512's the library takes 22 ms forward and 76 backward for 8 x 8 heads of 512 rows, D 64, in float32 21 and 51.
    """
    return has("amx_fp16") or "avx512_fp16" in _facts().get("flags", "").split()


@cache
def processor() -> Processor | None:
    """The kind that this machine's processor is of, None where nothing was measured."""
    if sys.platform != "linux" or not has("avx512"):
        return None
    vendor, flags = (_facts().get(key, "") for key in ("vendor_id", "flags"))
    if vendor == "AuthenticAMD":
        return AMD
    return INTEL if vendor == "GenuineIntel" and "avx512_fp16" in flags.split() else None


@cache
def is_faster_in(dtype: torch.dtype) -> bool:
    """Whether there is a size from which on these kernels are as fast as the library's in that type on this processor, or faster.

    Tiles (AMX), where the library finds them for a type, are faster.
    """
    tiles = {torch.float32: None, torch.bfloat16: "amx_tile", torch.float16: "amx_fp16"}
    if processor() is None or dtype not in tiles:
        return False
    needed = tiles[dtype]
    return needed is None or not has(needed)


def suits(dtype: torch.dtype, rows: int, scores: int, heads: int) -> str:
    """The name of the processor if operands of that type should go to the forward kernel there, else nothing.

    It may turn out that it cannot be built, which is not tried for the answer.

    Args:
        rows: so many read the keys of a KV head.
        scores: of a head.
        heads: of all batches.
    """
    on = processor()
    if on is None or not _has_rows(on, dtype, rows) or not is_faster_in(dtype):
        return ""
    small = scores < on.fewest_scores and scores * heads <= MANY_SCORES
    return "" if dtype == torch.float32 and small else on.name


def _has_rows(on: Processor, dtype: torch.dtype, rows: int) -> bool:
    return rows >= on.fewest_rows[dtype != torch.float32]


def serves(dtype: torch.dtype, rows: int) -> bool:
    """Whether operands of that type go to the forward kernel, where so many rows read the keys of a KV head."""
    on = processor()
    return on is not None and _has_rows(on, dtype, rows) and _is_built(dtype)


@cache
def _is_built(dtype: torch.dtype) -> bool:
    return is_faster_in(dtype) and not isinstance(_library("forward"), str)


@cache
def differentiates(dtype: torch.dtype) -> bool:
    """Whether gradients of operands of that type come from these kernels."""
    return _is_built(dtype) and not isinstance(_library("backward"), str)


def about() -> str:
    """What becomes of attention on this machine's CPU, for reports of the environment."""
    wanted = [str(dtype).removeprefix("torch.") for dtype in _TYPES if is_faster_in(dtype)]
    if not wanted:
        return "PyTorch's"
    found = _library("forward")
    return (
        f"PyTorch's, attnfuse's could not be built ({found})"
        if isinstance(found, str)
        else f"attnfuse's in {', '.join(wanted)}"
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    score: Score,
    keys: Keys,
    dead: float = math.nan,
) -> None:
    """Writes the attention of rows to `out` and `lse`, which is -inf where no score is above that; a row without keys is zeros.

    Args:
        q: [B, H, M, D] of a type that is served; as k, v and out it has a dense last axis.
        k: [B, Hkv, N, D].
        v: [B, Hkv, N, Dv].
        out: [B, H, M, Dv].
        lse: [B, H, M], fp32, its last axis dense.
        dead: what a row is that sees keys, but no score above -inf.
    """
    call = _Call(q, k, v, out, lse, score, keys, dead=dead)
    call.run("forward")


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    score: Score,
    keys: Keys,
    *,
    dlse: Tensor | None = None,
    dscores: Tensor | None = None,
    adds: bool = False,
    whole: bool = True,
) -> None:
    """Writes the gradients of q, k and v that are wanted; a row whose lse is +inf gives none.

    Args:
        dout: [B, H, M, Dv], as q, k, v and out of `forward`, which these are; its last axis is dense.
        lse: [B, H, M], fp32, what `forward` gave, or, where the call is not whole, with the sink of each row or more keys.
        dq: [B, H, M, D], of q's type.
        dk: [B, Hkv, N, D], of q's type.
        dv: [B, Hkv, N, Dv], of q's type.
        dlse: [B, H, M], fp32, the gradient of lse.
        dscores: contiguous fp32 [B, H, M, N], written too: the gradient of a bias of each cell, 0 for keys that a row does not see.
        adds: dk and dv are fp32, and added to.
        whole: whether lse is that of the keys of this call. Weights are right then where it is large too, and has few digits.
    """
    grads = dq, dk, dv, dscores
    call = _Call(q, k, v, out, lse, score, keys, dout=dout, dlse=dlse, grads=grads, adds=adds, whole=whole)
    call.run("backward")


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _address_of(cells: Cells | None) -> int:
    return 0 if cells is None else cells.x.data_ptr() + cells.offset * cells.x.element_size()


def _strides_of(cells: Cells | None) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if cells is None else cells.strides


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


class _Call:
    """The numbers of a call."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        score: Score,
        keys: Keys,
        *,
        dead: float = math.nan,
        dout: Tensor | None = None,
        dlse: Tensor | None = None,
        grads: tuple[Tensor | None, ...] = (None,) * 4,
        adds: bool = False,
        whole: bool = True,
    ) -> None:
        B, H, M, D = q.shape
        Hkv, N = k.shape[1:3]
        self._type = _TYPES[q.dtype]
        products = B * H * M * N * (D + v.shape[3])
        self._threads = max(1, min(torch.get_num_threads(), products // _PRODUCTS))
        scale, cap, bias, mask, dropout = score
        p, hashes = (0.0, (None, None)) if dropout is None else (dropout.p, dropout[1:])
        ends = (0, 0) if keys.rows is None else (keys.rows[0].data_ptr(), keys.rows[1].data_ptr())
        self._before = (
            *(q.data_ptr(), k.data_ptr(), v.data_ptr(), _address_of(bias), *ends),
            *(_address_of(mask), *map(_address, hashes), out.data_ptr(), lse.data_ptr()),
        )
        self._between = (
            *(_address(dout), _address(dlse), *map(_address, grads), B, H, Hkv, M, N, D, v.shape[3]),
            *(*_strides(q), *_strides(k), *_strides(v), *_strides(out), *lse.stride()[:2]),
            *(*_strides_of(bias), bias is not None and bias.x.dtype == torch.float32, *_strides_of(mask)),
            *(
                *_strides(dout),
                *_strides(dlse),
                *(step for x in grads[:3] for step in _strides(x)),
                adds,
                whole,
                *keys[:4],
            ),
        )
        self._after = (threshold(p), scale, cap, dead, 1 / (1 - p))

    def run(self, name: str) -> None:
        """Calls a kernel."""
        library = _library(name)
        floats = getattr(library, f"{name}_floats_{self._type}")(self._packed(0, 0))
        scratch = torch.empty(floats, dtype=torch.float32)
        getattr(library, f"{name}_{self._type}")(self._packed(scratch.data_ptr(), floats))

    def _packed(self, scratch: int, floats: int) -> bytes:
        return _CALL.pack(*self._before, scratch, *self._between, floats, self._threads, *self._after)
