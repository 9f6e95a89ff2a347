"""Whole models on a CUDA device, bf16, random weights: prefill and a training step of Llama-, GPT-2- and BERT-large-type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Model:
    """One model at one size.

    Args:
        make: the module from transformers' `attn_implementation`.
        padded: positions of left padding in the first sequence.
    """

    name: str
    make: Callable[[str], Any]
    batch: int
    tokens: int
    vocabulary: int
    training: bool
    padded: int = 0

    @property
    def about(self) -> str:
        kind = "training step (forward, backward, AdamW), bf16 autocast" if self.training else "prefill, bf16"
        padding = f", {self.padded} positions of left padding in one sequence" if self.padded else ""
        return f"{self.name}: {kind}, {self.batch} x {self.tokens} tokens{padding}, random weights"

    def start(self, implementation: str, backend: Any) -> tuple[Callable[[], Tensor], Callable[[], dict[str, Tensor]]]:
        """What to time, and what gives results to compare."""
        torch.manual_seed(0)
        model = self.make(implementation).cuda()
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.vocabulary, (self.batch, self.tokens), generator=generator).cuda()
        mask = torch.ones_like(ids)
        mask[0, : self.padded] = 0
        given = {"input_ids": ids, "attention_mask": mask}
        if self.training:
            return self._step(model.train(), backend, given)
        model = model.to(torch.bfloat16).eval()
        call = model if backend is None else torch.compile(model, backend=backend)

        @torch.no_grad()
        def run() -> Tensor:
            out: Tensor = call(**given)[0]
            return out

        return run, lambda: {"out": run()[mask.bool()]}

    def _step(
        self, model: Any, backend: Any, given: dict[str, Tensor]
    ) -> tuple[Callable[[], Tensor], Callable[[], dict[str, Tensor]]]:
        call = model if backend is None else torch.compile(model, backend=backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def gradients() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                out: Tensor = call(**given)[0]
            loss = out.float().square().mean()
            loss.backward()
            return loss

        def run() -> Tensor:
            loss = gradients()
            optimizer.step()
            return loss

        def results() -> dict[str, Tensor]:
            found = {"loss": gradients().detach()}
            first = next(name for name, p in model.named_parameters() if "attn" in name or "attention" in name)
            return {**found, first: model.get_parameter(first).grad.clone()}

        return run, results


def llama(implementation: str) -> Any:
    """Llama 3.2 1B's sizes, 4 of its 16 layers."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=16384,
        attn_implementation=implementation,
    )
    return LlamaModel(config)


def gpt2(implementation: str) -> Any:
    """GPT-2 medium's sizes, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config._attn_implementation = implementation
    config.use_cache = False
    return GPT2LMHeadModel(config)


def bert(implementation: str) -> Any:
    """BERT-large's sizes, without dropout."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=implementation,
    )
    return BertModel(config, add_pooling_layer=False)


MODELS = (
    Model("GPT-2 medium", gpt2, 16, 1024, 50257, training=True),
    Model("Llama 1B, 4 layers", llama, 2, 4096, 32000, training=False, padded=512),
    Model("Llama 1B, 4 layers", llama, 2, 4096, 32000, training=True, padded=512),
    Model("BERT large", bert, 16, 512, 30522, training=True, padded=64),
    Model("GPT-2 medium", gpt2, 16, 1024, 50257, training=False),
    Model("BERT large", bert, 16, 512, 30522, training=False, padded=64),
)
