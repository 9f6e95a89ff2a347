"""Makes torchvision importable beside a torch that its compiled operators are not built for."""

from __future__ import annotations

import importlib
import importlib.util

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def prepare() -> None:
    """Declares the operators that torchvision looks up when it is imported, if they did not come with it.

    timm imports torchvision, and transformers does where it is installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        for schema in SCHEMAS:
            _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
        importlib.import_module("torchvision")
