"""Models of images and text, and parts of them."""

from __future__ import annotations

from typing import Any

import torch

from .entry import BATCH, LENGTH, Inputs, entry, generator, image, padding, text

OBJECTS = 36
QUERIES = 16
SEEN = 32


def _image_and_text(masked: bool) -> Inputs:
    return text(masked) | image()(masked)


def _queries(masked: bool) -> Inputs:
    source = generator()
    inputs = {
        "query_embeds": torch.randn(BATCH, QUERIES, 64, generator=source),
        "encoder_hidden_states": torch.randn(BATCH, SEEN, 64, generator=source),
    }
    return inputs | {"encoder_attention_mask": padding(SEEN)} if masked else inputs


def _objects_and_text(masked: bool) -> Inputs:
    source = generator()
    inputs = text(masked) | {
        "visual_feats": torch.randn(BATCH, OBJECTS, 32, generator=source),
        "visual_pos": torch.rand(BATCH, OBJECTS, 4, generator=source),
    }
    return inputs | {"visual_attention_mask": padding(OBJECTS)} if masked else inputs


def _patches(masked: bool) -> Inputs:
    """Two images of 8 x 8 patches, one after the other."""
    return {
        "hidden_states": torch.randn(2 * LENGTH, 96, generator=generator()),
        "grid_thw": torch.tensor([[1, 8, 8], [1, 8, 8]]),
    }


GROUPS: dict[str, Any] = {"depths": [1, 1], "num_group_tokens": [8, 0], "num_output_groups": [8, 8]}

ENTRIES = [
    entry("clip", "CLIPConfig", "CLIPModel", _image_and_text),
    entry("siglip", "SiglipConfig", "SiglipModel", _image_and_text),
    entry(
        "groupvit",
        "GroupViTConfig",
        "GroupViTModel",
        _image_and_text,
        sdpa=False,
        drawing="GroupViTAssignAttention",
        vision_config=GROUPS,
        projection_intermediate_dim=96,
    ),
    entry(
        "blip2_qformer",
        "Blip2QFormerConfig",
        "Blip2QFormerModel",
        _queries,
        cross_attention_frequency=1,
        encoder_hidden_size=64,
    ),
    entry("blip_text", "BlipTextConfig", "BlipTextModel", text, sdpa=False, encoder_hidden_size=64),
    entry(
        "vilt",
        "ViltConfig",
        "ViltModel",
        _image_and_text,
        sdpa=False,
        note="shuffles the patches of the image, which breaks the graph",
    ),
    entry(
        "lxmert",
        "LxmertConfig",
        "LxmertModel",
        _objects_and_text,
        sdpa=False,
        l_layers=1,
        x_layers=1,
        r_layers=1,
        visual_feat_dim=32,
    ),
    entry(
        "qwen2_vl_text",
        "Qwen2VLTextConfig",
        "Qwen2VLTextModel",
        text,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]},
    ),
    entry(
        "qwen2_5_vl_vision",
        "Qwen2_5_VLVisionConfig",
        "Qwen2_5_VisionTransformerPretrainedModel",
        _patches,
        mask=False,
        depth=2,
        window_size=16,
        out_hidden_size=64,
        fullatt_block_indexes=[1],
        note="attends window by window, as their lengths say, which breaks the graph; has no dropout",
    ),
]
