"""Small models of every kind of attention in transformers and timm, with random weights.

To add a model, add one entry to the list ENTRIES of the module of its kind: a name, the names of its configuration class and of
its model class, and the fields that have to differ from `entry.DEFAULTS` (2 layers, hidden size 64, 4 heads, 97 tokens). Then `python -m tests.zoo.count` counts its attentions into counts.json.

The classes are looked up when a model is built, so an older transformers or a missing timm lacks only the models it lacks:
`build` raises MissingArchitecture.
"""

from __future__ import annotations

from . import audio, decoders, encoders, multimodal, seq2seq, timm_models, torchvision_stub, vision
from .entry import Entry, Inputs, MissingArchitecture, call

__all__ = ["ENTRIES", "Entry", "Inputs", "MissingArchitecture", "call"]

# before anything looks for the models of transformers
torchvision_stub.prepare()

MODULES = (decoders, encoders, seq2seq, vision, audio, multimodal, timm_models)

ENTRIES: dict[str, Entry] = {entry.name: entry for module in MODULES for entry in module.ENTRIES}
