"""Kernels run in Triton's interpreter, on the CPU: `TRITON_INTERPRET=1 pytest` collects these tests and no others."""

from typing import Any

import pytest

from attnfuse import ops
from attnfuse.ops import _checked, _Kind
from attnfuse.spec import Shape
from attnfuse.templates.base import Kernel
from attnfuse.templates.flash import Decode, Flash, interpreted


@pytest.fixture(params=["flash", "decode"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Each of the two templates."""
    return Flash() if request.param == "flash" else Decode()


@pytest.fixture(autouse=True)
def _operator_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator runs the template of the fixture `kernel`, or `Flash`."""
    assert interpreted(), "these tests need TRITON_INTERPRET=1 in the environment"
    template: Kernel = request.getfixturevalue("kernel") if "kernel" in request.fixturenames else Flash()

    def chosen(kind: _Kind, device: str, training: bool) -> tuple[Kernel, Any, Shape]:
        shape = Shape(kind.q[0], kind.q[1], kind.k[1], kind.q[2], kind.k[2], kind.q[3], kind.v[3])
        return template, _checked(kind), shape

    monkeypatch.setattr(ops, "_kernel", chosen)
