"""Encoder-decoders of text."""

from __future__ import annotations

from typing import Any

from .entry import Entry, Inputs, entry, generator, padding, token_ids

TARGET_LENGTH = 48
WINDOWED = {"sliding_window": 16, "query_pre_attn_scalar": 16}


def _pair(masked: bool) -> Inputs:
    source = generator()
    inputs = {"input_ids": token_ids(source), "decoder_input_ids": token_ids(source, TARGET_LENGTH)}
    return inputs | {"attention_mask": padding()} if masked else inputs


def pair(name: str, config: str, model: str, **differs: Any) -> Entry:
    return entry(name, config, model, _pair, **differs)


ENTRIES = [
    # relative positions in buckets
    pair("t5", "T5Config", "T5Model"),
    pair("mt5", "MT5Config", "MT5Model"),
    pair("umt5", "UMT5Config", "UMT5Model"),
    pair("longt5", "LongT5Config", "LongT5Model", sdpa=False, local_radius=7),
    pair(
        "longt5_tglobal",
        "LongT5Config",
        "LongT5Model",
        sdpa=False,
        local_radius=7,
        global_block_size=8,
        encoder_attention_type="transient-global",
    ),
    pair(
        "switch_transformers",
        "SwitchTransformersConfig",
        "SwitchTransformersModel",
        sdpa=False,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
        note="breaks the graph",
    ),
    pair("t5gemma", "T5GemmaConfig", "T5GemmaModel", sdpa=False, encoder=WINDOWED, decoder=WINDOWED),
    # the BART family
    pair("bart", "BartConfig", "BartModel"),
    pair("pegasus", "PegasusConfig", "PegasusModel"),
    pair("marian", "MarianConfig", "MarianModel"),
    pair("m2m_100", "M2M100Config", "M2M100Model"),
    pair("led", "LEDConfig", "LEDModel", sdpa=False, attention_window=16, note="breaks the graph"),
    pair(
        "bigbird_pegasus",
        "BigBirdPegasusConfig",
        "BigBirdPegasusModel",
        sdpa=False,
        block_size=8,
        num_random_blocks=1,
        dynamo={"capture_scalar_outputs": True, "nested_graph_breaks": True},
        note="five attentions in a layer of the encoder",
    ),
    pair("prophetnet", "ProphetNetConfig", "ProphetNetModel", sdpa=False),
]
