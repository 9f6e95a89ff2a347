"""What takes a site's place: nothing (kept, declined), a plain scaled_dot_product_attention node, plain operators, or ours.

The passes ask `templates.choose` with the sizes of this compile; the operator asks again with the real ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import fx

from attnfuse.passes.distribute import SUMMED
from attnfuse.passes.graph import SHORT_DTYPES, fake, module_path, packet, shape, source_line
from attnfuse.passes.lift import LeafSource
from attnfuse.passes.site import Site
from attnfuse.passes.spell import Meaning, meaning
from attnfuse.passes.views import GATHERS, MOVES
from attnfuse.remark import Remark
from attnfuse.score import Expr, Program, S, loads
from attnfuse.templates.base import Target
from attnfuse.templates.choose import Choice, Refusal, choose
from attnfuse.templates.inline import Inline
from attnfuse.templates.launch import arch_of
from attnfuse.templates.library import Call, Library, call_for
from attnfuse.templates.native import processor, suits
from attnfuse.templates.native_step import takes
from attnfuse.templates.tile_lists import has_no_ranges, mask_text, reads_leaves, share_skipped, worth_a_map
from attnfuse.templates.written_bias import WrittenBias, written_bias
from attnfuse.tiles import bounds, needs_every_key, never_empty, tiles_skipped

# So many times `inline_scores` an attention has at least for which a product more pays, with PyTorch's kernels and with ours: see
# docs/design.md.
_SUM: Final = 16
_SUM_BY_OURS: Final = 2
# Rows and keys, about those that kernels for the CPU take at a time.
_TILE: Final = (64, 64)


# None: the operator `attnfuse::attention` alone
Form = Call | Inline | WrittenBias | None


@dataclass(frozen=True)
class Replacement:
    """A site's meaning, what takes its place and the remark about it."""

    meaning: Meaning
    form: Form
    remark: Remark


def decide(site: Site, inline_scores: int) -> Replacement | Remark:
    """The replacement, or the remark of a site that stays as it is.  Raises Miss.

    Args:
        inline_scores: see `Options`.
    """
    what = meaning(site)
    target = _target(site, what, inline_scores)
    choice = choose(what.spec, what.shape, target)
    where = {"module": module_path(site.anchor), "source": source_line(site.anchor), "score": str(what.spec.program)}
    facts: dict[str, object] = {
        "shape": str(what.shape),
        "dtype": target.dtype,
        "seen": (*site.seen[:1], *_score_layers(what.spec.program), *site.seen[1:]),
        "spec": str(what.spec),
        "training": target.training,
    }
    notes = _notes(site, what)
    if notes:
        facts["notes"] = notes
    if site.elsewhere is not None:
        return Remark.of("AF037", **where, why=site.elsewhere.facts["why"], **facts)  # type: ignore[arg-type]
    if isinstance(choice, Refusal):
        return Remark.of("AF030", **where, reasons=dict(choice.reasons), **facts)  # type: ignore[arg-type]
    template = choice.template
    form = _form(what, choice, target)
    if isinstance(form, Call) and site.is_sdpa and _is_plain(site):
        return Remark.of("AF001", **where, template=template.name, **facts)  # type: ignore[arg-type]
    few = (_SUM_BY_OURS if target.native else _SUM) * target.inline_scores
    if SUMMED in site.anchor.meta and what.shape.M * what.shape.N <= few and target.device == "cpu":
        return Remark.of("AF031", **where, why="its weights are added to others'", **facts)  # type: ignore[arg-type]
    if isinstance(form, WrittenBias):
        facts["written_out"] = str(form.bias)
    facts["tiles_skipped"] = round(_tiles_skipped(what, choice), 4)
    code = {Call: "AF010", Inline: "AF011"}.get(type(form), "AF000")
    return Replacement(what, form, Remark.of(code, **where, template=template.name, **facts))  # type: ignore[arg-type]


def _form(what: Meaning, choice: Choice, target: Target) -> Form:
    """What the template that is chosen asks for."""
    if isinstance(choice.template, Library):
        return call_for(what.spec)
    if isinstance(choice.template, Inline):
        return choice.template
    small = target.device == "cpu" and target.dtype != "f64" and what.shape.M * what.shape.N <= target.inline_scores
    return written_bias(what.spec, what.shape) if small else None


def _tiles_skipped(what: Meaning, choice: Choice) -> float:
    """The fraction of tiles that no row block visits, as far as it is known before the call."""
    spec, shape = what.spec, what.shape
    listed = has_no_ranges(spec) and not reads_leaves(spec) and not what.sizes and worth_a_map(shape.M, shape.N)
    # a row without a key may look at all of them
    if listed and not needs_every_key(spec.program):
        return share_skipped(mask_text(str(spec)), (), tuple(shape[:5]))
    return tiles_skipped(spec, shape, *choice.tiles)


def _target(site: Site, what: Meaning, inline_scores: int) -> Target:
    q = fake(site.q.node)
    sizes = [*dataclasses.astuple(site.sizes), *(size for leaf in what.leaves for size in shape(leaf.node))]
    static = not what.sizes and all(isinstance(size, int) for size in sizes)
    outermost = site.scope
    while outermost.outer is not None:
        outermost = outermost.outer
    given = [n.meta.get("example_value") for n in outermost.module.graph.find_nodes(op="placeholder")]
    B, H, Hkv, M, N, *_ = what.shape
    served = q.device.type == "cpu" and site.dtype == fake(site.out).dtype and takes(what.spec)
    training = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in given)
    return Target(
        device=q.device.type,
        dtype=SHORT_DTYPES[site.dtype],
        v_dtype=SHORT_DTYPES[fake(site.out).dtype],
        training=training,
        lse=site.lse is not None,
        arch=arch_of(q.device) if q.device.type == "cuda" and torch.cuda.is_available() else "",
        inline_scores=inline_scores if static else 0,
        processor=cpu.name if q.device.type == "cpu" and (cpu := processor()) is not None else "",
        native=suits(site.dtype, M * H // max(1, Hkv), M * N, B * H) if served else "",
        rounded=site.rounded,
        gathers=static and _gathers_cells(what),
    )


def _gathers_cells(what: Meaning) -> bool:
    """Whether the score reads a tensor of its own, with an element for each cell, that the graph gathers (DeBERTa's positions).

    Not where a mask leaves keys out (causal, windows, padding by -inf): to skip them gains more than a bias that is not written.
    """
    B, H, _, M, N, *_ = what.shape
    program = what.spec.program
    if program.tiers and not (needs_every_key(program) and tiles_skipped(what.spec, what.shape, *_TILE) == 0.0):
        return False
    axes = {axis for axis, size in zip("bhmn", (B, H, M, N), strict=True) if size != 1}
    sources: dict[str, LeafSource] = dict(zip((leaf.name for leaf in what.spec.leaves), what.leaves, strict=True))
    of_cells = [load.leaf for load in loads(program.body) if axes <= {str(i) for i in load.indices}]
    pending = [sources[leaf].node for leaf in of_cells]
    while pending:
        node = pending.pop()
        # what others read is computed anyway
        if not isinstance(node.target, torch._ops.OpOverload) or len(node.users) > 1:
            continue
        if packet(node) in GATHERS and fake(node).numel() >= B * H * M * N:
            return True
        if packet(node) in MOVES or torch.Tag.pointwise in node.target.tags:
            pending += node.all_input_nodes
    return False


def _is_plain(site: Site) -> bool:
    """Whether the SDPA call reads q, k and v as they are: no mask, no heads expanded for it."""
    if site.anchor.args[3:4] not in ((), (None,)) or site.anchor.kwargs.get("attn_mask") is not None:
        return False
    return all(len(op.read) == 1 for op in (site.k, site.v))


def _score_layers(program: Program) -> tuple[str, ...]:
    """The score arithmetic and the masks, as layers seen between the score matmul and the softmax."""
    body = str(program.body)
    layers = [] if program.body == S else [body if len(body) <= 60 else f"{body[:57]}..."]
    return (*layers, *(f"mask {tier.fill}" for tier in program.tiers))


def _notes(site: Site, what: Meaning) -> tuple[str, ...]:
    notes = []
    sources: dict[str, LeafSource] = dict(zip((leaf.name for leaf in what.spec.leaves), what.leaves, strict=True))

    def of_each_score(expressions: Iterable[Expr]) -> list[fx.Node]:
        found = [load for expr in expressions for load in loads(expr)]
        return [sources[x.leaf].node for x in found if {"m", "n"} <= {str(i) for i in x.indices}]

    masks = of_each_score(tier.allowed for tier in what.spec.program.tiers)
    # a float that is added and that nobody learns may be a mask too
    added = [
        x
        for x in of_each_score([what.spec.program.body])
        if fake(x).dtype.is_floating_point and not site.scope.may_require_grad(x)
    ]
    if any(node.op == "placeholder" for node in (*masks, *added)):
        notes.append("AF050")
    elif masks:
        notes.append("AF051")
    if needs_every_key(what.spec.program) and not never_empty(bounds(what.spec)):
        notes.append("AF052")
    return tuple(notes)
