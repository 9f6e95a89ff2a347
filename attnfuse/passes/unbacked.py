"""Sizes and numbers that only the values of tensors tell, in a graph that is run once more: `Unbacked`.

What `item()` or `nonzero()` gives is a new symbol in each run, of which nothing is known until the call that made it is done and
the symbol is found to be Dynamo's. Some calls make a symbol and use it as a size, NumPy's functions for example, which take a
tensor for a number. What they ask of it Dynamo was asked too, and where it had no answer it put a check into its graph: the
question is answered for Dynamo's symbol.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final, cast
from unittest import mock

import sympy
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import rebind_unbacked, resolve_unbacked_bindings
from torch.utils._sympy.symbol import SymT, prefix_str, symbol_is_type

from attnfuse.passes.dynamo import NormaliseError

__all__ = ["BINDINGS", "Unbacked"]

BINDINGS: Final = "unbacked_bindings"
"""In `meta` of a node that makes symbols: where in its value each of them stands."""


class Unbacked:
    """The symbols that the call which is run makes, and those that Dynamo made for it."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self._env: Any = fake_mode.shape_env
        self._known: list[sympy.Symbol] = []
        self._first = 0
        self._taken: dict[sympy.Symbol, sympy.Symbol] = {}

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        """While it is open, checks of symbols of the call that is run are made of Dynamo's."""
        if self._env is None:
            yield
            return
        ask = self._env.guard_or_defer_runtime_assert

        def known(expr: Any, msg: str, fx_node: Any = None) -> object:
            return ask(expr.xreplace(self._replacements(expr)), msg, fx_node)

        with mock.patch.object(self._env, "guard_or_defer_runtime_assert", known):
            yield

    def _replacements(self, expr: sympy.Basic) -> dict[sympy.Symbol, sympy.Symbol]:
        found = {}
        for symbol in expr.free_symbols:
            if symbol_is_type(symbol, SymT.UNBACKED_INT):
                place = _number(symbol) - self._first
                if 0 <= place < len(self._known):
                    found[symbol] = self._known[place]
        self._taken |= found
        return found

    def expect(self, n: fx.Node) -> None:
        """Says which call of Dynamo's is run next."""
        self._known, self._taken = [], {}
        if BINDINGS in n.meta and self._env is not None:
            every = resolve_unbacked_bindings(self._env, n.meta[BINDINGS]) or {}
            # made in the same order; `bind` looks whether that is so
            self._known = sorted((s for s in every if symbol_is_type(s, SymT.UNBACKED_INT)), key=_number)
            self._first = self._env.unbacked_symint_counter

    def bind(self, n: fx.Node, result: object) -> None:
        """Makes the symbols in the result of `n` those that Dynamo recorded.

        Raises:
            NormaliseError: a check was made of another symbol than that which stands in the symbol's place.
        """
        rebind_unbacked(self._env, n, cast(Any, result))
        for made, known in self._taken.items():
            if self._env.unbacked_renamings.get(made) != known:
                raise NormaliseError(f"`{n}` makes other sizes than Dynamo recorded")
        self._known = []


def _number(symbol: sympy.Symbol) -> int:
    return int(symbol.name.removeprefix(prefix_str[SymT.UNBACKED_INT]))
