"""Counts the attentions that each model of the zoo runs, by watching the operators of its eager implementation.

    python -m tests.zoo.count [NAME ...]       writes counts.json, or the lines of the models named
    python -m tests.zoo.count --check          fails where counts.json is not what it counts

An attention is a softmax of what a batched product of matrices came to, by operators of one element each and by such as only move
elements, whose result comes to another batched product in the same way. Nothing here knows of attnfuse.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import ENTRIES
from .entry import COUNTS_FILE, Entry, MissingArchitecture, call

aten = torch.ops.aten

PRODUCTS = {aten.bmm, aten.baddbmm}
SOFTMAXES = {aten._softmax, aten._safe_softmax}
# whole attentions, from models that call scaled_dot_product_attention in their eager implementation too
FUSED = {
    aten._scaled_dot_product_attention_math,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_fused_attention_overrideable,
}
# beside views and operators tagged pointwise
MOVES = {
    aten.cat,
    aten.clone,
    aten.constant_pad_nd,
    aten.copy_,
    aten._to_copy,
    aten.flip,
    aten.gather,
    aten.index,
    aten.index_put_,
    aten.index_select,
    aten.masked_fill,
    aten.masked_fill_,
    aten.native_dropout,
    aten.repeat,
    aten.roll,
    aten.slice_scatter,
    aten.stack,
    aten._unsafe_index,
    aten._unsafe_view,
    aten.view_as_real,
}

# What the rule does not tell: how many attentions to add to what it counts, and why.
BY_HAND = {
    "groupvit": (-1, "assigns patches to groups by a softmax over the queries, made a one-hot"),
    "timm_cait": (2, "talking heads: linear maps over heads stand between the softmax and both products"),
}


@dataclass(frozen=True)
class Mark:
    """What a tensor's elements came from."""

    kind: str  # product, logsumexp or softmax
    number: int


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in `attentions` the softmax of every attention that runs inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.attentions: set[int] = set()
        # by storage, so that views and what is written into them share the marks
        self._marks: defaultdict[int, set[Mark]] = defaultdict(set)
        # or the address of a storage could come again
        self._alive: list[Any] = []
        self._number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        marks = set[Mark]().union(*(self._of(tensor) for tensor in given))
        result = func(*args, **kwargs)
        after = self._after(func, marks)
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._of(made).update(after)
        return result

    def _of(self, tensor: Tensor) -> set[Mark]:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._marks:
            self._alive.append(storage)
        return self._marks[storage._cdata]

    def _after(self, func: Any, marks: set[Mark]) -> set[Mark]:
        packet = func.overloadpacket
        kinds = {mark.kind for mark in marks}
        if packet in PRODUCTS:
            self.attentions.update(mark.number for mark in marks if mark.kind == "softmax")
            return {self._new("product")}
        if packet in FUSED:
            self.attentions.add(self._new("softmax").number)
            return set()
        # exp(x - logsumexp(x)) is a softmax too
        if packet in SOFTMAXES or (packet is aten.exp and "logsumexp" in kinds):
            return {self._new("softmax")} if "product" in kinds else set()
        if packet is aten.logsumexp:
            return {self._new("logsumexp")} if "product" in kinds else set()
        if packet in MOVES or torch.Tag.pointwise in func.tags:
            return marks
        return set()

    def _new(self, kind: str) -> Mark:
        self._number += 1
        return Mark(kind, self._number)


def count(entry: Entry, masked: bool) -> int:
    model = entry.build("eager", 0.0)
    # with gradients, or nn.MultiheadAttention takes a path of its own
    with Watch() as watch:
        call(model, entry.inputs(masked))
    return len(watch.attentions)


def counted(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    for name in names:
        entry = ENTRIES[name]
        try:
            found = {masked: count(entry, masked) for masked in ((False, True) if entry.takes_mask else (False,))}
        except MissingArchitecture as error:
            print(f"not counted: {error}", file=sys.stderr)
            continue
        if len(set(found.values())) > 1:
            raise AssertionError(f"{name}: {found[False]} attentions without a mask, {found[True]} with one")
        yield name, found[False] + BY_HAND.get(name, (0, ""))[0]


def main() -> int:
    parser = argparse.ArgumentParser(description="Counts the attentions of the models of the zoo.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a model (default: all of them)")
    parser.add_argument("--check", action="store_true", help="compare with counts.json, write nothing")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in ENTRIES:
            parser.error(f"there is no model {name}")
    names = arguments.names or list(ENTRIES)
    stored: dict[str, int] = json.loads(COUNTS_FILE.read_text()) if COUNTS_FILE.exists() else {}
    new = dict(counted(names))
    if arguments.check:
        wrong = [
            f"{name}: {stored.get(name)} in {COUNTS_FILE.name}, counted {n}"
            for name, n in new.items()
            if stored.get(name) != n
        ]
        if not arguments.names:
            wrong += [f"{name}: in {COUNTS_FILE.name}, not in the zoo" for name in stored if name not in ENTRIES]
        print("\n".join(wrong) or f"{len(new)} models have the attentions that {COUNTS_FILE.name} says")
        return 1 if wrong else 0
    kept = {name: n for name, n in (stored | new).items() if name in ENTRIES}
    COUNTS_FILE.write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
