"""Models of transformers, narrow and of few layers, at the lengths that they are used with: forward passes and steps to measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gate import SCALE
from benchmarks.subjects import Variant

VOCABULARY = 4096
WIDTH = {"vocab_size": VOCABULARY, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}


def _text(batch: int, tokens: int) -> dict[str, Tensor]:
    """Token ids and their mask; of several sequences the last is an eighth shorter."""
    ids = torch.randint(VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, tokens - tokens // 8 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _image(batch: int, size: int = 224) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))}


def _both(batch: int, tokens: int, decoded: int) -> dict[str, Tensor]:
    return {**_text(batch, tokens), "decoder_input_ids": _text(batch, decoded)["input_ids"]}


def _speech(decoded: int) -> dict[str, Tensor]:
    """Thirty seconds as a log-mel spectrogram."""
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": _text(1, decoded)["input_ids"]}


@dataclass(frozen=True)
class Forward:
    """A forward pass without cache of a model that is made from its configuration, with random weights.

    Args:
        config, model: names of classes of transformers.
        inputs: the arguments of a call.
        about: what the inputs are.
        attentions: the implementations that the model has.
    """

    config: str
    model: str
    inputs: Callable[[], dict[str, Tensor]]
    about: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    attentions: tuple[str, ...] = ("eager", "sdpa")
    dtype: torch.dtype = torch.float32

    @property
    def kind(self) -> str:
        """What is measured, in words."""
        return "forward"

    def start(self, variant: Variant) -> tuple[Callable[[], object], Callable[[], dict[str, Tensor]]]:
        """What to time, and what gives the results to compare."""
        model, config = self._model(variant)
        model.eval().to(torch.float64 if variant.exact else self.dtype)
        floating = next(model.parameters()).dtype
        given = {name: x.to(floating) if x.is_floating_point() else x for name, x in self.inputs().items()}
        extra = {} if getattr(config, "use_cache", None) is None else {"use_cache": False}
        call = model if variant.backend is None else torch.compile(model, backend=variant.backend)

        @torch.no_grad()
        def run() -> Any:
            return call(**given, **extra)

        return run, lambda: {"hidden": run()[0]}

    def _model(self, variant: Variant) -> tuple[Any, Any]:
        """The model and its configuration."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.fields)
        config._attn_implementation = variant.attention
        return getattr(transformers, self.model)(config), config


@dataclass(frozen=True)
class Step(Forward):
    """Forward and backward with the dropout that the model's configuration has; results are compared without.

    Args:
        dtype: bfloat16 is autocast's, parameters are float32.
    """

    @property
    def kind(self) -> str:
        return "forward and backward with its dropout" + (", autocast" if self.dtype != torch.float32 else "")

    def start(self, variant: Variant) -> tuple[Callable[[], object], Callable[[], dict[str, Tensor]]]:
        """What to time, and what gives the results to compare."""
        model, config = self._model(variant)
        model.train()
        inputs = self.inputs()
        if variant.exact:
            model.double()
            inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        extra = {} if getattr(config, "use_cache", None) is None else {"use_cache": False}
        call = model if variant.backend is None else torch.compile(model, backend=variant.backend)
        lower = self.dtype != torch.float32 and not variant.exact

        def run() -> Tensor:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                hidden: Tensor = call(**inputs, **extra)[0]
            hidden.to(torch.promote_types(hidden.dtype, torch.float32)).square().mean().backward()
            return hidden.detach()

        def results() -> dict[str, Tensor]:
            model.eval()
            if variant.exact:
                return _with_scales(model, run)
            return {"hidden": run(), **_gradients(model)}

        return run, results


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    # compiled, parameters of an output that is not used have zeros, else none
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def _with_scales(model: torch.nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The results of `run`, and for each gradient the greatest sum of the absolute terms that it adds up."""
    from tests.harness import Terms
    from tests.models import gradient_scales

    with gradient_scales(model) as scales, Terms() as terms:
        hidden = run()
    found = {"hidden": hidden, **_gradients(model)}
    for name, x in _gradients(model).items():
        greatest = max(scales.get(name, 0.0), terms.greatest(x), float(x.abs().max()))
        found[SCALE + name] = torch.tensor(greatest, dtype=torch.float64)
    return found


_WIDE = {**WIDTH, "intermediate_size": 1024}
_GROUPED = {**_WIDE, "num_key_value_heads": 4, "head_dim": 64}
_EAGER = ("eager",)

FORWARD: dict[str, Forward] = {
    "mistral": Forward(
        "MistralConfig",
        "MistralModel",
        lambda: _text(1, 2048),
        "1 x 2048 tokens, window 512",
        {**_GROUPED, "sliding_window": 512},
    ),
    "gemma2": Forward(
        "Gemma2Config",
        "Gemma2Model",
        lambda: _text(1, 1024),
        "1 x 1024 tokens, softcap, window 512 in every other layer",
        {**_GROUPED, "sliding_window": 512, "query_pre_attn_scalar": 64},
        _EAGER,
    ),
    "gpt-neox": Forward("GPTNeoXConfig", "GPTNeoXModel", lambda: _text(1, 1024), "1 x 1024 tokens", _WIDE),
    "bloom": Forward(
        "BloomConfig",
        "BloomModel",
        lambda: _text(1, 1024),
        "1 x 1024 tokens, ALiBi",
        {"vocab_size": VOCABULARY, "hidden_size": 512, "n_layer": 4, "n_head": 8},
        _EAGER,
    ),
    "bert": Forward("BertConfig", "BertModel", lambda: _text(8, 512), "8 x 512 tokens", _WIDE),
    "modernbert": Forward(
        "ModernBertConfig",
        "ModernBertModel",
        lambda: _text(1, 2048),
        "1 x 2048 tokens, window 128 in two of three layers",
        {**_WIDE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "deberta-v2": Forward(
        "DebertaV2Config",
        "DebertaV2Model",
        lambda: _text(2, 512),
        "2 x 512 tokens, disentangled positions",
        {
            **_WIDE,
            "relative_attention": True,
            "position_buckets": 256,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
        _EAGER,
    ),
    "t5": Forward(
        "T5Config",
        "T5Model",
        lambda: _both(4, 512, 128),
        "4 x 512 tokens in, 128 out",
        {"vocab_size": VOCABULARY, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_heads": 8},
    ),
    "whisper": Forward(
        "WhisperConfig",
        "WhisperModel",
        lambda: _speech(64),
        "30 s of speech (1500 frames), 64 tokens out",
        {
            "vocab_size": VOCABULARY,
            "d_model": 512,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 1024,
            "decoder_ffn_dim": 1024,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "vit": Forward(
        "ViTConfig",
        "ViTModel",
        lambda: _image(8),
        "8 images of 224 x 224 in patches of 16",
        {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8},
    ),
    "swin": Forward(
        "SwinConfig",
        "SwinModel",
        lambda: _image(4),
        "4 images of 224 x 224, windows of 7 x 7",
        {"embed_dim": 96, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24]},
    ),
    "beit": Forward(
        "BeitConfig",
        "BeitModel",
        lambda: _image(8),
        "8 images of 224 x 224 in patches of 16, a relative position bias",
        {
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "use_relative_position_bias": True,
        },
    ),
}

TRAINED: dict[str, Step] = {
    "gpt2": Step(
        "GPT2Config",
        "GPT2Model",
        lambda: _text(4, 512),
        "4 x 512 tokens",
        {"vocab_size": VOCABULARY, "n_embd": 512, "n_layer": 4, "n_head": 8},
    ),
    **{
        name: Step(x.config, x.model, x.inputs, x.about, x.fields)
        for name, x in FORWARD.items()
        if name in ("bert", "t5", "beit")
    },
}
