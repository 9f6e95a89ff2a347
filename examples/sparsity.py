"""Sparsity that nobody declared: dense masks as models build them, what they are proven to be, and the tiles that are left.

python examples/sparsity.py             as text
python examples/sparsity.py --plot F    as a picture, with matplotlib, in the file F
"""

import argparse

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnfuse

N, TILE = 1024, (64, 64)


def window(i: Tensor) -> Tensor:
    return (i[None] <= i[:, None]) & (i[:, None] - i[None] < 128)


def longformer(i: Tensor) -> Tensor:
    return ((i[:, None] - i[None]).abs() <= 64) | (i[None] < 64) | (i[:, None] < 64)


def strided(i: Tensor) -> Tensor:
    return (i[None] <= i[:, None]) & ((i[:, None] - i[None] < 64) | ((i[:, None] - i[None]) % 256 < 8))


def fixed(i: Tensor) -> Tensor:
    return (i[None] <= i[:, None]) & ((i[:, None] // 256 == i[None] // 256) | (i[None] % 256 >= 248))


MASKS = (window, longformer, strided, fixed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", metavar="FILE", help="draw the maps into a picture")
    file = parser.parse_args().plot
    q, k, v = (torch.randn(1, 2, N, 32) for _ in range(3))
    maps = []
    for build in MASKS:

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = build(torch.arange(N))  # noqa: B023  (called before the next turn)
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

        (remark,) = attnfuse.explain(attention, q, k, v).remarks
        maps.append(attnfuse.tile_map(remark, tiles=TILE))
        print(f"{build.__name__}: {maps[-1]}\n")
    if file:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, len(maps), figsize=(4 * len(maps), 4), layout="constrained")
        for found, place in zip(maps, axes, strict=True):
            found.plot(axes=place)
            place.title.set_fontsize(9)
        figure.savefig(file, bbox_inches="tight")


if __name__ == "__main__":
    main()
