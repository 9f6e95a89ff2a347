"""attnfuse finds every attention in a `torch.compile` graph, proves what it means and fuses it, or says why not.

`torch.compile(model, backend="attnfuse")` needs no import: torch finds the backend by its entry point. The names below
are for asking about a model (`explain`) and for calling the kernels directly (`attention`).

The package stays light: its names are looked up at first use (PEP 562). `TORCH_LOGS="+attnfuse"` imports it while torch
itself is still loading, so nothing here may import torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnfuse.explain import explain
    from attnfuse.integrations import register_with_accelerate
    from attnfuse.ops import attention
    from attnfuse.pictures import tile_map
    from attnfuse.remark import Remark, Report
    from attnfuse.spec import AttentionSpec

__version__ = "0.1.0"

__all__ = [
    "AttentionSpec",
    "Remark",
    "Report",
    "__version__",
    "attention",
    "explain",
    "register_with_accelerate",
    "tile_map",
]

_HOME = {
    "AttentionSpec": "attnfuse.spec",
    "Remark": "attnfuse.remark",
    "Report": "attnfuse.remark",
    "attention": "attnfuse.ops",
    "explain": "attnfuse.explain",
    "register_with_accelerate": "attnfuse.integrations",
    "tile_map": "attnfuse.pictures",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'attnfuse' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


class _Package(ModuleType):
    """Keeps a public name from being shadowed by the submodule of the same name when that is imported (`explain`)."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
