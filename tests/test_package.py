"""The package as its users meet it: names, entry point, logging, command line, make targets."""

import importlib.metadata
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

import attnfuse
from attnfuse import __main__ as command_line
from attnfuse.remark import CODES, Remark, Report

ROOT = Path(attnfuse.__file__).parent.parent


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


class TestNames:
    @pytest.mark.parametrize("name", attnfuse.__all__)
    def test_every_public_name_is_there(self, name: str) -> None:
        value = getattr(attnfuse, name)
        assert not isinstance(value, ModuleType)
        assert inspect.getdoc(value)
        assert name in dir(attnfuse)

    def test_another_name_is_refused_with_those_there_are(self) -> None:
        with pytest.raises(AttributeError, match=r"no attribute 'explian'.*explain"):
            attnfuse.explian  # noqa: B018

    def test_a_function_is_not_shadowed_by_its_submodule(self) -> None:
        answer = python(
            "-c", "import attnfuse.explain as one, sys; from attnfuse.explain import explain; import attnfuse; "
            "assert attnfuse.explain is explain is one; assert attnfuse.explain is not sys.modules['attnfuse.explain']",
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr

    def test_version_is_that_of_the_installation(self) -> None:
        assert attnfuse.__version__ == importlib.metadata.version("attnfuse")

    def test_typed(self) -> None:
        assert (Path(attnfuse.__file__).parent / "py.typed").is_file()


class TestTorch:
    def test_torch_lists_the_backend_without_an_import(self) -> None:
        answer = python("-c", "import torch; print(*torch.compiler.list_backends())")
        assert "attnfuse" in answer.stdout.split(), answer.stderr

    def test_torch_logs_reaches_every_module(self) -> None:
        code = "import torch, logging; print(logging.getLogger('attnfuse.passes.peel').getEffectiveLevel())"
        answer = python("-c", code, TORCH_LOGS="+attnfuse")
        assert answer.stdout.split() == ["10"], answer.stderr


class TestEnv:
    def test_it_names_the_versions(self) -> None:
        out = io.StringIO()
        command_line.print_environment(out)
        facts = dict(re.findall(r"^(.{15}\S*) *(.+)$", out.getvalue(), re.MULTILINE))
        facts = {name.strip(): value.strip() for name, value in facts.items()}
        for package in ("attnfuse", "torch", "sympy"):
            assert facts[package] == importlib.metadata.version(package)
        assert facts["torch imports"].startswith("yes, ")
        assert facts["entry point"] == "attnfuse.backend:attnfuse"

    def test_it_prints_whatever_is_broken(self, tmp_path: Path) -> None:
        (tmp_path / "torch.py").write_text("import os\nos.abort()")
        (tmp_path / "triton.py").write_text("raise SystemError('built for another machine')")
        answer = python("-m", "attnfuse", "env", PYTHONPATH=str(tmp_path), CXX="/nowhere/c++")
        assert answer.returncode == 0, answer.stderr
        lines = answer.stdout.splitlines()
        assert any(re.match(r"torch imports +no: .*(status -?\d+|Abort)", line) for line in lines), answer.stdout
        assert any(re.match(r"triton imports +no: SystemError: built for another machine", line) for line in lines)
        assert any(re.match(r"backend loads +no: ", line) for line in lines)

    def test_a_package_without_metadata(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command_line, "PACKAGES", ("no-such-package",))
        monkeypatch.setattr(command_line, "_probe", lambda title, code: [])
        out = io.StringIO()
        command_line.print_environment(out)
        assert re.search(r"^no-such-package *not known \(PackageNotFoundError", out.getvalue())

    def test_a_probe_that_hangs(self) -> None:
        ((title, text),) = command_line._probe("torch imports", "import time; time.sleep(60)", timeout=0.5)
        assert title == "torch imports"
        assert text.startswith("not known (TimeoutExpired")


PROGRAM = """
import dataclasses

@dataclasses.dataclass
class Size:
    number: int

def attend(q, scale=1.0):
    return q

def main():
    return attend, (Size(1).number,)

def other():
    return attend, [2], {"scale": 0.5}

def wrong():
    return attend, 3

three = 3
"""


class TestExplain:
    @pytest.fixture
    def program(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A file to explain; the explanation itself is replaced by one that tells what it was called with."""

        def told(call: object, *args: object, **kwargs: object) -> Report:
            name = getattr(call, "__name__", "")
            return Report((Remark.of("AF000", module=name, score=f"{args} {kwargs}"),))

        monkeypatch.setitem(vars(attnfuse), "explain", told)
        monkeypatch.setattr(sys, "path", sys.path.copy())
        path = tmp_path / "program.py"
        path.write_text(PROGRAM)
        return path

    def test_main_is_the_default(self, program: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert command_line.main(["explain", str(program)]) == 0
        assert capsys.readouterr().out == "1 attention: 1 fused\nfused     attend  (1,) {}\n"

    def test_a_named_function_with_keywords(self, program: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert command_line.main(["explain", f"{program}:other"]) == 0
        assert "(2,) {'scale': 0.5}" in capsys.readouterr().out

    def test_json(self, program: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert command_line.main(["explain", "--json", str(program)]) == 0
        report = Report.from_json(capsys.readouterr().out)
        assert [remark.module for remark in report.fused] == ["attend"]

    def test_a_file_named_like_a_module_replaces_none(self, program: Path) -> None:
        path = program.rename(program.with_name("json.py"))
        assert command_line.main(["explain", str(path)]) == 0
        assert sys.modules["json"] is json

    @pytest.mark.parametrize(
        ("suffix", "said"),
        [
            (":absent", "no function 'absent'"),
            (":three", "no function 'three'"),
            (":wrong", r"wrong\(\) of .* returned \(function, int\)"),
            ("x", r"no file '.*program.pyx'"),
            (":a b", r"no file"),
        ],
    )
    def test_what_cannot_be_explained(
        self, suffix: str, said: str, program: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert command_line.main(["explain", f"{program}{suffix}"]) == 2
        assert re.search(said, capsys.readouterr().err)

    def test_a_function_that_wants_arguments(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "wants.py"
        file.write_text("def main(size, depth=2, *rest): ...")
        assert command_line.main(["explain", str(file)]) == 2
        assert "needs size;" in capsys.readouterr().err

    def test_a_wrong_environment_variable(
        self, program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("ATTNFUSE", "explian")
        assert command_line.main(["explain", str(program)]) == 2
        assert "did you mean 'explain'" in capsys.readouterr().err

    def test_an_error_of_the_program_is_not_hidden(self, tmp_path: Path) -> None:
        path = tmp_path / "broken.py"
        path.write_text("def main():\n    raise KeyError('mine')\n")
        answer = python("-m", "attnfuse", "explain", str(path))
        assert answer.returncode == 1
        assert "broken.py" in answer.stderr
        assert "KeyError: 'mine'" in answer.stderr


def test_a_reader_may_stop_reading() -> None:
    command = f"{sys.executable} -m attnfuse codes | head -n 1"
    answer = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_codes_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["codes"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^## (AF\d{3}) ", text, re.MULTILINE) == sorted(CODES)
    assert all(code.cause in text and code.cure in text for code in CODES.values())


class TestProject:
    def test_constraints_pin_every_dependency_to_a_version_it_allows(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = [Requirement(text) for text in project["dependencies"]]
        wanted += [Requirement(text) for extra in project["optional-dependencies"].values() for text in extra]
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pins = {pin.name: pin for pin in (Requirement(line) for line in lines if line and not line.startswith("#"))}
        for requirement in wanted:
            if requirement.name == "attnfuse":
                continue
            pin = pins[requirement.name]
            (version,) = pin.specifier
            assert version.operator == "=="
            assert requirement.specifier.contains(version.version), requirement

    @pytest.mark.parametrize("target", ["demo", "test", "test-all", "check", "fix", "bench"])
    def test_each_target_makes_its_environment_first_and_once(self, target: str, tmp_path: Path) -> None:
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, tmp_path)

        def commands() -> list[str]:
            # These tests may themselves run under make, whose settings would show here.
            environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTHON"))}
            answer = subprocess.run(
                ["make", "--dry-run", target], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
            )
            return answer.stdout.splitlines()

        venv, install, stamp, *work = commands()
        assert venv == "python3 -m venv .venv"
        assert "--constraint constraints.txt --editable '.[demo,dev]'" in install
        assert work
        assert all(line.removeprefix("TRITON_INTERPRET=1 ").startswith(".venv/bin/") for line in work)
        (tmp_path / ".venv").mkdir()
        (tmp_path / stamp.removeprefix("touch ")).touch()
        assert commands() == work

    @pytest.mark.parametrize("failing", ["", "check", "test", "coverage"])
    def test_ci_runs_each_and_fails_if_any_does(self, failing: str, tmp_path: Path) -> None:
        make = tmp_path / "make"
        make.write_text(f'#!/bin/sh\necho "$1"\n[ "$1" != "{failing}" ]\n')
        make.chmod(0o755)
        answer = subprocess.run(
            [ROOT / ".ci" / "run"],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )
        assert answer.stdout.split() == ["check", "test", "coverage"]
        assert answer.returncode == int(bool(failing))
