"""What every test shares: own caches for each worker, one thread a worker, repeatable properties, a strict backend that makes
operators of the small attentions of tests too."""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import hypothesis
import pytest

# Read by torch when it is first imported, which is after this.
# `make gpu` names a folder, so that its processes share what they compile and a second run finds it.
_GIVEN = os.environ.get("ATTNFUSE_TESTS_CACHE")
_CACHES = _GIVEN or tempfile.mkdtemp(prefix="attnfuse-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(_CACHES, "inductor")
os.environ["TRITON_CACHE_DIR"] = os.path.join(_CACHES, "triton")
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ.pop("ATTNFUSE", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

hypothesis.settings.register_profile("attnfuse", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("attnfuse")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Triton's interpreter changes what its decorators make, and takes a process of its own; GPU tests take a GPU."""
    if not collection_path.name.startswith("test_"):
        return None
    folder = collection_path.parent.name
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if folder == "gpu":
        import torch

        return True if interpreting or not torch.cuda.is_available() else None
    return True if (folder == "interpreted") != interpreting else None


def pytest_unconfigure(config: pytest.Config) -> None:
    if not _GIVEN:
        shutil.rmtree(_CACHES, ignore_errors=True)


@pytest.fixture
def small(request: pytest.FixtureRequest) -> str:
    """What becomes of small attentions: "operator", or in tests parametrised with it "inline", as it is for users."""
    return str(getattr(request, "param", "operator"))


@pytest.fixture(autouse=True)
def _strict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small: str) -> None:
    """An error inside attnfuse raises in every test, so that no fallback hides it, except in those marked `lenient`."""
    if request.node.get_closest_marker("lenient") is not None:
        return
    from attnfuse.options import Options
    from attnfuse.passes import decide

    # what becomes of an attention is the same on every machine
    monkeypatch.setattr(sys.modules[decide.__module__], "suits", lambda *_: "")

    parse = Options.parse

    def strictly(mode: str | None = None, options: Mapping[str, object] | None = None) -> Options:
        forced = {"strict": True} if small == "inline" else {"strict": True, "inline_scores": 0}
        return parse(mode, {**forced, **(options or {})})

    monkeypatch.setattr(Options, "parse", strictly)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's kernels for the CPU, as on processors for which attnfuse has none."""
    from attnfuse.templates import native

    for name in ("serves", "differentiates"):
        monkeypatch.setattr(native, name, lambda *_: False)


@pytest.fixture(params=["ours", "library"])
def kernel(request: pytest.FixtureRequest) -> str:
    """Each kernel for the CPU in turn."""
    from attnfuse.templates import native

    if request.param == "library":
        request.getfixturevalue("library")
    elif native.about().startswith("PyTorch's"):
        pytest.skip(f"attnfuse's kernel is not for this machine: {native.about()}")
    return str(request.param)
