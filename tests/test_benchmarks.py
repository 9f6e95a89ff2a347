"""The benchmarks' statistics, gate and results; the demo's parts. Nothing is timed here."""

import contextlib
import dataclasses
import importlib.util
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import __main__ as command_line
from benchmarks import cases, gate, machine, plots, results, stats
from benchmarks.cases import CASES, Growth, Outcome, Row, Setting, Speed
from benchmarks.memory import peak_bytes
from benchmarks.process import Process
from benchmarks.results import Result
from benchmarks.sparse import MASKS, Sparse
from benchmarks.stats import Estimate, Target
from benchmarks.subjects import VARIANTS, Pass, Variant, attention, attention_call, attention_inputs
from tests.numerics import assert_close

ROOT = Path(__file__).parent.parent
OURS, STOCK = ("attnfuse-eager", "attnfuse-sdpa"), ("stock-eager", "stock-sdpa")
AT_LEAST = Target("at least", 1.25)
AT_MOST = Target("at most", 1.15)


def loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SAMPLES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20)


class TestStats:
    @given(SAMPLES)
    def test_the_interval_holds_the_median_and_lies_among_the_samples(self, samples: list[float]) -> None:
        value, lower, upper = stats.median(samples)
        assert min(samples) * (1 - 1e-12) <= lower <= value <= upper <= max(samples) * (1 + 1e-12)
        assert stats.median(samples) == (value, lower, upper)

    def test_one_sample_has_no_width(self) -> None:
        assert stats.median([2.0]) == Estimate(2.0, 2.0, 2.0)
        with pytest.raises(ValueError, match="at least one sample"):
            stats.median([])

    def test_the_interval_covers_as_often_as_it_says(self) -> None:
        generator = torch.Generator().manual_seed(0)
        draws = (1 + 0.1 * torch.randn(300, 15, generator=generator, dtype=torch.float64)).tolist()
        covered = sum(lower <= 1 <= upper for _, lower, upper in map(stats.median, draws))
        assert 0.9 <= covered / len(draws) <= 0.99

    def test_ratios_are_of_pairs(self) -> None:
        # The machine slows down fourfold halfway; the pairs do not notice, the medians of each side would.
        ours, theirs = [1.0, 1.0, 1.0, 4.0, 4.0], [2.0, 2.0, 2.0, 8.0, 8.0]
        assert stats.speed_up(ours, theirs) == Estimate(2.0, 2.0, 2.0)
        assert stats.share(ours, theirs) == Estimate(50.0, 50.0, 50.0)
        assert stats.difference([3.0], [1.0]).value == 2.0
        with pytest.raises(ValueError, match="argument"):
            stats.speed_up([1.0], [1.0, 2.0])

    @pytest.mark.parametrize(
        ("target", "estimate", "verdict"),
        [
            (AT_LEAST, (1.4, 1.25, 1.5), "pass"),
            (AT_LEAST, (1.4, 1.24, 1.5), "not shown"),
            (AT_LEAST, (1.2, 1.1, 1.25), "not shown"),
            (AT_LEAST, (1.2, 1.1, 1.24), "fail"),
            (AT_MOST, (1.1, 1.0, 1.15), "pass"),
            (AT_MOST, (1.1, 1.0, 1.16), "not shown"),
            (AT_MOST, (1.3, 1.15, 1.4), "not shown"),
            (AT_MOST, (1.3, 1.16, 1.4), "fail"),
            (AT_MOST, (-2.0, -3.0, -1.0), "pass"),
        ],
    )
    def test_verdict(self, target: Target, estimate: tuple[float, float, float], verdict: str) -> None:
        assert target.verdict(Estimate(*estimate)) == verdict


EXACT = {"out": torch.linspace(-1, 1, 64, dtype=torch.float64)}
ORIGINAL = {"out": EXACT["out"].bfloat16()}


class TestGate:
    def test_what_is_as_good_as_the_original_passes(self) -> None:
        assert gate.fault(ORIGINAL, ORIGINAL, EXACT) == ""

    def test_what_is_wrong_is_named(self) -> None:
        wrong = ORIGINAL["out"].clone()
        wrong[3] += 0.25
        assert re.match("out: error .* above the limit", gate.fault({"out": wrong}, ORIGINAL, EXACT))

    def test_nothing_is_no_result(self) -> None:
        assert "differ in what they hold" in gate.fault({}, {}, {})
        assert "differ in what they hold" in gate.fault({}, ORIGINAL, EXACT)

    def test_gradients_are_judged_by_their_terms(self) -> None:
        wrong = {"out": ORIGINAL["out"] + 0.25}
        assert gate.fault(wrong, ORIGINAL, EXACT) != ""
        assert gate.fault(wrong, ORIGINAL, {**EXACT, f"{gate.SCALE}out": torch.tensor(100.0)}) == ""

    def test_a_red_gate_leaves_no_speed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        case, timed = simulated(monkeypatch, {"attnfuse-eager": 0.25, "attnfuse-sdpa": 0.0})
        outcome = case.measure("case", Setting(4, 2, tmp_path, lambda _: None))
        assert [(row.verdict, row.estimate is None) for row in outcome.rows] == [
            ("wrong results", True),
            ("pass", False),
        ]
        assert "above the limit" in outcome.rows[0].note
        assert "attnfuse-eager" not in outcome.samples
        assert set(timed) == {"eager", *STOCK, "attnfuse-sdpa"}

    def test_a_green_gate_compares_with_the_better_stock(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        case, _ = simulated(monkeypatch, {})
        outcome = case.measure("case", Setting(4, 2, tmp_path, lambda _: None))
        assert [row.figure for row in outcome.rows] == [f"{ours} over stock-sdpa" for ours in OURS]
        assert [row.estimate and row.estimate.value for row in outcome.rows] == [2.0, 2.0]
        assert all(len(values) == 4 for values in outcome.samples.values())


def simulated(monkeypatch: pytest.MonkeyPatch, errors: Mapping[str, float]) -> tuple[Speed, list[str]]:
    """A case whose processes are simulated: stock-sdpa takes 2 s, ours 1 s, the others more; results are off by `errors`."""
    seconds = {"eager": 9.0, "stock-eager": 3.0, "stock-sdpa": 2.0} | dict.fromkeys(OURS, 1.0)
    timed: list[str] = []

    class Simulated:
        def __init__(self, variant: str) -> None:
            self.variant = variant

        def __enter__(self) -> "Simulated":
            return self

        def __exit__(self, *_: object) -> None: ...

        def ask(self, command: str) -> dict[str, float]:
            name, _, file = command.partition(" ")
            if name == "time":
                timed.append(self.variant)
                return {"seconds": seconds[self.variant]}
            assert name == "results"
            exact = torch.linspace(-1, 1, 64, dtype=torch.float64)
            out = exact if VARIANTS[self.variant].exact else exact.float() + errors.get(self.variant, 0.0)
            torch.save({"out": out}, file)
            return {}

    monkeypatch.setattr(cases, "_worker", lambda setting, name, variant: Simulated(variant))
    case = CASES["prefill-causal-bf16"]
    assert isinstance(case, Speed)
    return case, timed


def outcome() -> Outcome:
    estimate = Estimate(1.4, 1.3, 1.5)
    rows = (Row.of("a over b", "x", estimate, AT_LEAST), Row("c over b", "x", None, AT_LEAST, "wrong results", "why"))
    return Outcome(rows, {"a": [1.0, 1.5e-7], "b": [2.0, 3.0]})


def result(**changes: object) -> Result:
    kept = Result("case", "about", outcome(), 15, "2026-01-01", "abc", {"cpu": "A B", "cores": 2}, {"torch": "2.13.0"})
    return dataclasses.replace(kept, **changes)  # type: ignore[arg-type]


class TestGrowth:
    @pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
    def test_the_slope_is_the_exponent(self, exponent: float) -> None:
        sizes = (4096, 8192, 65536)
        assert stats.slope(sizes, [3.0 * n**exponent for n in sizes]) == pytest.approx(exponent)

    @pytest.mark.parametrize("mask", MASKS)
    def test_some_rows_and_keys_are_those_of_the_whole(self, mask: str) -> None:
        subject = Sparse(mask, 320, training=True, dtype=torch.float32)
        rows, keys = torch.arange(0, 320, 61), torch.tensor([0, 100, 319])
        found = subject.some(rows, keys, torch.float32)
        original, exact = (subject.step(Variant("eager", None, exact))() for exact in (False, True))
        for at, name, mine, theirs in zip((rows, rows, keys, keys), found, original, exact, strict=True):
            whole = theirs.detach()
            assert_close(found[name], mine[:, :, at], whole[:, :, at], float(whole.abs().max()), what=name)

    @pytest.mark.parametrize("error", [0.0, 0.25])
    def test_a_case_is_judged_by_its_rows_first(
        self, error: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        class Simulated(contextlib.nullcontext[Any]):
            def __init__(self, length: str) -> None:
                super().__init__(self)
                self.length = int(length)

            def ask(self, command: str) -> dict[str, float]:
                name, _, file = command.partition(" ")
                if name == "results":
                    torch.save(({"out": EXACT["out"].float() + error}, {"out": EXACT["out"].float()}, EXACT), file)
                return {"time": {"seconds": self.length / 4096}, "memory": {"bytes": 2**31}}.get(name, {})

        monkeypatch.setattr(cases, "_worker", lambda setting, name, variant: Simulated(variant))
        case = CASES["growth-longformer"]
        assert isinstance(case, Growth)
        outcome = case.measure("growth-longformer", Setting(3, 1, tmp_path, lambda _: None))
        if error:
            assert [row.verdict for row in outcome.rows] == ["wrong results"]
            return
        assert [row.estimate and round(row.estimate.value, 6) for row in outcome.rows] == [1.0, 16.0, 2.0]
        assert [row.verdict for row in outcome.rows] == ["pass", "", "pass"]
        file = tmp_path / "growth.svg"
        plots.draw(result(outcome=outcome), file)
        assert "exponent 1.00" in file.read_text()


class TestResults:
    def test_json_gives_the_result_back(self, tmp_path: Path) -> None:
        file = results.path(tmp_path, result().machine, "case")
        assert file == tmp_path / "a-b-2-cores" / "case.json"
        assert results.load(file) is None
        results.save(result(), file)
        assert results.load(file) == result()
        assert [entry.name for entry in file.parent.iterdir()] == ["case.json"]

    def test_another_schema_is_no_result(self, tmp_path: Path) -> None:
        file = tmp_path / "case.json"
        file.write_text(json.dumps({**json.loads(result().to_json()), "schema": 0}))
        assert results.load(file) is None

    @pytest.mark.parametrize(
        ("changes", "holds"),
        [
            ({}, True),
            ({"date": "2026-01-02", "outcome": Outcome(())}, True),
            ({"commit": "abd"}, False),
            ({"pairs": 3}, False),
            ({"starts": 1}, False),
            ({"machine": {"cpu": "A B", "cores": 4}}, False),
            ({"versions": {"torch": "2.12.0"}}, False),
        ],
    )
    def test_a_result_holds_for_the_same_measurement(self, changes: dict[str, object], holds: bool) -> None:
        assert result().still_holds(result(**changes)) is holds

    @pytest.mark.parametrize("commit", ["", "abc+"])
    def test_a_result_of_an_unknown_tree_does_not_hold(self, commit: str) -> None:
        assert not result(commit=commit).still_holds(result(commit=commit))

    def test_nothing_names_the_computer(self) -> None:
        import getpass
        import platform

        text = json.dumps([machine.machine(), machine.versions(), machine.commit()])
        assert str(Path.home()) not in text
        assert str(ROOT) not in text
        assert "/" not in text
        for name in (platform.node(), getpass.getuser()):
            assert name not in re.findall(r"[\w.-]+", text)

    def test_committed_results_say_what_their_samples_say(self) -> None:
        for file in results.FOLDER.glob("*/*.json"):
            kept = results.load(file)
            assert kept is not None, file
            assert kept.case == file.stem
            assert results.path(results.FOLDER, kept.machine, kept.case) == file
            assert kept.pairs >= 15
            for row in kept.outcome.rows:
                if row.estimate is not None:
                    assert row.verdict == (row.target.verdict(row.estimate) if row.target else "")
            case = CASES.get(kept.case)
            if isinstance(case, Speed):
                samples = kept.outcome.samples
                best = min(case.stock, key=lambda name: stats.median(samples[name]).value)
                compared: dict[str, set[str]] = {}
                for row in kept.outcome.rows:
                    ours, over, other = row.figure.partition(" over ")
                    if not over:
                        assert row.estimate == pytest.approx(stats.median(samples["flex mask"]))
                        continue
                    compared.setdefault(ours, set()).add(other)
                    if row.estimate is not None:
                        assert row.estimate == pytest.approx(stats.speed_up(samples[ours], samples[other]))
                assert compared.keys() == set(case.ours)
                for ours, others in compared.items():
                    right = any(row.estimate for row in kept.outcome.rows if row.figure.startswith(f"{ours} over "))
                    assert others == ({best, *case.peers} if right else {best}), kept.case


class TestCommandLine:
    def test_cases_are_selected_by_part_of_their_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert command_line.main(["--list", "--only", "prefill-padded", "--only", "compile"]) == 0
        shown = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith(" ")]
        assert shown == ["prefill-padded-bf16", "prefill-padded-fp32", "compile"]

    def test_an_unknown_case_is_an_error_that_names_those_there_are(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            command_line.main(["--only", "prefil-padded"])
        assert "no case holds 'prefil-padded'; there are prefill-causal-bf16," in capsys.readouterr().err

    def test_results_are_written_at_once_and_not_measured_again(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        measured: list[str] = []

        def measure(self: object, name: str, setting: Setting) -> Outcome:
            measured.append(name)
            if name == "overhead-training":
                raise KeyboardInterrupt
            return outcome()

        monkeypatch.setattr(cases.Overhead, "measure", measure)
        monkeypatch.setattr(machine, "commit", lambda: "abc")
        arguments = ["--only", "overhead", "--out", str(tmp_path)]
        with pytest.raises(KeyboardInterrupt):
            command_line.main(arguments)
        monkeypatch.setattr(cases.Overhead, "measure", lambda self, name, setting: measured.append(name) or outcome())
        assert command_line.main(arguments) == 1  # for the row of wrong results
        assert measured == ["overhead-forward", "overhead-training", "overhead-training"]
        assert command_line.main([*arguments, "--again"]) == 1
        assert measured[3:] == ["overhead-forward", "overhead-training"]
        capsys.readouterr()
        assert command_line.main(["--show", "--out", str(tmp_path)]) == 0
        assert "1.30 to 1.50" in capsys.readouterr().out

    def test_fewer_starts_are_recorded_and_do_not_hold_for_more(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        starts: list[int] = []

        def measure(self: Speed, name: str, setting: Setting) -> Outcome:
            starts.append(setting.starts)
            return outcome()

        monkeypatch.setattr(Speed, "measure", measure)
        monkeypatch.setattr(machine, "commit", lambda: "abc")
        arguments = ["--only", "model-gpt-neox", "--out", str(tmp_path)]
        for more in (["--starts", "1"], ["--starts", "1"], [], ["--starts", "9"]):
            command_line.main([*arguments, *more])
        assert dict.fromkeys(starts) == {1: None, 2: None}
        assert [json.loads(file.read_text())["starts"] for file in tmp_path.glob("*/model-gpt-neox.json")] == [2]
        with pytest.raises(SystemExit):
            command_line.main([*arguments, "--starts", "0"])

    def test_a_quick_run_writes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[Path] = []
        monkeypatch.setattr(results, "save", lambda result, file: written.append(file))
        monkeypatch.setattr(cases.Overhead, "measure", lambda self, name, setting: outcome())
        command_line.main(["--quick", "--only", "overhead"])
        assert written == []


class TestSubjects:
    def test_attention_is_that_of_the_library(self) -> None:
        q, k, v, allowed = attention_inputs(64, torch.float32, training=False)
        mask = torch.ones(64, 64, dtype=torch.bool).tril() & allowed[:, None, None, :]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(attention(q, k, v, allowed)[:, :, 8:], expected[:, :, 8:])

    def test_a_training_call_goes_through_the_backward(self) -> None:
        forward, training = (
            peak_bytes(attention_call(None, attention_inputs(128, torch.float32, training=training)))
            for training in (False, True)
        )
        assert forward >= 8 * 128 * 128 * 4
        assert training > forward

    @pytest.mark.parametrize("training", [False, True])
    def test_results_hold_what_the_gate_needs(self, training: bool) -> None:
        subject = Pass(training, batch=2, tokens=16, padded=4, mask=True, dtype=torch.bfloat16)
        found: list[dict[str, Tensor]] = []
        for name in ("eager", "eager-float64"):
            _, values = subject.start(VARIANTS[name])
            found.append(values())
        assert found[0].keys() == found[1].keys()
        assert {x.dtype for name, x in found[1].items() if name != "loss"} == {torch.float64}
        assert any(name.endswith("k_proj.weight") for name in found[0]) if training else "keys" in found[0]
        assert all(0 < float(x.abs().max()) < math.inf for x in found[1].values())
        assert gate.fault(found[0], found[0], found[1]) == ""

    def test_every_target_of_the_project_is_measured(self) -> None:
        bounds = {name: case.target.bound for name, case in CASES.items() if isinstance(case, Speed) and case.target}
        assert {name: bounds[name] for name in bounds if name.startswith("prefill-padded")} == {
            "prefill-padded-bf16": 1.25,
            "prefill-padded-fp32": 1.15,
        }
        assert {bound for name, bound in bounds.items() if name.startswith("training-")} == {1.1}
        assert {bound for name, bound in bounds.items() if name.startswith("short")} == {0.97}


class TestMemory:
    def test_what_is_alive_at_once_counts(self) -> None:
        kilobyte = 256

        def call() -> Tensor:
            a = torch.zeros(100 * kilobyte)
            b = a + 1  # 200 KiB alive
            del a
            c = b + 1  # 200 KiB again
            del b
            return c

        assert 200 * 1024 <= peak_bytes(call) < 205 * 1024

    def test_what_was_alive_before_does_not(self) -> None:
        before = torch.zeros(1 << 20)
        assert peak_bytes(before.sum) < 1 << 20


class TestProcess:
    def test_answers(self, tmp_path: Path) -> None:
        code = "from benchmarks.process import serve\ndef start():\n print('noise'); return {'a': 1}, {'twice': lambda x: {'b': 2 * int(x)}}\nserve(start)"
        with Process(["-c", code], tmp_path) as process:
            assert process.first == {"a": 1}
            assert process.ask("twice 21") == {"b": 42}
            with pytest.raises(
                RuntimeError, match=r"ended with status 1(.|\n)*unknown command 'thrice'; known are twice"
            ):
                process.ask("thrice 1")

    def test_a_process_that_fails_says_why(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match=r"status 1(.|\n)*out of order"):
            Process(["-c", "raise SystemExit('out of order')"], tmp_path)


class TestDemo:
    def test_the_model_is_what_the_demonstration_says(self) -> None:
        demo = loaded("examples/demo.py")
        with torch.device("meta"):
            model = demo.LlamaForCausalLM(demo.LlamaConfig(**demo.CONFIG))
        assert sum(parameter.numel() for parameter in model.parameters()) >= 100e6
        assert demo.CONFIG["num_key_value_heads"] < demo.CONFIG["num_attention_heads"]
        inputs = demo.batch("cpu")
        assert inputs["input_ids"].shape == (2, 2048)
        assert inputs["attention_mask"].sum(1).tolist() == [2048 - demo.PADDED, 2048]
        assert int(inputs["attention_mask"][0, : demo.PADDED].sum()) == 0
        kept = inputs["logits_to_keep"]
        assert int((kept < demo.PADDED).sum()) > 0
        assert int(kept[-1]) == 2047

    def test_errors_above_the_limit_are_seen(self, capsys: pytest.CaptureFixture[str]) -> None:
        demo = loaded("examples/demo.py")
        reference = torch.randn(2, len(demo.POSITIONS), 8, generator=torch.Generator().manual_seed(0))
        eager = reference.bfloat16()

        def measured(ours: Tensor) -> dict[str, object]:
            return {
                name: demo.Measured([1.0], 1, ours if name == "attnfuse" else eager, None, None)
                for name in demo.VARIANTS
            }

        console = demo.Console(width=120)
        assert demo.show_errors(console, measured(eager), reference)
        wrong = eager.clone()
        wrong[1, 5, 3] = math.nan
        assert not demo.show_errors(console, measured(wrong), reference)
        assert not demo.show_errors(console, measured(eager + 0.5), reference)
        assert "ABOVE" in capsys.readouterr().out
        demo.show_times(console, measured(eager))
        assert "stock-sdpa" in capsys.readouterr().out
