"""Models of timm, whose eager implementation is its attention with fused_attn off, and sdpa that with it on."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import torchvision_stub
from .entry import BATCH, SEED, Entry, Inputs, MissingArchitecture, counts, generator, settled

# What a model gets unless its entry says otherwise, for those of these parameters that its class takes.
DEFAULTS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
    "drop_path_rate": 0.0,
}
DROPOUT = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate")

# Makes the configuration of the classes that take one, from timm's module and a dropout probability.
Configure = Callable[[Any, float], Any]


def model(
    name: str,
    module: str,
    class_name: str,
    size: int = 32,
    *,
    sdpa: bool = True,
    configure: Configure | None = None,
    note: str = "",
    **differs: Any,
) -> Entry:
    """An entry of timm, from where its class is and the parameters in which it differs from DEFAULTS."""

    def build(implementation: str, dropout: float) -> nn.Module:
        try:
            torchvision_stub.prepare()
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise MissingArchitecture(f"{name}: {error}") from error
        found = getattr(timm.models, module, None)
        if not hasattr(found, class_name):
            raise MissingArchitecture(f"{name}: timm {timm.__version__} has no {module}.{class_name}")
        made: Any = getattr(found, class_name)
        parameters = DEFAULTS | dict.fromkeys(DROPOUT, dropout) | {"img_size": size}
        takes = inspect.signature(made).parameters
        chosen = {key: value for key, value in parameters.items() if key in takes} | differs
        if configure is not None:
            chosen["cfg"] = configure(found, dropout)
        timm.layers.set_fused_attn(implementation == "sdpa")
        torch.manual_seed(SEED)
        return settled(made(**chosen), inputs(False))

    def inputs(masked: bool) -> Inputs:
        return {"x": torch.randn(BATCH, 3, size, size, generator=generator())}

    return Entry(
        name=name,
        build=build,
        inputs=inputs,
        attentions=counts().get(name, 0),
        implementations=("eager", "sdpa") if sdpa else ("eager",),
        takes_mask=False,
        needs="timm",
        note=note,
    )


def _maxvit(timm_maxxvit: Any, dropout: float) -> Any:
    transformer = timm_maxxvit.MaxxVitTransformerCfg(
        dim_head=16, window_size=(4, 4), rel_pos_type="bias_tf", attn_drop=dropout, proj_drop=dropout
    )
    return timm_maxxvit.MaxxVitCfg(
        embed_dim=(32, 64), depths=(1, 1), block_type=("M", "M"), stem_width=16, transformer_cfg=transformer
    )


def _coatnet(timm_maxxvit: Any, dropout: float) -> Any:
    transformer = timm_maxxvit.MaxxVitTransformerCfg(dim_head=16, attn_drop=dropout, proj_drop=dropout)
    return timm_maxxvit.MaxxVitCfg(
        embed_dim=(16, 32, 48, 64), depths=(1, 1, 1, 1), stem_width=16, transformer_cfg=transformer
    )


def _mvitv2(timm_mvitv2: Any, dropout: float) -> Any:
    return timm_mvitv2.MultiScaleVitCfg(depths=(1, 2, 5, 2), embed_dim=16)


WINDOWS: dict[str, Any] = {"patch_size": 2, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
FOUR_STAGES: dict[str, Any] = {"embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}

ENTRIES = [
    model("timm_vit", "vision_transformer", "VisionTransformer"),
    model("timm_beit", "beit", "Beit", use_rel_pos_bias=True, use_abs_pos_emb=False),
    model("timm_eva02", "eva", "Eva", use_rot_pos_emb=True, swiglu_mlp=True, ref_feat_shape=(8, 8)),
    # windows
    model("timm_swin", "swin_transformer", "SwinTransformer", **WINDOWS),
    model(
        "timm_swinv2", "swin_transformer_v2", "SwinTransformerV2", sdpa=False, **WINDOWS, pretrained_window_sizes=(0, 0)
    ),
    model("timm_twins", "twins", "Twins", size=64, depths=(2, 2, 2, 2), wss=(4, 4, 2, 2), **FOUR_STAGES),
    model("timm_maxvit", "maxxvit", "MaxxVit", configure=_maxvit),
    model("timm_coatnet", "maxxvit", "MaxxVit", size=128, configure=_coatnet),
    model("timm_hiera", "hiera", "Hiera", size=64, img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)),
    model("timm_davit", "davit", "DaVit", depths=(1, 1), embed_dims=(32, 64), num_heads=(2, 4), window_size=4),
    # pyramids
    model("timm_pvt_v2", "pvt_v2", "PyramidVisionTransformerV2", size=64, depths=(1, 1, 1, 1), **FOUR_STAGES),
    model("timm_mvitv2", "mvitv2", "MultiScaleVit", size=64, sdpa=False, img_size=(64, 64), configure=_mvitv2),
    model(
        "timm_levit",
        "levit",
        "Levit",
        size=128,
        sdpa=False,
        embed_dim=(32, 48),
        key_dim=16,
        depth=(2, 1),
        num_heads=(2, 3),
        note="keeps its biases from its first call in evaluation mode",
    ),
    model(
        "timm_visformer",
        "visformer",
        "Visformer",
        size=128,
        patch_size=16,
        init_channels=16,
        depth=(1, 2, 2),
        attn_stage="011",
        spatial_conv="100",
    ),
    model("timm_nextvit", "nextvit", "NextViT", size=64, in_chans=3, stem_chs=(16, 16, 16), depths=(1, 1, 5, 1)),
    # classes, channels, talking heads
    model("timm_cait", "cait", "Cait", note="linear maps between heads before and after the softmax"),
    model("timm_xcit", "xcit", "Xcit", size=64, patch_size=8),
    model(
        "timm_crossvit",
        "crossvit",
        "CrossVit",
        size=64,
        sdpa=False,
        patch_size=(8, 16),
        embed_dim=(32, 64),
        depth=((1, 4, 0),) * 3,
        num_heads=(2, 4),
        mlp_ratio=(2, 2, 1),
    ),
    model(
        "timm_volo",
        "volo",
        "VOLO",
        size=64,
        patch_size=8,
        layers=(4, 4, 8, 2),
        embed_dims=(32, 64, 64, 64),
        num_heads=(2, 4, 4, 4),
        stem_hidden_dim=16,
        note="the softmax of its outlook attention has no scores of keys and is not counted",
    ),
    model(
        "timm_convit",
        "convit",
        "ConVit",
        sdpa=False,
        local_up_to_layer=1,
        note="not in bfloat16: its table of positions is float32",
    ),
]
