"""What a result has to say about where it comes from: machine, versions, commit."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
MEASURED = ("attnfuse", "benchmarks", "examples", ":!benchmarks/results")
PACKAGES = ("torch", "transformers", "triton")


def machine() -> dict[str, str | int]:
    """Model and number of cores of the processor, and the accelerator if there is one: nothing that names one computer."""
    facts: dict[str, str | int] = {
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    import attnfuse

    found = {"attnfuse": attnfuse.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str:
    """The commit that is measured, with "+" where what is measured has been changed since; "" outside of a repository."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--", *MEASURED) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def tree() -> str:
    """A name for what is measured where there is no repository: the digest of its files."""
    digest = hashlib.sha256()
    for folder in MEASURED[:3]:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return f"tree {digest.hexdigest()[:12]}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
