"""Kernel templates: what can run an `AttentionSpec`, in order of preference.

A template is a module with one name here; `choose` takes the first that has no reason against a spec on a target.
"""

from typing import Final

from attnfuse.templates.base import Template
from attnfuse.templates.blocked import Blocked
from attnfuse.templates.flash import Decode, Flash
from attnfuse.templates.inline import Inline
from attnfuse.templates.library import Library

TEMPLATES: Final[tuple[Template, ...]] = (Library(), Inline(), Blocked(), Decode(), Flash())
