"""Writes docs/remarks.md from the table of codes: `python docs/remarks.py`."""

from __future__ import annotations

from pathlib import Path

from attnfuse.remark import CODES, KINDS

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Remarks

What became of each attention, as `attnfuse.explain` and `TORCH_LOGS="+attnfuse"` report it: **fused**; **kept**, IO-aware
already; **declined**, understood, but no kernel takes it or nothing would be gained; **missed**, not understood; **failed**,
attnfuse went wrong and the original was compiled. A **note** stands beside another remark. A code never changes its meaning.

<!-- Written by docs/remarks.py from attnfuse/remark.py; `make docs` does it again. -->
"""


def page() -> str:
    sections = [HEAD]
    for kind in (*KINDS, "note"):
        sections.append(f"## {kind}\n")
        for name, code in sorted(CODES.items()):
            if code.kind == kind:
                about = " This is about a whole graph." if code.scope == "graph" else ""
                sections.append(f"### {name} {code.meaning}\n\n{code.cause}{about}\n\n*{code.cure}*\n")
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
