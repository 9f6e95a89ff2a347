"""What every test shares: own caches for each worker, one thread a worker, repeatable properties, strict backend."""

import os
import shutil
import tempfile
from collections.abc import Mapping

import hypothesis
import pytest

# Read by torch when it is first imported, which is after this.
_CACHES = tempfile.mkdtemp(prefix="attnfuse-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(_CACHES, "inductor")
os.environ["TRITON_CACHE_DIR"] = os.path.join(_CACHES, "triton")
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ.pop("ATTNFUSE", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

hypothesis.settings.register_profile("attnfuse", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("attnfuse")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_CACHES, ignore_errors=True)


@pytest.fixture(autouse=True)
def _strict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside attnfuse raises in every test, so that no fallback hides it, except in those marked `lenient`."""
    if request.node.get_closest_marker("lenient") is not None:
        return
    from attnfuse.options import Options

    parse = Options.parse

    def strictly(mode: str | None = None, options: Mapping[str, object] | None = None) -> Options:
        return parse(mode, {"strict": True, **(options or {})})

    monkeypatch.setattr(Options, "parse", strictly)
