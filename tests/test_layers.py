"""The import rows: each part of the package imports only from the rows above its own, for types as much as for use."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import attnfuse

PACKAGE = Path(attnfuse.__file__).parent

ROWS = (
    {"score", "spec", "remark", "options"},
    {"tiles", "reference"},
    {"templates"},
    {"ops"},
    {"passes"},
    {"backend"},
    {"explain", "integrations", "pictures", "__main__", "__init__"},
)
# Within a row. The oracle (reference) has no peer, so that it shares no mistake with what it judges.
PEERS = {("spec", "score"), *((one, other) for one in ROWS[-1] for other in ROWS[-1])}

# Who may name these modules at all, and who only inside of functions.
ONLY = {
    "triton": {"templates"},
    "torch.fx": {"passes", "backend", "explain"},
    "torch._inductor": {"backend", "options", "templates"},
}
NO_TORCH_AT_IMPORT = {"score", "spec", "remark", "options", "__init__", "__main__"}


def modules() -> dict[str, Path]:
    """Dotted name within the package → file."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(module: str) -> str:
    return module.partition(".")[0]


def row_of(part: str) -> int:
    return next(number for number, row in enumerate(ROWS) if part in row)


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not the bodies of functions, nor what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from at_import(node)


def named(module: str, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names of the modules that are imported, or reached through an imported one as in `torch.fx.Graph`."""
    package = ["attnfuse", *module.split(".")[:-1]]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text.startswith("torch."):
                yield text


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def violations(module: str, source: str) -> list[str]:
    part, tree = part_of(module), ast.parse(source)
    found = []
    for name in named(module, ast.walk(tree)):
        for forbidden, allowed in ONLY.items():
            if within(name, forbidden) and part not in allowed:
                found.append(f"{module} names {name}, which only {sorted(allowed)} may")
        if not within(name, "attnfuse") or name == "attnfuse.__version__":
            continue
        other = name.removeprefix("attnfuse").removeprefix(".").partition(".")[0]
        # `import attnfuse` and its public names: what is meant is the package's own file.
        if not other or (other in attnfuse.__all__ and not (PACKAGE / f"{other}.py").exists()):
            other = "__init__"
        if not any(other in row for row in ROWS):
            found.append(f"{module} imports {name}, which stands in no row")
        elif other != part and row_of(other) >= row_of(part) and (part, other) not in PEERS:
            found.append(f"{module} (row {row_of(part) + 1}) imports {name} (row {row_of(other) + 1})")
    if part in NO_TORCH_AT_IMPORT:
        found.extend(
            f"{module} imports {name} when it is imported itself"
            for name in named(module, at_import(tree))
            if within(name, "torch")
        )
    return found


def test_every_file_stands_in_a_row() -> None:
    known = set().union(*ROWS)
    assert [module for module in modules() if part_of(module) not in known] == []


@pytest.mark.parametrize("module", modules())
def test_imports_come_from_above(module: str) -> None:
    assert violations(module, modules()[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("score", "from attnfuse.spec import Leaf"),
        ("tiles", "from attnfuse import passes"),
        ("templates.flash", "from ..passes import lift"),
        ("reference", "from attnfuse.tiles import Range"),
        ("reference", "import attnfuse.tiles as tiles"),
        ("ops", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from attnfuse.passes.lift import Lifted"),
        ("passes.lift", "def f():\n    from attnfuse.backend import attnfuse"),
        ("passes.lift", "import triton.language as tl"),
        ("passes.lift", "import attnfuse"),
        ("passes.lift", "from attnfuse.unheard_of import x"),
        ("ops", "import torch\ndef f(g: torch.fx.Graph): ..."),
        ("templates.flash", "from torch import fx"),
        ("passes", "from torch._inductor import config"),
        ("options", "try:\n    import torch\nexcept ImportError:\n    pass"),
        ("__init__", "from torch import Tensor"),
    ],
)
def test_a_breach_is_seen(module: str, source: str) -> None:
    assert violations(module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("spec", "from attnfuse.score import Program"),
        ("spec", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("options", "def f():\n    from torch._inductor import config"),
        ("passes.lift", "from .peel import peel\nfrom ..score import Expr\nimport torch.fx"),
        ("templates.flash", "import triton\nfrom torch.fx_like import x"),
        ("backend", "from attnfuse import __version__\nfrom torch._inductor.compile_fx import compile_fx"),
        ("__main__", "import attnfuse\nfrom attnfuse.explain import explain"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_importing_the_package_is_light() -> None:
    """No torch, nothing but a few modules of the standard library: TORCH_LOGS imports it while torch itself loads."""
    code = "import sys; before = set(sys.modules); import attnfuse; print(*sorted(set(sys.modules) - before))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(answer.stdout.split())
    assert "attnfuse" in loaded
    assert {name for name in loaded if part_of(name) not in {"attnfuse", *sys.stdlib_module_names}} == set()
    assert {name for name in loaded if within(name, "attnfuse")} == {"attnfuse"}
    assert len(loaded) < 40
