"""The only place where a template is chosen."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from attnfuse.spec import AttentionSpec, Shape
from attnfuse.templates import TEMPLATES
from attnfuse.templates.base import Target, Template, Tiles


class Choice(NamedTuple):
    """The template that serves a spec on a target, and its tiles."""

    template: Template
    tiles: Tiles


class Refusal(NamedTuple):
    """No template: what each one says, by name."""

    reasons: tuple[tuple[str, tuple[str, ...]], ...]

    def __str__(self) -> str:
        return "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in self.reasons)


@lru_cache(maxsize=4096)
def choose(
    spec: AttentionSpec, shape: Shape, target: Target, templates: tuple[Template, ...] = TEMPLATES
) -> Choice | Refusal:
    """The first of `templates` that has no reason against `spec` there; pure and memoised.

    Args:
        shape: real sizes, or hints of them where they are symbolic.
    """
    refused = []
    for template in templates:
        reasons = template.reasons_against(spec, shape, target)
        if not reasons:
            return Choice(template, template.tiles(spec, shape, target))
        refused.append((template.name, reasons))
    return Refusal(tuple(refused))
