"""Tile sizes of the Triton kernels by architecture, element size and head dimension.

None of these numbers was measured by this project yet: sm_90 and sm_80 follow what compiles without spilling and what
FlexAttention ships for the same loops; other architectures take sm_80's.  `python -m attnfuse templates` says so.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

ORIGIN: Final = "from what compiles without spills; not measured on any device yet"


class Config(NamedTuple):
    """Rows and keys of a tile, warps of a program, stages of its software pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Shared memory that one program may have, in bytes.
SHARED: Final = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_103": 232_448,
    "sm_120": 101_376,
    "sm_121": 101_376,
    "gfx90a": 65_536,
    "gfx942": 65_536,
}
_LEAST_SHARED: Final = 65_536

_Table = dict[int, Config]
# kernel → bytes of an element → greatest head dimension → config
_SM_90: Final[dict[str, dict[int, _Table]]] = {
    "attend": {
        2: {64: Config(128, 128, 8, 3), 128: Config(128, 128, 8, 2), 256: Config(128, 32, 8, 3)},
        4: {64: Config(64, 64, 4, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 32, 8, 1)},
    },
    "keys": {
        2: {64: Config(64, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(16, 64, 8, 2)},
        4: {64: Config(32, 32, 4, 2), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    },
    "queries": {
        2: {64: Config(128, 128, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
        4: {64: Config(64, 32, 4, 2), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    },
    "decode": {
        2: {64: Config(16, 128, 4, 3), 128: Config(16, 64, 4, 3), 256: Config(16, 64, 4, 2)},
        4: {64: Config(16, 64, 4, 3), 128: Config(16, 32, 4, 3), 256: Config(16, 32, 4, 2)},
    },
}
_SM_80: Final[dict[str, dict[int, _Table]]] = {
    "attend": {
        2: {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 2), 256: Config(64, 64, 8, 2)},
        4: {64: Config(32, 64, 4, 2), 128: Config(32, 32, 8, 2), 256: Config(16, 32, 8, 1)},
    },
    "keys": {
        2: {64: Config(32, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)},
        4: {64: Config(32, 32, 4, 2), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    },
    "queries": {
        2: {64: Config(64, 64, 4, 2), 128: Config(64, 32, 4, 2), 256: Config(32, 32, 8, 1)},
        4: {64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    },
    "decode": {
        2: {64: Config(16, 64, 4, 3), 128: Config(16, 64, 4, 2), 256: Config(16, 32, 4, 2)},
        4: {64: Config(16, 64, 4, 2), 128: Config(16, 32, 4, 2), 256: Config(16, 16, 4, 2)},
    },
}
# Small tiles, so that short inputs have several.
# Kernels that leave at once in nearly every call, and kernels of leaves: any tile that fits will do.
_UNIFORM: Final = {128: Config(32, 32, 4, 1), 256: Config(32, 32, 8, 1)}
_INTERPRETER: Final = {
    "attend": Config(32, 32, 4, 1),
    "keys": Config(32, 32, 4, 1),
    "queries": Config(32, 32, 4, 1),
    "decode": Config(16, 32, 4, 1),
    "uniform": Config(32, 32, 4, 1),
    "combine": Config(1, 1, 4, 1),
}
KERNELS: Final = tuple(_INTERPRETER)


@lru_cache(maxsize=1024)
def configs(kernel: str, arch: str, itemsize: int, head_dim: int) -> tuple[Config, ...]:
    """Configs of a kernel whose tiles fit the shared memory of `arch`, best first; each later one needs less.

    Args:
        kernel: one of `KERNELS`.
        itemsize: bytes of the widest element of q, k and v.
        head_dim: the larger of the kernel's BLOCK_D and BLOCK_DV.
    """
    if arch == "interpreter":
        return (_INTERPRETER[kernel],)
    size = 2 if itemsize <= 2 else 4
    tables = _SM_90 if arch in ("sm_90", "sm_100", "sm_103") else _SM_80
    if kernel == "combine":
        return (Config(1, 1, 4, 1),)
    if kernel == "uniform":
        first = _UNIFORM[128 if head_dim <= 128 else 256]
    else:
        table = tables[kernel][size]
        first = table[min(d for d in table if d >= min(head_dim, 256))]
    found = [first]
    while found[-1] != (smaller := _smaller(found[-1])):
        found.append(smaller)
    limit = SHARED.get(arch, _LEAST_SHARED)
    fitting = [c for c in found if shared_memory(kernel, c, itemsize, head_dim) <= limit]
    return tuple(fitting) or (found[-1],)


def _smaller(config: Config) -> Config:
    if config.stages > 1:
        return config._replace(stages=config.stages - 1)
    if config.block_n > 16 and config.block_n >= config.block_m:
        return config._replace(block_n=config.block_n // 2)
    return config._replace(block_m=config.block_m // 2) if config.block_m > 16 else config


def shared_memory(kernel: str, config: Config, itemsize: int, head_dim: int) -> int:
    """About how many bytes of shared memory a program needs: the operands that stay and the stages of those that are loaded."""
    own, loaded = (config.block_n, config.block_m) if kernel == "keys" else (config.block_m, config.block_n)
    stay = own * head_dim * (2 if kernel in ("keys", "queries") else 1)
    if kernel in ("keys", "queries"):
        # weights and score gradients pass through it on their way to a matrix product
        stay += config.block_m * config.block_n
    return itemsize * (stay + config.stages * 2 * loaded * head_dim)
