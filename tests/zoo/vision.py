"""Models of images and of video."""

from __future__ import annotations

from typing import Any

import torch

from .entry import BATCH, Entry, Inputs, Maker, entry, generator, image

WINDOWS: dict[str, Any] = {"patch_size": 2, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
# queries of all patches, keys of few
REDUCED: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": (1, 1),
    "sr_ratios": (4, 2),
    "hidden_sizes": (32, 64),
    "patch_sizes": (7, 3),
    "strides": (2, 2),
    "num_attention_heads": (2, 4),
    "mlp_ratios": (2, 2),
}


def vision(name: str, config: str, model: str, size: int = 32, **differs: Any) -> Entry:
    return entry(name, config, model, image(size), mask=False, image_size=size, **differs)


def _video(frames: int) -> Maker:
    def make(masked: bool) -> Inputs:
        return {"pixel_values": torch.randn(BATCH, frames, 3, 32, 32, generator=generator())}

    return make


def _image_and_mask(masked: bool) -> Inputs:
    inputs = image(64)(masked)
    if masked:
        inputs["pixel_mask"] = torch.ones(BATCH, 64, 64, dtype=torch.long)
        inputs["pixel_mask"][1, :, 48:] = 0
    return inputs


ENTRIES = [
    vision("vit", "ViTConfig", "ViTModel"),
    vision("deit", "DeiTConfig", "DeiTModel"),
    vision("dinov2", "Dinov2Config", "Dinov2Model"),
    vision("beit", "BeitConfig", "BeitModel", use_relative_position_bias=True),
    # windows
    vision("swin", "SwinConfig", "SwinModel", **WINDOWS),
    vision("swinv2", "Swinv2Config", "Swinv2Model", sdpa=False, **WINDOWS, pretrained_window_sizes=(0, 0)),
    vision(
        "sam_vision",
        "SamVisionConfig",
        "SamVisionModel",
        size=64,
        window_size=7,
        global_attn_indexes=[1],
        output_channels=32,
        num_pos_feats=32,
    ),
    entry(
        "hiera",
        "HieraConfig",
        "HieraModel",
        image(32),
        sdpa=False,
        mask=False,
        image_size=(32, 32),
        patch_size=(7, 7),
        embed_dim=32,
        depths=(1, 1),
        num_heads=(2, 4),
        num_query_pool=1,
        masked_unit_size=(4, 4),
        masked_unit_attention=(True, False),
        note="has no dropout",
    ),
    # pyramids
    vision("segformer", "SegformerConfig", "SegformerModel", **REDUCED),
    vision("pvt_v2", "PvtV2Config", "PvtV2Model", sdpa=False, **REDUCED),
    entry(
        "cvt",
        "CvtConfig",
        "CvtModel",
        image(64),
        sdpa=False,
        mask=False,
        embed_dim=(32, 32, 64),
        num_heads=(2, 2, 4),
        depth=(1, 2, 3),  # a stage has to have more layers than its number
        drop_path_rate=(0.0, 0.0, 0.0),
    ),
    vision(
        "levit",
        "LevitConfig",
        "LevitModel",
        size=128,
        sdpa=False,
        patch_size=16,
        hidden_sizes=(32, 48, 64),
        num_attention_heads=(2, 3, 4),
        depths=(1, 1, 1),
        drop_path_rate=0,
        note="has no dropout; keeps its biases from its first call in evaluation mode",
    ),
    vision(
        "mobilevit",
        "MobileViTConfig",
        "MobileViTModel",
        size=128,
        sdpa=False,
        patch_size=2,
        hidden_sizes=(32, 48, 64),
        initializer_range=0.2,  # of the batch norms too
        neck_hidden_sizes=(16, 16, 16, 32, 32, 32, 64),
    ),
    # video
    entry("videomae", "VideoMAEConfig", "VideoMAEModel", _video(8), mask=False, patch_size=8, num_frames=8),
    entry(
        "timesformer",
        "TimesformerConfig",
        "TimesformerModel",
        _video(4),
        sdpa=False,
        mask=False,
        patch_size=8,
        num_frames=4,
        drop_path_rate=0,
    ),
    # detection
    entry(
        "detr",
        "DetrConfig",
        "DetrModel",
        _image_and_mask,
        sdpa=False,
        num_queries=16,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "out_features": ["stage2"],
        },
        note="breaks the graph in training",
    ),
]
