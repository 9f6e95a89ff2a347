"""From Dynamo's graph to a graph in which each attention that was understood is one operator.

    normalise   one spelling for each operation
    recognise   each softmax and SDPA call becomes a `Site`, or a remark that says what stopped it (uses peel and lift)
    rewrite     each site becomes `attnfuse::attention`, a plain SDPA call where that is provably the same and better, or
                plain operators where it is small

`run` goes through `PIPELINE`; a pass that raises costs its own site or graph, never the user's program.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from torch import fx

from attnfuse.options import Options
from attnfuse.passes.band import unband
from attnfuse.passes.decide import decide
from attnfuse.passes.distribute import distribute
from attnfuse.passes.dump import dump
from attnfuse.passes.graph import module_path, packet, source_line
from attnfuse.passes.join import JOINED, join
from attnfuse.passes.kept import kept
from attnfuse.passes.lift import Scope, graphs, scopes
from attnfuse.passes.normalise import NormaliseError, normalise
from attnfuse.passes.peel import Miss
from attnfuse.passes.recognise import anchors, recognise
from attnfuse.passes.respell import RESPELLED, respell
from attnfuse.passes.rewrite import hand_over, insert, prune_operands
from attnfuse.passes.settle import settle
from attnfuse.passes.site import Site
from attnfuse.passes.verify import checker
from attnfuse.remark import Remark, Report

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass
class Work:
    """What the passes hand on to each other: the graph, its scopes, the sites found and the remarks so far."""

    original: fx.GraphModule
    options: Options
    graph: fx.GraphModule | None = None
    scopes: list[Scope] = field(default_factory=list)
    found: list[tuple[int, fx.Node, Site | Remark]] = field(default_factory=list)
    """The number of the graph, or a negative one of its own for what no pass looks into; the softmax or call; what became of it."""
    remarks: list[Remark] = field(default_factory=list)
    fused: int = 0
    leave: frozenset[tuple[int, str]] = frozenset()
    """Softmaxes, by number of the graph and name, that are not to be respelled, because they were not fused when they were."""
    failures: list[Remark] = field(default_factory=list)
    """What raised at no attention in particular."""


def run(gm: fx.GraphModule, options: Options) -> tuple[fx.GraphModule | None, Report]:
    """Finds and rewrites the attentions of a graph as Dynamo hands it to a backend.

    Returns:
        The rewritten graph, or None where nothing was rewritten (the caller compiles `gm` itself, which is never changed),
        and the report, one remark for each softmax and SDPA call.
    """
    try:
        return _run(gm, options)
    except NormaliseError as error:
        if options.strict and error.code == "AF041":
            raise
        return None, Report((Remark.of(error.code, why=error.reason),))
    except Exception as error:
        if options.strict:
            raise
        log.debug("a pass raised", exc_info=True)
        return None, Report((Remark.of("AF041", error=_described(error), why="a pass raised"),))


def _run(gm: fx.GraphModule, options: Options) -> tuple[fx.GraphModule | None, Report]:
    first = work = _through(Work(gm, options))
    while work.fused and (left := _left_respelled(work)):
        work = _through(Work(gm, options, leave=work.leave | left))
    return (work.graph if work.fused else None), Report((*_remarks(first, work), *work.failures))


def _remarks(first: Work, last: Work) -> Iterator[Remark]:
    """The last run's remarks, and those of the first about softmaxes that are written out, which the last one has not seen."""
    found = {(scope, anchor.name): remark for (scope, anchor, _), remark in zip(last.found, last.remarks, strict=False)}
    for (scope, anchor, _), remark in zip(first.found, first.remarks, strict=False):
        key = scope, anchor.meta.get(RESPELLED, anchor.name)
        seen = found.pop(key, None) or found.pop((scope, anchor.name), None)
        if JOINED in anchor.meta and key in last.leave:
            # it says more than what stopped the parts by themselves
            seen = remark
        if seen is None and key in last.leave:
            # what was respelled may itself be a softmax, normalised once more
            seen = found.pop((scope, _softmax_above(last.scopes[scope], key[1], found, scope)), None)
        if seen is not None or key in last.leave:
            yield seen or remark
    yield from found.values()


def _softmax_above(scope: Scope, name: str, found: Mapping[tuple[int, str], Remark], number: int) -> str:
    """The nearest softmax that goes into the node of that name, of those that are in `found`; or nothing."""
    todo = [node for node in scope.module.graph.nodes if node.name == name]
    seen = set(todo)
    for node in todo:
        if (number, node.name) in found:
            return str(node.name)
        above = [x for x in node.all_input_nodes if x not in seen]
        seen.update(above)
        todo += above
    return ""


def _through(work: Work) -> Work:
    """All passes, one after the other; none where the graph holds nothing that could be an attention and cannot be normalised."""
    for at, step in enumerate(PIPELINE, 1):
        try:
            step(work)
        except NormaliseError:
            if not _names_a_softmax(work.original):
                break
            raise
        dump(work.options.dump, at, step.__name__, work.graph, work.original)
    return work


def _left_respelled(work: Work) -> frozenset[tuple[int, str]]:
    """What was respelled, or joined, and has not been fused."""
    return frozenset(
        (number, node.meta[key])
        for number, scope in enumerate(work.scopes)
        for node in scope.module.graph.nodes
        for key in (RESPELLED, JOINED)
        if key in node.meta and packet(node) in ("softmax", "_softmax")
    )


def normalised(work: Work) -> None:
    """One spelling for each operation."""
    work.graph = normalise(work.original)
    try:
        _in_order(work, work.graph, join, distribute, unband)
    except Exception as error:
        if work.options.strict:
            raise
        # a graph that one of them has left half done is no graph; without them only their own sites are lost
        log.debug("a pass that joins parts raised", exc_info=True)
        work.failures.append(Remark.of("AF040", error=_described(error), node="attentions in parts or over offsets"))
        work.graph = normalise(work.original)
        _in_order(work, work.graph)


def _in_order(work: Work, graph: fx.GraphModule, *more: Callable[[fx.Graph, Container[str]], object]) -> None:
    for number, module in enumerate(graphs(graph)):
        settle(module.graph)
        left = {name for at, name in work.leave if at == number}
        for step in (respell, *more):
            step(module.graph, left)


def recognised(work: Work) -> None:
    """A site or a remark for each anchor, in the graph and in the bodies that are normalised too."""
    assert work.graph is not None
    for number, scope in enumerate(scopes(work.graph)):
        work.scopes.append(scope)
        for anchor in anchors(scope):
            work.found.append((number, anchor, _guarded(work, anchor, lambda s=scope, a=anchor: recognise(s, a))))  # type: ignore[misc]
        for node, remark in kept(scope.module):
            # the body that it may stand in has no number
            work.found.append((-1 - len(work.found), node, remark))


def rewritten(work: Work) -> None:
    """Each site replaced, where a template takes it."""
    assert work.graph is not None
    for _, anchor, found in work.found:
        remark = found if isinstance(found, Remark) else _guarded(work, anchor, lambda s=found: _rewrite(work, s))  # type: ignore[misc]
        work.remarks.append(remark)
    if work.fused:
        for number, scope in reversed([*enumerate(work.scopes)]):
            prune_operands(scope)
            hand_over(scope, number)
            scope.module.graph.lint()
            scope.module.recompile()


PIPELINE: Final[tuple[Callable[[Work], None], ...]] = (normalised, recognised, rewritten)


def _rewrite(work: Work, site: Site) -> Remark:
    chosen = decide(site, work.options.inline_scores)
    if isinstance(chosen, Remark):
        return chosen
    facts = dict(chosen.remark.facts)
    insert(site, chosen.meaning, chosen.form, checker(site, chosen.meaning, facts) if work.options.verify else None)
    work.fused += 1
    return replace(chosen.remark, facts=facts)


def _guarded(work: Work, anchor: fx.Node, step: Callable[[], T]) -> T | Remark:
    """The result of a step at one site, or the remark that tells why there is none."""
    where = {"module": module_path(anchor), "source": source_line(anchor)}
    try:
        return step()
    except Miss as miss:
        facts = dict(miss.facts)
        if miss.node is not None:
            facts |= {"node": miss.node.name, "node_source": source_line(miss.node)}
        return Remark.of(miss.code, **where, **facts)  # type: ignore[arg-type]
    except Exception as error:
        if work.options.strict:
            raise
        log.debug("a pass raised at %s", anchor, exc_info=True)
        return Remark.of("AF040", **where, error=_described(error), node=anchor.name)


def _names_a_softmax(gm: fx.GraphModule) -> bool:
    """Whether something in the graph, or in a body in it, may be one: else there is nothing to be said about it."""
    names = (
        str(getattr(n.target, "__name__", n.target))
        for m in gm.modules()
        if isinstance(m, fx.GraphModule)
        for n in m.graph.nodes
    )
    return any(
        name in ("exp", "exp_", "exp2") or part in name
        for name in names
        for part in ("softm", "attention", "transformer")
    )


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


__all__ = ["PIPELINE", "Work", "run"]
