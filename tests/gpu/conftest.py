"""What only a GPU can show. Collected where there is one; `make gpu` runs these tests first."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.backends.registry import list_backends, register_backend

from attnfuse.backend import attnfuse

# the entry point makes it known where the package is installed; `make gpu` runs from the source
if "attnfuse" not in list_backends():
    register_backend(attnfuse, name="attnfuse")


def pytest_configure(config: pytest.Config) -> None:
    # a kernel that cannot be made is made good for by a dense one, with this warning
    config.addinivalue_line("filterwarnings", "error:no Triton kernel:RuntimeWarning")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
