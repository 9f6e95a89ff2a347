"""What became of each attention, and why: `Remark`, the table `CODES` of stable codes, and `Report`.

A remark is one of five kinds: `fused`, `kept` (IO-aware already), `declined` (understood, but no kernel or no gain),
`missed` (not understood) and `failed` (attnfuse went wrong, and the original was compiled). A code belongs to one kind
for good. Codes of the kind `note` stand in `facts["notes"]` of another remark. `CODES` is the only place where a code
is explained: its meaning is printed in reports, its cause and cure in the documentation.

This module knows no graph and no torch. It reads these facts; whatever else a pass records travels along in the JSON:

    tiles_skipped  float, 0 to 1: key tiles never visited      seen         tuple of the layers understood, q@k^T first
    node           name of the graph node that stopped it      node_source  its file:line
    why            a clause that completes the code's meaning  reasons      {template: tuple of reasons against it}
    notes          tuple of note codes                         error        text of the exception
    written_out    the bias that the graph computes before the operator, of the score `spec`
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Final, Literal, NamedTuple, Self, cast

Kind = Literal["fused", "kept", "declined", "missed", "failed"]
KINDS: Final[tuple[Kind, ...]] = ("fused", "kept", "declined", "missed", "failed")


class Code(NamedTuple):
    """One row of `CODES`. `cure` is the hint of a remark without one. A graph code is about no single attention."""

    kind: Kind | Literal["note"]
    meaning: str
    cause: str
    cure: str
    scope: Literal["site", "graph"] = "site"


CODES: Final[dict[str, Code]] = {
    "AF000": Code(
        "fused",
        "an attnfuse kernel takes its place",
        "Its score arithmetic and its mask were read back from the graph, and a template takes them.",
        "Nothing to do.",
    ),
    "AF001": Code(
        "kept",
        "this scaled_dot_product_attention is IO-aware already",
        "The call has no mask, or only is_causal, so PyTorch's kernels write no scores and compute none in vain.",
        "Nothing to do.",
    ),
    "AF002": Code(
        "kept",
        "this attention op is IO-aware already",
        "The model calls FlexAttention, a flash-attention package or another kernel that never writes the scores.",
        "Nothing to do.",
    ),
    "AF010": Code(
        "fused",
        "a plain scaled_dot_product_attention takes its place",
        "It is provably what scaled_dot_product_attention computes for every size, and the library is faster here.",
        "Nothing to do.",
    ),
    "AF011": Code(
        "fused",
        "it is small and written out for Inductor",
        "It has so few scores that the call of a kernel would cost more than the memory traffic it saves.",
        "Nothing to do; options={'inline_scores': 0} turns it into a kernel's call all the same.",
    ),
    "AF020": Code(
        "missed",
        "no matmul that makes the scores was found above the softmax",
        "The scores do not come from a product of two tensors over the head dimension, or what lies between hides it.",
        "Nothing, if this softmax is no attention (a router, a classifier); else write the scores as q @ k.mT.",
    ),
    "AF021": Code(
        "missed",
        "the attention weights are used elsewhere",
        "The softmax's result is returned or read by a second operation, so it has to exist in memory.",
        "Do not return or keep the weights: set output_attentions=False, remove hooks and probes that read them. Where a graph"
        " breaks within a call, torch._dynamo.config.nested_graph_breaks = True leaves out what its callers drop.",
    ),
    "AF022": Code(
        "missed",
        "the softmax does not run over the keys",
        "It normalises over queries, heads or the batch, which is another function than attention.",
        "If attention is meant, take the softmax over the dimension that the value matmul sums over, usually dim=-1.",
    ),
    "AF023": Code(
        "missed",
        "an operation between the softmax and the value matmul is not understood",
        "The weights are changed after they were normalised, for instance by a mask, a renormalisation or a head mask.",
        "Mask the scores before the softmax; leave out head masks that are not used.",
    ),
    "AF024": Code(
        "missed",
        "an operation between the score matmul and the softmax is not understood",
        "The scores go through something that is no scale, bias, mask or pointwise arithmetic, or mixes keys or heads.",
        "Please report the node named here if it works on each score by itself; others cannot be fused.",
    ),
    "AF025": Code(
        "missed",
        "the scores are used elsewhere",
        "The score matrix before the softmax is returned or read by a second operation, so it has to exist in memory.",
        "Do not return or keep the scores, or compute what needs them (a log-sum-exp, a statistic) in another way.",
    ),
    "AF026": Code(
        "missed",
        "an operand is overwritten between its use in the scores and the end of the attention",
        "An in-place operation writes to q, k, v, the mask or a view of them; a kernel would read the new values.",
        "Write the update out of place, or move it before or after the whole attention.",
    ),
    "AF027": Code(
        "missed",
        "the layouts of q, k and v do not agree",
        "Batch, heads, keys or head dimension are permuted, split or merged differently in one of the three.",
        "Check the transposes and views of the operand named here; if they are meant, the attention cannot be fused.",
    ),
    "AF028": Code(
        "missed",
        "no value matmul was found below the softmax",
        "The weights are not multiplied by a tensor over the key dimension.",
        "Nothing, if this softmax is no attention (a router, a classifier); else write the output as weights @ v.",
    ),
    "AF029": Code(
        "missed",
        "the data type is not supported",
        "The operands q, k and v are integer, complex or quantised tensors, or differ in type.",
        "Cast q, k and v to one of float16, bfloat16, float32 and float64.",
    ),
    "AF030": Code(
        "declined",
        "no template takes this attention",
        "It was understood, but every kernel has a reason against it on this device, with these sizes and types.",
        "See the reasons, one line for each template; sizes and types within their limits are taken.",
    ),
    "AF031": Code(
        "declined",
        "the rewrite would not be faster",
        "At this size on this device the operations as they stand were measured to be as fast as any template.",
        "Nothing to do; longer sequences are taken.",
    ),
    "AF032": Code(
        "declined",
        "the layout of the output cannot be kept",
        "A later operation or the caller sees the strides of the original output, and no template can write them.",
        "Call .contiguous() on the attention's output before it is returned or viewed.",
    ),
    "AF033": Code(
        "missed",
        "the sizes of q, k and v cannot be proven to agree",
        "With dynamic shapes two sizes that must be equal are unrelated symbols, and attnfuse adds no guards.",
        "Derive both from one tensor's shape, state it with torch._check(a == b), or compile with dynamic=False.",
    ),
    "AF034": Code(
        "missed",
        "the attention runs across a change of mode",
        "Autocast or grad mode is switched between the score matmul and the value matmul.",
        "Put the whole attention inside or outside of the autocast or no_grad block.",
    ),
    "AF035": Code(
        "missed",
        "the scores are made of an input of the graph, not by a matmul in it",
        "The caller computed them, or Dynamo broke the graph between the score matmul and the softmax.",
        "Remove the break that TORCH_LOGS=graph_breaks shows; for .item(): torch._dynamo.config.capture_scalar_outputs = True.",
    ),
    "AF036": Code(
        "missed",
        "it stands in the body of an operator that is left in place",
        "A branch of torch.cond, a step of a scan or a loop, a custom autograd function, a nested_compile_region that returns the"
        " attention itself: the body is compiled as it stands.",
        "Move the attention out of that body; those of torch.utils.checkpoint and nested_compile_region are looked into where all"
        " calls of one body agree.",
    ),
    "AF037": Code(
        "declined",
        "the attention weights are used elsewhere too",
        "They have to exist in memory all the same, and a kernel beside them was measured to be slower than the operations as they"
        " stand, in bfloat16 and in training.",
        "Do not return or keep the weights: set output_attentions=False, remove hooks and probes that read them. Where a graph"
        " breaks within a call, torch._dynamo.config.nested_graph_breaks = True leaves out what its callers drop.",
    ),
    "AF038": Code(
        "declined",
        "a matrix mixes the heads",
        "It stands between the scores and the softmax, or the weights and the values (talking heads). A kernel would work on all"
        " heads side by side for each of them, and was measured to be slower than the operations as they stand, up to 576 tokens.",
        "Nothing to do.",
    ),
    "AF040": Code(
        "failed",
        "a pass raised an exception at this attention",
        "A defect of attnfuse. The attention was left as it was.",
        "Please report it with the error; options={'strict': True} raises it with its traceback.",
    ),
    "AF041": Code(
        "failed",
        "the graph could not be normalised",
        "The graph holds something that make_fx cannot trace exactly, so all of it was compiled as it stood.",
        "Compile the submodules that hold the attention by themselves; options={'strict': True} raises the error.",
        "graph",
    ),
    "AF042": Code(
        "failed",
        "an input is a tensor subclass that attnfuse does not know",
        "DTensor, NestedTensor, quantised and similar tensors give operators a meaning of their own.",
        "Apply attnfuse to the modules that see plain tensors.",
        "graph",
    ),
    "AF043": Code(
        "failed",
        "the rewritten graph could not be compiled",
        "Something downstream of attnfuse raised. The original graph was compiled instead.",
        "Please report it with the error; options={'strict': True} raises it with its traceback.",
        "graph",
    ),
    "AF044": Code(
        "failed",
        "the replacement differs from the original",
        "With options={'verify': True} both ran at small sizes and differ by too much. It was left as it was.",
        "Please report it with the model or the graph that options={'dump': DIR} writes.",
    ),
    "AF045": Code(
        "failed",
        "the backward graph could not be compiled",
        "Inductor raised when the backward was first needed, after the forward had run. The backward graph runs operator by"
        " operator instead: the gradients are right, it is slower.",
        "Please report it with the error; options={'strict': True} raises it with its traceback.",
        "graph",
    ),
    "AF050": Code(
        "note",
        "the mask comes from outside the graph",
        "The caller made it, or a graph break lies between, so it is read as data, its blocks found at run time.",
        "Compile a larger part of the model, so that the arithmetic of the mask is in the graph.",
    ),
    "AF051": Code(
        "note",
        "the mask is read as data",
        "What makes it could not be written as an expression of the indices; its blocks are found at run time.",
        "Nothing to do; a mask made of arange, comparisons, & and | would skip blocks without being read.",
    ),
    "AF052": Code(
        "note",
        "rows without any allowed key visit every key",
        "The mask's fill is finite, so such a row is the mean of all values; row tiles that hold one skip nothing.",
        "Nothing to do; with a boolean mask scaled_dot_product_attention makes such rows zero, and they are skipped.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Remark:
    """What became of one attention (or one graph).

    Args:
        kind: one of `KINDS`, that of the code.
        code: a key of `CODES`.
        module: path of the module in the model, "layers.0.self_attn"; "" where there is none.
        source: file:line of the model's code; "" where it is not known.
        score: text of the score program; "" where it was not read.
        template: the kernel that was chosen; "" where none was.
        facts: plain data (see the module's text); lists become tuples, what JSON cannot hold becomes its str().
        hint: what the user can do; "" for the code's own cure.

    Raises:
        ValueError: the code is not in `CODES`, is of another kind, or a fact is out of range.
    """

    kind: Kind
    code: str
    module: str = ""
    source: str = ""
    score: str = ""
    template: str = ""
    facts: Mapping[str, object] = field(default_factory=dict, hash=False)
    hint: str = ""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown remark code {self.code!r}; attnfuse.remark.CODES lists the known ones")
        if CODES[self.code].kind != self.kind:
            raise ValueError(
                f"a remark with code {self.code} is of the kind {CODES[self.code].kind!r}, not {self.kind!r}"
            )
        facts = cast(dict[str, object], _plain(self.facts))
        object.__setattr__(self, "facts", facts)
        skipped = facts.get("tiles_skipped", 0.0)
        if not isinstance(skipped, int | float) or not 0 <= skipped <= 1:
            raise ValueError(f"facts['tiles_skipped'] is {skipped!r}; it is a fraction from 0 to 1")
        for note in _texts(facts.get("notes")):
            if note not in CODES or CODES[note].kind != "note":
                raise ValueError(f"facts['notes'] holds {note!r}, which is no note code of attnfuse.remark.CODES")

    @classmethod
    def of(
        cls,
        code: str,
        *,
        module: str = "",
        source: str = "",
        score: str = "",
        template: str = "",
        hint: str = "",
        **facts: object,
    ) -> Self:
        """The remark with this code, its kind taken from `CODES`; other keywords are its facts."""
        kind = cast(Kind, CODES[code].kind) if code in CODES else "failed"
        return cls(
            kind=kind, code=code, module=module, source=source, score=score, template=template, facts=facts, hint=hint
        )

    @property
    def text(self) -> str:
        """One line: for a fused attention what it computes, else the code and its meaning."""
        if self.kind == "fused":
            skipped = _percentage(cast(float, self.facts.get("tiles_skipped", 0.0)))
            details = ", ".join(part for part in (skipped and f"{skipped} of tiles skipped", self.template) if part)
            return "  ".join(part for part in (self.score, details) if part) or CODES[self.code].meaning
        why = self.facts.get("why")
        return f"{self.code} {CODES[self.code].meaning}{f': {why}' if why else ''}"

    @property
    def details(self) -> tuple[tuple[str, str], ...]:
        """The lines below `text`, as (label, text)."""
        facts = self.facts
        lines: list[tuple[str, str]] = []
        if self.kind != "fused" and self.score:
            lines.append(("score", self.score))
        if "node" in facts:
            where = facts.get("node_source")
            lines.append(("at", f"`{facts['node']}`{f' ({where})' if where else ''}"))
        if seen := _texts(facts.get("seen")):
            lines.append(("seen", ", ".join(seen)))
        reasons = facts.get("reasons")
        if isinstance(reasons, Mapping):
            lines.extend((template, "; ".join(_texts(against))) for template, against in reasons.items())
        if "error" in facts:
            lines.append(("error", str(facts["error"])))
        lines.extend(("note", f"{note} {CODES[note].meaning}") for note in _texts(facts.get("notes")))
        if self.hint:
            lines.append(("hint", self.hint))
        elif self.kind in ("declined", "missed", "failed"):
            lines.append(("hint", CODES[self.code].cure))
        return tuple(lines)


@dataclass(frozen=True)
class Report:
    """The remarks of one or more graphs, in graph order. `str()` is for people, `to_json()` for programs.

    Args:
        remarks: all of them.
        versions: package → version, the header of the text; left out where empty.
        device: the last word of the header, "cpu" or "sm_90".
    """

    remarks: tuple[Remark, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    device: str = ""

    @property
    def fused(self) -> tuple[Remark, ...]:
        return self._of("fused")

    @property
    def kept(self) -> tuple[Remark, ...]:
        return self._of("kept")

    @property
    def declined(self) -> tuple[Remark, ...]:
        return self._of("declined")

    @property
    def missed(self) -> tuple[Remark, ...]:
        return self._of("missed")

    @property
    def failed(self) -> tuple[Remark, ...]:
        return self._of("failed")

    def _of(self, kind: Kind) -> tuple[Remark, ...]:
        return tuple(remark for remark in self.remarks if remark.kind == kind)

    @property
    def summary(self) -> str:
        """ "3 attentions: 1 fused, 1 declined, 1 missed"."""
        sites = [remark for remark in self.remarks if CODES[remark.code].scope == "site"]
        counts = [(kind, sum(remark.kind == kind for remark in sites)) for kind in KINDS]
        text = f"{_count(len(sites), 'attention')}: " if sites else "no attention found"
        text += ", ".join(f"{count} {kind}" for kind, count in counts if count)
        graphs = len(self.remarks) - len(sites)
        backward = sum(remark.code == "AF045" for remark in self.remarks)
        text += f"; {_count(graphs - backward, 'graph')} compiled as stock" if graphs > backward else ""
        return text + (f"; {_count(backward, 'backward')} not compiled" if backward else "")

    def merge(self, *others: Self) -> Self:
        """This report and the others as one; versions and device are those of the first that has them."""
        every = (self, *others)
        return type(self)(
            tuple(remark for report in every for remark in report.remarks),
            next((report.versions for report in every if report.versions), {}),
            next((report.device for report in every if report.device), ""),
        )

    def __str__(self) -> str:
        names = [f"{package} {version}" for package, version in self.versions.items()]
        header = ", ".join([*names, self.device] if self.device else names)
        lines = [f"{header}   {self.summary}" if header else self.summary]
        rows = _fold(self.remarks)
        kind_width = max(map(len, KINDS))
        module_width = max((len(row.module) for row in rows), default=0)
        source_width = max((len(_file_name(row.first.source)) for row in rows), default=0)
        for row in rows:
            remark = row.first
            columns = [f"{remark.kind:<{kind_width}}", f"{row.module:<{module_width}}"]
            if source_width:
                columns.append(f"{_file_name(remark.source):<{source_width}}")
            lines.append("  ".join([*columns, remark.text]))
            details = remark.details
            label_width = max((len(label) for label, _ in details), default=0)
            for label, text in details:
                first = f", first of {row.size}" if label == "at" and row.size > 1 else ""
                head, *more = f"{text}{first}".splitlines() or [""]
                lines.append(f"{'':{kind_width + 4}}{label:<{label_width}}  {head}")
                lines.extend(f"{'':{kind_width + 6 + label_width}}{line}" for line in more)
        return "\n".join(line.rstrip() for line in lines)

    def to_json(self, indent: int | None = None) -> str:
        """The whole report as JSON text; `from_json` gives an equal report back."""
        data = {
            "schema": _SCHEMA,
            "versions": dict(self.versions),
            "device": self.device,
            "remarks": [asdict(remark) for remark in self.remarks],
        }
        return json.dumps(data, indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: not JSON, another schema, or remarks that this version does not know.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != _SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else None
            raise ValueError(f"report has schema {found!r}; this version of attnfuse reads schema {_SCHEMA}")
        try:
            remarks = tuple(Remark(**remark) for remark in data["remarks"])
            return cls(remarks, dict(data["versions"]), data["device"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"report does not follow schema {_SCHEMA}: {error}") from error


_SCHEMA: Final = 1


def _plain(value: object) -> object:
    """As data that survives JSON: str, bool, int, finite float, None, tuples and str-keyed dicts of them."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, set | frozenset):
        return tuple(_plain(item) for item in sorted(value, key=str))
    return str(value)


def _texts(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, tuple) else (str(value),)


def _percentage(fraction: float) -> str:
    """In whole per cent, but only nothing reads as 0 (it is left out) and only all as 100."""
    if fraction == 0:
        return ""
    percent = round(fraction * 100)
    if percent == 0:
        return "< 1 %"
    return "> 99 %" if percent == 100 and fraction < 1 else f"{percent} %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _file_name(source: str) -> str:
    return re.split(r"[/\\]", source)[-1]


_Component = str | tuple[int, ...]


class _Row(NamedTuple):
    """A line of the text: layers that differ only in the numbers of their path."""

    path: tuple[_Component, ...]
    same: tuple[object, ...]
    first: Remark
    size: int

    @property
    def module(self) -> str:
        no_module = "(graph)" if CODES[self.first.code].scope == "graph" else "-"
        return ".".join(map(_component_text, self.path)) or no_module


def _fold(remarks: Iterable[Remark]) -> list[_Row]:
    """Remarks of the same text share a row if their module paths differ only in numbers, in every combination.

    Node names count as equal if only their running number differs. A module that comes twice gets two rows.
    """
    rows: list[_Row] = []
    for remark in remarks:
        path: tuple[_Component, ...] = tuple(
            (int(part),) if part.isdecimal() else part for part in remark.module.split(".")
        )
        text = [remark.text, *(" ".join(detail) for detail in remark.details)]
        same = (remark.kind, remark.source, *(_NODE_NUMBER.sub("`", line) for line in text))
        rows.append(_Row(path, same, remark, 1))
    for place in reversed(range(max((len(row.path) for row in rows), default=0))):
        folded: dict[tuple[object, ...], _Row] = {}
        for row in rows:
            numbers = row.path[place] if place < len(row.path) else ""
            if isinstance(numbers, str):
                folded[(len(folded),)] = row
                continue
            others = (row.path[:place], row.path[place + 1 :], row.same)
            for turn in itertools.count():
                like = folded.setdefault((*others, turn), row)
                if like is row:
                    break
                known = cast(tuple[int, ...], like.path[place])
                if not set(known) & set(numbers):
                    wider = (*row.path[:place], (*known, *numbers), *row.path[place + 1 :])
                    folded[*others, turn] = like._replace(path=wider, size=like.size + row.size)
                    break
        rows = list(folded.values())
    return rows


_NODE_NUMBER: Final = re.compile(r"(?<=\w)_\d+`")


def _component_text(component: _Component) -> str:
    """ "self_attn", "3", "0-11", "0,2..24" (every second one) or "0-3,7"."""
    if isinstance(component, str):
        return component
    numbers = sorted(component)
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]},{numbers[1]}..{numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
