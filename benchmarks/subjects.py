"""What is measured: a Llama's prefill and training step, attention alone, the bare operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

# Four of the thirty layers of SmolLM2-135M, the vocabulary cut in the same proportion.
LLAMA = {
    "vocab_size": 6528,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA_TEXT = "4 of the 30 layers of SmolLM2-135M (9 query heads on 3 key-value heads, D 64), random weights"


class Variant(NamedTuple):
    """How a model is run: transformers' `attn_implementation`, `torch.compile`'s backend (None: uncompiled)."""

    attention: str
    backend: str | Callable[..., Any] | None
    exact: bool = False


VARIANTS = {
    "eager": Variant("eager", None),
    "sdpa": Variant("sdpa", None),
    "eager-float64": Variant("eager", None, exact=True),
    "sdpa-float64": Variant("sdpa", None, exact=True),
    "stock-eager": Variant("eager", "inductor"),
    "stock-sdpa": Variant("sdpa", "inductor"),
    "attnfuse-eager": Variant("eager", "attnfuse"),
    "attnfuse-sdpa": Variant("sdpa", "attnfuse"),
    # compiled FlexAttention with a mask written by hand, where a subject has one
    "flex": Variant("flex", "inductor"),
}


def added_mask(allowed: Tensor) -> Tensor:
    """What transformers' eager attention adds to its scores in a float32 model, [B, 1, N, N] of float64.

    A float64 model would add float64's minimum, which its softmax, in float32 even there, takes for -inf: NaN at padding.
    """
    position = torch.arange(allowed.shape[1])
    seen = (position <= position[:, None]) & allowed.bool()[:, None, None, :]
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min).double()


@dataclass(frozen=True)
class Pass:
    """A forward pass or a training step of the Llama.

    Args:
        padded: positions of left padding in the first sequence.
        mask: whether the model gets an attention_mask, as a tokenizer makes one.
        dtype: of parameters in a forward pass; a training step keeps float32 and uses autocast.
    """

    training: bool
    batch: int
    tokens: int
    padded: int
    mask: bool
    dtype: torch.dtype
    attentions: ClassVar = ("eager", "sdpa")

    def start(self, variant: Variant) -> tuple[Callable[[], object], Callable[[], dict[str, Tensor]]]:
        """What to time, and what gives the results to compare."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(**LLAMA, max_position_embeddings=self.tokens, attn_implementation=variant.attention)
        model = LlamaForCausalLM(config)
        inputs = self.inputs()
        lower = None if variant.exact or self.dtype == torch.float32 else self.dtype
        if variant.exact:
            model.double()
            if variant.attention == "eager" and self.mask:
                inputs["attention_mask"] = added_mask(inputs["attention_mask"])
        elif not self.training:
            model.to(self.dtype)
        return self.step(model, variant, inputs, lower) if self.training else self.prefill(model, variant, inputs)

    def inputs(self) -> dict[str, Any]:
        ids = torch.randint(LLAMA["vocab_size"], (self.batch, self.tokens), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[0, : self.padded] = 0
        return {"input_ids": ids, "attention_mask": mask} if self.mask else {"input_ids": ids}

    def prefill(
        self, model: Any, variant: Variant, inputs: dict[str, Any]
    ) -> tuple[Callable[[], object], Callable[[], dict[str, Tensor]]]:
        """As the first step of `generate`: fills a cache; without the head, which needs the last position only."""
        model.eval()
        call = model.model if variant.backend is None else torch.compile(model.model, backend=variant.backend)

        @torch.no_grad()
        def run() -> Any:
            return call(**inputs, use_cache=True)

        def results() -> dict[str, Tensor]:
            out = run()
            last = out.past_key_values.layers[-1]
            return {"hidden": out.last_hidden_state, "keys": last.keys, "values": last.values}

        return run, results

    def step(
        self, model: Any, variant: Variant, inputs: dict[str, Any], lower: torch.dtype | None
    ) -> tuple[Callable[[], object], Callable[[], dict[str, Tensor]]]:
        """Forward, backward and AdamW."""
        model.train()
        labels = inputs["input_ids"].clone()
        labels[0, : self.padded] = -100
        call = model if variant.backend is None else torch.compile(model, backend=variant.backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def loss_and_gradients() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", lower or torch.bfloat16, enabled=lower is not None):
                loss: Tensor = call(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
            return loss

        def run() -> None:
            loss_and_gradients()
            optimizer.step()

        def results() -> dict[str, Tensor]:
            loss = loss_and_gradients()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            return {"loss": loss.detach(), **gradients}

        return run, results


def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """The Llama's attention, spelled out. q [B, H, N, D], k and v [B, Hkv, N, D], allowed [B, N] keys."""
    B, H, N, D = q.shape
    k, v = (x[:, :, None].expand(B, x.shape[1], H // x.shape[1], N, D).reshape(B, H, N, D) for x in (k, v))
    position = torch.arange(N)
    mask = (position[None, :] <= position[:, None]) & allowed[:, None, None, :]
    scores = q @ k.mT * D**-0.5 + torch.where(mask, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def attention_inputs(N: int, dtype: torch.dtype, *, training: bool) -> list[Tensor]:
    """q, k, v and the allowed keys: B 1, H 8, Hkv 2, D 64, an eighth of the keys padded on the left."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, N, 64, generator=generator).to(dtype) for heads in (8, 2, 2))
    for x in (q, k, v):
        x.requires_grad_(training)
    return [q, k, v, (torch.arange(N) >= N // 8)[None]]


def attention_call(backend: str | None, tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Forward, and backward where the operands want gradients (these are dropped)."""
    call = attention if backend is None else torch.compile(attention, backend=backend, dynamic=False)
    wanted = [x for x in tensors if x.requires_grad]

    def run() -> Tensor:
        out = call(*tensors)
        if wanted:
            torch.autograd.grad(out.sum(), wanted)
        return out.detach()

    return run


def bare_call(backend: str | None, N: int, dtype: torch.dtype, training: bool) -> Callable[[], Tensor]:
    """`attention` of N keys."""
    return attention_call(backend, attention_inputs(N, dtype, training=training))


def beit_call(backend: str | None, N: int, dtype: torch.dtype, training: bool) -> Callable[[], Tensor]:
    """One layer of a BEiT, 8 heads, its image a square of about N patches; where it trains, the gradients of parameters too."""
    from transformers import BeitConfig, BeitModel

    torch.manual_seed(0)
    side = math.isqrt(N)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8}
    config = BeitConfig(image_size=4 * side, patch_size=4, use_relative_position_bias=True, drop_path_rate=0.0, **sizes)
    config._attn_implementation = "eager"
    model = BeitModel(config).to(dtype).train(training)
    call = model if backend is None else torch.compile(model, backend=backend, dynamic=False)
    pixels = torch.randn(1, 3, 4 * side, 4 * side, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run() -> Tensor:
        model.zero_grad()
        with torch.set_grad_enabled(training):
            out: Tensor = call(pixels).last_hidden_state
        if training:
            out.square().mean().backward()
        return out.detach()

    return run


def t5_call(backend: str | None, N: int, dtype: torch.dtype, training: bool) -> Callable[[], Tensor]:
    """One layer of a T5 encoder, 4 heads, N tokens an eighth of them padding; where it trains, the gradients of parameters too."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=512, d_model=256, d_kv=64, d_ff=256, num_layers=1, num_heads=4, dropout_rate=0.0)
    config._attn_implementation = "eager"
    model = T5EncoderModel(config).to(dtype).train(training)
    call = model if backend is None else torch.compile(model, backend=backend, dynamic=False)
    ids = torch.randint(512, (1, N), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:, -(N // 8) :] = 0

    def run() -> Tensor:
        model.zero_grad()
        with torch.set_grad_enabled(training):
            out: Tensor = call(input_ids=ids, attention_mask=mask).last_hidden_state
        if training:
            out.square().mean().backward()
        return out.detach()

    return run
