"""Encoders of text."""

from __future__ import annotations

from typing import Any

import torch

from .entry import BATCH, LENGTH, Entry, Inputs, entry, generator, padding, text

DISENTANGLED: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 32,
}


def encoder(name: str, config: str, model: str, **differs: Any) -> Entry:
    return entry(name, config, model, text, **differs)


def _with_boxes(masked: bool) -> Inputs:
    corners = torch.randint(0, 500, (BATCH, LENGTH, 2), generator=generator())
    return text(masked) | {"bbox": torch.cat((corners, corners + 100), dim=-1)}


def _bytes_of_text(masked: bool) -> Inputs:
    inputs = {"inputs": torch.randn(BATCH, LENGTH, 64, generator=generator())}
    return inputs | {"attention_mask": padding()} if masked else inputs


ENTRIES = [
    # the BERT family
    encoder("bert", "BertConfig", "BertModel"),
    encoder("roberta", "RobertaConfig", "RobertaModel"),
    encoder("distilbert", "DistilBertConfig", "DistilBertModel"),
    encoder("albert", "AlbertConfig", "AlbertModel"),
    encoder("electra", "ElectraConfig", "ElectraModel"),
    encoder("mobilebert", "MobileBertConfig", "MobileBertModel", intra_bottleneck_size=32),
    encoder("esm", "EsmConfig", "EsmModel", position_embedding_type="rotary", mask_token_id=1),
    encoder(
        "modernbert",
        "ModernBertConfig",
        "ModernBertModel",
        local_attention=16,
        note="its implementations differ where padding leaves a window no key",
    ),
    # the same with code of their own
    encoder("mpnet", "MPNetConfig", "MPNetModel", sdpa=False),
    encoder("megatron_bert", "MegatronBertConfig", "MegatronBertModel", sdpa=False),
    encoder("rembert", "RemBertConfig", "RemBertModel", sdpa=False, input_embedding_size=64, output_embedding_size=64),
    encoder("roformer", "RoFormerConfig", "RoFormerModel", sdpa=False),
    encoder("squeezebert", "SqueezeBertConfig", "SqueezeBertModel", sdpa=False),
    encoder(
        "convbert",
        "ConvBertConfig",
        "ConvBertModel",
        sdpa=False,
        conv_kernel_size=5,
        note="the softmax of the kernels of its span convolution has no scores of keys and is not counted",
    ),
    encoder(
        "canine",
        "CanineConfig",
        "CanineModel",
        sdpa=False,
        local_transformer_stride=16,
        num_hash_buckets=128,
        note="runs local attention chunk by chunk",
    ),
    encoder("xlm", "XLMConfig", "XLMModel", sdpa=False),
    # scores with positions in them
    encoder(
        "deberta",
        "DebertaConfig",
        "DebertaModel",
        sdpa=False,
        # its .item() breaks the graph between the scores and the softmax otherwise
        dynamo={"capture_scalar_outputs": True},
        **DISENTANGLED,
    ),
    encoder(
        "deberta_v2",
        "DebertaV2Config",
        "DebertaV2Model",
        sdpa=False,
        position_buckets=16,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        **DISENTANGLED,
    ),
    encoder("xlnet", "XLNetConfig", "XLNetModel", sdpa=False),
    encoder("funnel", "FunnelConfig", "FunnelModel", sdpa=False, block_sizes=[1, 1], num_decoder_layers=1),
    entry(
        "layoutlmv3",
        "LayoutLMv3Config",
        "LayoutLMv3Model",
        _with_boxes,
        sdpa=False,
        coordinate_size=10,
        shape_size=12,
        visual_embed=False,
    ),
    # parts of the keys
    encoder(
        "longformer", "LongformerConfig", "LongformerModel", sdpa=False, attention_window=16, note="breaks the graph"
    ),
    encoder(
        "big_bird_sparse",
        "BigBirdConfig",
        "BigBirdModel",
        sdpa=False,
        block_size=8,
        num_random_blocks=1,
        # it builds its random blocks with NumPy, from numbers that it computes, in a function within its attention
        dynamo={"capture_scalar_outputs": True, "nested_graph_breaks": True},
        note="five attentions in a layer",
    ),
    encoder("big_bird_full", "BigBirdConfig", "BigBirdModel", sdpa=False, attention_type="original_full"),
    encoder(
        "reformer",
        "ReformerConfig",
        "ReformerModel",
        sdpa=False,
        attn_layers=["local", "lsh"],
        axial_pos_shape=(8, 8),
        axial_pos_embds_dim=(32, 32),
        local_attn_chunk_length=16,
        lsh_attn_chunk_length=16,
        num_buckets=4,
        hash_seed=0,
        note="breaks the graph; its dropout cannot be repeated",
    ),
    encoder(
        "nystromformer",
        "NystromformerConfig",
        "NystromformerModel",
        sdpa=False,
        mask=False,
        num_landmarks=8,
        segment_means_seq_len=LENGTH,
        conv_kernel_size=5,
        note="adds a mask of all keys to the scores of landmarks, so fails with a mask and under torch.compile; not in bfloat16",
    ),
    encoder(
        "mra",
        "MraConfig",
        "MraModel",
        sdpa=False,
        note="without its CUDA kernel, zeros in place of attention; not in bfloat16",
    ),
    entry(
        "perceiver",
        "PerceiverConfig",
        "PerceiverModel",
        _bytes_of_text,
        sdpa=False,
        num_latents=16,
        d_latents=64,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
    ),
    encoder(
        "fnet",
        "FNetConfig",
        "FNetModel",
        sdpa=False,
        mask=False,
        note="Fourier transforms, no attention; not in bfloat16",
    ),
]
