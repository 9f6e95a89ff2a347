"""Models of audio, encoders and encoder-decoders."""

from __future__ import annotations

from typing import Any

import torch

from .entry import BATCH, LENGTH, Entry, Inputs, Maker, entry, generator, padding, token_ids

# 64 frames of 650 samples
FRAMES: dict[str, Any] = {
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def _samples(length: int, target_length: int = 0) -> Maker:
    """Raw audio and, for a decoder, tokens."""

    def make(masked: bool) -> Inputs:
        source = generator()
        inputs = {"input_values": torch.randn(BATCH, length, generator=source)}
        if target_length:
            inputs["decoder_input_ids"] = token_ids(source, target_length)
        return inputs | {"attention_mask": padding(length, length // 5)} if masked else inputs

    return make


def _spectrum(*shape: int, target_length: int = 0, name: str = "input_features") -> Maker:
    """Frequencies by frames in the order of `shape` and, for a decoder, tokens; the mask is of the first axis of `shape`."""

    def make(masked: bool) -> Inputs:
        source = generator()
        inputs = {name: torch.randn(BATCH, *shape, generator=source)}
        if target_length:
            inputs["decoder_input_ids"] = token_ids(source, target_length)
        return inputs | {"attention_mask": padding(shape[0], shape[0] // 5)} if masked else inputs

    return make


def speech(name: str, config: str, model: str, length: int = 650, **differs: Any) -> Entry:
    return entry(name, config, model, _samples(length), **(FRAMES | differs))


TRAINING = "breaks the graph in training"

ENTRIES = [
    speech("wav2vec2", "Wav2Vec2Config", "Wav2Vec2Model", note=TRAINING),
    speech("hubert", "HubertConfig", "HubertModel", note=TRAINING),
    speech("wavlm", "WavLMConfig", "WavLMModel", sdpa=False, num_buckets=32, max_bucket_distance=40, note=TRAINING),
    speech(
        "wav2vec2_conformer",
        "Wav2Vec2ConformerConfig",
        "Wav2Vec2ConformerModel",
        conv_depthwise_kernel_size=5,
        note=TRAINING,
    ),
    speech(
        "sew_d",
        "SEWDConfig",
        "SEWDModel",
        length=1290,
        sdpa=False,
        position_buckets=16,
        max_position_embeddings=128,
        note=TRAINING,
    ),
    entry(
        "wav2vec2_bert",
        "Wav2Vec2BertConfig",
        "Wav2Vec2BertModel",
        _spectrum(LENGTH, 32),
        feature_projection_input_dim=32,
        conv_depthwise_kernel_size=5,
    ),
    entry(
        "ast",
        "ASTConfig",
        "ASTModel",
        _spectrum(32, 32, name="input_values"),
        mask=False,
        frequency_stride=4,
        time_stride=4,
        max_length=32,
        num_mel_bins=32,
    ),
    entry(
        "whisper",
        "WhisperConfig",
        "WhisperModel",
        _spectrum(16, 2 * LENGTH, target_length=32),
        mask=False,
        num_mel_bins=16,
        max_source_positions=LENGTH,
        note="its encoder takes no mask",
    ),
    entry(
        "speech_to_text",
        "Speech2TextConfig",
        "Speech2TextModel",
        _spectrum(4 * LENGTH, 16, target_length=32),
        sdpa=False,
        input_feat_per_channel=16,
        conv_channels=32,
        max_source_positions=4 * LENGTH,
    ),
    entry(
        "moonshine",
        "MoonshineConfig",
        "MoonshineModel",
        _samples(25087, target_length=24),
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        pad_head_dim_to_multiple_of=8,
    ),
]
