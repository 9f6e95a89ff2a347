"""Remarks and reports: the table of codes, the text that people read (goldens), the JSON that programs read."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import expecttest
import pytest
from hypothesis import given
from hypothesis import strategies as st

import attnfuse
from attnfuse.remark import CODES, KINDS, Remark, Report

PACKAGE = Path(attnfuse.__file__).parent
CAUSAL = "s*0.125 where n <= m else +min"


def fused(module: str, **facts: object) -> Remark:
    return Remark.of(
        "AF000", module=module, source="zoo/modeling_llama.py:193", score=CAUSAL, template="flash", **facts
    )


def missed(module: str, node: str, **facts: object) -> Remark:
    return Remark.of(
        "AF021",
        module=module,
        source="/home/me/model.py:73",
        hint="set output_attentions=False",
        why=f"by `{node}` and by the graph's output (model.py:75)",
        node=node,
        node_source="model.py:75",
        seen=("q@k.T", "*0.125", "softmax", "@v"),
        **facts,
    )


DECLINED = Remark.of(
    "AF030",
    module="layers.1.attn",
    source="model.py:57",
    score="s*0.0625",
    reasons={"flash": ["head dim 288 > 256"], "decode": ["1024 queries > 32", "float64"]},
)


class TestCodes:
    def test_every_code_that_is_used_is_in_the_table(self) -> None:
        used = {
            (code, path.name)
            for path in PACKAGE.rglob("*.py")
            for code in re.findall(r"AF\d{3}", path.read_text(encoding="utf-8"))
        }
        assert {(code, name) for code, name in used if code not in CODES} == set()

    @pytest.mark.parametrize("name", CODES)
    def test_a_code_explains_itself(self, name: str) -> None:
        code = CODES[name]
        assert re.fullmatch(r"AF\d{3}", name)
        assert code.kind in (*KINDS, "note")
        for sentence in (code.cause, code.cure):
            assert sentence[0].isupper()
            assert sentence.endswith(".")
        # It follows the code, and a reason may follow it.
        assert code.meaning
        assert not code.meaning.endswith(".")
        assert "\n" not in code.meaning + code.cause + code.cure

    def test_meanings_are_distinct(self) -> None:
        assert len({code.meaning for code in CODES.values()}) == len(CODES)

    def test_every_kind_has_a_code(self) -> None:
        assert {code.kind for code in CODES.values()} == {*KINDS, "note"}


class TestRemark:
    def test_the_kind_follows_the_code(self) -> None:
        assert [Remark.of(code).kind for code in ("AF000", "AF001", "AF021", "AF030", "AF040")] == [
            "fused",
            "kept",
            "missed",
            "declined",
            "failed",
        ]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"kind": "missed", "code": "AF999"}, "'AF999'"),
            ({"kind": "fused", "code": "AF021"}, "AF021 is of the kind 'missed', not 'fused'"),
            ({"kind": "fused", "code": "AF050"}, "AF050 is of the kind 'note'"),
            ({"kind": "fused", "code": "AF000", "facts": {"tiles_skipped": 1.5}}, "1.5"),
            ({"kind": "fused", "code": "AF000", "facts": {"tiles_skipped": float("nan")}}, "nan"),
            ({"kind": "fused", "code": "AF000", "facts": {"notes": ("AF021",)}}, "'AF021'"),
        ],
    )
    def test_what_contradicts_the_table_is_refused(self, arguments: Any, said: str) -> None:
        with pytest.raises(ValueError, match=re.escape(said)):
            Remark(**arguments)

    def test_an_unknown_code_is_refused_by_of(self) -> None:
        with pytest.raises(ValueError, match="AF999"):
            Remark.of("AF999")

    def test_frozen_hashable_equal_by_value(self) -> None:
        one, other = fused("a", tiles_skipped=0.5), fused("a", tiles_skipped=0.5)
        assert one == other
        assert hash(one) == hash(other)
        assert one != fused("a", tiles_skipped=0.25)
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.module = "b"  # type: ignore[misc]

    def test_facts_become_plain_data_and_a_copy(self) -> None:
        class Symbolic:
            def __str__(self) -> str:
                return "s0"

        given_facts: dict[str, Any] = {"shape": [2, Symbolic()], "names": {"b", "a"}, "bound": float("inf")}
        remark = Remark(kind="fused", code="AF000", facts=given_facts)
        given_facts["shape"].append(3)
        assert remark.facts == {"shape": (2, "s0"), "names": ("a", "b"), "bound": "inf"}


class TestText(expecttest.TestCase):
    def test_a_report_of_each_kind(self) -> None:
        report = Report(
            (
                fused("layers.0.attn", tiles_skipped=0.5),
                DECLINED,
                missed("layers.2.attn", "bmm_5"),
                Remark.of("AF001", module="vision.attn", source="model.py:12"),
                Remark.of("AF040", module="layers.3.attn", source="model.py:80", error="KeyError: 'dim'\n  in peel"),
                Remark.of("AF041", error="RuntimeError: cannot trace"),
            ),
            {"attnfuse": "0.1.0", "torch": "2.13.0", "triton": "3.7.0"},
            "cpu",
        )
        self.assertExpectedInline(
            str(report),
            """\
attnfuse 0.1.0, torch 2.13.0, triton 3.7.0, cpu   5 attentions: 1 fused, 1 kept, 1 declined, 1 missed, 1 failed; 1 graph compiled as stock
fused     layers.0.attn  modeling_llama.py:193  s*0.125 where n <= m else +min  50 % of tiles skipped, flash
declined  layers.1.attn  model.py:57            AF030 no template takes this attention
            score   s*0.0625
            flash   head dim 288 > 256
            decode  1024 queries > 32; float64
            hint    See the reasons, one line for each template; sizes and types within their limits are taken.
missed    layers.2.attn  model.py:73            AF021 the attention weights are used elsewhere: by `bmm_5` and by the graph's output (model.py:75)
            at    `bmm_5` (model.py:75)
            seen  q@k.T, *0.125, softmax, @v
            hint  set output_attentions=False
kept      vision.attn    model.py:12            AF001 this scaled_dot_product_attention is IO-aware already
failed    layers.3.attn  model.py:80            AF040 a pass raised an exception at this attention
            error  KeyError: 'dim'
                     in peel
            hint   Please report it with the error; options={'strict': True} raises it with its traceback.
failed    (graph)                               AF041 the graph could not be normalised
            error  RuntimeError: cannot trace
            hint   Compile the submodules that hold the attention by themselves; options={'strict': True} raises the error.""",
        )

    def test_layers_that_are_alike_share_a_line(self) -> None:
        report = Report(
            (
                *(fused(f"model.layers.{layer}.self_attn", tiles_skipped=0.47) for layer in range(12)),
                *(missed(f"model.layers.{layer}.self_attn", f"bmm_{2 * layer + 1}") for layer in (12, 13)),
            )
        )
        self.assertExpectedInline(
            str(report),
            """\
14 attentions: 12 fused, 2 missed
fused     model.layers.0-11.self_attn   modeling_llama.py:193  s*0.125 where n <= m else +min  47 % of tiles skipped, flash
missed    model.layers.12-13.self_attn  model.py:73            AF021 the attention weights are used elsewhere: by `bmm_25` and by the graph's output (model.py:75)
            at    `bmm_25` (model.py:75), first of 2
            seen  q@k.T, *0.125, softmax, @v
            hint  set output_attentions=False""",
        )

    def test_layers_that_alternate_share_two_lines(self) -> None:
        window = dataclasses.replace(fused(""), score="s*0.125 where n <= m & n > m - 4096 else +min")
        report = Report(
            tuple(
                dataclasses.replace(window if layer % 2 == 0 else fused(""), module=f"layers.{layer}.attn")
                for layer in range(26)
            )
        )
        self.assertExpectedInline(
            str(report),
            """\
26 attentions: 26 fused
fused     layers.0,2..24.attn  modeling_llama.py:193  s*0.125 where n <= m & n > m - 4096 else +min  flash
fused     layers.1,3..25.attn  modeling_llama.py:193  s*0.125 where n <= m else +min  flash""",
        )

    def test_two_numbers_in_a_path(self) -> None:
        report = Report(
            (
                *(fused(f"layers.{stage}.blocks.{block}.attn") for stage in range(2) for block in range(3)),
                *(fused(f"layers.2.blocks.{block}.attn") for block in (0, 1, 4)),
            )
        )
        self.assertExpectedInline(
            str(report),
            """\
9 attentions: 9 fused
fused     layers.0-1.blocks.0-2.attn  modeling_llama.py:193  s*0.125 where n <= m else +min  flash
fused     layers.2.blocks.0-1,4.attn  modeling_llama.py:193  s*0.125 where n <= m else +min  flash""",
        )

    def test_what_differs_is_not_folded(self) -> None:
        report = Report(
            (
                fused("layers.0.attn", tiles_skipped=0.5),
                fused("layers.1.attn", tiles_skipped=0.25),
                fused("layers.2.cross"),
                missed("layers.3.attn", "bmm_5"),
                missed("layers.4.attn", "copy_5"),
                fused("layers.0.attn", tiles_skipped=0.5),
            )
        )
        self.assertExpectedInline(
            str(report),
            """\
6 attentions: 4 fused, 2 missed
fused     layers.0.attn   modeling_llama.py:193  s*0.125 where n <= m else +min  50 % of tiles skipped, flash
fused     layers.1.attn   modeling_llama.py:193  s*0.125 where n <= m else +min  25 % of tiles skipped, flash
fused     layers.2.cross  modeling_llama.py:193  s*0.125 where n <= m else +min  flash
missed    layers.3.attn   model.py:73            AF021 the attention weights are used elsewhere: by `bmm_5` and by the graph's output (model.py:75)
            at    `bmm_5` (model.py:75)
            seen  q@k.T, *0.125, softmax, @v
            hint  set output_attentions=False
missed    layers.4.attn   model.py:73            AF021 the attention weights are used elsewhere: by `copy_5` and by the graph's output (model.py:75)
            at    `copy_5` (model.py:75)
            seen  q@k.T, *0.125, softmax, @v
            hint  set output_attentions=False
fused     layers.0.attn   modeling_llama.py:193  s*0.125 where n <= m else +min  50 % of tiles skipped, flash""",
        )

    def test_notes_and_the_default_hint(self) -> None:
        report = Report(
            (
                fused("attn", notes=("AF050",)),
                Remark.of("AF022", node="softmax", why="it runs over dimension 1 of [B, H, M, N]"),
            )
        )
        self.assertExpectedInline(
            str(report),
            """\
2 attentions: 1 fused, 1 missed
fused     attn  modeling_llama.py:193  s*0.125 where n <= m else +min  flash
            note  AF050 the mask comes from outside the graph
missed    -                            AF022 the softmax does not run over the keys: it runs over dimension 1 of [B, H, M, N]
            at    `softmax`
            hint  If attention is meant, take the softmax over the dimension that the value matmul sums over, usually dim=-1.""",
        )

    def test_nothing_found(self) -> None:
        self.assertExpectedInline(str(Report()), """no attention found""")
        self.assertExpectedInline(
            str(Report(versions={"attnfuse": "0.1.0"})), """attnfuse 0.1.0   no attention found"""
        )

    def test_percentages_do_not_round_to_nothing_or_all(self) -> None:
        fractions = (0.0, 0.001, 0.25, 0.999, 1.0)
        texts = "\n".join(Remark.of("AF000", template="flash", tiles_skipped=part).text for part in fractions)
        self.assertExpectedInline(
            texts,
            """\
flash
< 1 % of tiles skipped, flash
25 % of tiles skipped, flash
> 99 % of tiles skipped, flash
100 % of tiles skipped, flash""",
        )


class TestReport:
    def test_kinds_in_graph_order(self) -> None:
        remarks = (fused("a"), DECLINED, fused("b"), Remark.of("AF001"), Remark.of("AF040"), missed("c", "x"))
        report = Report(remarks)
        assert report.remarks == remarks
        assert report.fused == (remarks[0], remarks[2])
        assert report.declined == (DECLINED,)
        assert report.kept == (remarks[3],)
        assert report.failed == (remarks[4],)
        assert report.missed == (remarks[5],)

    def test_a_graph_is_not_counted_as_an_attention(self) -> None:
        assert Report((fused("a"), Remark.of("AF043"))).summary == "1 attention: 1 fused; 1 graph compiled as stock"

    def test_merge(self) -> None:
        one = Report((fused("a"),))
        other = Report((DECLINED,), {"torch": "2.13.0"}, "sm_90")
        merged = one.merge(other, Report((fused("c"),), {"torch": "2.11.0"}, "cpu"))
        assert merged == Report((fused("a"), DECLINED, fused("c")), {"torch": "2.13.0"}, "sm_90")
        assert one == Report((fused("a"),))

    def test_json_is_the_public_form(self) -> None:
        data = json.loads(Report((fused("a", tiles_skipped=0.5),), {"torch": "2.13.0"}, "cpu").to_json())
        assert data == {
            "schema": 1,
            "versions": {"torch": "2.13.0"},
            "device": "cpu",
            "remarks": [
                {
                    "kind": "fused",
                    "code": "AF000",
                    "module": "a",
                    "source": "zoo/modeling_llama.py:193",
                    "score": CAUSAL,
                    "template": "flash",
                    "facts": {"tiles_skipped": 0.5},
                    "hint": "",
                }
            ],
        }

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            '{"schema": 2}',
            '{"schema": 1}',
            '{"schema": 1, "versions": {}, "device": "", "remarks": [{"codes": 1}]}',
            '{"schema": 1, "versions": {}, "device": "", "remarks": [{"kind": "missed", "code": "AF999"}]}',
        ],
    )
    def test_json_of_another_kind_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"schema|AF999|Expecting value"):
            Report.from_json(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=8,
)
REMARKS = st.builds(
    lambda code, module, texts, values: Remark(
        kind=CODES[code].kind,  # type: ignore[arg-type]
        code=code,
        module=module,
        source=texts[0],
        score=texts[1],
        template=texts[2],
        hint=texts[3],
        facts=values,
    ),
    st.sampled_from([code for code in CODES if CODES[code].kind != "note"]),
    st.from_regex(r"([a-c]|[0-3])(\.([a-c]|[0-3])){0,3}", fullmatch=True) | st.just("") | st.text(),
    st.tuples(st.text(), st.text(), st.text(), st.text()),
    st.dictionaries(st.text() | st.sampled_from(["node", "why", "seen", "reasons", "error"]), VALUES, max_size=4).map(
        lambda facts: {key: value for key, value in facts.items() if key not in ("tiles_skipped", "notes")}
    ),
)


@given(st.lists(REMARKS, max_size=6))
def test_json_gives_the_report_back(remarks: list[Remark]) -> None:
    report = Report(tuple(remarks), {"torch": "2.13.0"}, "cpu")
    assert Report.from_json(report.to_json()) == report
    assert str(report)


MODULES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda pair: f"layers.{pair[0]}.blocks.{pair[1]}"), max_size=20
)


@given(MODULES)
def test_folding_loses_and_invents_no_module(modules: list[str]) -> None:
    lines = str(Report(tuple(fused(module) for module in modules))).splitlines()[1:]
    shown = [module for line in lines for module in expand(line.split()[1])]
    assert sorted(shown) == sorted(modules)


def expand(text: str) -> list[str]:
    """`layers.0-1.blocks.0,2..4` → the modules that it stands for."""
    _, first, _, second = re.split(r"(?<!\.)\.(?!\.)", text)
    return [f"layers.{one}.blocks.{other}" for one in numbers(first) for other in numbers(second)]


def numbers(text: str) -> list[int]:
    if stepped := re.fullmatch(r"(\d+),(\d+)\.\.(\d+)", text):
        start, second, last = map(int, stepped.groups())
        return list(range(start, last + 1, second - start))
    runs = [[int(number) for number in run.split("-")] for run in text.split(",")]
    return [number for run in runs for number in range(run[0], run[-1] + 1)]
