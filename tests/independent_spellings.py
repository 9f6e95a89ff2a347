"""Attention as people write it, by an author who had not read the passes; frozen before the first run."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Make = Callable[[torch.Generator], Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spelling:
    """A piece of PyTorch and what to call it with.

    `attentions` counts what a reader would call separate attentions: a loop over heads or over blocks of queries has
    one for each turn; pieces of one softmax (blocks of keys, two sources of keys under one normaliser) are one.
    """

    name: str
    fn: Callable[..., Tensor]
    inputs: Callable[[], tuple[Tensor, ...]]
    attentions: int = 1
    random: bool = False


_REGISTERED: list[Spelling] = []


def _draw(name: str, makes: tuple[Make | Shape, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return tuple(floats(*make)(generator) if isinstance(make, tuple) else make(generator) for make in makes)


def spelling(
    *makes: Make | Shape, attentions: int = 1, random: bool = False
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers a function; a tuple is the shape of a standard normal input."""

    def register(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = fn.__name__
        _REGISTERED.append(Spelling(name, fn, partial(_draw, name, makes), attentions, random))
        return fn

    return register


def floats(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Make:
    """Normal values that bfloat16 holds."""
    return lambda generator: (torch.randn(shape, generator=generator) * scale + shift).bfloat16().float()


def weight(*shape: int) -> Make:
    """A linear layer's weight: normal with the variance that keeps the size of what goes through it."""
    return floats(*shape, scale=shape[-1] ** -0.5)


def values(*numbers: float) -> Make:
    """Given floats."""
    return lambda _: torch.tensor(numbers).bfloat16().float()


def ints(numbers: list[int] | list[list[int]]) -> Make:
    """Given integers."""
    return lambda _: torch.tensor(numbers)


def randints(high: int, *shape: int) -> Make:
    """Integers below `high`."""
    return lambda generator: torch.randint(high, shape, generator=generator)


def bools(*shape: int, p: float = 0.6) -> Make:
    """Random flags, each true with probability `p`; the first of every row is true."""

    def make(generator: torch.Generator) -> Tensor:
        flags = torch.rand(shape, generator=generator) < p
        flags[..., 0] = True
        return flags

    return make


def spans(size: int, *starts_ends: tuple[int, int]) -> Make:
    """One row of flags for each (start, end): true in between."""
    return lambda _: torch.stack([(torch.arange(size) >= a) & (torch.arange(size) < b) for a, b in starts_ends])


def int_spans(size: int, *starts_ends: tuple[int, int]) -> Make:
    """The same as 0 and 1, as tokenizers return attention masks."""
    return lambda generator: spans(size, *starts_ends)(generator).long()


def table(of: Callable[[], Tensor]) -> Make:
    """A tensor that needs no random numbers, such as a registered buffer."""
    return lambda _: of()


SELF = ((2, 4, 24, 16),) * 3  # q, k, v with heads first
CROSS = ((2, 4, 20, 16), (2, 4, 36, 16), (2, 4, 36, 16))
FLAT = ((8, 20, 8), (8, 28, 8), (8, 28, 8))  # batch and heads in one axis
TOKENS = (2, 24, 32)  # batch, tokens, channels (4 heads of 8)
LINEAR = weight(32, 32)
LINEARS = (LINEAR,) * 4


# --- the plain ones -------------------------------------------------------------------------------------------------


@spelling(*CROSS)
def three_lines(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot product in three lines; every blog post on transformers."""
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights, v)


@spelling((20, 16), (28, 16), (28, 8))
def one_head_two_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unbatched single head with values of another width; lecture notes."""
    return F.softmax(q @ k.T * q.shape[1] ** -0.5, dim=1) @ v


@spelling(TOKENS, weight(96, 32), (96,), LINEAR, table(lambda: torch.tril(torch.ones(40, 40)).view(1, 1, 40, 40)))
def small_gpt_block(x: Tensor, w_qkv: Tensor, b_qkv: Tensor, w_out: Tensor, bias: Tensor) -> Tensor:
    """One projection split in three, a float triangle as registered buffer; minimal GPT repositories."""
    B, T, C = x.size()
    q, k, v = F.linear(x, w_qkv, b_qkv).split(C, dim=2)
    q = q.view(B, T, 4, C // 4).transpose(1, 2)
    k = k.view(B, T, 4, C // 4).transpose(1, 2)
    v = v.view(B, T, 4, C // 4).transpose(1, 2)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(bias[:, :, :T, :T] == 0, float("-inf"))
    y = F.softmax(att, dim=-1) @ v
    return F.linear(y.transpose(1, 2).contiguous().view(B, T, C), w_out)


@spelling(TOKENS, weight(96, 32), LINEAR)
def small_gpt_flash(x: Tensor, w_qkv: Tensor, w_out: Tensor) -> Tensor:
    """The same with the built-in and is_causal; minimal GPT repositories after torch 2.0."""
    B, T, C = x.shape
    q, k, v = (t.view(B, T, 4, -1).transpose(1, 2) for t in F.linear(x, w_qkv).chunk(3, dim=-1))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
    return F.linear(y.transpose(1, 2).reshape(B, T, C), w_out)


@spelling(*SELF, spans(24, (0, 24), (0, 15)))
def annotated(query: Tensor, key: Tensor, value: Tensor, pad: Tensor) -> Tensor:
    """Padding & subsequent mask, masked_fill(mask == 0, -1e9); line-by-line explanations of the 2017 paper."""
    size = query.size(-2)
    subsequent = torch.triu(torch.ones(1, size, size), diagonal=1).type(torch.uint8) == 0
    mask = (pad.unsqueeze(-2) & subsequent).unsqueeze(1)
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    scores = scores.masked_fill(mask == 0, -1e9)
    p_attn = scores.softmax(dim=-1)
    return torch.matmul(p_attn, value)


@spelling((24, 2, 32), (30, 2, 32), *LINEARS, spans(30, (26, 30), (30, 30)))
def sequence_first_bmm(
    query: Tensor, memory: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, padding: Tensor
) -> Tensor:
    """[L, B, E], heads folded into the batch, key_padding_mask through a 4-D view; sequence-to-sequence toolkits."""
    tgt_len, bsz, embed_dim = query.size()
    heads, head_dim = 4, embed_dim // 4
    q = F.linear(query, wq) * head_dim**-0.5
    k, v = F.linear(memory, wk), F.linear(memory, wv)
    q = q.contiguous().view(tgt_len, bsz * heads, head_dim).transpose(0, 1)
    k = k.contiguous().view(-1, bsz * heads, head_dim).transpose(0, 1)
    v = v.contiguous().view(-1, bsz * heads, head_dim).transpose(0, 1)
    src_len = k.size(1)
    attn_weights = torch.bmm(q, k.transpose(1, 2))
    attn_weights = attn_weights.view(bsz, heads, tgt_len, src_len)
    attn_weights = attn_weights.masked_fill(padding.unsqueeze(1).unsqueeze(2).to(torch.bool), float("-inf"))
    attn_weights = attn_weights.view(bsz * heads, tgt_len, src_len)
    attn_probs = F.softmax(attn_weights, dim=-1).type_as(attn_weights)
    attn = torch.bmm(attn_probs, v)
    attn = attn.transpose(0, 1).contiguous().view(tgt_len, bsz, embed_dim)
    return F.linear(attn, wo)


@spelling(TOKENS, *LINEARS[:3], int_spans(24, (0, 24), (0, 17)))
def encoder_minus_ten_thousand(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, attention_mask: Tensor) -> Tensor:
    """transpose_for_scores and (1 - mask) * -10000; the first BERT ports."""

    def transpose_for_scores(t: Tensor) -> Tensor:
        return t.view(*t.size()[:-1], 4, 8).permute(0, 2, 1, 3)

    extended = attention_mask.unsqueeze(1).unsqueeze(2).to(dtype=x.dtype)
    extended = (1.0 - extended) * -10000.0
    q, k, v = (transpose_for_scores(F.linear(x, w)) for w in (wq, wk, wv))
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(8)
    probs = nn.Softmax(dim=-1)(scores + extended)
    context = torch.matmul(probs, v).permute(0, 2, 1, 3).contiguous()
    return context.view(*context.size()[:-2], 32)


@spelling(*SELF, table(lambda: torch.tril(torch.ones(48, 48, dtype=torch.bool)).view(1, 1, 48, 48)))
def where_with_full_scalar(q: Tensor, k: Tensor, v: Tensor, buffer: Tensor) -> Tensor:
    """torch.where against a 0-d tensor of finfo.min, sliced Boolean buffer, division by a 0-d tensor; GPT-2 ports."""
    w = torch.matmul(q, k.transpose(-1, -2))
    w = w / torch.full([], v.size(-1) ** 0.5, dtype=w.dtype, device=w.device)
    query_length, key_length = q.size(-2), k.size(-2)
    causal_mask = buffer[:, :, key_length - query_length : key_length, :key_length]
    mask_value = torch.full([], torch.finfo(w.dtype).min, dtype=w.dtype, device=w.device)
    w = torch.where(causal_mask, w.to(w.dtype), mask_value)
    return torch.matmul(F.softmax(w, dim=-1).type(v.dtype), v)


@spelling(TOKENS, weight(96, 32), LINEAR)
def rearranged_without_einops(x: Tensor, w_qkv: Tensor, w_out: Tensor) -> Tensor:
    """'b n (h d) -> b h n d' by hand, 'b h i d, b h j d -> b h i j'; one-file paper implementations."""
    b, n, _ = x.shape
    q, k, v = (t.reshape(b, n, 4, 8).permute(0, 2, 1, 3) for t in F.linear(x, w_qkv).chunk(3, dim=-1))
    dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 8**-0.5
    attn = dots.softmax(dim=-1)
    out = torch.einsum("b h i j, b h j d -> b h i d", attn, v)
    return F.linear(out.permute(0, 2, 1, 3).reshape(b, n, 32), w_out)


@spelling(*SELF, bools(2, 24, p=0.7))
def in_place_negative_max(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """masked_fill_ with -finfo.max in place, twice; one-file paper implementations of language models."""
    q = q * q.shape[-1] ** -0.5
    sim = torch.einsum("bhid,bhjd->bhij", q, k)
    max_neg_value = -torch.finfo(sim.dtype).max
    sim.masked_fill_(~mask[:, None, None, :], max_neg_value)
    i, j = sim.shape[-2:]
    sim.masked_fill_(torch.ones((i, j), device=q.device, dtype=torch.bool).triu_(j - i + 1), max_neg_value)
    return torch.einsum("bhij,bhjd->bhid", sim.softmax(dim=-1), v)


@spelling((2, 17, 32), weight(96, 32), (96,), LINEAR, (32,))
def image_tokens(x: Tensor, w_qkv: Tensor, b_qkv: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    """reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0); every vision transformer zoo."""
    B, N, C = x.shape
    qkv = F.linear(x, w_qkv, b_qkv).reshape(B, N, 3, 4, C // 4).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q = q * (C // 4) ** -0.5
    attn = q @ k.transpose(-2, -1)
    attn = attn.softmax(dim=-1)
    x = (attn @ v).transpose(1, 2).reshape(B, N, C)
    return F.linear(x, w_out, b_out)


@spelling((2, 20, 4, 8), (2, 32, 4, 8), (2, 32, 4, 8), bools(2, 1, 20, 32))
def list_of_operands(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """einsum on a list, -1e20, softmax over dim 3, division by the root of the width; video courses."""
    energy = torch.einsum("nqhd,nkhd->nhqk", [queries, keys])
    energy = energy.masked_fill(mask == 0, float("-1e20"))
    attention = torch.softmax(energy / (32 ** (1 / 2)), dim=3)
    return torch.einsum("nhql,nlhd->nqhd", [attention, values]).reshape(2, 20, 32)


@spelling((2, 20, 4, 16), (2, 28, 4, 16), (2, 28, 4, 16), bools(2, 1, 20, 28))
def flax_translated(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """'...qhd,...khd->...hqk', big negative by where, query scaled first; line-by-line ports from Flax."""
    depth = query.shape[-1]
    query = query / torch.sqrt(torch.tensor(depth, dtype=query.dtype))
    attn_weights = torch.einsum("...qhd,...khd->...hqk", query, key)
    big_neg = torch.finfo(attn_weights.dtype).min
    attn_weights = torch.where(mask, attn_weights, big_neg)
    attn_weights = torch.softmax(attn_weights, -1)
    return torch.einsum("...hqk,...khd->...qhd", attn_weights, value)


@spelling((24, 4, 16), (24, 4, 16), (24, 4, 16))
def haiku_translated(query_heads: Tensor, key_heads: Tensor, value_heads: Tensor) -> Tensor:
    """'...thd,...Thd->...htT' with capitals, no batch, tril of ones; ports from Haiku."""
    attn_logits = torch.einsum("...thd,...Thd->...htT", query_heads, key_heads)
    attn_logits = attn_logits * (1 / math.sqrt(16))
    t = query_heads.shape[0]
    mask = torch.tril(torch.ones((1, t, t)))
    attn_logits = torch.where(mask.bool(), attn_logits, torch.tensor(-1e30, dtype=attn_logits.dtype))
    attn = torch.einsum("...htT,...Thd->...thd", torch.softmax(attn_logits, dim=-1), value_heads)
    return attn.reshape(t, -1)


@spelling(*FLAT, spans(28, (0, 28), (0, 9)))
def repeated_mask_for_heads(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Heads before batch in one axis and mask.repeat(heads, 1, 1); early PyTorch transformers."""
    mask = (~keep).unsqueeze(1).expand(-1, q.size(1), -1)
    mask = mask.repeat(4, 1, 1)
    attn = torch.bmm(q, k.transpose(1, 2))
    attn = attn / k.size(-1) ** 0.5
    attn = attn.masked_fill(mask, -math.inf)
    return torch.bmm(nn.functional.softmax(attn, dim=2), v)


@spelling(*CROSS, ints([36, 21]))
def lengths_expand_as(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """arange < lengths, mask == 0, view and expand_as, masked_fill_ in place; cross-lingual model code."""
    bs, klen = k.size(0), k.size(2)
    mask = torch.arange(klen, dtype=torch.long, device=lengths.device) < lengths[:, None]
    q = q / math.sqrt(q.size(-1))
    scores = torch.matmul(q, k.transpose(2, 3))
    mask = (mask == 0).view(bs, 1, 1, klen).expand_as(scores)
    scores.masked_fill_(mask, -float("inf"))
    return torch.matmul(F.softmax(scores, dim=-1), v)


@spelling((6, 20, 16), (6, 28, 16), (6, 28, 16))
def baddbmm_of_nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """baddbmm on an empty tensor with beta=0 and alpha=scale; diffusion libraries."""
    scores = torch.baddbmm(
        torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype, device=query.device),
        query,
        key.transpose(-1, -2),
        beta=0,
        alpha=0.25,
    )
    probs = scores.softmax(dim=-1)
    del scores
    return torch.bmm(probs.to(value.dtype), value)


@spelling((2, 20, 32), (2, 28, 24), LINEAR, weight(32, 24), weight(32, 24), LINEAR)
def text_conditioned_pixels(x: Tensor, context: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor) -> Tensor:
    """'b n (h d) -> (b h) n d' by hand, 'b i d, b j d -> b i j'; latent diffusion's cross attention."""
    b, h = x.shape[0], 4

    def split(t: Tensor) -> Tensor:
        return t.unflatten(-1, (h, -1)).permute(0, 2, 1, 3).flatten(0, 1)

    q, k, v = split(F.linear(x, wq)), split(F.linear(context, wk)), split(F.linear(context, wv))
    sim = torch.einsum("b i d, b j d -> b i j", q, k) * 8**-0.5
    out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
    return F.linear(out.unflatten(0, (b, h)).permute(0, 2, 1, 3).flatten(2), wo)


@spelling((20, 16), (28, 16), (28, 16), (20, 28))
def addmm_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """torch.addmm(bias, q, k.t(), alpha=scale) for one head; people who count kernel launches."""
    return torch.addmm(bias, q, k.t(), beta=0.5, alpha=0.25).softmax(1).mm(v)


@spelling((2, 20, 32), LINEAR, (2, 28, 32), ints([28, 13]))
def luong_general(decoder: Tensor, w: Tensor, encoder: Tensor, lengths: Tensor) -> Tensor:
    """decoder·W·encoderᵀ with the encoder states as keys and values, unscaled; recurrent translation models."""
    energies = torch.bmm(torch.matmul(decoder, w), encoder.transpose(1, 2))
    outside = torch.arange(encoder.size(1)).unsqueeze(0).ge(lengths.unsqueeze(1))
    energies = energies.masked_fill(outside.unsqueeze(1), -float("inf"))
    return torch.bmm(F.softmax(energies, dim=-1), encoder)


@spelling((2, 12, 32), (2, 36, 32), *LINEARS[:3])
def set_block(Q: Tensor, K: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """cat(split) puts heads into the batch, scaled by the whole width, residual inside; set transformers."""
    Q, V, K = F.linear(Q, wq), F.linear(K, wv), F.linear(K, wk)
    dim_split = 32 // 4
    Q_ = torch.cat(Q.split(dim_split, 2), 0)
    K_ = torch.cat(K.split(dim_split, 2), 0)
    V_ = torch.cat(V.split(dim_split, 2), 0)
    A = torch.softmax(Q_.bmm(K_.transpose(1, 2)) / math.sqrt(32), 2)
    return torch.cat((Q_ + A.bmm(V_)).split(Q.size(0), 0), 2)


@spelling((12, 32), (2, 36, 32), *LINEARS[:3], attentions=2)
def induced_points(inducing: Tensor, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """Learned points attend to the set, then the set to them; induced set attention."""

    def block(a: Tensor, b: Tensor) -> Tensor:
        q, k, v = (t.view(2, -1, 4, 8).transpose(1, 2) for t in (F.linear(a, wq), F.linear(b, wk), F.linear(b, wv)))
        return (torch.softmax(q @ k.mT / 8**0.5, -1) @ v).transpose(1, 2).flatten(2)

    return block(x, block(inducing.unsqueeze(0).repeat(2, 1, 1), x))


@spelling((2, 12, 32), (2, 28, 32), *LINEARS[:3])
def latent_resampler(latents: Tensor, x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """Latents attend to inputs and latents, sim - sim.amax().detach(); resamplers of vision-language models."""
    kv_input = torch.cat((x, latents), dim=-2)
    q = F.linear(latents, wq).unflatten(-1, (4, 8)).transpose(1, 2) * 8**-0.5
    k = F.linear(kv_input, wk).unflatten(-1, (4, 8)).transpose(1, 2)
    v = F.linear(kv_input, wv).unflatten(-1, (4, 8)).transpose(1, 2)
    sim = torch.einsum("...id,...jd->...ij", q, k)
    sim = sim - sim.amax(dim=-1, keepdim=True).detach()
    out = torch.einsum("...ij,...jd->...id", sim.softmax(dim=-1), v)
    return out.transpose(1, 2).flatten(-2)


@spelling(TOKENS, weight(96, 32), LINEAR)
def speech_recogniser(x: Tensor, w_qkv: Tensor, w_out: Tensor) -> Tensor:
    """D**-0.25 on q and on k, keys permuted to (0, 2, 3, 1), additive triangle, softmax in float; speech models."""
    q, k, v = F.linear(x, w_qkv).chunk(3, -1)
    _, n_ctx, n_state = q.shape
    scale = (n_state // 4) ** -0.25
    q = q.view(*q.shape[:2], 4, -1).permute(0, 2, 1, 3) * scale
    k = k.view(*k.shape[:2], 4, -1).permute(0, 2, 3, 1) * scale
    v = v.view(*v.shape[:2], 4, -1).permute(0, 2, 1, 3)
    mask = torch.empty(40, 40, dtype=x.dtype).fill_(-math.inf).triu_(1)
    qk = q @ k
    qk = qk + mask[:n_ctx, :n_ctx]
    qk = qk.to(torch.promote_types(qk.dtype, torch.float32))
    w = F.softmax(qk, dim=-1).to(q.dtype)
    return F.linear((w @ v).permute(0, 2, 1, 3).flatten(start_dim=2), w_out)


@spelling(*SELF)
def tutorial_square_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """generate_square_subsequent_mask added; the library's own tutorial."""
    mask = nn.Transformer.generate_square_subsequent_mask(q.size(-2), dtype=q.dtype)
    return ((q @ k.mT).div(4.0) + mask).softmax(-1) @ v


# --- masks and biases -----------------------------------------------------------------------------------------------


@spelling(*SELF, values(0.5, 0.25, 0.125, 0.0625), int_spans(24, (0, 24), (7, 24)))
def alibi_from_cumsum(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, attention_mask: Tensor) -> Tensor:
    """ALiBi on cumsum positions through baddbmm with beta and a folded batch; the BLOOM way."""
    B, H, N, D = q.shape
    positions = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
    alibi = (slopes[..., None] * positions).reshape(B * H, 1, N).to(q.dtype)
    fused = alibi.baddbmm(
        batch1=q.reshape(B * H, N, D),
        batch2=k.permute(0, 1, 3, 2).reshape(B * H, D, N),
        beta=1.0,
        alpha=1.0 / math.sqrt(D),
    )
    causal = torch.triu(torch.ones(N, N, dtype=torch.bool), diagonal=1)
    blocked = causal[None, None] | (attention_mask == 0)[:, None, None, :]
    scores = fused.view(B, H, N, N).masked_fill(blocked, torch.finfo(q.dtype).min)
    probs = F.softmax(scores, dim=-1).view(B * H, N, N)
    return torch.bmm(probs, v.reshape(B * H, N, D)).view(B, H, N, D)


@spelling(*CROSS)
def alibi_symmetric(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slopes made by arange and pow, -|i - j|, added; encoder versions of ALiBi."""
    heads = q.size(1)
    slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, dtype=q.dtype))
    distance = (torch.arange(k.size(2))[None, :] - torch.arange(q.size(2))[:, None]).abs().neg()
    bias = slopes.view(1, heads, 1, 1) * distance
    return F.softmax(q @ k.transpose(-1, -2) / q.size(-1) ** 0.5 + bias, dim=-1) @ v


@spelling((2, 4, 24, 16), (2, 4, 24, 16), (2, 4, 24, 16), (32, 4))
def bucketed_distance(q: Tensor, k: Tensor, v: Tensor, embedding: Tensor) -> Tensor:
    """Logarithmic distance buckets looked up in an embedding, no scale; text-to-text transformers."""
    M, N = q.size(-2), k.size(-2)
    relative = torch.arange(N)[None, :] - torch.arange(M)[:, None]
    num = 16
    bucket = (relative > 0).to(torch.long) * num
    n = torch.abs(relative)
    exact = num // 2
    large = exact + (torch.log(n.float() / exact) / math.log(64 / exact) * (num - exact)).to(torch.long)
    large = torch.min(large, torch.full_like(large, num - 1))
    bucket = bucket + torch.where(n < exact, n, large)
    bias = F.embedding(bucket, embedding).permute([2, 0, 1]).unsqueeze(0)
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += bias
    return torch.matmul(F.softmax(scores.type_as(scores), dim=-1).type_as(scores), v)


@spelling((8, 16, 32), weight(96, 32), (49, 4))
def shifted_windows(x: Tensor, w_qkv: Tensor, bias_table: Tensor) -> Tensor:
    """Relative position table and -100 between regions, batch viewed as images × windows; shifted-window models."""
    B_, N, C = x.shape
    q, k, v = F.linear(x, w_qkv).reshape(B_, N, 3, 4, C // 4).permute(2, 0, 3, 1, 4)
    attn = (q * (C // 4) ** -0.5) @ k.transpose(-2, -1)
    coords = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
    index = (relative[..., 0] + 3) * 7 + relative[..., 1] + 3
    attn = attn + bias_table[index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
    regions = torch.zeros(8, 8, dtype=torch.long)
    regions[:4, 4:6], regions[:4, 6:], regions[4:6, :4], regions[6:, 6:] = 1, 2, 3, 4
    windows = regions.view(2, 4, 2, 4).permute(0, 2, 1, 3).reshape(4, 16)
    mask = torch.where(windows[:, None, :] != windows[:, :, None], -100.0, 0.0).to(attn.dtype)
    attn = attn.view(B_ // 4, 4, 4, N, N) + mask.unsqueeze(1).unsqueeze(0)
    attn = attn.view(-1, 4, N, N).softmax(-1)
    return (attn @ v).transpose(1, 2).reshape(B_, N, C)


@spelling(*SELF, ints([5, 11]))
def prefix_language_model(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor) -> Tensor:
    """Everyone sees the prefix, the rest is causal, negated mask; prefix-LM training code."""
    n = torch.arange(q.size(2), device=q.device)
    allowed = torch.logical_or(n[None, :, None] >= n[None, None, :], n[None, None, :] < prefix[:, None, None])
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.25
    scores = scores.masked_fill(torch.logical_not(allowed).unsqueeze(1), torch.finfo(scores.dtype).min)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


@spelling(*SELF)
def band_by_tril_of_triu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sliding window as ones.tril().triu(-w); local attention baselines."""
    N = q.size(-2)
    window = torch.ones(N, N, device=q.device, dtype=torch.bool).tril().triu(-6)
    scores = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(~window, -torch.inf)
    return scores.softmax(dim=-1).matmul(v)


@spelling(*SELF)
def strided_pattern(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Local or every fourth, and causal; the strided pattern of sparse transformers."""
    N = q.size(2)
    i, j = torch.arange(N).view(-1, 1), torch.arange(N).view(1, -1)
    pattern = ((i - j) % 4 == 0).logical_or(i - j < 4) & (j <= i)
    bias = torch.zeros(N, N, dtype=q.dtype).masked_fill(pattern.logical_not(), -1e9)
    return torch.softmax(q @ k.transpose(2, 3) / 4 + bias, 3) @ v


@spelling(*SELF)
def dilated_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """|i - j| below a reach and a multiple of the dilation, as float mask with 1 - mask; dilated attention."""
    idx = torch.arange(q.shape[-2], dtype=q.dtype)
    distance = torch.abs(idx.unsqueeze(0) - idx.unsqueeze(1))
    mask = ((distance <= 8) * (torch.remainder(distance, 2) == 0)).to(q.dtype)
    logits = torch.matmul(q, torch.transpose(k, -1, -2)) * (1 / math.sqrt(q.shape[-1]))
    logits = logits + (1 - mask) * -1e9
    return torch.matmul(torch.softmax(logits, -1), v)


@spelling((2, 4, 32, 8), (2, 4, 32, 8), (2, 4, 32, 8))
def own_block_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tokens split into blocks that see only themselves, five dimensions; blockwise attention."""
    B, H, N, D = q.shape
    q, k, v = (t.view(B, H, N // 16, 16, D) for t in (q, k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) / D**0.5
    return torch.matmul(scores.softmax(-1), v).view(B, H, N, D)


@spelling(*SELF, table(lambda: torch.randint(5, (2, 24), generator=torch.Generator().manual_seed(3))))
def packed_by_end_tokens(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    """Documents counted by the cumsum of end tokens, which close their own; pre-training code."""
    ends = (tokens == 0).int()
    document = ends.cumsum(dim=1) - ends
    same = document.unsqueeze(2) == document.unsqueeze(1)
    mask = (same & torch.ones(24, 24, dtype=torch.bool).tril()).unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling((1, 4, 36, 16), (1, 4, 36, 16), (1, 4, 36, 16), ints([0, 9, 10, 27, 36]))
def packed_by_offsets(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Document numbers from cumulative lengths by bucketize, non-causal; variable-length encoders without flash."""
    document = torch.bucketize(torch.arange(q.size(2)), cu_seqlens[1:], right=True)
    block_diagonal = document[:, None].eq(document[None, :])
    scores = (q * 0.25) @ k.transpose(-2, -1)
    scores = torch.where(block_diagonal, scores, torch.tensor(-torch.inf, dtype=scores.dtype))
    return torch.softmax(scores, dim=-1) @ v


@spelling(*SELF, ints([[*range(9), *range(15)], [*range(20), *range(4)]]))
def packed_by_positions(q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor) -> Tensor:
    """A document starts where its position is 0; position ids are compared for causality; packed fine-tuning."""
    segment = (position_ids == 0).long().cumsum(-1)
    allowed = (segment[:, :, None] == segment[:, None, :]) & (position_ids[:, :, None] >= position_ids[:, None, :])
    bias = torch.zeros_like(allowed, dtype=q.dtype)
    bias = bias.masked_fill(allowed.logical_not(), torch.finfo(q.dtype).min)[:, None]
    return torch.softmax(torch.matmul(q, k.mT) / math.sqrt(q.shape[-1]) + bias, dim=-1) @ v


@spelling(TOKENS, *LINEARS, spans(24, (0, 24), (0, 14)))
def zeroed_after_softmax(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, valid: Tensor) -> Tensor:
    """Masked before and set to zero after the softmax, padded queries see nothing; speech toolkits."""
    n_batch = x.size(0)
    q = F.linear(x, wq).view(n_batch, -1, 4, 8).transpose(1, 2)
    k = F.linear(x, wk).view(n_batch, -1, 4, 8).transpose(1, 2)
    v = F.linear(x, wv).view(n_batch, -1, 4, 8).transpose(1, 2)
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(8)
    mask = (valid.unsqueeze(1) & valid.unsqueeze(2)).unsqueeze(1).eq(0)
    scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
    attn = torch.softmax(scores, dim=-1).masked_fill(mask, 0.0)
    out = torch.matmul(attn, v).transpose(1, 2).contiguous().view(n_batch, -1, 32)
    return F.linear(out, wo)


@spelling(*SELF, ints([24, 17]))
def streaming_chunks(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Whole chunks of six frames with one chunk to the left, floor division of positions; streaming recognisers."""
    frames = torch.arange(q.size(2))
    chunk = torch.div(frames, 6, rounding_mode="floor")
    near = (chunk[None, :] <= chunk[:, None]) & (chunk[None, :] >= chunk[:, None] - 1)
    real = frames[None, :] < lengths[:, None]
    keep = near[None] & real[:, None, :]
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(~keep[:, None], -10000.0)
    return scores.softmax(-1) @ v


@spelling(*SELF, table(lambda: torch.arange(24).div(5, rounding_mode="floor").remainder(2).bool().expand(2, 24)))
def image_spans_see_themselves(q: Tensor, k: Tensor, v: Tensor, is_image: Tensor) -> Tensor:
    """Causal text, bidirectional inside each image, spans numbered by where they start; vision-language decoders."""
    starts = is_image & ~F.pad(is_image, (1, 0), value=False)[:, :-1]
    group = torch.where(is_image, starts.int().cumsum(-1), -1)
    together = (group[:, None, :, None] == group[:, None, None, :]) & (group[:, None, None, :] >= 0)
    index = torch.arange(q.size(2))
    mask = (index[:, None] >= index[None, :]) | together
    scores = torch.where(mask, q @ k.mT / 4.0, torch.finfo(q.dtype).min)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


@spelling(*SELF)
def global_tokens_and_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mask filled by slices of rows and columns over a band; long-document encoders written densely."""
    N = q.size(-2)
    allowed = torch.zeros(N, N, dtype=torch.bool)
    offset = torch.arange(N)[:, None] - torch.arange(N)[None, :]
    allowed = allowed | (offset.abs() <= 3)
    allowed[:2, :] = True
    allowed[:, :2] = True
    attn = torch.softmax((q @ k.mT * 0.25).masked_fill(allowed == False, float("-inf")), dim=-1)  # noqa: E712
    return attn @ v


@spelling(*SELF, bools(2, 4, 6, 6, p=0.4))
def block_table_mask(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
    """A table of 4 × 4 blocks blown up by repeat_interleave; block-sparse reference code."""
    mask = blocks.repeat_interleave(4, dim=-1).repeat_interleave(4, dim=-2)
    scores = torch.einsum("bhid,bhjd->bhij", q, k).div(math.sqrt(q.shape[-1]))
    scores = scores.where(mask, scores.new_tensor(float("-inf")))
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)


@spelling(*SELF)
def block_diagonal_of_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch.block_diag of all-ones blocks for packed sequences of known lengths; unit tests and small encoders."""
    mask = torch.block_diag(*(torch.ones(n, n) for n in (5, 12, 7))).bool()
    return (q @ k.mT / 4).masked_fill(~mask, -1e30).softmax(-1) @ v


@spelling(*SELF)
def triangle_from_cumsum_of_eye(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Lower triangle as the running sum of the identity; people who think in linear algebra."""
    lower = torch.eye(q.size(-2), dtype=q.dtype).cumsum(0)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    scores = scores * lower - 1e9 * (1 - lower)
    return F.softmax(scores, dim=-1) @ v


@spelling(*SELF)
def triangle_from_indices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-inf written where triu_indices says; numpy converts."""
    N = q.size(-2)
    mask = torch.zeros(N, N, dtype=q.dtype)
    rows, columns = torch.triu_indices(N, N, offset=1)
    mask[rows, columns] = float("-inf")
    return torch.softmax(torch.matmul(q, k.mT) * 0.25 + mask, -1).matmul(v)


@spelling(*CROSS, bools(2, 20, 36))
def log_of_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """scores + log(mask); authors who derive masks as priors."""
    prior = mask.to(q.dtype).log().unsqueeze(1)
    return torch.softmax(q @ k.mT / math.sqrt(q.size(-1)) + prior, dim=-1) @ v


@spelling(*FLAT, bools(2, 1, 20, 28))
def clipped_at_least_float(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Additive mask, then torch.max with finfo.min, through 4-D and 3-D views; OPT-like decoders."""
    attention_mask = torch.zeros(2, 1, 20, 28, dtype=q.dtype).masked_fill(~keep, torch.finfo(q.dtype).min)
    attn_weights = torch.bmm(q * 8**-0.5, k.transpose(1, 2))
    attn_weights = attn_weights.view(2, 4, 20, 28) + attention_mask
    attn_weights = torch.max(attn_weights, torch.tensor(torch.finfo(attn_weights.dtype).min, dtype=q.dtype))
    attn_weights = attn_weights.view(8, 20, 28)
    return torch.bmm(F.softmax(attn_weights, dim=-1), v)


@spelling((2, 8, 32), (2, 8, 32), (2, 8, 32), weight(96, 32), int_spans(8, (0, 8), (3, 8)))
def returns_states_actions(r: Tensor, s: Tensor, a: Tensor, w_qkv: Tensor, attention_mask: Tensor) -> Tensor:
    """Three modalities interleaved by stack and permute, mask likewise, causal; decision transformers."""
    B, T, C = s.shape
    x = torch.stack((r, s, a), dim=1).permute(0, 2, 1, 3).reshape(B, 3 * T, C)
    stacked = torch.stack((attention_mask,) * 3, dim=1).permute(0, 2, 1).reshape(B, 3 * T)
    q, k, v = (t.view(B, 3 * T, 4, 8).permute(0, 2, 1, 3) for t in F.linear(x, w_qkv).split(C, -1))
    w = torch.matmul(q, k.transpose(-1, -2)) / 8**0.5
    bias = torch.tril(torch.ones(3 * T, 3 * T, dtype=torch.uint8)).bool()
    w = torch.where(bias, w, torch.tensor(-1e4, dtype=w.dtype))
    w = w + (1.0 - stacked[:, None, None, :].to(w.dtype)) * torch.finfo(w.dtype).min
    h = torch.matmul(torch.softmax(w, -1), v).permute(0, 2, 1, 3).reshape(B, T, 3, C)
    return h.permute(0, 2, 1, 3)[:, 1]


@spelling(*SELF, randints(2, 2, 24, 24), randints(9, 2, 24, 24), (9, 4))
def graph_with_path_lengths(q: Tensor, k: Tensor, v: Tensor, adjacency: Tensor, hops: Tensor, table: Tensor) -> Tensor:
    """Bias looked up by the shortest path, edges and self-loops only; graph transformers."""
    bias = F.embedding(hops, table).permute(0, 3, 1, 2)
    scores = q.matmul(k.transpose(-1, -2)) * q.size(-1) ** -0.5 + bias
    edges = adjacency + torch.eye(24, dtype=adjacency.dtype)
    scores = scores.masked_fill(edges.unsqueeze(1) < 0.5, float("-inf"))
    return torch.softmax(scores, dim=3).matmul(v)


@spelling(*SELF, values(0.5, 1.0, 2.0, 4.0), values(0.25, 0.5, 1.0, 2.0))
def logarithmic_distance(q: Tensor, k: Tensor, v: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    """-r1·log(1 + r2·|i - j|) with clamped learned numbers a head; kernelised relative positions."""
    N = q.size(-2)
    distance = torch.tril(torch.arange(N).view(N, 1).repeat(1, N) + torch.arange(0, -N, -1)).to(q.dtype)
    bias = -r1.clamp(min=1e-2).view(-1, 1, 1) * torch.log(1 + r2.clamp(min=1e-2).view(-1, 1, 1) * distance)
    scores = q @ k.mT / math.sqrt(q.size(-1)) + bias
    future = torch.ones(N, N).triu(1).bool()
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v


@spelling(*CROSS, values(2.0, 3.0, 5.0, 8.0))
def gaussian_window(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """-(i - j)² / 2σ² added to the scores; localness modelling in speech."""
    i = torch.arange(q.size(-2), dtype=q.dtype)[:, None]
    j = torch.arange(k.size(-2), dtype=q.dtype)[None, :]
    locality = -((i - j) ** 2) / (2 * sigma[:, None, None] ** 2)
    return ((q @ k.mT) / math.sqrt(q.size(-1)) + locality).softmax(-1) @ v


@spelling(*SELF, (2, 4, 24))
def forget_gates(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """Decay between two positions as difference of cumulative log gates; forgetting transformers."""
    c = F.logsigmoid(gates).cumsum(dim=-1)
    decay = c.unsqueeze(-1) - c.unsqueeze(-2)
    logits = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5 + decay
    logits = logits.masked_fill(torch.triu(torch.ones_like(logits, dtype=torch.bool), 1), -torch.inf)
    return torch.einsum("bhij,bhjd->bhid", torch.softmax(logits, -1), v)


# --- arithmetic of scores, queries and keys -------------------------------------------------------------------------


@spelling(*SELF)
def soft_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """tanh cap after the scale, causal window by two comparisons; decoder models of 2024."""
    scores = torch.matmul(q * 16**-0.5, k.transpose(2, 3))
    scores = scores / 30.0
    scores = torch.tanh(scores)
    scores = scores * 30.0
    i = torch.arange(q.size(2))
    keep = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 9)
    scores = scores + torch.where(keep, 0.0, -2.3819763e38).to(scores.dtype)[None, None]
    return torch.matmul(F.softmax(scores, dim=-1), v)


@spelling(*CROSS, values(0.0, 1.0, 2.0, 6.0))
def cosine_with_clamped_scale(q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor) -> Tensor:
    """F.normalize on both, exp of a clamped learned logit a head; second-generation window transformers."""
    attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scale = torch.clamp(logit_scale.view(4, 1, 1), max=math.log(1.0 / 0.01)).exp()
    return (attn * scale).softmax(dim=-1) @ v


@spelling(*CROSS)
def cosine_by_norm_outer_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dot products divided by the outer product of norms afterwards; memory networks."""
    dots = torch.einsum("bhnd,bhmd->bhnm", q, k)
    norms = torch.einsum("bhn,bhm->bhnm", q.norm(dim=-1), k.norm(dim=-1)).clamp_min(1e-6)
    return torch.einsum("bhnm,bhmd->bhnd", torch.softmax(10.0 * dots / norms, dim=-1), v)


@spelling(*SELF, floats(16, scale=0.25, shift=1.0), floats(16, scale=0.25, shift=1.0))
def rms_normed_queries_and_keys(q: Tensor, k: Tensor, v: Tensor, gq: Tensor, gk: Tensor) -> Tensor:
    """RMS norm with gain on q and k of each head; recent open decoders and diffusion transformers."""

    def norm(x: Tensor, g: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * g

    return F.scaled_dot_product_attention(norm(q, gq), norm(k, gk), v, is_causal=True)


@spelling(TOKENS, weight(96, 32), values(0.5))
def learned_temperature_without_self(x: Tensor, w_qkv: Tensor, temperature: Tensor) -> Tensor:
    """exp of a learned temperature and a masked diagonal; vision transformers for small data sets."""
    b, n, _ = x.shape
    q, k, v = (t.view(b, n, 4, 8).transpose(1, 2) for t in F.linear(x, w_qkv).chunk(3, dim=-1))
    dots = torch.matmul(q, k.transpose(-1, -2)) * temperature.exp()
    mask = torch.eye(dots.shape[-1], device=dots.device, dtype=torch.bool)
    dots = dots.masked_fill(mask, -torch.finfo(dots.dtype).max)
    return torch.matmul(nn.Softmax(dim=-1)(dots), v).transpose(1, 2).reshape(b, n, -1)


@spelling((2, 4, 24, 16), (2, 4, 24, 16))
def shared_query_and_key(qk: Tensor, v: Tensor) -> Tensor:
    """Keys are normalised queries, self only as last resort (-5e4), causal; locality-sensitive hashing's baseline."""
    k = F.normalize(qk, 2, dim=-1)
    dot = torch.einsum("bhie,bhje->bhij", qk, k) * (qk.shape[-1] ** -0.5)
    t = dot.shape[-1]
    i = torch.arange(t)
    dot.masked_fill_(i[:, None] == i[None, :], -5e4)
    dot.masked_fill_(i[:, None] < i[None, :], torch.finfo(dot.dtype).min)
    return torch.einsum("bhij,bhje->bhie", dot.softmax(dim=-1), v)


@spelling(*SELF, values(0.5, 0.75, 1.0, 1.25))
def scaled_by_log_of_count(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """Logits times a learned number and log of the keys in sight; length-generalising softmax."""
    N = q.size(2)
    count = torch.arange(1, N + 1, dtype=q.dtype)
    logits = (q @ k.transpose(-2, -1)) / q.size(-1) ** 0.5
    logits = logits * (s[:, None, None] * torch.log(count)[:, None])
    logits = logits.masked_fill(torch.triu(torch.ones(N, N, dtype=torch.bool), diagonal=1), float("-inf"))
    return torch.softmax(logits, dim=-1) @ v


@spelling(*CROSS)
def negative_squared_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-‖q - k‖² expanded as 2qk - q² - k²; Lipschitz attention."""
    q2 = q.square().sum(-1, keepdim=True)
    k2 = k.square().sum(-1).unsqueeze(-2)
    distance = q2 + k2 - 2 * torch.matmul(q, k.transpose(-2, -1))
    return torch.softmax(-distance / math.sqrt(q.size(-1)), dim=-1) @ v


@spelling((2, 24, 8, 16), (2, 24, 2, 16), (2, 24, 2, 16))
def rotary_with_repeat_kv(xq: Tensor, xk: Tensor, xv: Tensor) -> Tensor:
    """rotate_half, repeat_kv by expand and reshape, additive causal finfo.min; llama-like decoders."""
    B, N, _, D = xq.shape
    q, k, v = xq.transpose(1, 2), xk.transpose(1, 2), xv.transpose(1, 2)
    inv_freq = 1.0 / (10000 ** (torch.arange(0, D, 2, dtype=q.dtype) / D))
    freqs = torch.outer(torch.arange(N, dtype=q.dtype), inv_freq)
    emb = torch.cat((freqs, freqs), dim=-1)
    cos, sin = emb.cos()[None, None], emb.sin()[None, None]

    def rotate_half(x: Tensor) -> Tensor:
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)

    def repeat_kv(x: Tensor) -> Tensor:
        return x[:, :, None].expand(B, 2, 4, N, D).reshape(B, 8, N, D)

    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    causal = torch.full((N, N), torch.finfo(q.dtype).min, dtype=q.dtype)
    causal = torch.triu(causal, diagonal=1)[None, None].expand(B, 1, N, N)
    weights = torch.matmul(q, repeat_kv(k).transpose(2, 3)) * D**-0.5 + causal
    weights = F.softmax(weights, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return torch.matmul(weights, repeat_kv(v)).transpose(1, 2).contiguous()


@spelling((2, 24, 4, 16), (2, 24, 4, 16), (2, 24, 4, 16))
def rotary_by_complex_numbers(xq: Tensor, xk: Tensor, xv: Tensor) -> Tensor:
    """view_as_complex times polar; the first llama release."""
    wide = torch.promote_types(xq.dtype, torch.float32)
    freqs = 1.0 / (10000.0 ** (torch.arange(0, 16, 2, dtype=wide) / 16))
    angles = torch.outer(torch.arange(xq.size(1), dtype=wide), freqs)
    cis = torch.polar(torch.ones_like(angles), angles).view(1, xq.size(1), 1, 8)

    def rotate(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.to(wide).reshape(*x.shape[:-1], -1, 2)) * cis).flatten(3)

    q, k = rotate(xq).type_as(xq).transpose(1, 2), rotate(xk).type_as(xk).transpose(1, 2)
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(16)
    mask = torch.full((1, 1, xq.size(1), xq.size(1)), float("-inf"), dtype=scores.dtype)
    scores = scores + torch.triu(mask, diagonal=1)
    out = torch.matmul(F.softmax(scores.to(wide), dim=-1).type_as(xq), xv.transpose(1, 2))
    return out.transpose(1, 2).contiguous().view(xq.size(0), xq.size(1), -1)


@spelling((2, 24, 4, 16), (2, 24, 4, 16), (2, 24, 4, 16), int_spans(24, (0, 24), (6, 24)))
def rotary_interleaved_left_padded(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    """Even and odd channels, positions counted from the mask, left padding; GPT-J-like decoders."""
    position = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    theta = position[:, :, None].to(q.dtype) * 10000.0 ** (-torch.arange(0, 16, 2, dtype=q.dtype) / 16)
    sin = theta.sin().repeat_interleave(2, dim=-1).unsqueeze(2)
    cos = theta.cos().repeat_interleave(2, dim=-1).unsqueeze(2)

    def turn(x: Tensor) -> Tensor:
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin

    q, k, v = turn(q).permute(0, 2, 1, 3), turn(k).permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
    scores = torch.matmul(q, k.transpose(-1, -2)) / 4
    lowest = torch.finfo(scores.dtype).min
    scores = torch.where(torch.ones(24, 24, dtype=torch.bool).tril(), scores, lowest)
    scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, lowest)
    return torch.matmul(F.softmax(scores, dim=-1), v).permute(0, 2, 1, 3)


# --- groups of heads, caches, several sources -----------------------------------------------------------------------


@spelling((2, 4, 24, 16), (2, 24, 16), (2, 24, 16))
def one_key_value_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """'b h i d, b j d -> b h i j'; multi-query attention in paper code."""
    sim = torch.einsum("b h i d, b j d -> b h i j", q * 0.25, k)
    causal = torch.ones(24, 24, dtype=torch.bool).triu(1)
    attn = sim.masked_fill(causal, -torch.finfo(sim.dtype).max).softmax(dim=-1)
    return torch.einsum("b h i j, b j d -> b h i d", attn, v)


@spelling((2, 24, 64), (2, 16, 24), (2, 24, 16))
def one_key_value_head_folded(query: Tensor, key_t: Tensor, value: Tensor) -> Tensor:
    """Heads folded into the tokens: [B, M·H, D] against one [B, D, N]; code models with multi-query attention."""
    B, M, _ = query.shape
    scores = torch.baddbmm(torch.empty(1, dtype=query.dtype), query.reshape(B, M * 4, 16), key_t, beta=0, alpha=0.25)
    scores = scores.view(B, M, 4, key_t.size(-1))
    causal = torch.tril(torch.ones(M, M, dtype=torch.bool)).view(1, M, 1, M)
    scores = torch.where(causal, scores, torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype))
    weights = F.softmax(scores, dim=-1).view(B, M * 4, -1)
    return torch.bmm(weights, value).view(B, M, 64)


@spelling((2, 8, 20, 8), (2, 2, 28, 8), (2, 2, 28, 8))
def groups_by_repeat_interleave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """k.repeat_interleave(4, dim=1); grouped-query attention, the short way."""
    k, v = k.repeat_interleave(4, dim=1), v.repeat_interleave(4, 1)
    return torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, dim=-1) @ v


@spelling((2, 20, 8, 8), (2, 28, 2, 8), (2, 28, 2, 8), bools(2, 20, 28))
def groups_as_an_axis(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """'btkgh,bskh->bkgts', five dimensions; ports of JAX decoders."""
    B, T, _, Hd = q.shape
    q = q.reshape(B, T, 2, 4, Hd) * Hd**-0.5
    logits = torch.einsum("btkgh,bskh->bkgts", q, k)
    logits = torch.where(mask[:, None, None, :, :], logits, -2.3819763e38)
    probs = torch.softmax(logits, dim=-1).to(k.dtype)
    return torch.einsum("bkgts,bskh->btkgh", probs, v).reshape(B, T, -1)


@spelling((2, 8, 20, 8), (2, 2, 28, 8), (2, 2, 28, 8))
def groups_by_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """unflatten the query's heads and let matmul broadcast the singleton; short model files."""
    q = q.unflatten(1, (2, 4))
    attn = torch.matmul(q, k.unsqueeze(2).mT).mul(8**-0.5).softmax(-1)
    return torch.matmul(attn, v.unsqueeze(2)).flatten(1, 2)


@spelling((2, 4, 12, 16), (2, 4, 12, 16), (2, 4, 12, 16), (2, 4, 20, 16), (2, 4, 20, 16))
def past_concatenated(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    """Past keys in front, triangle with an offset diagonal; decoding in several steps."""
    k, v = torch.cat([past_k, k], dim=-2), torch.cat((past_v, v), dim=-2)
    nd, ns = q.size(-2), k.size(-2)
    b = torch.ones(nd, ns, dtype=q.dtype).tril(diagonal=ns - nd).view(1, 1, nd, ns)
    w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(v.size(-1))
    w = w * b - 1e4 * (1 - b)
    return torch.matmul(nn.Softmax(dim=-1)(w), v)


@spelling(
    (2, 4, 12, 16),
    (2, 4, 12, 16),
    (2, 4, 12, 16),
    (2, 4, 40, 16),
    (2, 4, 40, 16),
    ints([*range(9, 21)]),
    table(lambda: torch.tril(torch.ones(40, 40, dtype=torch.bool))),
)
def static_cache(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, causal_mask: Tensor
) -> Tensor:
    """Cache written at input_pos, rows of a square mask picked by it; fast generation repositories."""
    mask = causal_mask[None, None, input_pos]
    keys, values = k_cache.clone(), v_cache.clone()
    keys[:, :, input_pos], values[:, :, input_pos] = k, v
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, dropout_p=0.0)


@spelling((2, 4, 20, 16), (2, 4, 20, 16), (2, 4, 20, 16), (2, 4, 12, 16), (2, 4, 12, 16), (2, 4, 12, 16))
def joint_text_and_image(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor) -> Tensor:
    """Two streams concatenated, attended, split again; multimodal diffusion transformers."""
    out = F.scaled_dot_product_attention(*(torch.cat(pair, dim=2) for pair in ((tq, q), (tk, k), (tv, v))))
    text, image = out.split([tq.size(2), q.size(2)], dim=2)
    return torch.cat((image * 2, text), dim=2)


@spelling((2, 4, 20, 16), (2, 4, 28, 16), (2, 4, 28, 16), (2, 4, 12, 16), (2, 4, 12, 16), attentions=2)
def decoupled_image_prompt(q: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor) -> Tensor:
    """Text attention plus a weighted image attention with the same queries; image-prompt adapters."""
    text = F.scaled_dot_product_attention(q, k, v)
    image = torch.softmax(q @ image_k.transpose(-2, -1) * 0.25, dim=-1) @ image_v
    return text + 0.5 * image


@spelling(
    (2, 4, 6, 20, 8), (2, 4, 6, 20, 8), (2, 4, 6, 20, 8), (2, 4, 20, 20), spans(20, (0, 20), (0, 12)), (2, 4, 6, 20, 8)
)
def gated_rows_with_pair_bias(q: Tensor, k: Tensor, v: Tensor, pair: Tensor, mask: Tensor, gate: Tensor) -> Tensor:
    """Rows of an alignment, pair bias shared by rows, 1e9·(mask - 1), sigmoid gate; protein structure models."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    a = torch.matmul(q * 8**-0.5, k.transpose(-1, -2))
    for bias in (1e9 * (mask.to(q.dtype)[:, None, None, None, :] - 1), pair.unsqueeze(1)):
        a = a + bias
    o = torch.matmul(torch.softmax(a, dim=-1), v)
    return o * torch.sigmoid(gate.transpose(1, 2))


@spelling((2, 32, 12, 14), weight(96, 32), attentions=2)
def axial(x: Tensor, w_qkv: Tensor) -> Tensor:
    """Channels-first image, attention along columns and along rows by permutation; axial attention."""

    def along_last_but_one(t: Tensor) -> Tensor:  # [B, other, length, C]
        q, k, v = F.linear(t, w_qkv).unflatten(-1, (3, 4, 8)).movedim(-3, 0).transpose(-3, -2)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), dim=-1)
        return (weights @ v).transpose(-3, -2).flatten(-2)

    columns = along_last_but_one(x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
    rows = along_last_but_one(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return columns + rows


@spelling((2, 32, 6, 6), LINEAR, (32, 32, 2, 2), weight(64, 32))
def reduced_keys_by_convolution(x: Tensor, wq: Tensor, reduce: Tensor, w_kv: Tensor) -> Tensor:
    """Keys and values from a strided convolution of the map; pyramid vision transformers."""
    B, C, Hh, Ww = x.shape
    tokens = x.flatten(2).transpose(1, 2)
    q = F.linear(tokens, wq).reshape(B, Hh * Ww, 4, C // 4).permute(0, 2, 1, 3)
    small = F.conv2d(F.pad(x, (1, 1, 1, 1)), reduce / 8, stride=2).reshape(B, C, -1).permute(0, 2, 1)
    kv = F.linear(small, w_kv).reshape(B, -1, 2, 4, C // 4).permute(2, 0, 3, 1, 4)
    k, v = kv[0], kv[1]
    attn = (q @ k.transpose(-2, -1)) * (C // 4) ** -0.5
    return (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, Hh * Ww, C)


@spelling(*SELF, weight(12, 24), weight(12, 24))
def shortened_keys(q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """Keys and values projected along the sequence to twelve; low-rank attention."""
    k, v = torch.einsum("bhnd,ln->bhld", k, e), torch.einsum("bhnd,ln->bhld", v, f)
    scores = torch.einsum("bhnd,bhld->bhnl", q, k) * q.size(-1) ** -0.5
    return torch.einsum("bhnl,bhld->bhnd", scores.softmax(dim=-1), v)


@spelling(TOKENS, weight(4, 8, 32), weight(4, 8, 32), weight(4, 8, 32), attentions=4)
def a_loop_over_heads(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """One small module a head, results concatenated; GPT from scratch in a lecture."""
    T = x.shape[1]
    tril = torch.tril(torch.ones(T, T))
    outputs = []
    for h in range(4):
        k, q, v = x @ wk[h].T, x @ wq[h].T, x @ wv[h].T
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(tril[:T, :T] == 0, float("-inf"))
        outputs.append(F.softmax(wei, dim=-1) @ v)
    return torch.cat(outputs, dim=-1)


@spelling((2, 4, 30, 16), (2, 4, 36, 16), (2, 4, 36, 16), attentions=3)
def blocks_of_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries ten at a time, concatenated; memory-saving options."""
    out = []
    for part in q.split(10, dim=2):
        out.append(torch.softmax(part @ k.transpose(-1, -2) / 4.0, dim=-1) @ v)
    return torch.cat(out, dim=2)


@spelling((8, 30, 16), (8, 36, 16), (8, 36, 16), attentions=4)
def slices_written_into_a_buffer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Slices of batch × heads written into a preallocated result; attention slicing in diffusion libraries."""
    hidden = torch.zeros((query.shape[0], query.shape[1], value.shape[2]), dtype=query.dtype)
    for i in range(query.shape[0] // 2):
        a, b = i * 2, (i + 1) * 2
        weights = torch.einsum("b i d, b j d -> b i j", query[a:b], key[a:b]).mul(0.25).softmax(-1)
        hidden[a:b] = torch.einsum("b i j, b j d -> b i d", weights, value[a:b])
    return hidden


# --- the library's own ----------------------------------------------------------------------------------------------

_MHA = nn.MultiheadAttention(32, 4, batch_first=True)
_MHA_SEQUENCE_FIRST = nn.MultiheadAttention(32, 4, bias=False)
_MHA_DROPOUT = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)
_DECODER_LAYER = nn.TransformerDecoderLayer(32, 4, 48, dropout=0.0, batch_first=True, norm_first=True, bias=False)


@spelling(TOKENS, weight(96, 32), (96,), LINEAR, (32,))
def module_with_weights_dropped(x: Tensor, w: Tensor, b: Tensor, wo: Tensor, bo: Tensor) -> Tensor:
    """out, _ = nn.MultiheadAttention(...)(x, x, x), as most call it: the averaged weights are made and dropped."""
    weights = {"in_proj_weight": w, "in_proj_bias": b, "out_proj.weight": wo, "out_proj.bias": bo}
    out, _ = functional_call(_MHA, weights, (x, x, x))
    return out


@spelling(TOKENS, (2, 30, 32), weight(96, 32), (96,), LINEAR, (32,), spans(30, (27, 30), (11, 30)))
def module_with_padding(
    x: Tensor, memory: Tensor, w: Tensor, b: Tensor, wo: Tensor, bo: Tensor, padding: Tensor
) -> Tensor:
    """Cross attention by nn.MultiheadAttention with key_padding_mask and need_weights=False; detection models."""
    weights = {"in_proj_weight": w, "in_proj_bias": b, "out_proj.weight": wo, "out_proj.bias": bo}
    options = {"key_padding_mask": padding, "need_weights": False}
    return functional_call(_MHA, weights, (x, memory, memory), options)[0]


@spelling((24, 2, 32), weight(96, 32), LINEAR)
def module_sequence_first_causal(x: Tensor, w: Tensor, wo: Tensor) -> Tensor:
    """Sequence-first module with a float attn_mask and is_causal; the library's language modelling example."""
    mask = torch.triu(torch.full((24, 24), float("-inf"), dtype=x.dtype), diagonal=1)
    weights = {"in_proj_weight": w, "out_proj.weight": wo}
    options = {"attn_mask": mask, "need_weights": False, "is_causal": True}
    return functional_call(_MHA_SEQUENCE_FIRST, weights, (x, x, x), options)[0]


@spelling((24, 32), weight(96, 32), LINEAR, bools(24, 24, p=0.3))
def module_unbatched(x: Tensor, w: Tensor, wo: Tensor, keep: Tensor) -> Tensor:
    """nn.MultiheadAttention on two dimensions with a Boolean mask, weights made and dropped; notebooks."""
    weights = {"in_proj_weight": w, "out_proj.weight": wo}
    return functional_call(_MHA_SEQUENCE_FIRST, weights, (x, x, x), {"attn_mask": ~keep})[0]


@spelling(TOKENS, weight(96, 32), (96,), LINEAR, (32,), random=True)
def module_with_dropout(x: Tensor, w: Tensor, b: Tensor, wo: Tensor, bo: Tensor) -> Tensor:
    """nn.MultiheadAttention in training with dropout=0.1; most training scripts."""
    weights = {"in_proj_weight": w, "in_proj_bias": b, "out_proj.weight": wo, "out_proj.bias": bo}
    return functional_call(_MHA_DROPOUT, weights, (x, x, x), {"need_weights": False})[0]


@spelling(
    (2, 16, 32),
    (2, 28, 32),
    weight(96, 32),
    LINEAR,
    weight(96, 32),
    LINEAR,
    weight(48, 32),
    weight(32, 48),
    spans(28, (28, 28), (19, 28)),
    attentions=2,
)
def decoder_layer(
    x: Tensor,
    memory: Tensor,
    self_in: Tensor,
    self_out: Tensor,
    cross_in: Tensor,
    cross_out: Tensor,
    w1: Tensor,
    w2: Tensor,
    padding: Tensor,
) -> Tensor:
    """nn.TransformerDecoderLayer with causal target mask and padded memory; translation tutorials."""
    weights = {
        "self_attn.in_proj_weight": self_in,
        "self_attn.out_proj.weight": self_out,
        "multihead_attn.in_proj_weight": cross_in,
        "multihead_attn.out_proj.weight": cross_out,
        "linear1.weight": w1,
        "linear2.weight": w2,
    } | {f"norm{i}.weight": torch.ones(32, dtype=x.dtype) for i in (1, 2, 3)}
    mask = torch.ones(16, 16, dtype=torch.bool).triu(1)
    return functional_call(_DECODER_LAYER, weights, (x, memory), {"tgt_mask": mask, "memory_key_padding_mask": padding})


@spelling((20, 2, 32), (28, 2, 32), weight(96, 32), (96,), LINEAR, (32,), spans(28, (28, 28), (16, 28)))
def functional_forward_padded(
    query: Tensor, key: Tensor, w: Tensor, b: Tensor, wo: Tensor, bo: Tensor, padding: Tensor
) -> Tensor:
    """F.multi_head_attention_forward with its eleven positional arguments; forks of the module."""
    out, _ = F.multi_head_attention_forward(
        query, key, key, 32, 4, w, b, None, None, False, 0.0, wo, bo, training=True, key_padding_mask=padding
    )
    return out


@spelling((20, 2, 32), (28, 2, 32), weight(96, 32), (96,), (1, 1, 32), (1, 1, 32), LINEAR, bools(28, p=0.7))
def functional_forward_with_bias_kv(
    query: Tensor, key: Tensor, w: Tensor, b: Tensor, bias_k: Tensor, bias_v: Tensor, wo: Tensor, keep: Tensor
) -> Tensor:
    """bias_k, bias_v and add_zero_attn: one learned and one zero key more; wav2vec-like and protein models."""
    return F.multi_head_attention_forward(
        query,
        key,
        key,
        embed_dim_to_check=32,
        num_heads=4,
        in_proj_weight=w,
        in_proj_bias=b,
        bias_k=bias_k,
        bias_v=bias_v,
        add_zero_attn=True,
        dropout_p=0.0,
        out_proj_weight=wo,
        out_proj_bias=None,
        training=False,
        need_weights=False,
        attn_mask=torch.logical_not(keep).expand(20, 28),
    )[0]


@spelling((12, 2, 32), (36, 2, 24), LINEAR, weight(32, 24), weight(32, 24), (96,), LINEAR, (32,))
def functional_forward_separate_weights(
    query: Tensor, memory: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, b: Tensor, wo: Tensor, bo: Tensor
) -> Tensor:
    """use_separate_proj_weight with keys of another width; attention pooling of contrastive models."""
    return F.multi_head_attention_forward(
        query=query,
        key=memory,
        value=memory,
        embed_dim_to_check=32,
        num_heads=4,
        q_proj_weight=wq,
        k_proj_weight=wk,
        v_proj_weight=wv,
        in_proj_weight=None,
        in_proj_bias=b,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=wo,
        out_proj_bias=bo,
        use_separate_proj_weight=True,
        training=True,
        need_weights=False,
    )[0]


@spelling(*CROSS, bools(2, 1, 20, 36))
def builtin_bool_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """scaled_dot_product_attention with a Boolean mask that broadcasts over heads."""
    return F.scaled_dot_product_attention(q, k, v, mask)


@spelling(*CROSS, (4, 20, 36))
def builtin_float_bias_and_scale(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """scaled_dot_product_attention with a learned bias a head and scale=1; window transformers."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


@spelling((2, 8, 24, 16), (2, 2, 24, 16), (2, 2, 24, 16))
def builtin_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scaled_dot_product_attention with enable_gqa and is_causal; decoders since torch 2.5."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@spelling((6, 20, 16), (6, 28, 16), (6, 28, 8))
def builtin_three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scaled_dot_product_attention on three dimensions with wider queries than values."""
    return F.scaled_dot_product_attention(q, k, v)


@spelling((2, 20, 4, 8), (2, 28, 4, 8), (2, 28, 4, 8), spans(28, (0, 28), (0, 18)))
def builtin_merged_masks(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Lengths as an additive zero/-inf mask expanded to full size, swapaxes; speech code moved to the built-in."""
    q, k, v = (t.swapaxes(1, 2) for t in (q, k, v))
    bias = torch.zeros(2, 28, dtype=q.dtype).masked_fill(~valid, float("-inf"))
    bias = bias.view(2, 1, 1, 28).expand(2, 4, 20, 28)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).swapaxes(1, 2).flatten(2)


@spelling(*CROSS, random=True)
def builtin_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scaled_dot_product_attention with dropout_p."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


@spelling(*SELF, random=True)
def dropout_on_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """F.dropout on the causal weights; every training script before the built-in."""
    att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
    att = att.masked_fill(torch.ones(24, 24).tril() == 0, float("-inf")).softmax(-1)
    return F.dropout(att, p=0.1, training=True) @ v


@spelling(*FLAT, random=True)
def dropout_module_in_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax in float, cast back, nn.Dropout, bmm; sequence toolkits in half precision."""
    weights = torch.bmm(q * 8**-0.5, k.transpose(1, 2))
    probs = F.softmax(weights, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).type_as(weights)
    return torch.bmm(nn.Dropout(0.1)(probs), v)


@spelling(*SELF)
def upcast_everything(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries and keys to float before the product, weights back to the values' type; numerically careful forks."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = torch.matmul(q.to(wide), k.to(wide).transpose(-1, -2)) / torch.tensor(q.shape[-1], dtype=wide).sqrt()
    logits = logits + torch.full((24, 24), -torch.inf, dtype=wide).triu(1)
    return torch.matmul(logits.softmax(-1).to(v.dtype), v)


# --- softmax by hand ------------------------------------------------------------------------------------------------


@spelling(*CROSS)
def exp_over_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s - max) / sum; assignments that forbid softmax."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    e = torch.exp(scores - scores.max(dim=-1, keepdim=True)[0])
    return (e / e.sum(dim=-1, keepdim=True)) @ v


@spelling(*CROSS, bools(2, 1, 20, 36))
def exp_times_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Exponentials multiplied by a 0/1 mask and renormalised; pointer networks and graph code."""
    scores = torch.matmul(q, k.transpose(-2, -1)) * 0.25
    scores = scores - scores.amax(-1, keepdim=True)
    weights = scores.exp() * mask.to(scores.dtype)
    return torch.matmul(weights / weights.sum(-1, keepdim=True), v)


@spelling(*CROSS, bools(2, 1, 20, 36))
def softmax_mask_renormalise(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(s·mask)·mask / (sum + 1e-13); reading-comprehension libraries."""
    keep = mask.to(q.dtype)
    result = F.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.25 * keep, dim=-1)
    result = result * keep
    result = result / (result.sum(dim=-1, keepdim=True) + 1e-13)
    return torch.matmul(result, v)


@spelling(*CROSS)
def exp_of_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """log_softmax().exp(); code that also wants an entropy some day."""
    log_weights = F.log_softmax(torch.einsum("bhid,bhjd->bhij", q, k) * 0.25, dim=-1)
    return torch.einsum("bhij,bhjd->bhid", log_weights.exp(), v)


@spelling(*SELF)
def exp_minus_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s - logsumexp(s)) on a causal -inf mask; probabilistic derivations."""
    s = (q @ k.mT / 4).masked_fill(torch.ones(24, 24, dtype=torch.bool).triu(1), -torch.inf)
    return torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True)) @ v


@spelling(*CROSS)
def divided_after_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(exp(s - m) @ v) / sum; explanations of flash attention before tiling."""
    s = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
    p = torch.exp(s - s.max(dim=-1, keepdim=True).values)
    return (p @ v) / p.sum(dim=-1, keepdim=True)


@spelling(*CROSS)
def column_of_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The normaliser as one more column of values; kernel-attention papers' exact baseline."""
    v1 = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
    s = torch.einsum("bhnd,bhmd->bhnm", q, k) * 0.25
    out = torch.exp(s - s.detach().amax(-1, keepdim=True)) @ v1
    return out[..., :-1] / out[..., -1:]


@spelling(*CROSS)
def powers_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp2 with log2(e) folded into the scale; reference code beside GPU kernels."""
    qk = torch.matmul(q, k.mT) * (q.size(-1) ** -0.5 * 1.44269504)
    p = torch.exp2(qk - torch.amax(qk, dim=-1, keepdim=True))
    return torch.matmul(p * p.sum(-1, keepdim=True).reciprocal(), v)


@spelling(*SELF)
def no_maximum_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp times tril over its sum, no maximum; first drafts with small logits."""
    a = torch.exp(q @ k.transpose(-2, -1) / 16.0)
    a = torch.tril(a)
    return torch.matmul(a / a.sum(-1).unsqueeze(-1), v)


@spelling(*CROSS)
def relaxed_by_alpha(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores divided by alpha, maximum subtracted, multiplied back; overflow-safe half-precision models."""
    alpha = 32.0
    scores = torch.matmul(q / (math.sqrt(16) * alpha), k.transpose(-1, -2))
    highest = scores.amax(dim=-1).unsqueeze(-1)
    return torch.matmul(nn.Softmax(dim=-1)((scores - highest) * alpha), v)


@spelling(*FLAT)
def clamped_and_shifted_globally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Maximum of the whole tensor subtracted, clamped to ±50000; grounded detection models."""
    attn_weights = torch.bmm(q * 8**-0.5, k.transpose(1, 2))
    attn_weights = attn_weights - attn_weights.max()
    attn_weights = torch.clamp(attn_weights, min=-50000)
    attn_weights = torch.clamp(attn_weights, max=50000)
    return torch.bmm(nn.functional.softmax(attn_weights, dim=-1), v)


@spelling(*CROSS)
def softmax_on_flattened_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores viewed as [rows, N] for a 2-D softmax; code written for dim-less softmax."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    weights = F.softmax(scores.view(-1, scores.size(-1)), dim=1).view_as(scores)
    return torch.matmul(weights, v)


@spelling(*SELF, bools(2, 1, 24, 24))
def not_a_number_to_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """nan_to_num after the softmax, in case a row has no key; defensive code."""
    s = (q @ k.mT * 0.25).masked_fill(~mask, float("-inf"))
    return torch.nan_to_num(torch.softmax(s, dim=-1), nan=0.0) @ v


@spelling(*SELF, values(1.0, 0.0, 0.5, 1.0))
def head_mask_on_weights(q: Tensor, k: Tensor, v: Tensor, head_mask: Tensor) -> Tensor:
    """Weights times a number a head after the softmax; head pruning studies."""
    probs = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / 4.0, dim=-1)
    probs = probs * head_mask.view(1, -1, 1, 1)
    return torch.matmul(probs, v).permute(0, 2, 1, 3).flatten(2)


# --- other layouts --------------------------------------------------------------------------------------------------


@spelling(*CROSS)
def keys_by_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """k @ qᵀ, softmax over dim -2, weightsᵀ @ v; authors who keep vectors as columns."""
    scores = torch.matmul(k, q.transpose(-2, -1)) / math.sqrt(q.size(-1))
    weights = torch.softmax(scores, dim=-2)
    return torch.matmul(weights.transpose(-2, -1), v)


@spelling((2, 16, 20), (2, 16, 28), (2, 8, 28))
def columns_are_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """V·softmax(KᵀQ) with tokens as columns; a textbook on deep learning."""
    return v @ torch.softmax(k.transpose(1, 2) @ q / q.size(1) ** 0.5, dim=1)


@spelling((2, 20, 4, 8), (2, 28, 4, 8), (2, 28, 4, 8))
def heads_behind_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """'bqhd,bkhd->bqkh', softmax over dim 2; one-off research code with heads last."""
    scores = torch.einsum("bqhd,bkhd->bqkh", q, k) / math.sqrt(8)
    return torch.einsum("bqkh,bkhd->bqhd", torch.softmax(scores, dim=2), v)


@spelling((24, 2, 4, 8), (24, 2, 4, 8), (24, 2, 4, 8))
def lengths_before_batch_in_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """'ibnd,jbnd->ijbn', softmax over dim 1, mask of [q, k, 1, 1]; recurrent-memory transformers."""
    attn_score = torch.einsum("ibnd,jbnd->ijbn", (q, k))
    attn_score.mul_(1 / 8**0.5)
    mask = torch.triu(torch.ones(24, 24, dtype=torch.uint8), diagonal=1).bool()
    attn_score = attn_score.masked_fill(mask[:, :, None, None], -float("inf"))
    attn_prob = F.softmax(attn_score, dim=1)
    return torch.einsum("ijbn,jbnd->ibnd", (attn_prob, v)).reshape(24, 2, 32)


@spelling((2, 16, 5, 6), (8, 16, 1, 1), (8, 16, 1, 1), (16, 16, 1, 1))
def map_attends_to_itself(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
    """1 × 1 convolutions, bmm(v, attentionᵀ), unscaled, residual; self-attention in adversarial networks."""
    b, c, width, height = x.size()
    query = F.conv2d(x, wq / 4).view(b, -1, width * height).permute(0, 2, 1)
    key = F.conv2d(x, wk / 4).view(b, -1, width * height)
    attention = torch.softmax(torch.bmm(query, key), dim=-1)
    value = F.conv2d(x, wv / 4).view(b, -1, width * height)
    return torch.bmm(value, attention.permute(0, 2, 1)).view(b, c, width, height) * 0.5 + x


@spelling((2, 96, 24))
def channels_before_tokens(qkv: Tensor) -> Tensor:
    """'bct,bcs->bts' on one [B, H·3·C, T] tensor, both sides scaled by a fourth root; diffusion U-Nets."""
    bs, width, length = qkv.shape
    ch = width // 12
    q, k, v = qkv.reshape(bs * 4, ch * 3, length).split(ch, dim=1)
    scale = 1 / math.sqrt(math.sqrt(ch))
    weights = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weights = torch.softmax(weights, dim=-1).type(weights.dtype)
    return torch.einsum("bts,bcs->bct", weights, v).reshape(bs, -1, length)


@spelling((2, 96, 16), (4, 16), randints(16, 16, 16))
def biases_picked_by_index(qkv: Tensor, biases: Tensor, index: Tensor) -> Tensor:
    """qᵀ @ k on channels-first heads, bias[:, index], v @ attnᵀ; fast hybrid vision models."""
    q, k, v = qkv.view(2, 4, -1, 16).split([8, 8, 8], dim=2)
    attn = (q.transpose(-2, -1) @ k) * 8**-0.5 + biases[:, index]
    attn = attn.softmax(dim=-1)
    return (v @ attn.transpose(-2, -1)).reshape(2, 32, 16)


@spelling((20, 16), (28, 16), (28, 16))
def tensordot_single_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch.tensordot for both products; people who come from tensor networks."""
    weights = torch.softmax(torch.tensordot(q, k, dims=([1], [1])) / 4.0, dim=1)
    return torch.tensordot(weights, v, dims=1)


@spelling((2, 20, 16), (28, 16), (28, 8))
def memory_as_linear_layers(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """F.linear(x, keys).softmax() then F.linear with valuesᵀ: learned memory slots; external attention, Hopfield."""
    association = F.softmax(F.linear(x, keys) * 0.5, dim=-1)
    return F.linear(association, values.t())


@spelling((20, 16), (28, 16), (28, 16))
def inner_single_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch.inner for the scores, einsum('ij,jk') for the values; numpy habits."""
    return torch.einsum("ij,jk->ik", torch.softmax(torch.inner(q, k).mul(0.25), dim=-1), v)


@spelling(*CROSS)
def mapped_over_batch_and_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch.vmap twice over a 2-D attention; functional programmers."""

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1) @ v

    return torch.vmap(torch.vmap(one))(q, k, v)


@spelling((2, 4, 12, 8), (2, 4, 16, 8), (2, 4, 16, 8))
def multiply_and_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Both products as broadcast multiplication and sum; geometric libraries and careful beginners."""
    scores = (q.unsqueeze(3) * k.unsqueeze(2)).sum(dim=-1) / math.sqrt(q.size(-1))
    weights = scores.softmax(dim=-1)
    return (weights.unsqueeze(-1) * v.unsqueeze(2)).sum(dim=3)


# --- more keys, more terms, more blocks -----------------------------------------------------------------------------


@spelling(*SELF, (2, 16), spans(24, (0, 24), (0, 10)))
def null_key_and_value(q: Tensor, k: Tensor, v: Tensor, null_kv: Tensor, mask: Tensor) -> Tensor:
    """A learned key and value in front, mask padded by True; text-to-image paper code."""
    nk, nv = (t.expand(2, 4, 1, 16) for t in null_kv.unbind(dim=0))
    k, v = torch.cat((nk, k), dim=-2), torch.cat((nv, v), dim=-2)
    sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.25
    mask = F.pad(mask, (1, 0), value=True)[:, None, None, :]
    sim = sim.masked_fill(~mask, -torch.finfo(sim.dtype).max)
    return torch.einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v)


@spelling((2, 8, 24, 8), (2, 2, 24, 8), (2, 2, 24, 8), (8,))
def sink_column(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """One learned logit a head concatenated, column dropped after the softmax; open-weight decoders of 2025."""
    k, v = (t[:, :, None].expand(-1, -1, 4, -1, -1).reshape(2, 8, 24, 8) for t in (k, v))
    qk = torch.matmul(q, k.transpose(2, 3)) * 8**-0.5
    qk = qk + torch.triu(qk.new_full((24, 24), -float("inf")), diagonal=1)
    combined = torch.cat([qk, sinks.reshape(1, -1, 1, 1).expand(2, -1, 24, -1)], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    probs = F.softmax(combined, dim=-1, dtype=combined.dtype)
    return torch.matmul(probs[..., :-1], v)


@spelling(*CROSS)
def off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp(s - m) / (exp(-m) + sum), so that a head may attend to nothing; quiet attention."""
    s = torch.matmul(q, k.mT) / math.sqrt(q.size(-1))
    m = s.amax(dim=-1, keepdim=True).clamp(min=0)
    e = torch.exp(s - m)
    return torch.matmul(e / (torch.exp(-m) + e.sum(dim=-1, keepdim=True)), v)


@spelling((2, 20, 4, 16), (2, 20, 4, 8), (2, 28, 16), (2, 28, 8))
def latent_and_rotary_parts(q_latent: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor) -> Tensor:
    """Sum of two products, values are the latent keys, heads between; multi-head latent attention, absorbed."""
    scores = (torch.einsum("bshc,btc->bsht", q_latent, kv) + torch.einsum("bshr,btr->bsht", q_rope, k_rope)) * 24**-0.5
    mask = torch.full((20, 28), float("-inf"), dtype=scores.dtype).triu_(9)
    scores += mask.unsqueeze(1)
    return torch.einsum("bsht,btc->bshc", scores.softmax(dim=-1), kv)


@spelling((2, 4, 20, 16), (2, 4, 12, 16), (2, 4, 12, 16), (2, 4, 20, 16), (2, 4, 20, 16))
def two_sources_one_softmax(q: Tensor, mem_k: Tensor, mem_v: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of memory and of self concatenated, weights split, products added; memory-augmented decoders."""
    memory = q @ mem_k.transpose(-1, -2) * 0.25
    local = (q @ k.transpose(-1, -2) * 0.25).masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -math.inf)
    weights = torch.cat((memory, local), dim=-1).softmax(dim=-1)
    on_memory, on_local = weights.split([12, 20], dim=-1)
    return on_memory @ mem_v + on_local @ v


@spelling((2, 4, 24, 8), (2, 4, 24, 8), (2, 4, 24, 8), (2, 4, 24, 8), (2, 4, 24, 16), values(0.5), attentions=2)
def difference_of_two(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """(softmax₁ - λ·softmax₂) @ v; differential transformers."""
    a1 = torch.softmax(q1 @ k1.transpose(-1, -2) * 8**-0.5, dim=-1)
    a2 = torch.softmax(q2 @ k2.transpose(-1, -2) * 8**-0.5, dim=-1)
    return (a1 - lam * a2) @ v


@spelling((24, 2, 4, 8), (24, 2, 4, 8), (24, 2, 4, 8), (24, 4, 8), (4, 8), (4, 8))
def shifted_relative_scores(q: Tensor, k: Tensor, v: Tensor, r: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Content and position terms, rel_shift by pad and view, 'ijbn' scores; segment-recurrent language models."""
    content = torch.einsum("ibnd,jbnd->ijbn", q + u, k)
    position = torch.einsum("ibnd,jnd->ijbn", q + w, r)
    padded = torch.cat((position.new_zeros(24, 1, 2, 4), position), dim=1)
    position = padded.view(25, 24, 2, 4)[1:].view_as(position)
    scores = (content + position) * 8**-0.5
    scores = scores.masked_fill(torch.ones(24, 24, dtype=torch.bool).triu(1)[:, :, None, None], -1e30)
    return torch.einsum("ijbn,jbnd->ibnd", torch.softmax(scores, dim=1), v)


@spelling(*SELF, (24, 16))
def skewed_relative_scores(q: Tensor, k: Tensor, v: Tensor, er: Tensor) -> Tensor:
    """q @ Erᵀ skewed by pad, reshape and slice, then the whole scaled; music transformers."""
    qer = torch.matmul(q, er.transpose(0, 1))
    padded = F.pad(qer, (1, 0))
    skewed = padded.reshape(2, 4, 25, 24)[:, :, 1:, :]
    scores = (torch.matmul(q, k.transpose(-1, -2)) + skewed) / math.sqrt(16)
    scores = scores.masked_fill(torch.tril(torch.ones(24, 24)) == 0, float("-inf"))
    return torch.matmul(F.softmax(scores, dim=-1), v)


@spelling(*SELF, (17, 16))
def relative_keys_by_clipped_distance(q: Tensor, k: Tensor, v: Tensor, embeddings: Tensor) -> Tensor:
    """A key for each clipped distance, 'bhid,ijd->bhij' added; the first relative position paper."""
    i = torch.arange(q.size(2))
    distance = (i[None, :] - i[:, None]).clamp(-8, 8) + 8
    relative = torch.einsum("bhid,ijd->bhij", q, embeddings[distance])
    return torch.softmax((torch.matmul(q, k.transpose(-1, -2)) + relative) / 4.0, dim=-1).matmul(v)


@spelling((8, 24, 8), (8, 24, 8), (8, 24, 8), (4, 32, 8), (4, 32, 8))
def disentangled(q: Tensor, k: Tensor, v: Tensor, pos_k: Tensor, pos_q: Tensor) -> Tensor:
    """Content-to-position and position-to-content scores by gather, scale √(3d); disentangled encoders."""
    scale = math.sqrt(8 * 3)
    i = torch.arange(24)
    rel = torch.clamp(i[:, None] - i[None, :] + 16, 0, 31)
    scores = torch.bmm(q, k.transpose(-1, -2) / scale)
    c2p = torch.bmm(q, pos_k.repeat(2, 1, 1).transpose(-1, -2))
    scores = scores + torch.gather(c2p, dim=-1, index=rel.expand(8, 24, 24)) / scale
    p2c = torch.bmm(k, pos_q.repeat(2, 1, 1).transpose(-1, -2))
    p2c = torch.gather(p2c, dim=-1, index=(31 - rel).expand(8, 24, 24)).transpose(-1, -2)
    scores = scores + p2c / scale
    return torch.bmm(torch.softmax(scores, dim=-1), v)


@spelling((2, 4, 32, 8), (2, 4, 32, 8), (2, 4, 32, 8))
def previous_block_too(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Blocks see themselves and the one before, padded and concatenated, positions compared; local attention."""
    B, H, N, D = q.shape
    w = 8
    bq, bk, bv = (t.reshape(B * H, N // w, w, D) for t in (q, k, v))

    def look_back(x: Tensor, pad: float) -> Tensor:
        return torch.cat((F.pad(x, (0, 0, 0, 0, 1, 0), value=pad)[:, :-1], x), dim=2)

    bk, bv = look_back(bk, 0.0), look_back(bv, 0.0)
    ticks = torch.arange(N).reshape(1, N // w, w)
    before = torch.cat((F.pad(ticks, (0, 0, 1, 0), value=-1)[:, :-1], ticks), dim=2)
    sim = torch.einsum("b w i d, b w j d -> b w i j", bq, bk) * D**-0.5
    mask = (ticks[..., :, None] < before[..., None, :]) | (before[..., None, :] == -1)
    sim = sim.masked_fill(mask, -torch.finfo(sim.dtype).max)
    return torch.einsum("b w i j, b w j d -> b w i d", sim.softmax(dim=-1), bv).reshape(B, H, N, D)


@spelling((2, 4, 24, 8), (2, 4, 24, 8), (2, 4, 24, 8))
def neighbourhood_by_unfold(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query's nine neighbours cut out by unfold, the border masked; stand-alone local attention."""
    N = q.size(2)
    near_k = F.pad(k, (0, 0, 4, 4)).unfold(2, 9, 1)  # [B, H, N, D, 9]
    near_v = F.pad(v, (0, 0, 4, 4)).unfold(2, 9, 1)
    logits = torch.einsum("bhnd,bhndw->bhnw", q, near_k) * 8**-0.5
    where = torch.arange(N)[:, None] + torch.arange(-4, 5)[None, :]
    logits = logits.masked_fill((where < 0) | (where >= N), float("-inf"))
    return torch.einsum("bhnw,bhndw->bhnd", logits.softmax(-1), near_v)


@spelling(*CROSS)
def online_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Running maximum, sum and output over blocks of keys; flash attention explained in Python."""
    out = torch.zeros_like(q)
    total = q.new_zeros(*q.shape[:-1], 1)
    highest = q.new_full((*q.shape[:-1], 1), -math.inf)
    for kb, vb in zip(k.split(12, dim=2), v.split(12, dim=2), strict=True):
        s = q @ kb.mT * q.size(-1) ** -0.5
        new = torch.maximum(highest, s.amax(-1, keepdim=True))
        p, shrink = torch.exp(s - new), torch.exp(highest - new)
        total = total * shrink + p.sum(-1, keepdim=True)
        out = out * shrink + p @ vb
        highest = new
    return out / total


@spelling((2, 4, 20, 16), (2, 4, 12, 16), (2, 4, 12, 16), (2, 4, 24, 16), (2, 4, 24, 16))
def halves_merged_by_logsumexp(q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """Two partial attentions merged by the sigmoid of their logsumexps; ring and cascade attention."""

    def partial_attention(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.einsum("bhid,bhjd->bhij", q, k) * 0.25
        return torch.einsum("bhij,bhjd->bhid", s.softmax(-1), v), s.logsumexp(-1, keepdim=True)

    (o1, l1), (o2, l2) = partial_attention(k1, v1), partial_attention(k2, v2)
    return o1 - torch.sigmoid(l2 - l1) * (o1 - o2)


SPELLINGS: tuple[Spelling, ...] = tuple(_REGISTERED)
