"""Libraries that ask for more than a backend's name."""

from __future__ import annotations

import importlib
from typing import Any


def register_with_accelerate() -> None:
    """Lets accelerate, and so the Trainer of transformers, take the backend's name.

    accelerate has a list of the backends that it knows and refuses others (its `DynamoBackend`).  After this call
    `TrainingArguments(torch_compile=True, torch_compile_backend="attnfuse")` works; a second call does nothing.

    Raises:
        ImportError: accelerate is not installed.
    """
    known: Any = importlib.import_module("accelerate.utils").DynamoBackend
    name = "ATTNFUSE"
    if name in known.__members__:
        return
    # an Enum with members cannot be subclassed; this is what its own constructor does for each of them
    member = str.__new__(known, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(known.__members__)
    known._member_map_[name] = known._value2member_map_[name] = member
    known._member_names_.append(name)
