"""What an entry of the zoo is, how one is made from a configuration class of transformers, and inputs that entries share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from . import torchvision_stub

VOCABULARY = 97
BATCH = 2
LENGTH = 64
PADDING = 13
SPECIAL = 3  # ids below are padding, begin and end
SEED = 0

COUNTS_FILE = Path(__file__).with_name("counts.json")

Inputs = dict[str, Tensor]
Maker = Callable[[bool], Inputs]


class MissingArchitecture(LookupError):
    """The installed package does not have the classes of an entry."""


@dataclass(frozen=True)
class Entry:
    """A small model and what is known of it."""

    name: str
    build: Callable[[str, float], nn.Module]
    """Attention implementation and dropout probability to a model in evaluation mode, the same weights at every call."""
    inputs: Maker
    """With or without padding to the same inputs at every call."""
    attentions: int
    """How many attentions one call runs, as `python -m tests.zoo.count` found them."""
    implementations: tuple[str, ...] = ("eager", "sdpa")
    takes_mask: bool = True
    float64: bool = True
    """Whether the model runs in float64; some insist on float32 by name."""
    dynamo: Mapping[str, object] = field(default_factory=dict)
    """Settings of torch._dynamo.config, those of them that it has, that the model is compiled under, with stock Inductor too."""
    needs: str = "transformers"
    note: str = ""


# What a configuration gets unless its entry says otherwise, for those of these fields that its class declares.
DEFAULTS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "embedding_size", "d_model", "n_embd", "dim", "emb_dim", "projection_dim"), 64),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("d_ff", "d_inner", "dff", "feed_forward_size", "hidden_dim", "n_inner"), 96),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "attention_head_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 128),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), 128),
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "cls_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id", "forced_eos_token_id"), 2),
    "image_size": 32,
    "patch_size": 4,
    # layers left out at random, which is not dropout
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "drop_path_rate"), 0.0),
    "apply_spec_augment": False,
}


@functools.cache
def counts() -> dict[str, int]:
    found: dict[str, int] = json.loads(COUNTS_FILE.read_text()) if COUNTS_FILE.exists() else {}
    return found


def entry(
    name: str,
    config: str,
    model: str,
    inputs: Maker,
    *,
    sdpa: bool = True,
    mask: bool = True,
    no_dropout: Sequence[str] = (),
    float64: bool = True,
    drawing: str = "",
    dynamo: Mapping[str, object] | None = None,
    note: str = "",
    **differs: Any,
) -> Entry:
    """An entry of transformers, from the names of its classes and the fields in which its configuration differs from DEFAULTS.

    Fields named in `no_dropout` stay 0 when the model is built with dropout; modules of the class named `drawing`, which draw other
    random numbers in training, stay in evaluation mode.
    """

    def build(implementation: str, dropout: float) -> nn.Module:
        torchvision_stub.prepare()
        import transformers

        try:
            config_class, model_class = getattr(transformers, config), getattr(transformers, model)
        except AttributeError as error:
            raise MissingArchitecture(f"{name}: {error}") from error
        made = config_class(**_fields(config_class, differs))
        made._attn_implementation = implementation
        for part in _parts(made):
            _set_dropout(part, dropout, no_dropout)
        torch.manual_seed(SEED)
        built = settled(model_class(made), inputs(False))
        for module in built.modules():
            if type(module).__name__ == drawing:
                module.train = lambda mode=True, module=module: module
        return built

    return Entry(
        name=name,
        build=build,
        inputs=inputs,
        attentions=counts().get(name, 0),
        implementations=("eager", "sdpa") if sdpa else ("eager",),
        takes_mask=mask,
        float64=float64,
        dynamo=dynamo or {},
        note=note,
    )


def settled(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The model in evaluation mode, with weights such that every part of it shows in its outputs.

    Biases, norms, sinks and tables of positions often start as zeros or ones: they get noise. Matrices often start so small that
    attention is the same for all keys: they get the spread that keeps a vector's. Batch norms get the moments of a call.
    """
    with torch.no_grad():
        for weight in model.parameters():
            if bool((weight == weight.flatten()[:1]).all()):
                weight.add_(torch.randn_like(weight), alpha=0.1)
            elif weight.dim() > 1:
                weight.mul_(max(1.0, weight[0].numel() ** -0.5 / float(weight.std())))
        model.eval()
        if norms := [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]:
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.train()
                norm.momentum = 1.0
            call(model, inputs)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            # LeViT keeps what it looked up until its mode changes
            model.train().eval()
    return model


def call(model: nn.Module, inputs: Inputs) -> Tensor | tuple[Tensor, ...]:
    """The floating-point outputs of a call without cache, the last hidden state or the logits first.

    Inputs take the model's type. The random state is set, since some models draw numbers in evaluation mode too, BigBird with numpy.
    """
    plain = getattr(model, "_orig_mod", model)
    dtype = next(parameter.dtype for parameter in plain.parameters())
    given: dict[str, Any] = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    takes = inspect.signature(plain.forward).parameters
    if "use_cache" in takes:
        given["use_cache"] = False
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    result = model(**given)
    outputs = tuple(_tensors(result))
    return outputs[0] if len(outputs) == 1 else outputs


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, (tuple, list)):
        for value in result:
            yield from _tensors(value)


def _fields(config_class: Any, differs: dict[str, Any]) -> dict[str, Any]:
    """DEFAULTS as far as they apply, overridden by `differs`, in configurations inside this one too."""
    names = {field.name for field in dataclasses.fields(config_class)}
    fields = {name: value for name, value in DEFAULTS.items() if name in names} | differs
    for name, part in config_class.sub_configs.items():
        if dataclasses.is_dataclass(part) and not dataclasses.is_dataclass(fields.get(name)):
            fields[name] = _fields(part, fields.get(name) or {})
    return fields


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _parts(part)


def _set_dropout(config: Any, probability: float, leave: Sequence[str]) -> None:
    for name, value in vars(config).items():
        if not any(word in name for word in ("dropout", "pdrop", "drop_rate")):
            continue
        chosen = 0.0 if name in leave else probability
        # past the validation: some classes declare a probability an integer
        if isinstance(value, (tuple, list)):
            vars(config)[name] = type(value)(chosen for _ in value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            vars(config)[name] = chosen


def generator() -> Generator:
    return Generator().manual_seed(1)


def token_ids(source: Generator, length: int = LENGTH, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(SPECIAL, vocabulary, (BATCH, length), generator=source)


def padding(length: int = LENGTH, padded: int = PADDING) -> Tensor:
    """Ones, and zeros at the end of row 1."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[1, length - padded :] = 0
    return mask


def text(masked: bool) -> Inputs:
    inputs = {"input_ids": token_ids(generator())}
    return inputs | {"attention_mask": padding()} if masked else inputs


def image(size: int = 32, channels: int = 3) -> Maker:
    def make(masked: bool) -> Inputs:
        return {"pixel_values": torch.randn(BATCH, channels, size, size, generator=generator())}

    return make
