"""The correctness gate: results against the original's, by the numerics contract that the tests use."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

NUMERICS = Path(__file__).parent.parent / "tests" / "numerics.py"

# Before the name of a result: S of the contract for it, in what is exact.
SCALE = "scale of "

Results = Mapping[str, Tensor]


def _numerics() -> Any:
    spec = importlib.util.spec_from_file_location("attnfuse_numerics", NUMERICS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fault(actual: Results, original: Results, exact: Results) -> str:
    """What is wrong with the results, or "" where all are within the contract.

    Args:
        actual: of the variant under test.
        original: of the uncompiled model in the same types.
        exact: of the uncompiled model in float64, gradients with their scales.
    """
    names = [name for name in exact if not name.startswith(SCALE)]
    if not actual.keys() == original.keys() == set(names) or not actual:
        return f"results differ in what they hold: {sorted(actual)}, {sorted(original)}, {sorted(names)}"
    assert_close = _numerics().assert_close
    for name in names:
        scale = float(exact[SCALE + name]) if SCALE + name in exact else None
        try:
            assert_close(actual[name], original[name], exact[name].double(), scale, what=name)
        except AssertionError as error:
            return str(error)
    return ""
