"""What the pages say is what the package does."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from attnfuse.options import Options
from attnfuse.templates import TEMPLATES
from tests.test_layers import ROWS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_remarks", ROOT / "docs" / "remarks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [text for named, text in found if named == language]


def test_the_page_of_remarks_is_current() -> None:
    remarks = generator()
    assert remarks.PAGE.read_text(encoding="utf-8") == remarks.page(), "run `make docs`"
    for code in remarks.CODES:
        assert remarks.page().count(f"### {code} ") == 1


def test_the_quick_start_is_short_python() -> None:
    quick_start = blocks(README, "python")[0]
    ast.parse(quick_start)
    assert len([line for line in quick_start.splitlines() if line.strip()]) <= 8
    assert 'backend="attnfuse"' in quick_start


def test_the_report_in_the_readme_is_what_its_code_prints(capsys: pytest.CaptureFixture[str]) -> None:
    code = next(block for block in blocks(README, "python") if "attnfuse.explain" in block)
    exec(compile(code, "README.md", "exec"), {})

    def remarks(text: str) -> list[str]:
        summary, *lines = text.splitlines()
        # The versions and the lines of transformers' files are those of the installation.
        return [re.sub(r"(\.py):\d+", r"\1", line) for line in (summary.rpartition("   ")[2], *lines)]

    shown = next(block for block in blocks(README, "") if "attentions:" in block)
    assert remarks(capsys.readouterr().out.rstrip("\n")) == remarks(shown.rstrip("\n"))


def test_every_option_is_in_the_readme_or_its_docstring() -> None:
    named = set(re.findall(r'options=\{"(\w+)"', README + DESIGN))
    assert named <= {
        "strict",
        "downstream",
        "dump",
        "verify",
        "inline_scores",
        "inductor_attention_patterns",
    }
    for option in named:
        assert hasattr(Options(), option)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/design.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_design_shows_the_rows_and_templates_that_there_are() -> None:
    drawn = [set(re.split(r"\s{2,}", line[3:].strip())) for line in DESIGN.splitlines() if re.match(r"^ \d   ", line)]
    assert len(drawn) == len(ROWS)
    for row, shown in zip(ROWS, drawn, strict=True):
        assert row <= {name.rstrip("/") for name in shown}
    for template in TEMPLATES:
        assert f"| `{template.name}` |" in DESIGN
