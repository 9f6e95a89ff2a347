"""Decoders: language models with a causal mask."""

from __future__ import annotations

from typing import Any

from .entry import Entry, entry, text

MLA: dict[str, Any] = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
EMPTY_WINDOWS = "its implementations differ where padding leaves a window no key"
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]


def decoder(name: str, config: str, model: str, **differs: Any) -> Entry:
    return entry(name, config, model, text, **differs)


ENTRIES = [
    # rotary positions, grouped queries
    decoder("llama", "LlamaConfig", "LlamaModel"),
    decoder("mistral", "MistralConfig", "MistralModel", sliding_window=16),
    decoder("qwen2", "Qwen2Config", "Qwen2Model"),
    decoder("qwen3", "Qwen3Config", "Qwen3Model"),
    decoder("gemma", "GemmaConfig", "GemmaModel", num_key_value_heads=1),
    decoder("phi", "PhiConfig", "PhiModel", qk_layernorm=True),
    decoder("phi3", "Phi3Config", "Phi3Model"),
    decoder("stablelm", "StableLmConfig", "StableLmModel"),
    decoder("cohere2", "Cohere2Config", "Cohere2Model", sliding_window=16, layer_types=SLIDING_AND_FULL),
    decoder("olmo2", "Olmo2Config", "Olmo2Model"),
    decoder("granite", "GraniteConfig", "GraniteModel", attention_multiplier=0.25),
    decoder("nemotron", "NemotronConfig", "NemotronModel"),
    decoder("mixtral", "MixtralConfig", "MixtralModel", num_local_experts=4),
    decoder("gpt_neox", "GPTNeoXConfig", "GPTNeoXModel"),
    # a cap on scores, sinks, other additions to the same
    decoder("gemma2", "Gemma2Config", "Gemma2Model", sdpa=False, sliding_window=16, query_pre_attn_scalar=16),
    decoder(
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3TextModel",
        sliding_window=16,
        query_pre_attn_scalar=16,
        layer_types=SLIDING_AND_FULL,
    ),
    decoder("gpt_oss", "GptOssConfig", "GptOssModel", sdpa=False, sliding_window=16, num_local_experts=4),
    decoder(
        "granite_swa", "GraniteSWAConfig", "GraniteSWAModel", sdpa=False, sliding_window=16, attention_multiplier=0.25
    ),
    decoder("deepseek_v2", "DeepseekV2Config", "DeepseekV2Model", first_k_dense_replace=2, **MLA),
    decoder("deepseek_v3", "DeepseekV3Config", "DeepseekV3Model", first_k_dense_replace=2, **MLA),
    decoder(
        "diffllama",
        "DiffLlamaConfig",
        "DiffLlamaModel",
        no_dropout=("attention_dropout",),
        note="refuses attention_dropout, which is its only dropout",
    ),
    decoder(
        "llama4",
        "Llama4TextConfig",
        "Llama4TextModel",
        intermediate_size_mlp=96,
        attention_chunk_size=16,
        floor_scale=16,
        moe_layers=[],
        no_rope_layers=[1, 0],
    ),
    decoder(
        "modernbert_decoder",
        "ModernBertDecoderConfig",
        "ModernBertDecoderModel",
        local_attention=16,
        note=EMPTY_WINDOWS,
    ),
    # some layers have a recurrence in place of attention
    decoder(
        "qwen3_next",
        "Qwen3NextConfig",
        "Qwen3NextModel",
        layer_types=["linear_attention", "full_attention"],
        mlp_only_layers=[0, 1],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        note="one layer of two has attention",
    ),
    decoder(
        "jamba",
        "JambaConfig",
        "JambaModel",
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        note="one layer of two has attention",
    ),
    decoder(
        "bamba_granite4",
        "BambaConfig",
        "BambaModel",
        num_hidden_layers=3,
        attn_layer_indices=[0, 2],
        **MAMBA2,
        note="two layers of three have attention",
    ),
    # the GPT family
    decoder("openai_gpt", "OpenAIGPTConfig", "OpenAIGPTModel", sdpa=False, initializer_range=0.4),
    decoder("gpt2", "GPT2Config", "GPT2Model"),
    decoder("gpt2_upcast", "GPT2Config", "GPT2Model", float64=False, reorder_and_upcast_attn=True),
    decoder("gpt_bigcode", "GPTBigCodeConfig", "GPTBigCodeModel"),
    decoder(
        "gpt_neo", "GPTNeoConfig", "GPTNeoModel", sdpa=False, attention_types=[[["global", "local"], 1]], window_size=16
    ),
    decoder("gptj", "GPTJConfig", "GPTJModel", sdpa=False, rotary_dim=8),
    decoder("codegen", "CodeGenConfig", "CodeGenModel", sdpa=False, rotary_dim=8),
    decoder("ctrl", "CTRLConfig", "CTRLModel", note="breaks the graph"),
    # ALiBi, several queries to one key
    decoder("bloom", "BloomConfig", "BloomModel", sdpa=False),
    decoder("mpt", "MptConfig", "MptModel", sdpa=False),
    decoder("falcon_mqa", "FalconConfig", "FalconModel"),
    decoder(
        "falcon_alibi",
        "FalconConfig",
        "FalconModel",
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        note="its eager implementation adds the bias twice, once with the mask",
    ),
    decoder("falcon_new", "FalconConfig", "FalconModel", new_decoder_architecture=True, num_kv_heads=2),
    # the BART family
    decoder("opt", "OPTConfig", "OPTModel"),
    decoder("biogpt", "BioGptConfig", "BioGptModel"),
    decoder("xglm", "XGLMConfig", "XGLMModel", sdpa=False),
]
