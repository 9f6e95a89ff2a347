"""Small transformers models from their configs, their inputs, and what they compute in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

VOCABULARY = 97


def llama(implementation: str, layers: int = 2, **more: Any) -> nn.Module:
    """GQA, rotary positions."""
    return LlamaForCausalLM(LlamaConfig(**_sizes(implementation, layers), num_key_value_heads=2, **more))


def mistral(implementation: str, layers: int = 2, **more: Any) -> nn.Module:
    """As llama, with a window of 7 keys."""
    return MistralForCausalLM(
        MistralConfig(**_sizes(implementation, layers), num_key_value_heads=2, sliding_window=7, **more)
    )


def gpt2(implementation: str, layers: int = 2, **more: Any) -> nn.Module:
    """Fused q, k and v, Conv1D, dropout in training."""
    config = GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=VOCABULARY, n_positions=64, **more)
    config._attn_implementation = implementation
    return GPT2LMHeadModel(config)


def bert(implementation: str, layers: int = 2, **more: Any) -> nn.Module:
    """Bidirectional, dropout in training."""
    return BertModel(BertConfig(**_sizes(implementation, layers), **more), add_pooling_layer=False)


FAMILIES: dict[str, Callable[..., nn.Module]] = {"llama": llama, "mistral": mistral, "gpt2": gpt2, "bert": bert}


def _sizes(implementation: str, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "attn_implementation": implementation,
    }


def build(family: str, implementation: str, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    """A model of a family in evaluation mode, the same weights at every call."""
    torch.manual_seed(0)
    return FAMILIES[family](implementation, **more).to(dtype).eval()


def inputs(padding: str, batch: int = 3, length: int = 20) -> dict[str, Tensor]:
    """Token ids and, with padding `left`, `right` or `rows`, a mask; `rows` leaves the last row of the batch no token."""
    generator = torch.Generator().manual_seed(1)
    out = {"input_ids": torch.randint(0, VOCABULARY, (batch, length), generator=generator)}
    if padding != "none":
        mask = torch.ones(batch, length, dtype=torch.long)
        for row in range(1, batch):
            pad = slice(None, 3 * row) if padding == "left" else slice(length - 3 * row, None)
            mask[row, pad] = 0
        if padding == "rows":
            mask[-1] = 0
        out["attention_mask"] = mask
    return out


def call(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Logits, or hidden states."""
    extra = {} if isinstance(model, BertModel) else {"use_cache": False}
    result: Tensor = model(**given, **extra)[0]
    return result


class _Exactly(TorchFunctionMode):
    """Models cast to float32 by name in places; for the float64 reference those casts go to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        if func in (torch.tensor, torch.full) and isinstance(args[-1], float):
            kwargs = {"dtype": torch.float64, **(kwargs or {})}
        swap = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        return func(*map(swap, args), **{k: swap(v) for k, v in (kwargs or {}).items()})


def exact(model: nn.Module, run: Callable[[nn.Module], Any]) -> Any:
    """`run` on a float64 copy of the model."""
    before = torch.get_default_dtype()
    # an integer mask times finfo(float64).min would else be float32, and NaN
    torch.set_default_dtype(torch.float64)
    try:
        with _Exactly():
            return run(copy.deepcopy(model).double())
    finally:
        torch.set_default_dtype(before)


@contextmanager
def gradient_scales(model: nn.Module) -> Iterator[dict[str, float]]:
    """S of the numerics contract for the gradients of linear layers and norms, by parameter name: the greatest sum of absolute terms.

    Filled by the backward pass inside the context; other parameters have no entry.
    """
    scales: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1:
            # a norm: out = weight·x̂ + bias

            def scaled(module: nn.Module, given: Any, out: Tensor, name: str = name) -> None:
                if not out.requires_grad or out.shape[-1] != module.weight.shape[0]:
                    return
                bias = getattr(module, "bias", None)
                unit = (out.detach() if bias is None else (out - bias).detach()) / module.weight.detach()

                def terms(grad: Tensor) -> None:
                    scales[f"{name}.weight"] = float((grad * unit).flatten(0, -2).abs().sum(0).max())
                    scales[f"{name}.bias"] = float(grad.flatten(0, -2).abs().sum(0).max())

                out.register_hook(terms)

            handles.append(module.register_forward_hook(scaled))
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":

            def hook(module: nn.Module, given: Any, out: Tensor, name: str = name) -> None:
                if not out.requires_grad:
                    return
                x = given[0].detach().flatten(0, -2).abs()

                def terms(grad: Tensor) -> None:
                    dy = grad.flatten(0, -2).abs()
                    scales[f"{name}.weight"] = float((dy.mT @ x).max())
                    scales[f"{name}.bias"] = float(dy.sum(0).max())

                out.register_hook(terms)

            handles.append(module.register_forward_hook(hook))
    try:
        yield scales
    finally:
        for handle in handles:
            handle.remove()
